//! What vmpatch says when it is done: one document, as JSON or as text. `docs/json.md` describes the members; they are only
//! ever added to.

use guest_core::commit::Committed;
use guest_core::kernel::guard::Guard;
use guest_core::machine::PauseTimes;
use guest_core::module::{Note, PatchModule};
use guest_core::registry::{PatchedFunction, Record, Redirect};
use host_agent::session::Session;
use serde::{Deserialize, Serialize};

/// A guest-virtual address, as hex text: JSON numbers end at 2^53.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address(pub u64);

impl Serialize for Address {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:#x}", self.0))
    }
}

/// The guest that it is about.
#[derive(Debug, Clone, Serialize)]
pub struct Guest {
    /// Its name, where QEMU was given one.
    pub domain: Option<String>,
    /// The QEMU process.
    pub pid: i32,
    /// `uname -r` of its kernel.
    pub release: String,
    /// The integrity guard that it runs, if any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub integrity_guard: Option<IntegrityGuard>,
}

impl Guest {
    /// The guest of a session.
    pub fn of(session: &Session) -> Self {
        Self {
            domain: session.name().map(str::to_owned),
            pid: session.identity().pid,
            release: session.kernel().release.clone(),
            integrity_guard: session.guard().map(IntegrityGuard::from),
        }
    }
}

/// Software in the guest that checks whether its kernel was changed.
#[derive(Debug, Clone, Serialize)]
pub struct IntegrityGuard {
    /// `LKRG`.
    pub name: &'static str,
    /// `off`, `logs`, `panics` or `unknown`: what it does when it finds a change.
    pub reaction: &'static str,
    /// The same as a sentence, for the text.
    #[serde(skip)]
    pub warning: Option<String>,
}

impl From<&Guard> for IntegrityGuard {
    fn from(guard: &Guard) -> Self {
        Self {
            name: guard.name,
            reaction: guard.reaction.name(),
            warning: guard.warning(),
        }
    }
}

/// Times of one pause, in microseconds, as the host saw them.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Pause {
    /// From asking to stop to hearing that the guest runs.
    pub total_us: u64,
    /// Stopping the vCPUs.
    pub stop_us: u64,
    /// Reading their registers.
    pub registers_us: u64,
    /// Checking locks and stacks.
    pub check_us: u64,
    /// Writing and reading back.
    pub write_us: u64,
    /// Letting the vCPUs run.
    pub resume_us: u64,
    /// Pauses that it took.
    pub tries: u32,
    /// The longest of them.
    pub pause_us_max: u64,
}

impl From<&Committed> for Pause {
    fn from(committed: &Committed) -> Self {
        let PauseTimes {
            stop_us,
            registers_us,
            check_us,
            write_us,
            resume_us,
            total_us,
        } = committed.pause;
        let (tries, pause_us_max) = (committed.tries, committed.pause_us_max);
        Self {
            total_us,
            stop_us,
            registers_us,
            check_us,
            write_us,
            resume_us,
            tries,
            pause_us_max,
        }
    }
}

/// One redirected function.
#[derive(Debug, Clone, Serialize)]
pub struct Function {
    /// The guest's module that it is in; none for the kernel image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// Its name in the kernel.
    pub name: String,
    /// Which of several of that name, from 1; 0 where it is the only one.
    pub sympos: u64,
    /// Address of the old function.
    pub old: Address,
    /// Address of the new function.
    pub new: Address,
    /// `ftrace`: the jump is in the ftrace site; `body`: behind it.
    pub redirect: Redirect,
    /// `patched`, `original`, `overridden`, `in transition`, or what is there instead.
    pub state: String,
    /// The later patch whose code it runs (`status`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overridden_by: Option<String>,
    /// A livepatch of the guest's own that is for the same function (`status`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub livepatch: Option<String>,
}

impl Function {
    /// From a plan or a record, with the state that it has.
    pub fn new(function: &PatchedFunction, state: &str) -> Self {
        Self {
            object: function.object.clone(),
            name: function.name.clone(),
            sympos: function.sympos,
            old: Address(function.old),
            new: Address(function.new),
            redirect: function.redirect,
            state: state.to_owned(),
            overridden_by: None,
            livepatch: None,
        }
    }
}

/// What a module says of itself (`check`).
#[derive(Debug, Clone, Serialize)]
pub struct Identity {
    /// How it says what it patches: `klp_patch`, `kpatch-build`, `klp-build`.
    pub format: &'static str,
    /// The kernel that it was made for, with its configuration.
    pub vermagic: String,
    /// `MODULE_VERSION`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Checksum of its sources.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub srcversion: Option<String>,
    /// The linker's build ID, in hex.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub build_id: Option<String>,
    /// `MODULE_DESCRIPTION`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
}

impl Identity {
    /// Of a module. Text that could move a terminal's cursor is left out.
    pub fn of(module: &PatchModule<'_>) -> Self {
        let says = |key| {
            let value = module.info().get(key).map(str::trim_end);
            value
                .filter(|value| value.chars().all(|c| !c.is_control()))
                .map(str::to_owned)
        };
        let hex = |id: &[u8]| id.iter().map(|byte| format!("{byte:02x}")).collect();
        Self {
            format: module.format().name(),
            vermagic: says("vermagic").unwrap_or_default(),
            version: says("version"),
            srcversion: says("srcversion"),
            build_id: module.build_id().map(hex),
            description: says("description"),
        }
    }
}

/// Whether the guest's code was compared with that which a patch was made for. Code that differs is a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verified {
    /// Every function that is replaced.
    All,
    /// Some: the module does not have the code of the rest.
    Some,
    /// None: the module does not say what it was made for.
    None,
}

impl Verified {
    /// Of a module that was applied or could be, so whose code fits as far as it is known.
    pub fn of(module: &PatchModule<'_>, record: &Record) -> Self {
        let note = module.note().ok().flatten();
        let known = |function: &&PatchedFunction| {
            // Functions of modules are not in the record's terms; the name is enough to find what the note has.
            let noted = |note: &Note| {
                let mut functions = note.functions.iter();
                functions.any(|old| old.name == function.name && old.sympos == function.sympos)
            };
            note.as_ref().is_some_and(noted)
        };
        match record.functions.iter().filter(known).count() {
            0 => Self::None,
            count if count == record.functions.len() => Self::All,
            _ => Self::Some,
        }
    }

    /// What the operator should know.
    pub fn line(self) -> Option<&'static str> {
        match self {
            Self::All => None,
            Self::Some => Some("not verified: the module lacks the old code of some of these functions"),
            Self::None => Some("not verified: the module does not say which old code it was made for"),
        }
    }
}

/// One patch.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Patch {
    /// The module's name, which `revert` takes.
    pub id: String,
    /// The file, where there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// `applied`, `reverted`, `would apply`, `not applied`, `applying`, …
    pub state: String,
    /// Why it was not done, where it was not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What the module says of itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub module: Option<Identity>,
    /// Whether the guest's code was compared with that which the patch was made for (apply, check).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verified: Option<Verified>,
    /// Whether the types that the module was compiled against were compared with the guest's (apply, check).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checksums: Option<&'static str>,
    /// SHA-256 of the module, decompressed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Consistency model that it was applied with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Seconds since 1970 on the host that applied it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub applied_at: Option<u64>,
    /// Its functions.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub functions: Vec<Function>,
    /// Patches that it has replaced, or would replace, by name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub replaces: Vec<String>,
    /// Modules that it is for, too, which the guest has not loaded.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pending: Vec<String>,
    /// Its own functions and variables whose addresses the guest may have, for which its code stays when it is reverted.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub escapes: Vec<String>,
    /// The pause that it took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pause: Option<Pause>,
    /// What the operator should know.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// `apply`, `check`, `revert`, `status` and the bare command.
#[derive(Debug, Clone, Serialize)]
pub struct Patches {
    /// The guest.
    pub guest: Guest,
    /// The patches that it is about, in the order in which they were dealt with.
    pub patches: Vec<Patch>,
    /// That its QEMU is to be replaced, and why (the bare command).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upgrade_due: Option<String>,
}

impl Patches {
    /// True where the command itself has changed the guest: every change takes a pause.
    pub fn changed(&self) -> bool {
        self.patches.iter().any(|patch| patch.pause.is_some())
    }
}

/// A QEMU process.
#[derive(Debug, Clone, Serialize)]
pub struct Process {
    /// Its number, where there is such a process.
    pub pid: Option<i32>,
    /// QEMU's version.
    pub qemu: String,
    /// Its program.
    pub program: String,
}

/// `upgrade`.
#[derive(Debug, Clone, Serialize)]
pub struct Upgrade {
    /// The guest, in the process where it is now.
    pub guest: Guest,
    /// `moved`, or `would move`.
    pub state: String,
    /// Where it was.
    pub old: Process,
    /// Where it is.
    pub new: Process,
    /// The machine type, which stays.
    pub machine: String,
    /// `cpr-transfer`, `x-ignore-shared` or `precopy`.
    pub method: String,
    /// How long it stood, by the times at which the two QEMUs stopped and resumed it, in microseconds.
    pub downtime_us: Option<u64>,
    /// From the new process's start until the guest ran there, in milliseconds.
    pub total_ms: Option<u64>,
    /// Bytes sent.
    pub transferred: Option<u64>,
    /// How many pieces of the kernel and its patches are compared before the guest runs.
    pub compared: usize,
    /// Its patches, as they are in the new process.
    pub patches: Vec<Patch>,
    /// What the operator should know.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

impl Upgrade {
    /// True where the guest is in its new process.
    pub fn moved(&self) -> bool {
        self.new.pid.is_some()
    }
}

/// `inspect`: an address range.
#[derive(Debug, Clone, Serialize)]
pub struct AddressRange {
    /// First byte.
    pub start: Address,
    /// Bytes.
    pub len: u64,
}

/// `inspect`.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// The guest.
    pub guest: Guest,
    /// QEMU's version.
    pub qemu: String,
    /// `tcg` or `kvm`.
    pub accelerator: String,
    /// vCPUs.
    pub vcpus: usize,
    /// Guest RAM, bytes.
    pub ram: u64,
    /// The kernel's banner.
    pub banner: String,
    /// `_text`-side start of the image.
    pub image: AddressRange,
    /// Guest-physical address of the image's start.
    pub image_physical: Address,
    /// 4 or 5.
    pub page_table_levels: u8,
    /// Guest-physical address of the kernel's own top-level page table.
    pub page_table_root: Address,
    /// Number of symbols.
    pub symbols: usize,
    /// Number of types.
    pub types: usize,
    /// Text caves.
    pub caves: Vec<AddressRange>,
    /// The registry, where there is one.
    pub registry: Option<AddressRange>,
    /// Where each of this was found, and what agreed with it.
    pub sources: Vec<String>,
}

/// `domains`: one running guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DomainLine {
    /// Its name.
    pub name: Option<String>,
    /// The process that runs it.
    pub pid: i32,
    /// Its program, where that is not QEMU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub program: Option<String>,
    /// The QMP socket that was used.
    pub qmp: Option<String>,
    /// `tcg` or `kvm`.
    pub accelerator: Option<String>,
    /// `uname -r`.
    pub kernel: Option<String>,
    /// Names of its patches.
    pub patches: Vec<String>,
    /// Why it could not be looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}
