//! Object files for tests, made of literal C by the compiler that made the kernel.

use std::fs;
use std::path::Path;

use crate::compare::Comparison;
use crate::elf::Object;
use crate::facts::Exports;
use crate::running::{Places, Shipped};
use crate::select::{Finding, SelectError, Selection, Side, Why};
use crate::{assembler, command};

/// Flags that decide what the kernel's code looks like.
const FLAGS: [&str; 11] = [
    "-O2",
    "-g",
    "-c",
    "-mcmodel=kernel",
    "-fno-pic",
    "-fno-pie",
    "-fcf-protection=none",
    "-fno-asynchronous-unwind-tables",
    "-fno-jump-tables",
    "-fno-stack-protector",
    "-w",
];

/// What every text begins with: the kernel's words, and a table of bugs as its WARN() makes it.
pub(crate) const PROLOGUE: &str = r#"
#define noinline __attribute__((noinline))
#define WARN() asm volatile("1: ud2\n.pushsection __bug_table,\"aw\"\n2: .long 1b - .\n.long %c0 - .\n.word %c1\n.word 0\n.org 2b+12\n.popsection" \
	: : "i" (__FILE__), "i" (__LINE__))
extern int printk(const char *, ...);
extern void sleepy(const char *file, int line);
"#;

/// Compiles a text; with a section for each function and object, or plainly, as a kernel is.
pub(crate) fn compiled(test: &str, text: &str, sections: bool) -> Vec<u8> {
    let folder = std::env::temp_dir().join(format!("vmpatch-build-{}-{test}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("x.c"), format!("{PROLOGUE}{text}")).unwrap();
    let mut args = FLAGS.to_vec();
    if sections {
        args.extend(["-ffunction-sections", "-fdata-sections"]);
    }
    args.extend(["-o", "x.o", "x.c"]);
    let mut path = std::env::var("PATH").unwrap();
    if sections {
        let assembler = folder.join("assembler");
        assembler::write(&assembler).unwrap();
        path = format!("{}:{path}", assembler.display());
    }
    let path = format!("PATH={path}");
    let command = [&[path.as_str(), "gcc-12"], args.as_slice()].concat();
    command::output("env", &command, Path::new(&folder)).unwrap();
    let bytes = fs::read(folder.join("x.o")).unwrap();
    fs::remove_dir_all(&folder).unwrap();
    bytes
}

/// Compares two texts.
pub(crate) fn compared(test: &str, before: &str, after: &str) -> Comparison {
    Comparison::of(&compiled(test, before, true), &compiled(test, after, true)).unwrap()
}

/// What would be in a module for a change of files, each all of a module: the first is named `m`.
pub(crate) struct Chosen {
    pub side: Vec<Side<'static>>,
    pub selection: Result<Selection, SelectError>,
}

/// Selects for a change of one file.
pub(crate) fn selected(test: &str, before: &str, after: &str) -> Chosen {
    let object = Object::parse(&compiled(test, before, false)).unwrap();
    selected_of(compared(test, before, after), object)
}

/// Selects for a change of one file of a module that was shipped as that object.
pub(crate) fn selected_of(comparison: Comparison, object: Object) -> Chosen {
    chosen(vec![side("m", comparison, object)])
}

/// Selects for changes of several modules: of each its name, and its file before and after.
pub(crate) fn selected_of_modules(test: &str, modules: &[(&str, &str, &str)]) -> Chosen {
    let side = |(name, before, after): &(&str, &str, &str)| {
        let test = format!("{test}-{name}");
        let object = Object::parse(&compiled(&test, before, false)).unwrap();
        side(name, compared(&test, before, after), object)
    };
    chosen(modules.iter().map(side).collect())
}

fn side(name: &str, comparison: Comparison, object: Object) -> Side<'static> {
    let shipped = Shipped::Module {
        name: name.to_owned(),
        object,
    };
    Side {
        source: "x.c".to_owned(),
        has_ftrace: true,
        places: Places::find(&comparison.before, &shipped),
        comparison,
        shipped,
    }
}

fn chosen(side: Vec<Side<'static>>) -> Chosen {
    let selection = Selection::of(&side, &exports());
    Chosen { side, selection }
}

/// What the kernel exports.
pub(crate) fn exports() -> Exports {
    Exports::parse(
        "0x1\tprintk\tvmlinux\tEXPORT_SYMBOL\t\n0x3\tpanic\tvmlinux\tEXPORT_SYMBOL\t\n0x4\tof_third\tlib/third\tEXPORT_SYMBOL\t\n0x2\tsleepy\tvmlinux\tEXPORT_SYMBOL\t\n",
    )
}

impl Chosen {
    /// Names of what is replaced.
    pub fn replaced(&self) -> Vec<&str> {
        let selection = self.selection.as_ref().unwrap();
        let name = |replaced: &crate::select::Replaced| {
            let before = &self.side[0].comparison.before;
            before.item(replaced.old).name.as_str()
        };
        selection.replaced.iter().map(name).collect()
    }

    /// Names of what is carried and not replaced, with the reason.
    pub fn brought(&self) -> Vec<(&str, Why)> {
        let selection = self.selection.as_ref().unwrap();
        let carried = selection
            .carried
            .iter()
            .filter(|(_, why)| !matches!(why, Why::Changed(_)));
        carried
            .map(|(chosen, why)| (self.side[0].comparison.after.item(chosen.1).name.as_str(), why.clone()))
            .collect()
    }

    /// What speaks against it.
    pub fn findings(&self) -> &[Finding] {
        &self.selection.as_ref().unwrap().findings
    }
}

/// The object file that a selection is laid into.
pub(crate) fn laid(chosen: &Chosen) -> Object {
    let selection = chosen.selection.as_ref().unwrap();
    let (patched, exports) = (selection.patched(), exports());
    let mut layer = crate::write::Layer::new(crate::select::Resolver {
        sides: &chosen.side,
        exports: &exports,
        patched: &patched,
    });
    layer.lay(selection).unwrap();
    layer.output.object
}
