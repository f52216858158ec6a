//! Network cards other than virtio's: a guest is reached through its card before a move and afterwards, on the same connection; a kind of
//! card with which that was never seen is refused.

use e2e::bed::assert_healthy;
use e2e::kit;
use e2e::load::Outfit;
use e2e::moving::{INSTALLED, Keeper};
use e2e::vmpatch::Vmpatch;
use images::guest::{Guest, Ram};
use images::kernel::Kernel;

/// Models, each with its module.
const CARDS: [(&str, &str); 5] = [
    ("e1000", "e1000"),
    ("e1000e", "e1000e"),
    ("igb", "igb"),
    ("rtl8139", "8139cp"),
    ("vmxnet3", "vmxnet3"),
];

#[test]
fn guests_are_reached_through_their_cards_after_a_move() {
    for (model, module) in CARDS {
        let outfit = Outfit::new();
        let config = kit::guest(Kernel::GENERIC_6_1).ram(Ram::Private).vcpus(1);
        let mut guest = Guest::boot(outfit.fit_card(config, model, module)).unwrap_or_else(|error| panic!("{error}"));
        let _keeper = Keeper::of(&guest);
        outfit.start_echo(&guest);
        let talk = outfit.talk();
        let upgrade = ["upgrade", "--qemu", INSTALLED, "--json"];
        let report = Vmpatch::on(&guest).run(&upgrade).expect(0).json();
        guest
            .follow(u32::try_from(report["new"]["pid"].as_u64().unwrap()).unwrap())
            .unwrap();
        outfit.assert_reached(model);
        let silence = talk.end();
        println!(
            "{model}: an echo took {:?} at the most of {}",
            silence.longest, silence.echoes
        );
        assert_healthy(&guest);
    }
}

#[test]
fn a_card_of_a_kind_that_was_never_moved_is_refused() {
    let outfit = Outfit::new();
    let config = kit::guest(Kernel::CLOUD_6_1).ram(Ram::Private);
    let guest =
        Guest::boot(outfit.fit_card(config, "ne2k_pci", "virtio_net")).unwrap_or_else(|error| panic!("{error}"));
    for options in [&["--check"][..], &[]] {
        let line = [&["upgrade", "--qemu", INSTALLED], options].concat();
        let answer = Vmpatch::on(&guest).run(&line).expect(3);
        assert!(
            answer
                .complaint()
                .starts_with("a network card of the kind `ne2k_pci`: it was never tried"),
            "{answer}"
        );
    }
}
