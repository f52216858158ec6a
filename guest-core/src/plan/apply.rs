//! From a module and a kernel to the plan of applying it.

use super::{Plan, known, old, old_code, orc_header, parts};
use crate::addr::Gva;
use crate::change::Change;
use crate::guest_module::{self, Description, Registration};
use crate::kernel::resolve::GuestSymbols;
use crate::kernel::{KernelError, Live, exports, livepatch};
use crate::memory::VirtMemory;
use crate::module::{
    AltLayout, Bases, GuestContext, ImageError, JumpLayout, LinkError, Linked, ModuleError, NoteError, PatchError,
    PatchModule, ResolveError,
};
use crate::paging::{PAGE_SIZE, entry};
use crate::per_cpu::PerCpuError;
use crate::place::{FILLER, Orc, Pages, PatchedFunction, Record, Registry, RegistryError, Span, State};
use crate::redirect::{RedirectError, redirect};
use sha2::{Digest, Sha256};

/// Longest `vermagic` read.
const VERMAGIC_BYTES_MAX: usize = 256;

/// Why a module does not fit the guest. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Not a module that vmpatch understands.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// The patch that it describes is not understood.
    #[error(transparent)]
    Patch(#[from] PatchError),
    /// It has a section, or needs memory, that is not handled.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// It can't be linked against this kernel.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// It was made for another kernel.
    #[error("the module was made for kernel {module:?}, the guest runs {guest:?}")]
    Vermagic {
        /// `vermagic` of the module.
        module: String,
        /// `vermagic`, or the release, of the guest's kernel.
        guest: String,
    },
    /// It was compiled against another type of something that it uses.
    #[error(
        "the module was compiled against another {symbol} (checksum {module:#010x}; the guest's kernel has {guest:#010x})"
    )]
    Version {
        /// The exported symbol.
        symbol: String,
        /// The checksum of its type in the module.
        module: u32,
        /// That of the guest's kernel.
        guest: u32,
    },
    /// Its tables for unwinding have another format than the guest's kernel reads.
    #[error("the module was built for another ORC format ({module}) than the guest's kernel has ({guest})")]
    OrcHeader {
        /// The digest of the module's format.
        module: String,
        /// That of the kernel's.
        guest: String,
    },
    /// `klp_patch.replace`, in a guest that has other patches.
    #[error("the module is to replace all other livepatches (klp_patch.replace); revert these first: {others}")]
    Replace {
        /// The others, by name.
        others: String,
    },
    /// All that it patches is in modules that the guest has not loaded.
    #[error("it patches nothing but modules that the guest has not loaded: {}", objects.join(", "))]
    Pending {
        /// The module's name.
        id: String,
        /// The modules.
        objects: Vec<String>,
    },
    /// A part of it has been applied before, with data that the rest would have to share.
    #[error(
        "{section} belongs to {id}, too, which was applied before {objects} was loaded; revert it and apply it again"
    )]
    SharedData {
        /// The section.
        section: String,
        /// The part that is applied.
        id: String,
        /// What is to be patched now.
        objects: String,
    },
    /// A module that the patch needs is being loaded or unloaded.
    #[error("the guest's module {module} is just being loaded or unloaded")]
    Unsettled {
        /// The module.
        module: String,
    },
    /// It is there already.
    #[error("{id} is already applied")]
    AlreadyApplied {
        /// Its name.
        id: String,
    },
    /// The guest has a module of that name.
    #[error("the guest has loaded a module {id} of its own, and can't know a second one by that name")]
    Loaded {
        /// The name.
        id: String,
    },
    /// A kernel that was built without modules does not load a livepatch either.
    #[error("the guest's kernel was built without modules, and can't know the patch's code as one")]
    NoModules,
    /// What it says of the code that it was made for can't be read.
    #[error(transparent)]
    Note(#[from] NoteError),
    /// The guest runs other code than the patch was made for.
    #[error(
        "the patch was made for another {function}: byte {offset:#x} of it, at {at}, is {found:#04x} in the guest, expected {expected:#04x}"
    )]
    OtherCode {
        /// The function.
        function: String,
        /// The first byte that differs, counted from the function's start.
        offset: usize,
        /// Its address in the guest.
        at: Gva,
        /// What is there.
        found: u8,
        /// What should be.
        expected: u8,
    },
    /// Another patch holds the function.
    #[error("{function} is already patched by {id}; revert that one first")]
    Held {
        /// The function.
        function: String,
        /// The patch.
        id: String,
    },
    /// A function that the patch names is not in this kernel, or not once.
    #[error("function {name}: {cause}")]
    Function {
        /// Its name.
        name: String,
        /// Why not.
        cause: ResolveError,
    },
    /// It can't be redirected.
    #[error(transparent)]
    Redirect(#[from] RedirectError),
    /// No per-CPU memory.
    #[error(transparent)]
    PerCpu(#[from] PerCpuError),
    /// No room.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The guest's tables could not be read.
    #[error("reading the guest's kernel")]
    Kernel(#[from] KernelError),
    /// Its record could not be written down.
    #[error("writing the patch's record")]
    Record(#[from] serde_json::Error),
}

/// What the operator chose.
#[derive(Debug, Clone)]
pub struct ApplyOptions {
    /// Name of the consistency model, for the record.
    pub model: String,
    /// Seconds since 1970 on the host.
    pub now: u64,
}

/// Plans to apply the module `file`. Reads the guest, changes nothing.
pub fn apply(live: &Live<'_>, registry: &Registry, file: &[u8], options: &ApplyOptions) -> Result<Plan, Refusal> {
    let module = PatchModule::parse(file)?;
    check_vermagic(live, module.info().get("vermagic").unwrap_or_default())?;
    check_versions(live, &module)?;
    orc_header::check(live, &module)?;
    let mut patch = module.patch(&livepatch::layout(live)?)?;
    let alternatives = alternatives(live)?;
    let digest = crate::change::hex::encode(&Sha256::digest(file));
    let symbols = GuestSymbols::new(live);
    let parts = parts::split(live, &symbols, registry, &digest, &mut patch)?;
    let id = parts.id(registry, &module, &patch, &alternatives)?;
    if patch.replace == Some(true) {
        refuse_beside_others(live, registry)?;
    }
    let image = module.image(&patch, &alternatives)?;
    let layout = image.layout();
    let pages = |bytes: u64| bytes.div_ceil(PAGE_SIZE);
    let guest = known::layout(live, &id)?;
    let named: Vec<_> = image.symbols().collect();
    let (uses, settled) = old::used(live, &symbols, &patch, image.undefined())?;
    let room = guest.room(
        &named,
        (uses.len(), image.traceable()),
        layout.rodata.size,
        layout.data.size,
    );
    let sizes = [layout.text.size, room.rodata, room.data];
    // The record's size is known last; linking needs the addresses first. So: areas in front, the record behind them.
    let (_, area) = registry.allocate(sizes.into_iter().map(pages).sum::<u64>() + 1)?;
    let rodata = area.first + pages(sizes[0]);
    let data = rodata + pages(sizes[1]);
    let record_page = data + pages(sizes[2]);
    let data_at = registry.mapped(data);
    let per_cpu = known::per_cpu(live, &layout.per_cpu, data_at.wrapping_add(room.module))?;
    let bases = Bases {
        text: registry.mapped(area.first),
        rodata: registry.mapped(rodata),
        data: data_at,
        per_cpu: Gva(per_cpu.map_or(0, |piece| piece.at)),
    };
    let capabilities = capabilities(live)?;
    let jump_labels = match image.has_jump_labels() {
        true => guest_module::jump_layout(live)?,
        false => JumpLayout::default(),
    };
    let mut linked = image.link(
        &bases,
        &GuestContext {
            symbols: &symbols,
            memory: live,
            capabilities: &capabilities,
            pending: &parts.pending,
            jump_labels,
        },
    )?;

    let description = Description {
        name: &id,
        in_tree: module.info().get("intree").is_some(),
        bases,
        sizes,
        orc: (linked.orc.ips, linked.orc.entries, linked.orc.rows.len() as u64),
        fixups: linked.fixups,
        bugs: linked.bugs,
        jumps: (linked.jump_labels.table, linked.jump_labels.count),
        per_cpu: per_cpu.map(|piece| Gva(piece.at)),
        uses: &uses,
        sites: &linked.sites,
        symbols: named,
    };
    let others = registry.records().filter_map(|record| record.known.as_ref());
    let registration = guest.register(live, &description, &room, others)?;
    let module_at = Gva(registration.known.module);
    let own_data = (bases.data, &mut linked.data);
    let (keys, listed) = guest_module::list_at_keys(live, &linked.jump_labels, module_at, own_data)?;
    known::append(&mut linked.rodata, room.symbols, &registration.symbols);
    known::append(&mut linked.data, room.module, &registration.module);
    let Registration {
        changes: mut paused,
        mut known,
        ..
    } = registration;
    known.keys = listed;
    known.per_cpu = per_cpu;
    paused.extend(settled.into_iter().chain(keys));
    if let Some(piece) = per_cpu {
        paused.extend(piece.take(live, &linked.per_cpu, (data_at, registry.page(data)))?);
    }

    let held = livepatch::held_functions(live)?;
    let note = module.note()?;
    let mut occupied = Vec::new();
    let mut functions = Vec::new();
    let mut changes = Vec::new();
    for function in &linked.functions {
        let old::Old { at, len, parts } = old::find(live, &symbols, registry, function)?;
        old_code::check(live, note.as_ref(), function, at)?;
        let (kind, sites) = redirect(live, &function.old_name, at, len, function.new, &held)?;
        let jump = sites.first().map_or(0, |change| change.gpa().0);
        changes.extend(sites);
        occupied.extend(parts);
        functions.push(PatchedFunction {
            object: function.object.clone(),
            name: function.old_name.clone(),
            sympos: function.sympos,
            old: at.0,
            old_len: len,
            new: function.new.0,
            new_len: function.size,
            redirect: kind,
            jump,
        });
    }
    let orders = registry.records().map(|record| record.order);
    let span = |start: Gva, len| Span { start: start.0, len };
    let record = Record {
        id,
        digest,
        order: orders.max().unwrap_or(0) + 1,
        model: options.model.clone(),
        applied_at: options.now,
        functions,
        text: span(bases.text, sizes[0]),
        rodata: span(bases.rodata, sizes[1]),
        data: span(bases.data, sizes[2]),
        orc: Orc {
            ips: linked.orc.ips.0,
            entries: linked.orc.entries.0,
            count: linked.orc.rows.len() as u64,
        },
        changes,
        known: Some(known),
        pending: parts.pending,
    };
    let bytes = record.to_bytes()?;
    let (slot, area) = registry.allocate(record_page - area.first + pages(bytes.len() as u64))?;
    let placed = [
        (area.first, &linked.text),
        (rodata, &linked.rodata),
        (data, &linked.data),
        (record_page, &bytes),
    ];

    let mut before = if registry.exists {
        registry.renewal().into_iter().collect()
    } else {
        registry.creation()
    };
    let offset = (record_page - area.first) * PAGE_SIZE;
    let stored = offset..offset + bytes.len() as u64;
    before.push(registry.slot_change(slot, State::Placing, area, &stored, crc32fast::hash(&bytes)));
    before.extend(
        placed
            .iter()
            .filter(|(_, bytes)| !bytes.is_empty())
            .map(|(page, bytes)| lay(registry, *page, bytes)),
    );
    before.extend(map_areas(registry, &linked, area, rodata, data));
    before.push(registry.state_change(slot, State::Placing, State::Applying));
    paused.extend(record.changes.iter().cloned());
    paused.push(registry.state_change(slot, State::Applying, State::Applied));
    Ok(Plan {
        before,
        paused,
        occupied,
        unread: Gva(0)..Gva(0),
        laid: registry.laid_code(),
        record,
    })
}

/// What replaces all other patches can only be applied where there are none.
fn refuse_beside_others(live: &Live<'_>, registry: &Registry) -> Result<(), Refusal> {
    let mut others: Vec<_> = registry.records().map(|record| record.id.clone()).collect();
    if !livepatch::held_functions(live)?.is_empty() {
        others.push("a livepatch of the guest's own".to_owned());
    }
    if others.is_empty() {
        return Ok(());
    }
    let others = others.join(", ");
    Err(Refusal::Replace { others })
}

/// Bytes into pages of the pool that are still filler.
fn lay(registry: &Registry, page: u64, bytes: &[u8]) -> Change {
    Change::replace(
        format!("pool page {page}"),
        registry.page(page),
        vec![FILLER; bytes.len()],
        bytes.to_vec(),
    )
}

/// The page-table entries: text to run, read-only data to read, data to read and write. Accessed and dirty are set
/// beforehand, so that no CPU ever writes to the table.
fn map_areas(registry: &Registry, linked: &Linked, area: Pages, rodata: u64, data: u64) -> Vec<Change> {
    let pages = |bytes: &[u8]| (bytes.len() as u64).div_ceil(PAGE_SIZE);
    let seen = entry::PRESENT | entry::ACCESSED;
    let areas = [
        (area.first, pages(&linked.text), seen),
        (rodata, pages(&linked.rodata), seen | entry::NO_EXECUTE),
        (
            data,
            pages(&linked.data),
            seen | entry::WRITABLE | entry::DIRTY | entry::NO_EXECUTE,
        ),
    ];
    let entries = areas.into_iter().flat_map(|(first, count, bits)| {
        (first..first + count).map(move |page| {
            let what = format!("page-table entry of pool page {page}");
            Change::word(what, registry.table_entry(page), 0, registry.page(page).0 | bits)
        })
    });
    entries.collect()
}

/// The module's `vermagic` must be the kernel's own, where the kernel has it among its symbols; the release at least.
fn check_vermagic(live: &Live<'_>, module: &str) -> Result<(), Refusal> {
    let own = live.kernel.symbols.unique("vermagic").and_then(|at| {
        let mut bytes = [0; VERMAGIC_BYTES_MAX];
        live.read(at, &mut bytes).ok()?;
        let text = bytes.split(|byte| *byte == 0).next()?;
        Some(String::from_utf8_lossy(text).trim_end().to_owned())
    });
    let fits = match &own {
        Some(own) => own == module.trim_end(),
        None => module.split(' ').next() == Some(live.kernel.release.as_str()),
    };
    let guest = own.unwrap_or_else(|| live.kernel.release.clone());
    if fits {
        Ok(())
    } else {
        Err(Refusal::Vermagic {
            module: module.to_owned(),
            guest,
        })
    }
}

/// Where module and kernel both have checksums of types, they must be the same, as the kernel's own loader demands.
fn check_versions(live: &Live<'_>, module: &PatchModule<'_>) -> Result<(), Refusal> {
    for (symbol, crc) in module.versions() {
        let guest = exports::find(live, symbol)?.and_then(|export| export.crc);
        if let Some(guest) = guest.filter(|guest| *guest != crc) {
            return Err(Refusal::Version {
                symbol: symbol.to_owned(),
                module: crc,
                guest,
            });
        }
    }
    Ok(())
}

/// The layout of the kernel's `struct alt_instr`, which the module was compiled with, too.
fn alternatives(live: &Live<'_>) -> Result<AltLayout, KernelError> {
    let entry = live.kernel.btf.structure("alt_instr")?;
    Ok(AltLayout {
        size: entry.size(),
        instr_offset: entry.offset("instr_offset")?,
        repl_offset: entry.offset("repl_offset")?,
        // Since 6.3 a bit field of 16 bits, which ends where the bytes of `flags` begin.
        cpuid: entry.member("cpuid")?.offset(),
        flags: entry.try_member("flags").map(|member| member.offset()),
        instrlen: entry.offset("instrlen")?,
        replacementlen: entry.offset("replacementlen")?,
    })
}

/// `boot_cpu_data.x86_capability`: feature words and, behind them, bug words.
fn capabilities(live: &Live<'_>) -> Result<Vec<u32>, Refusal> {
    let member = live
        .kernel
        .btf
        .structure("cpuinfo_x86")
        .and_then(|cpu| cpu.member("x86_capability"));
    let member = member.map_err(KernelError::from)?;
    let at = live.kernel.symbol("boot_cpu_data")?.wrapping_add(member.offset());
    let mut bytes = vec![0; usize::try_from(member.size.min(PAGE_SIZE)).unwrap_or(0)];
    let what = "boot_cpu_data.x86_capability";
    live.read(at, &mut bytes)
        .map_err(|source| KernelError::Unreadable { what, at, source })?;
    Ok(bytes
        .chunks_exact(4)
        .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
        .collect())
}
