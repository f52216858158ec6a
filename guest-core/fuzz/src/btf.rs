//! Type information.

use guest_core::btf::Btf;

/// What is asked for.
const PATHS: [(&str, &str); 8] = [
    ("task_struct", "thread.sp"),
    ("task_struct", "comm[3]"),
    ("module", "mem[2].base"),
    ("module", "arch.num_orcs"),
    ("klp_object", "node.next"),
    ("orc_entry", "type"),
    ("cpu_entry_area", "estacks.DF_stack"),
    ("list_head", "next"),
];

/// Parses, and asks.
pub fn run(data: &[u8]) {
    let Ok(btf) = Btf::parse(data.to_vec()) else { return };
    for (structure, path) in PATHS {
        let Ok(found) = btf.structure(structure) else { continue };
        let Ok(member) = found.member(path) else { continue };
        let _ = (member.offset(), member.end(), member.value_in(data));
        let _ = btf.structure_of(member.type_id).map(|inner| inner.size());
        let _ = btf.size_of(member.type_id);
    }
    let _ = btf.enumerator("FTRACE_FL_DISABLED");
}
