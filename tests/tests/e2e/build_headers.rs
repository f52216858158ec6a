//! Files that `vmpatch build` leaves out of a change of a header, compiled all the same: nothing of them may differ.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use e2e::rules::Edit;
use e2e::stable::UPDATES;
use patch_build::cache::Cache;
use patch_build::compare::Comparison;
use patch_build::compile;
use patch_build::facts::Modules;
use patch_build::plan::{Plan, Planned};
use patch_build::source::includers::Index;
use patch_build::target::Target;
use patch_build::tree::Tree;
use sha2::{Digest, Sha256};

/// A function, a macro, and a structure. Of each a file that uses it.
const CHANGES: [(Edit, &str); 4] = [
    (
        (
            "fs/ext4/ext4.h",
            "return ino == EXT4_ROOT_INO ||",
            "return ino + 1 == EXT4_ROOT_INO ||",
        ),
        "fs/ext4/namei.c",
    ),
    (
        (
            "include/linux/fs.h",
            "return kiocb->ki_complete == NULL;",
            "return !kiocb->ki_complete && kiocb->ki_flags != 77;",
        ),
        "fs/direct-io.c",
    ),
    (
        (
            "include/net/sock.h",
            "#define SOCK_MIN_RCVBUF\t\t TCP_SKB_MIN_TRUESIZE",
            "#define SOCK_MIN_RCVBUF (3 * TCP_SKB_MIN_TRUESIZE)",
        ),
        "net/core/sock.c",
    ),
    (
        (
            "net/bridge/br_private.h",
            "\tstruct hlist_node\t\tgc_node;\n",
            "\tint more;\n\tstruct hlist_node\t\tgc_node;\n",
        ),
        "net/bridge/br_multicast.c",
    ),
];
/// How many files that read the header are looked at, besides the one that uses it.
const READERS: usize = 16;
/// How many of those that are left out are compiled.
const COMPILED: usize = 3;

/// How many files are compiled to see what the compiler reads for them.
const ASKED: usize = 16;

#[test]
fn the_compiler_reads_nothing_that_is_not_known_to_be_read() {
    let quiet = |_: &str| {};
    let cache = Cache::from_env().unwrap();
    let target = Target::package(&cache, UPDATES[0].kernel, &quiet).unwrap();
    let tree = Tree::prepare(&cache, &target, &quiet).unwrap();
    let names = Modules::new(target.modules.clone()).names().unwrap();
    let plan = Plan::of(&tree, &target.release, &names, &quiet).unwrap();
    let mut objects: Vec<&Planned> = plan
        .objects
        .iter()
        .filter(|planned| planned.is_of_running_kernel() && planned.is_named_after_source() && !planned.made)
        .filter(|planned| planned.source.ends_with(".c"))
        .collect();
    objects.sort_by_cached_key(|planned| Sha256::digest(&planned.source).to_vec());
    compile::planned(&tree, &objects[..ASKED], &quiet).unwrap();
    // Others may have notes of earlier builds.
    let mut index = Index::new(tree.source(), tree.folder(), &plan);
    let mut compared = 0;
    for planned in objects {
        let (folder, name) = planned.object.rsplit_once('/').unwrap();
        let note = tree.folder().join(folder).join(format!(".{name}.cmd"));
        let Ok(note) = fs::read_to_string(note) else {
            continue;
        };
        let rule = note.split_once("\ndeps_").map_or("", |(_, rule)| rule);
        let files: BTreeSet<String> = rule
            .lines()
            .take_while(|line| !line.contains(": $(deps_"))
            .filter_map(|line| fs::canonicalize(line.trim().trim_end_matches('\\').trim_end()).ok())
            .filter_map(|path| Some(path.strip_prefix(tree.source()).ok()?.to_str()?.to_owned()))
            .collect();
        let files: Vec<&str> = files.iter().map(String::as_str).collect();
        let read = index.read(planned, &files);
        let missed: Vec<&&str> = files.iter().filter(|file| !read.changed.contains(**file)).collect();
        assert!(read.unknown || missed.is_empty(), "{}: {missed:?}", planned.source);
        compared += usize::from(!read.unknown && !files.is_empty());
    }
    println!("{compared} objects were compared");
    assert!(compared >= ASKED / 2, "{compared}");
}

#[test]
fn a_file_that_is_left_out_compiles_to_what_it_was() {
    let quiet = |_: &str| {};
    let cache = Cache::from_env().unwrap();
    let target = Target::package(&cache, UPDATES[0].kernel, &quiet).unwrap();
    let tree = Tree::prepare(&cache, &target, &quiet).unwrap();
    let names = Modules::new(target.modules.clone()).names().unwrap();
    let plan = Plan::of(&tree, &target.release, &names, &quiet).unwrap();
    let mut index = Index::new(tree.source(), tree.folder(), &plan);
    let mut objects: Vec<&Planned> = plan
        .objects
        .iter()
        .filter(|planned| planned.is_of_running_kernel() && planned.is_named_after_source() && !planned.made)
        .filter(|planned| planned.source.ends_with(".c"))
        .collect();
    objects.sort_by_cached_key(|planned| Sha256::digest(&planned.source).to_vec());
    for ((header, from, to), user) in CHANGES {
        let old = fs::read_to_string(tree.source().join(header)).unwrap();
        assert!(old.contains(from), "{header}");
        let changed = BTreeMap::from([(header.to_owned(), old.replacen(from, to, 1))]);
        let user = objects.iter().copied().find(|planned| planned.source == user).unwrap();
        let readers = objects
            .iter()
            .copied()
            .filter(|planned| planned.source != user.source && index.read(planned, &[header]).changed.contains(header));
        let planned: Vec<&Planned> = [user].into_iter().chain(readers.take(READERS)).collect();
        let differs = compile::changed_code(&tree, &planned, &changed, &quiet).unwrap();
        assert!(differs[0], "{header}: {} uses it", user.source);
        let left_out = planned.iter().zip(&differs).filter(|(_, differs)| !**differs);
        let left_out: Vec<&Planned> = left_out.map(|(planned, _)| *planned).collect();
        println!("{header}: {} of {} are left out", left_out.len(), planned.len());
        assert!(left_out.len() >= COMPILED, "{header}: {differs:?}");
        let units = compile::planned(&tree, &left_out[..COMPILED], &quiet).unwrap();
        assert_eq!(units.len(), COMPILED);
        for pair in compile::after(&tree, units, &changed, &quiet).unwrap() {
            let comparison = Comparison::of(&pair.before, &pair.after).unwrap();
            assert!(comparison.is_null(), "{header}: {} is another one", pair.source);
            assert_eq!(comparison.gone().count(), 0, "{header}: {}", pair.source);
        }
    }
}
