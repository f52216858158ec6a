//! Whether what patches are built from is what guests run: source files of the kernel are compiled, with and without lines in
//! front, and each function is compared with the code of a running guest.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;

use guest_core::addr::Gva;
use guest_core::kernel::Live;
use guest_core::memory::VirtMemory;
use images::kernel::Kernel;
use patch_build::cache::Cache;
use patch_build::compare::{Comparison, Unit, Verdict, is_of_boot};
use patch_build::compile;
use patch_build::facts::{KernelFacts, Sources};
use patch_build::pair::ObjectPair;
use patch_build::plan::{Plan, Planned};
use patch_build::running::{Places, Shipped};
use patch_build::target::Target;
use patch_build::tree::Tree;

/// Folders whose files are built into a kernel for virtual machines, most of them.
const FOLDERS: [&str; 16] = [
    "kernel",
    "kernel/sched",
    "kernel/time",
    "kernel/locking",
    "kernel/trace",
    "mm",
    "fs",
    "fs/proc",
    "block",
    "ipc",
    "lib",
    "net/core",
    "net/ipv4",
    "net/unix",
    "security",
    "drivers/base",
];
/// Where the trampolines of static calls are, which the kernel rewrites as a whole; no patch replaces one.
const TRAMPOLINES: &str = ".static_call.text";
/// Lines put in front of a file: line numbers change, nothing else.
const LINES: &str = "\n\n\n";
/// Files compiled at a time, so that something is said in between.
const FILES_AT_ONCE: usize = 16;

/// What went wrong, in words.
pub type Error = Box<dyn std::error::Error>;

/// A kernel whose source can be compiled.
pub struct Source {
    tree: Tree,
    facts: KernelFacts,
    plan: Plan,
}

impl Source {
    /// Of that kernel, fetched and made ready where the cache has it not.
    pub fn of(kernel: &Kernel) -> Result<Self, Error> {
        let package = match kernel.version() {
            Some(version) => format!("{}={version}", kernel.package()),
            None => kernel.package().to_owned(),
        };
        let cache = Cache::from_env()?;
        let silent = |_: &str| {};
        let target = Target::package(&cache, &package, &silent)?;
        let tree = Tree::prepare(&cache, &target, &silent)?;
        let facts = KernelFacts::read(&Sources {
            release: &target.release,
            vermagic: tree.vermagic(),
            config: &target.config,
            image: &target.image,
            symvers: &target.symvers,
            modules: target.modules.clone(),
        })?;
        let plan = Plan::of(&tree, &target.release, &facts.modules.names()?, &silent)?;
        Ok(Self { tree, facts, plan })
    }

    /// About `count` C files, the same ones each time, spread evenly over the folders.
    pub fn files(&self, count: usize) -> Vec<String> {
        let is_wanted = |planned: &&Planned| {
            let folder = planned.source.rsplit_once('/').map(|(folder, _)| folder);
            let is_c = planned.source.ends_with(".c") && !planned.made && planned.is_of_running_kernel();
            is_c && planned.is_named_after_source() && folder.is_some_and(|folder| FOLDERS.contains(&folder))
        };
        let planned = self.plan.objects.iter().filter(is_wanted);
        let mut files: Vec<String> = planned.map(|planned| planned.source.clone()).collect();
        files.sort();
        let step = files.len().div_ceil(count.max(1)).max(1);
        files.into_iter().step_by(step).collect()
    }

    /// Compiles and compares files with the guest. `said` is told of each file.
    pub fn check(&self, live: &Live<'_>, files: &[String], said: &dyn Fn(&str)) -> Result<Tally, Error> {
        let slide = self.slide(live)?;
        let mut tally = Tally::default();
        for files in files.chunks(FILES_AT_ONCE) {
            let is_of = |planned: &&Planned| planned.is_named_after_source() && files.contains(&planned.source);
            let planned: Vec<&Planned> = self.plan.objects.iter().filter(is_of).collect();
            let units = compile::planned(&self.tree, &planned, &|_| {})?;
            // Modules are not in the image; what is in neither has no code in the guest.
            let units: Vec<compile::Unit> = units.into_iter().filter(|unit| unit.module.is_none()).collect();
            let mut changed = BTreeMap::new();
            for unit in &units {
                let text = fs::read_to_string(self.tree.source().join(&unit.source))?;
                changed.insert(unit.source.clone(), format!("{LINES}{text}"));
            }
            for pair in compile::after(&self.tree, units, &changed, &|_| {})? {
                said(&tally.file(&pair, self, live, slide)?);
            }
        }
        Ok(tally)
    }

    /// How far the guest's kernel lies from where it was linked.
    fn slide(&self, live: &Live<'_>) -> Result<u64, Error> {
        let here = live.kernel.symbol("_text")?;
        let linked = self
            .facts
            .symbols
            .unique("_text")
            .ok_or("the kernel image has no _text")?;
        Ok(here.0.wrapping_sub(linked.0))
    }
}

/// What was found.
#[derive(Debug, Default)]
pub struct Tally {
    /// Files of the kernel that were compiled.
    pub files: usize,
    /// Functions whose code in the guest is the compiled one.
    pub same: usize,
    /// Files in which lines in front changed something: file, and what.
    pub not_null: Vec<String>,
    /// Functions in whose place the kernel has those of another file, for they are weak.
    pub weak: Vec<String>,
    /// Functions whose shipped code is not the compiled one.
    pub other: Vec<String>,
    /// Functions whose code in the guest is neither.
    pub differ: Vec<String>,
}

impl Tally {
    /// True where every function that the kernel took from these files is what the guest runs, and lines in front changed nothing.
    pub fn is_clean(&self) -> bool {
        self.not_null.is_empty() && self.other.is_empty() && self.differ.is_empty()
    }

    /// Adds a file; returns a line about it. A file without a function in the kernel does not count.
    fn file(&mut self, pair: &ObjectPair, source: &Source, live: &Live<'_>, slide: u64) -> Result<String, Error> {
        let comparison = Comparison::of(&pair.before, &pair.after)?;
        let unit = &comparison.before;
        let shipped = Shipped::kernel(&source.facts)?;
        let mut places = Places::find(unit, &shipped);
        if !places.are_complete(unit) {
            let as_shipped = Unit::plain(&compile::as_shipped(&source.tree, &pair.source)?)?;
            places.complete(unit, &as_shipped, &shipped);
        }
        let (mut same, mut weak, mut other) = (0, Vec::new(), Vec::new());
        for (id, item) in unit.items.iter().enumerate() {
            let section = &unit.section_of(item).name;
            let is_code = item.is_function && item.size > 0 && !item.is_padding();
            if !is_code || is_of_boot(section) || section == TRAMPOLINES {
                continue;
            }
            let name = format!("{}: {}", pair.source, item.name);
            let (Some(found), Some(code)) = (places.get(id), places.code(id)) else {
                match places.count(id) {
                    1 if unit.is_weak(item) => weak.push(name),
                    1 => other.push(format!("{name}: other code")),
                    count => other.push(format!("{name}: {count} symbols of that name")),
                }
                continue;
            };
            let mut running = vec![0; code.len()];
            live.read(Gva(found.address.wrapping_add(slide)), &mut running)?;
            match code.mismatch(&running) {
                None => same += 1,
                Some(mismatch) => self.differ.push(format!("{name}: {mismatch:x?}")),
            }
        }
        // Some names of functions are in every file.
        if same <= other.len() {
            return Ok(format!("{}: not in this kernel", pair.source));
        }
        self.files += 1;
        self.same += same;
        let line = format!("{}: {same} functions, {} others", pair.source, weak.len() + other.len());
        self.weak.append(&mut weak);
        self.other.append(&mut other);
        if !comparison.is_null() {
            let changed = comparison.after.items.iter().zip(&comparison.verdicts);
            let changed: Vec<String> = changed
                .filter(|(_, verdict)| **verdict != Verdict::Equal)
                .map(|(item, verdict)| format!("{} {verdict:?}", item.name))
                .collect();
            self.not_null.push(format!("{}: {}", pair.source, changed.join(", ")));
        }
        Ok(line)
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} files, {} functions as in the guest; {} files where lines in front changed something, {} weak functions that others \
             took the place of, {} functions shipped otherwise, {} that differ in the guest",
            self.files,
            self.same,
            self.not_null.len(),
            self.weak.len(),
            self.other.len(),
            self.differ.len()
        )?;
        let lists = [
            ("lines in front changed", &self.not_null),
            ("weak", &self.weak),
            ("shipped otherwise", &self.other),
            ("differs in the guest", &self.differ),
        ];
        for (what, list) in lists {
            for line in list {
                writeln!(f, "  {what}: {line}")?;
            }
        }
        Ok(())
    }
}
