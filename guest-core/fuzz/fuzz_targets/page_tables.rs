#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::page_tables::run(data));
