//! Guests whose RAM is held in ways other than one plain mapping (huge pages, several kinds in one guest, backends that no device
//! uses), or mapped by the guest's kernel without protection. Each is patched, asked, and reverted.

use std::sync::LazyLock;

use e2e::bed;
use e2e::boxed::assert_clean;
use e2e::huge_pages::HugePages;
use e2e::kit::{self, Modules};
use e2e::probe::{Seen, see};
use e2e::report::states;
use e2e::vmpatch::Vmpatch;
use images::build::Cve;
use images::guest::{Guest, GuestConfig, Ram};
use images::host_box::HostBox;
use images::kernel::Kernel;

static MODULES: LazyLock<Modules> = LazyLock::new(|| Modules::of(&Kernel::CLOUD_6_1));

/// Patched, at work, seen, and reverted.
#[track_caller]
fn is_patched_and_reverted(guest: &Guest) {
    is_fixed_and_flawed_again(guest);
    bed::assert_healthy(guest);
}

#[track_caller]
fn is_fixed_and_flawed_again(guest: &Guest) {
    let vmpatch = Vmpatch::on(guest);
    let applied = vmpatch.apply(&MODULES.cve(Cve::Y2026N52928));
    assert_eq!(see(guest, "siocatmark"), Seen::Fixed);
    assert_eq!(states(&vmpatch.status()), states(&applied));
    vmpatch.revert_all();
    assert_eq!(see(guest, "siocatmark"), Seen::Flawed);
}

fn args(config: GuestConfig, words: &str) -> GuestConfig {
    words.split(' ').fold(config, GuestConfig::qemu_arg)
}

#[test]
fn shared_huge_pages() {
    let config = kit::guest(Kernel::CLOUD_6_1).ram(Ram::SharedHuge);
    let _pages = HugePages::for_ram(config.memory_mib);
    let guest = Guest::boot(config).unwrap();
    is_patched_and_reverted(&guest);
}

/// This machine may have no memory left in pieces of that size, so the guests run in a box that has set one aside.
#[test]
fn a_huge_page_of_a_gigabyte_shared_and_private() {
    const PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-1048576kB";
    let host = HostBox::start_with_gigabyte_pages(1).unwrap_or_else(|error| panic!("{error}"));
    let free = || host.text(&["cat", &format!("{PAGES}/free_hugepages")]).unwrap();
    for share in ["on", "off"] {
        assert_eq!(free(), "1");
        let mut config = kit::guest(Kernel::CLOUD_6_1).ram(Ram::Private).memory_mib(1024);
        config.machine = format!("{},memory-backend=page0", config.machine);
        let backend = format!("memory-backend-memfd,id=page0,size=1G,share={share},hugetlb=on,hugetlbsize=1G");
        let guest = host.boot(args(config, &format!("-object {backend}"))).unwrap();
        assert_eq!(free(), "0", "the guest's RAM is that page");
        is_fixed_and_flawed_again(&guest);
        assert_clean(&guest);
    }
}

#[test]
fn two_nodes_of_shared_and_of_private_memory() {
    let guest = Guest::boot(kit::guest(Kernel::CLOUD_6_1).ram(Ram::TwoKinds)).unwrap();
    is_patched_and_reverted(&guest);
}

#[test]
fn a_microvm_whose_firmware_is_private_memory_beside_shared_ram() {
    let mut config = kit::guest(Kernel::CLOUD_6_1);
    config.machine = "microvm,pcie=on,rtc=on".to_owned();
    // It has no clock by which an emulated TSC is measured.
    let guest = Guest::boot(config.append("tsc_early_khz=2000000")).unwrap();
    is_patched_and_reverted(&guest);
}

#[test]
fn a_backend_that_no_device_uses_and_persistent_memory() {
    let config = args(
        kit::guest(Kernel::CLOUD_6_1),
        "-m slots=2,maxmem=2G -object memory-backend-ram,id=unused,size=32M \
         -object memory-backend-ram,id=pmem0,size=64M -device virtio-pmem-pci,memdev=pmem0",
    );
    let guest = Guest::boot(config).unwrap();
    is_patched_and_reverted(&guest);
}

#[test]
fn a_kernel_without_page_protection() {
    let guest = Guest::boot(kit::guest(Kernel::CLOUD_6_1).append("rodata=off")).unwrap();
    is_patched_and_reverted(&guest);
}
