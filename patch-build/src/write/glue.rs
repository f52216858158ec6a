//! What a livepatch module has beside its code: `struct module`, `struct klp_patch`, and the code that enables the patch. The
//! kernel's own headers say what they look like, so they are C, compiled as the kernel's modules are.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use object::elf;

use crate::elf::{At, Object, Place, Relocation, Symbol};

use super::output::{Kind, Output};

/// What stands for a new function in the C text.
const NEW: &str = "vmpatch_new_";

/// The functions to replace in an object.
pub(crate) struct ObjectOf<'a> {
    /// The module; none for the kernel image.
    pub module: Option<&'a str>,
    /// Old name and its position among the symbols of that name, and the new function's symbol.
    pub functions: Vec<(String, u64, usize)>,
}

/// The C text of a module that replaces those functions.
pub(crate) fn text(named: &Named<'_>, objects: &[ObjectOf<'_>]) -> String {
    let mut c = String::from(
        "#include <linux/module.h>\n#include <linux/livepatch.h>\n#include <linux/compiler.h>\n\
         #if __has_include(<asm/orc_header.h>)\n#include <asm/orc_header.h>\nORC_HEADER;\n#endif\n\n",
    );
    // Writing to a String cannot fail.
    for (_, _, symbol) in objects.iter().flat_map(|object| &object.functions) {
        let _ = writeln!(c, "extern char {NEW}{symbol}[];");
    }
    for (index, object) in objects.iter().enumerate() {
        let _ = writeln!(c, "\nstatic struct klp_func funcs_{index}[] = {{");
        for (name, sympos, symbol) in &object.functions {
            let _ = writeln!(
                c,
                "\t{{ .old_name = {}, .new_func = {NEW}{symbol}, .old_sympos = {sympos} }},",
                quoted(name)
            );
        }
        c.push_str("\t{ }\n};\n");
    }
    c.push_str("\nstatic struct klp_object objects[] = {\n");
    for (index, object) in objects.iter().enumerate() {
        let name = object
            .module
            .map_or(String::new(), |name| format!(".name = {}, ", quoted(name)));
        let _ = writeln!(c, "\t{{ {name}.funcs = funcs_{index} }},");
    }
    c.push_str(
        "\t{ }\n};\n\n\
         static struct klp_patch patch = { .mod = THIS_MODULE, .objs = objects };\n\n\
         int init_module(void);\n\
         int __init init_module(void)\n{\n\treturn klp_enable_patch(&patch);\n}\n\n\
         void cleanup_module(void);\n\
         void __exit cleanup_module(void)\n{\n}\n\n\
         __visible struct module __this_module __section(\".gnu.linkonce.this_module\") = {\n\
         \t.name = KBUILD_MODNAME,\n\t.init = init_module,\n\t.exit = cleanup_module,\n\t.arch = MODULE_ARCH_INIT,\n};\n\n",
    );
    let info = |c: &mut String, tag: &str, value: &str| {
        // The loader wants `depends` even where it is empty; what else is empty says nothing.
        if value.is_empty() && tag != "depends" {
            return;
        }
        let _ = writeln!(c, "MODULE_INFO({tag}, {});", quoted(value));
    };
    info(&mut c, "license", "GPL");
    info(&mut c, "livepatch", "Y");
    info(&mut c, "description", named.description);
    info(&mut c, "version", named.version);
    info(&mut c, "depends", "");
    info(&mut c, "name", named.name);
    info(&mut c, "vermagic", named.vermagic);
    for namespace in &named.namespaces {
        info(&mut c, "import_ns", namespace);
    }
    c.push_str("#if defined(CONFIG_RETPOLINE) || defined(CONFIG_MITIGATION_RETPOLINE)\nMODULE_INFO(retpoline, \"Y\");\n#endif\n");
    c
}

/// What a module says of itself.
pub(crate) struct Named<'a> {
    pub name: &'a str,
    pub description: &'a str,
    pub version: &'a str,
    pub vermagic: &'a str,
    /// Namespaces of the exported symbols that are used.
    pub namespaces: Vec<String>,
}

/// A C string.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for byte in text.bytes() {
        match byte {
            b'"' | b'\\' => {
                quoted.push('\\');
                quoted.push(char::from(byte));
            }
            0x20..=0x7e => quoted.push(char::from(byte)),
            // Three octal digits: a fourth character is never taken along.
            _ => {
                let _ = write!(quoted, "\\{byte:03o}");
            }
        }
    }
    quoted.push('"');
    quoted
}

/// Puts the compiled glue beside what was laid out. Its sections keep their names, or join those that are there.
pub(crate) fn add_glue(output: &mut Output, glue: &Object) {
    let mut places: BTreeMap<usize, At> = BTreeMap::new();
    for (index, section) in glue.sections.iter().enumerate() {
        let empty = section.size == 0 && section.name != "__versions";
        if index == 0 || !section.is_loaded() || empty || section.name.starts_with(".note") {
            continue;
        }
        let to = output.section(&Kind {
            name: section.name.clone(),
            kind: section.kind,
            flags: section.flags & !(elf::SHF_GROUP.0 | elf::SHF_MERGE.0 | elf::SHF_STRINGS.0),
            entry_size: 0,
        });
        let bytes = section.bytes(0, section.size).unwrap_or_default();
        // Unwinding data that ends where another function starts must not be that function's.
        let (align, gap) = if section.is_code() {
            (section.align.max(16), 1)
        } else {
            (section.align, 0)
        };
        places.insert(index, output.append(to, &bytes, align, gap));
    }
    let symbols: Vec<Option<usize>> = glue
        .symbols
        .iter()
        .enumerate()
        .map(|(index, symbol)| (index > 0).then(|| add_symbol(output, &places, symbol)).flatten())
        .collect();
    for (index, section) in glue.sections.iter().enumerate() {
        let Some(to) = places.get(&index) else { continue };
        for relocation in &section.relocations {
            let Some(symbol) = symbols.get(relocation.symbol).copied().flatten() else {
                continue;
            };
            // A section's own symbol stands for the joined section now.
            let moved = match glue
                .symbols
                .get(relocation.symbol)
                .map(|symbol| (symbol.is_section(), symbol.place))
            {
                Some((true, Place::In(at))) => places.get(&at.section).map_or(0, |place| place.offset),
                _ => 0,
            };
            output.relocate(
                to.section,
                Relocation {
                    offset: to.offset + relocation.offset,
                    kind: relocation.kind,
                    symbol,
                    addend: relocation.addend.saturating_add_unsigned(moved),
                },
            );
        }
    }
    for section in &mut output.object.sections {
        section.relocations.sort_by_key(|relocation| relocation.offset);
    }
}

/// A symbol of the glue, in the module.
fn add_symbol(output: &mut Output, places: &BTreeMap<usize, At>, symbol: &Symbol) -> Option<usize> {
    match symbol.place {
        Place::In(at) => {
            let place = places.get(&at.section)?;
            if symbol.is_section() {
                return Some(output.section_symbol(place.section));
            }
            let at = At {
                section: place.section,
                offset: place.offset + at.offset,
            };
            Some(output.add_symbol(Symbol {
                place: Place::In(at),
                ..symbol.clone()
            }))
        }
        Place::Undefined => match symbol.name.strip_prefix(NEW) {
            Some(index) => index.parse().ok(),
            None => Some(output.out_symbol(&crate::select::OutSymbol::Exported(symbol.name.clone()), None)),
        },
        Place::Absolute(_) if symbol.kind == elf::STT_FILE.0 => None,
        _ => Some(output.add_symbol(symbol.clone())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_for_the_compiler_is_quoted() {
        assert_eq!(quoted("a \"b\" \\ ü"), "\"a \\\"b\\\" \\\\ \\303\\274\"");
    }
}
