//! Modules in every format and packing that livepatch modules come in, and what `check` says of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use e2e::bed::{self, Lent};
use e2e::kit::{self, Modules};
use e2e::probe::{Seen, see};
use e2e::vmpatch::Vmpatch;
use images::build::hand_written::Applied;
use images::kernel::Kernel;

static MODULES: LazyLock<Modules> = LazyLock::new(|| Modules::of(&Kernel::CLOUD_6_1));

fn guest() -> Lent {
    bed::lend(kit::guest(Kernel::CLOUD_6_1))
}

/// The file as the kernel's own build packs it, in `folder`.
fn packed(folder: &Path, file: &str, program: &str, args: &[&str], suffix: &str) -> PathBuf {
    let output = Command::new(program).args(args).arg("-c").arg(file).output().unwrap();
    assert!(output.status.success(), "{program}");
    let name = Path::new(file).file_name().unwrap().to_string_lossy();
    let path = folder.join(format!("{name}{suffix}"));
    fs::write(&path, output.stdout).unwrap();
    path
}

#[test]
fn a_module_of_every_tool_is_applied_from_every_kind_of_file() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let folder = std::env::temp_dir().join(format!("vmpatch-formats-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let packings: [(&str, &[&str], &str); 3] = [
        ("gzip", &["-n"], ".gz"),
        ("xz", &["--check=crc32", "--lzma2=dict=1MiB"], ".xz"),
        ("zstd", &["-q"], ".zst"),
    ];
    let formats = [
        (Applied::Pause, "klp_patch"),
        (Applied::Kpatch, "kpatch-build"),
        (Applied::KlpBuild, "klp-build"),
    ];
    for ((module, format), (program, args, suffix)) in formats.into_iter().zip(packings) {
        let plain = MODULES.applied(module);
        let path = packed(&folder, &plain, program, args, suffix);
        let path = path.to_str().unwrap();

        let [packed, unpacked] =
            [path, plain.as_str()].map(|file| vmpatch.run(&["check", "--json", file]).expect(0).json());
        let said = &packed["patches"][0];
        assert_eq!(said["digest"], unpacked["patches"][0]["digest"], "of the module itself");
        assert_eq!(said["module"]["format"], format);
        let build_id = said["module"]["build_id"].as_str().unwrap();
        assert_eq!(build_id.len(), 40, "{said}");
        assert!(
            said["module"]["vermagic"]
                .as_str()
                .unwrap()
                .starts_with(guest.kernel_release())
        );
        let text = vmpatch.run(&["check", path]).expect(0).stdout;
        for line in [
            format!("  format      {format}\n"),
            format!("  build ID    {build_id}\n"),
        ] {
            assert!(text.contains(&line), "{line:?} is not in {text}");
        }

        assert_eq!(see(&guest, "pause"), Seen::Flawed);
        vmpatch.run(&["apply", path]).expect(0);
        assert_eq!(see(&guest, "pause"), Seen::Fixed, "{path}");
        vmpatch.revert_all();
        assert_eq!(see(&guest, "pause"), Seen::Flawed);
    }

    // What kpatch-build itself links with a patch: its init allocates and fills a klp_patch, its exit frees it.
    let hooked = MODULES.kpatch_hook();
    let said = vmpatch.run(&["check", "--json", &hooked]).expect(0).json();
    assert_eq!(said["patches"][0]["module"]["format"], "kpatch-build");
    vmpatch.run(&["apply", &hooked]).expect(0);
    assert_eq!(see(&guest, "pause"), Seen::Fixed);
    vmpatch.revert_all();
    assert_eq!(see(&guest, "pause"), Seen::Flawed);

    // The bare command takes packed modules, too: three patches of one function, each on top of those before it.
    vmpatch.run(&["--patches", folder.to_str().unwrap()]).expect(0);
    assert_eq!(see(&guest, "pause"), Seen::Fixed);
    assert_eq!(vmpatch.revert_all()["patches"].as_array().unwrap().len(), 3);
    assert_eq!(see(&guest, "pause"), Seen::Flawed);

    let broken = folder.join("broken.ko.xz");
    fs::write(&broken, &fs::read(folder.join("test-kpatch.ko.xz")).unwrap()[..500]).unwrap();
    let answer = vmpatch.run(&["apply", broken.to_str().unwrap()]).expect(3);
    assert!(answer.complaint().starts_with("decompressing "), "{answer}");
    fs::remove_dir_all(folder).unwrap();
}
