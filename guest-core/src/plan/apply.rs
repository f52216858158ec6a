//! Plans the apply of a module.

use super::placement::Placement;
use super::redirects::{self, HeldByOthers, Redirects};
use super::replace::{Released, Replaced};
use super::transition::{self, Means, NoTransition};
use super::{
    Marks, Plan, Refusal, compatibility, from_reads, guard, partial, reapply, registration, targets, this_module,
};
use crate::addr::Gva;
use crate::change::Change;
use crate::guest_module::{self, Description, PreparedModule};
use crate::kernel::patch_state::{self, Mark, NoPatchState};
use crate::kernel::resolve::GuestSymbols;
use crate::kernel::{Live, alternatives, livepatch};
use crate::module::{Bases, GuestContext, Image, JumpLayout, Linked, Note, Patch, PatchModule};
use crate::paging::PAGE_SIZE;
use crate::reads::Preconditions;
use crate::registry::{Orc, Record, Registry, Span, State};
use crate::trampoline::TRAMPOLINE_BYTES;
use sha2::{Digest, Sha256};

/// Space for a record in the first attempt, in bytes. The record of a patch with a few functions needs no more.
const RECORD_BYTES_FIRST: u64 = 4 * PAGE_SIZE;

/// What the record says of the apply.
#[derive(Debug, Clone)]
pub struct ApplyOptions {
    /// Name of the consistency model.
    pub model: String,
    /// Time on the host, in seconds since 1970.
    pub now: u64,
    /// Begin a transition, in place of an apply at one instant.
    pub in_transition: bool,
}

/// Plans the apply of `file`, the bytes of a livepatch module. Reads the guest and changes nothing.
///
/// # Errors
///
/// The module does not fit the guest, or the guest has no space for it.
pub fn apply(live: &Live<'_>, registry: &Registry, file: &[u8], options: &ApplyOptions) -> Result<Plan, Refusal> {
    from_reads::plan(live, |live| plan(live, registry, file, options))
}

/// The digest by which a record names the module: its SHA-256, in hex.
pub(crate) fn digest(file: &[u8]) -> String {
    crate::change::hex::encode(&Sha256::digest(file))
}

fn plan(live: &Live<'_>, registry: &Registry, file: &[u8], options: &ApplyOptions) -> Result<Plan, Refusal> {
    let module = PatchModule::parse(file)?;
    compatibility::check(live, &module)?;
    guard::require_survival::<Refusal>(live)?;
    if let Some((_, record)) = transition::in_transition(registry) {
        return Err(Refusal::InTransition { id: record.id.clone() });
    }
    let mut patch = module.patch(&livepatch::layout(live)?)?;
    let alternatives = alternatives::layout(live)?;
    let digest = digest(file);
    let symbols = GuestSymbols::new(live);
    let parts = partial::split(live, &symbols, registry, &digest, &mut patch)?;
    let id = parts.id(registry, &module, &patch, &alternatives)?;
    let (others, replaced) = match patch.replace {
        // The first part has replaced what there was.
        _ if parts.is_later() => (HeldByOthers::Refuse, Replaced::default()),
        Some(true) => {
            compatibility::refuse_beside_own_livepatches(live)?;
            (HeldByOthers::Replace, Replaced::all(registry))
        }
        _ => (HeldByOthers::Cover, Replaced::default()),
    };
    let note = module.note()?;
    if replaced.is_empty() {
        let kept = reapply::plan(live, &symbols, registry, (&id, &digest, note.as_ref()), &patch)?;
        if let Some(plan) = kept {
            return match options.in_transition {
                true => Err(NoTransition::Kept.into()),
                false => Ok(plan),
            };
        }
    }
    let means = transition::Means::find(live)?;
    let trampoline_bytes = if means.is_ok() { TRAMPOLINE_BYTES } else { 0 };
    let image = module.image_with(&patch, &alternatives, trampoline_bytes)?;
    this_module::check_uses(live, &image)?;
    let part = Part {
        live,
        registry,
        symbols: &symbols,
        module: &module,
        patch: &patch,
        image: &image,
        id: &id,
        digest: &digest,
        pending: &parts.pending,
        note: note.as_ref(),
        others,
        replaced,
        means: &means,
    };
    // The patch is linked for its addresses, and only the linked patch gives the length of the record.
    let mut record_bytes = RECORD_BYTES_FIRST;
    loop {
        match part.place(options, record_bytes)? {
            Placed::Planned(plan) => return Ok(*plan),
            // Each attempt has more space than the one before: the loop ends with a plan, or with an error that there is no space.
            Placed::LongerRecord(bytes) => record_bytes = bytes,
        }
    }
}

/// The part of a module that is applied now, which was found to fit the guest.
struct Part<'a> {
    live: &'a Live<'a>,
    registry: &'a Registry,
    symbols: &'a GuestSymbols<'a>,
    module: &'a PatchModule<'a>,
    patch: &'a Patch,
    image: &'a Image<'a, 'a>,
    id: &'a str,
    digest: &'a str,
    /// Modules that the guest has not loaded.
    pending: &'a [String],
    /// The code that the module was made for, where the module carries it.
    note: Option<&'a Note>,
    /// What becomes of functions that other patches hold.
    others: HeldByOthers,
    /// The patches that this one replaces.
    replaced: Replaced<'a>,
    /// What the kernel has for transitions.
    means: &'a Result<Means, NoPatchState>,
}

/// Result of an attempt to place a patch.
enum Placed {
    Planned(Box<Plan>),
    /// The record does not fit into its space: its bytes.
    LongerRecord(u64),
}

impl Part<'_> {
    /// Plans the apply with space for a record of `record_bytes`.
    fn place(&self, options: &ApplyOptions, record_bytes: u64) -> Result<Placed, Refusal> {
        let (live, registry, image) = (self.live, self.registry, self.image);
        let layout = image.layout();
        let guest = registration::layout(live, self.id)?;
        let named: Vec<_> = image.symbols().collect();
        let uses = targets::used(live, self.symbols, self.patch, image.undefined())?;
        let space = guest.space(
            &named,
            (uses.len(), image.traceable()),
            layout.rodata.size,
            layout.data.size,
        );
        let sizes = [layout.text.size, space.rodata, space.data];
        let placement = Placement::find(registry, sizes, record_bytes)?;
        let [text, rodata, data] = placement.mapped(registry);
        let per_cpu = registration::per_cpu(live, &layout.per_cpu, data.wrapping_add(space.module))?;
        let bases = Bases {
            text,
            rodata,
            data,
            per_cpu: Gva(per_cpu.map_or(0, |allocation| allocation.at)),
            module: data.wrapping_add(space.module),
        };
        let context = GuestContext {
            symbols: self.symbols,
            memory: &live.constant(),
            capabilities: &alternatives::capabilities(live)?,
            pending: self.pending,
            jump_labels: match image.has_jump_labels() {
                true => guest_module::jump_layout(live)?,
                false => JumpLayout::default(),
            },
        };
        let mut linked = image.link(&bases, &context)?;
        compatibility::check_orc_entry(live, &linked.orc)?;

        let description = Description {
            name: self.id,
            in_tree: self.module.info().get("intree").is_some(),
            bases,
            sizes,
            orc: (linked.orc.ips, linked.orc.entries, linked.orc.rows.len() as u64),
            fixups: linked.fixups,
            bugs: linked.bugs,
            jumps: (linked.jump_labels.table, linked.jump_labels.count),
            per_cpu: per_cpu.map(|allocation| Gva(allocation.at)),
            uses: &uses,
            sites: &linked.sites,
            symbols: named,
        };
        let others = registry.all_records().filter_map(|record| record.registration.as_ref());
        let prepared = guest.register(live, &description, &space, others)?;
        let module_at = Gva(prepared.registration.module);
        let (keys, listed) =
            guest_module::list_at_keys(live, &linked.jump_labels, module_at, (data, &mut linked.data))?;
        registration::append(&mut linked.rodata, space.symbols, &prepared.symbols);
        registration::append(&mut linked.data, space.module, &prepared.module);
        let PreparedModule {
            changes: mut atomic,
            mut registration,
            ..
        } = prepared;
        registration.keys = listed;
        registration.per_cpu = per_cpu;
        atomic.extend(keys);
        if let Some(allocation) = per_cpu {
            atomic.extend(allocation.take(live, &linked.per_cpu, (data, placement.data(registry)))?);
        }

        let mut redirects = redirects::plan(live, self.symbols, registry, self.note, &linked.functions, self.others)?;
        let transition = self.transition(&mut linked, text, &mut redirects)?;
        let Redirects {
            functions,
            mut changes,
            recorded,
            mut must_be_quiescent,
            ..
        } = redirects;
        let mut marks = Marks::Leave;
        let mut after = State::Applied;
        if options.in_transition {
            transition?;
            let fields = patch_state::find_unused(live)?.map_err(NoTransition::from)?;
            let owner = module_at;
            let mark = Mark::Old;
            marks = Marks::Set { fields, owner, mark };
            after = State::Transition;
            changes = changes.iter().map(via_trampoline).collect();
        }
        must_be_quiescent.extend(self.replaced.replacements(live)?);
        let Released { jumps, flags } = self.replaced.released(live, &functions)?;
        let orders = registry.all_records().map(|record| record.order);
        let span = |start: Gva, len| Span { start: start.0, len };
        let record = Record {
            id: self.id.to_owned(),
            digest: self.digest.to_owned(),
            order: orders.max().unwrap_or(0).saturating_add(1),
            model: options.model.clone(),
            applied_at: options.now,
            functions,
            text: span(text, sizes[0]),
            rodata: span(rodata, sizes[1]),
            data: span(data, sizes[2]),
            orc: Orc {
                ips: linked.orc.ips.0,
                entries: linked.orc.entries.0,
                count: linked.orc.rows.len() as u64,
            },
            changes: recorded,
            replaces: self.replaced.names(),
            registration: Some(registration),
            pending: self.pending.to_vec(),
            escapes: Some(image.escapes()),
        };
        let bytes = record.to_bytes()?;
        if bytes.len() as u64 > placement.record_space() {
            return Ok(Placed::LongerRecord(bytes.len() as u64));
        }
        let states = self.replaced.state_changes(registry, State::Applied, State::Replaced);
        let sites = [changes.as_slice(), &states].concat();
        atomic.extend(changes);
        atomic.extend(jumps);
        atomic.extend(flags);
        atomic.extend(states);
        atomic.push(registry.state_change(placement.slot, State::Applying, after));
        Ok(Placed::Planned(Box::new(Plan {
            staged: placement.stage(registry, &linked, &bytes),
            atomic,
            sites,
            requires: Preconditions::default(),
            must_be_quiescent,
            unreferenced: Gva(0)..Gva(0),
            patch_code: registry.patch_code(),
            marks,
            record,
        })))
    }

    /// Gives the functions their trampolines, in the text of the patch at `text`. Inner errors: the patch can't be in transition.
    fn transition(
        &self,
        linked: &mut Linked,
        text: Gva,
        redirects: &mut Redirects,
    ) -> Result<Result<(), NoTransition>, Refusal> {
        let means = match self.means {
            Ok(means) => means,
            Err(why) => return Ok(Err(why.clone().into())),
        };
        if !self.replaced.is_empty() {
            return Ok(Err(NoTransition::Replaces));
        }
        let Some(start) = linked.trampolines else {
            return Ok(Err(NoTransition::NoOrc));
        };
        transition::give_trampolines(means, start, redirects, |at, code| {
            let offset = usize::try_from(at.0.wrapping_sub(text.0)).unwrap_or(usize::MAX);
            let space = linked.text.get_mut(offset..offset.saturating_add(code.len()));
            space.map(|space| space.copy_from_slice(code)).is_some()
        })
    }
}

/// The change that leads a function to its trampoline; that of its ftrace record as it is.
fn via_trampoline(change: &Change) -> Change {
    change.by_way().unwrap_or_else(|| change.clone())
}
