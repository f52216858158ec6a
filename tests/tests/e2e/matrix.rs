//! The same patch on every kind of guest: several kernels, one to four vCPUs, with and without page-table isolation, with four and five
//! levels of page tables, in private and shared RAM; each idle, busy in user mode, busy in the kernel, and paused by its operator.
//! Every value of each choice meets the kernels of the first three kinds; the others are there once.

use e2e::matrix::{Levels, Pti, Setting, demand};
use images::guest::Ram;
use images::kernel::Kernel;

/// Patches such a guest, whatever it does, and takes the patches back.
fn is_patched(kernel: Kernel, vcpus: u32, pti: Pti, levels: Levels, ram: Ram) {
    demand(&Setting {
        kernel,
        vcpus,
        pti,
        levels,
        ram,
    });
}

use Kernel as K;
use Levels::{Five, Four};
use Pti::{Off, On};
use Ram::{Private, SharedMemfd as Shared};

#[test]
fn a_6_1_cloud_guest_with_1_vcpu_pti_and_5_levels_in_shared_ram_is_patched() {
    is_patched(K::CLOUD_6_1, 1, On, Five, Shared);
}

#[test]
fn a_6_1_cloud_guest_with_2_vcpus_no_pti_and_4_levels_in_private_ram_is_patched() {
    is_patched(K::CLOUD_6_1, 2, Off, Four, Private);
}

#[test]
fn a_6_1_cloud_guest_with_4_vcpus_pti_and_4_levels_in_private_ram_is_patched() {
    is_patched(K::CLOUD_6_1, 4, On, Four, Private);
}

#[test]
fn a_6_1_guest_with_1_vcpu_no_pti_and_4_levels_in_shared_ram_is_patched() {
    is_patched(K::GENERIC_6_1, 1, Off, Four, Shared);
}

#[test]
fn a_6_1_guest_with_2_vcpus_pti_and_5_levels_in_private_ram_is_patched() {
    is_patched(K::GENERIC_6_1, 2, On, Five, Private);
}

#[test]
fn a_6_1_guest_with_4_vcpus_no_pti_and_5_levels_in_shared_ram_is_patched() {
    is_patched(K::GENERIC_6_1, 4, Off, Five, Shared);
}

#[test]
fn a_6_12_cloud_guest_with_1_vcpu_pti_and_4_levels_in_private_ram_is_patched() {
    is_patched(K::CLOUD_6_12, 1, On, Four, Private);
}

#[test]
fn a_6_12_cloud_guest_with_2_vcpus_no_pti_and_5_levels_in_shared_ram_is_patched() {
    is_patched(K::CLOUD_6_12, 2, Off, Five, Shared);
}

#[test]
fn a_6_12_cloud_guest_with_4_vcpus_pti_and_5_levels_in_shared_ram_is_patched() {
    is_patched(K::CLOUD_6_12, 4, On, Five, Shared);
}

#[test]
fn a_6_1_rt_guest_with_2_vcpus_no_pti_and_5_levels_in_shared_ram_is_patched() {
    is_patched(K::RT_6_1, 2, Off, Five, Shared);
}

#[test]
fn a_6_12_rt_guest_with_2_vcpus_pti_and_4_levels_in_private_ram_is_patched() {
    is_patched(K::RT_6_12, 2, On, Four, Private);
}

#[test]
fn a_5_10_cloud_guest_with_2_vcpus_pti_and_4_levels_in_shared_ram_is_patched() {
    is_patched(K::CLOUD_5_10, 2, On, Four, Shared);
}

#[test]
fn a_7_2_cloud_guest_with_2_vcpus_no_pti_and_5_levels_in_private_ram_is_patched() {
    is_patched(K::CLOUD_7_2, 2, Off, Five, Private);
}

#[test]
fn a_7_3_cloud_guest_with_1_vcpu_pti_and_5_levels_in_shared_ram_is_patched() {
    is_patched(K::CLOUD_7_3, 1, On, Five, Shared);
}
