//! scratch
#![allow(warnings)]
use patch_build::facts::*;
use std::path::*;
fn main() {
    let t = std::time::Instant::now();
    let a: Vec<String> = std::env::args().collect();
    let pkg = PathBuf::from(&a[1]);
    let rel = &a[2];
    let image = pkg.join(format!("boot/vmlinuz-{rel}"));
    let config = pkg.join(format!("boot/config-{rel}"));
    let sym = PathBuf::from(&a[3]);
    let f = KernelFacts::read(&Sources {
        release: rel,
        vermagic: "",
        config: &config,
        image: &image,
        symvers: &sym,
        modules: Some(pkg.join("lib/modules").join(rel)),
    })
    .unwrap();
    println!(
        "{} symbols {} exports {:?} {:?} in {:?}",
        f.symbols.len(),
        f.exports.len(),
        f.symbols.unique("unix_ioctl"),
        f.modules.read("af_alg").map(|m| m.len()),
        t.elapsed()
    );
}
