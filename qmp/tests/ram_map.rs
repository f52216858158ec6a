//! The RAM map against real QEMUs.

mod common;

use common::{PATIENCE, Qemu};
use guest_core::Gpa;
use qmp::{Backing, Client, RamMap, RamRegion};
use std::os::unix::fs::FileExt;

async fn map_of(qemu: &Qemu) -> (Client, RamMap) {
    let client = Client::connect(&qemu.qmp(), PATIENCE).await.unwrap();
    let map = RamMap::read(&client, client.peer_pid().unwrap()).await.unwrap();
    (client, map)
}

fn region_at_1_mib(map: &RamMap) -> &RamRegion {
    const MIB: u64 = 1 << 20;
    let holds = |region: &&RamRegion| region.gpa.0 <= MIB && MIB < region.gpa.0 + region.len;
    map.regions.iter().find(holds).unwrap()
}

/// What QEMU itself reads at `gpa`, by HMP `xp`.
async fn four_bytes(client: &Client, gpa: Gpa) -> u32 {
    let text = client.hmp(&format!("xp /1wx {:#x}", gpa.0)).await.unwrap();
    let word = text.trim().rsplit_once("0x").unwrap().1.to_owned();
    u32::from_str_radix(&word, 16).unwrap()
}

#[tokio::test]
async fn shared_ram_opened_through_the_map_is_the_guests() {
    let qemu = Qemu::start(&[
        "-S",
        "-M",
        "q35,memory-backend=m0",
        "-object",
        "memory-backend-memfd,id=m0,size=64M",
    ]);
    let (client, map) = map_of(&qemu).await;
    let region = region_at_1_mib(&map);
    let Backing::Shared(file) = &region.backing else {
        panic!("{region:?}")
    };
    let within = 0x20_0000;
    let gpa = region.gpa.checked_add(within).unwrap();
    file.open(map.pid)
        .unwrap()
        .write_all_at(&0x1234_5678_u32.to_le_bytes(), file.offset + within)
        .unwrap();
    assert_eq!(four_bytes(&client, gpa).await, 0x1234_5678);
}

#[tokio::test]
async fn private_ram_lies_where_the_map_says() {
    let qemu = Qemu::start(&["-S", "-M", "q35"]);
    let (client, map) = map_of(&qemu).await;
    let region = region_at_1_mib(&map);
    assert_eq!((region.block.as_str(), &region.backing), ("pc.ram", &Backing::Private));
    let within = 0x20_0000;
    let memory = std::fs::File::options()
        .write(true)
        .open(format!("/proc/{}/mem", map.pid))
        .unwrap();
    memory
        .write_all_at(&0x9abc_def0_u32.to_le_bytes(), region.hva.0 + within)
        .unwrap();
    assert_eq!(
        four_bytes(&client, region.gpa.checked_add(within).unwrap()).await,
        0x9abc_def0
    );
}

#[tokio::test]
async fn a_private_file_mapping_is_not_taken_for_shared() {
    let object = "memory-backend-memfd,id=m0,size=64M,share=off";
    let qemu = Qemu::start(&["-S", "-M", "q35,memory-backend=m0", "-object", object]);
    let (_client, map) = map_of(&qemu).await;
    assert!(
        map.regions.iter().all(|region| region.backing == Backing::Private),
        "{map:?}"
    );
}

#[tokio::test]
async fn ram_above_the_pci_hole_is_found_and_roms_and_video_memory_are_not() {
    let qemu = Qemu::start(&["-S", "-M", "q35", "-m", "5G", "-device", "VGA"]);
    let (_client, map) = map_of(&qemu).await;
    let last = map.regions.last().unwrap();
    assert_eq!((last.gpa, last.len), (Gpa(4 << 30), 3 << 30));
    assert_eq!(last.block_offset, 2 << 30);
    let below: u64 = map
        .regions
        .iter()
        .filter(|region| region.gpa < last.gpa)
        .map(|region| region.len)
        .sum();
    assert!(below <= 2 << 30 && below > (2 << 30) - (1 << 20), "{below:#x}");
    assert!(map.regions.iter().all(|region| region.block == "pc.ram"), "{map:?}");
}

#[tokio::test]
async fn a_backend_that_no_device_uses_is_not_ram_and_memory_devices_are() {
    let qemu = Qemu::start(&[
        "-S",
        "-M",
        "q35,nvdimm=on",
        "-m",
        "64M,slots=2,maxmem=2G",
        "-object",
        "memory-backend-ram,id=unused,size=32M",
        "-object",
        "memory-backend-ram,id=n0,size=64M",
        "-device",
        "nvdimm,memdev=n0",
        "-object",
        "memory-backend-memfd,id=v0,size=64M",
        "-device",
        "virtio-mem-pci,memdev=v0,requested-size=2M",
        "-object",
        "memory-backend-memfd,id=p0,size=64M",
        "-device",
        "virtio-pmem-pci,memdev=p0",
        "-device",
        "VGA",
    ]);
    let (client, map) = map_of(&qemu).await;
    let names: Vec<&str> = map.regions.iter().map(|region| region.block.as_str()).collect();
    assert_eq!(names, ["pc.ram", "pc.ram", "n0", "v0", "p0"], "{map:?}");
    for region in map.regions.iter().filter(|region| region.block != "pc.ram") {
        let memory = std::fs::File::options()
            .write(true)
            .open(format!("/proc/{}/mem", map.pid))
            .unwrap();
        let within = 0x10_0000;
        memory
            .write_all_at(&0x0bad_cafe_u32.to_le_bytes(), region.hva.0 + within)
            .unwrap();
        let gpa = region.gpa.checked_add(within).unwrap();
        assert_eq!(four_bytes(&client, gpa).await, 0x0bad_cafe, "{region:?}");
    }
}
