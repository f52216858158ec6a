//! From a module and a kernel to the plan of applying it.

use super::areas::Areas;
use super::redirects::{self, Redirects};
use super::{Plan, Refusal, fit, from_reads, guard, known, old, parts, reapply, this_module};
use crate::addr::Gva;
use crate::guest_module::{self, Description, Registration};
use crate::kernel::resolve::GuestSymbols;
use crate::kernel::{Live, alternatives, livepatch};
use crate::module::{Bases, GuestContext, Image, JumpLayout, Note, Patch, PatchModule};
use crate::paging::PAGE_SIZE;
use crate::place::{Orc, Record, Registry, Span, State};
use crate::reads::Preconditions;
use sha2::{Digest, Sha256};

/// Room for a record at first; one of a few functions needs no more.
const RECORD_BYTES_FIRST: u64 = 4 * PAGE_SIZE;

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
    from_reads::plan(live, |live| plan(live, registry, file, options))
}

fn plan(live: &Live<'_>, registry: &Registry, file: &[u8], options: &ApplyOptions) -> Result<Plan, Refusal> {
    let module = PatchModule::parse(file)?;
    fit::check(live, &module)?;
    guard::require_survival::<Refusal>(live)?;
    let mut patch = module.patch(&livepatch::layout(live)?)?;
    let alternatives = alternatives::layout(live)?;
    let digest = crate::change::hex::encode(&Sha256::digest(file));
    let symbols = GuestSymbols::new(live);
    let parts = parts::split(live, &symbols, registry, &digest, &mut patch)?;
    let id = parts.id(registry, &module, &patch, &alternatives)?;
    if patch.replace == Some(true) {
        fit::refuse_beside_others(live, registry)?;
    }
    let note = module.note()?;
    if let Some(plan) = reapply::plan(live, &symbols, registry, (&id, &digest, note.as_ref()), &patch)? {
        return Ok(plan);
    }
    let image = module.image(&patch, &alternatives)?;
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
    };
    // Linking needs the addresses, and only then it shows how long the record is that says where everything is.
    let mut record_bytes = RECORD_BYTES_FIRST;
    loop {
        match part.place(options, record_bytes)? {
            Placed::Whole(plan) => return Ok(*plan),
            // more than there was room for, each time: it ends, with a plan or for want of room
            Placed::RecordOf(bytes) => record_bytes = bytes,
        }
    }
}

/// What of a module is applied now, which fits the guest.
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
    /// What the module was made for, where it says so.
    note: Option<&'a Note>,
}

enum Placed {
    Whole(Box<Plan>),
    /// The record is longer than the room for it: that many bytes.
    RecordOf(u64),
}

impl Part<'_> {
    /// Plans it with room for a record of `record_bytes`.
    fn place(&self, options: &ApplyOptions, record_bytes: u64) -> Result<Placed, Refusal> {
        let (live, registry, image) = (self.live, self.registry, self.image);
        let layout = image.layout();
        let guest = known::layout(live, self.id)?;
        let named: Vec<_> = image.symbols().collect();
        let uses = old::used(live, self.symbols, self.patch, image.undefined())?;
        let room = guest.room(
            &named,
            (uses.len(), image.traceable()),
            layout.rodata.size,
            layout.data.size,
        );
        let sizes = [layout.text.size, room.rodata, room.data];
        let areas = Areas::find(registry, sizes, record_bytes)?;
        let [text, rodata, data] = areas.mapped(registry);
        let per_cpu = known::per_cpu(live, &layout.per_cpu, data.wrapping_add(room.module))?;
        let bases = Bases {
            text,
            rodata,
            data,
            per_cpu: Gva(per_cpu.map_or(0, |piece| piece.at)),
            module: data.wrapping_add(room.module),
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

        let description = Description {
            name: self.id,
            in_tree: self.module.info().get("intree").is_some(),
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
        let others = registry.all_records().filter_map(|record| record.known.as_ref());
        let registration = guest.register(live, &description, &room, others)?;
        let module_at = Gva(registration.known.module);
        let (keys, listed) =
            guest_module::list_at_keys(live, &linked.jump_labels, module_at, (data, &mut linked.data))?;
        known::append(&mut linked.rodata, room.symbols, &registration.symbols);
        known::append(&mut linked.data, room.module, &registration.module);
        let Registration {
            changes: mut paused,
            mut known,
            ..
        } = registration;
        known.keys = listed;
        known.per_cpu = per_cpu;
        paused.extend(keys);
        if let Some(piece) = per_cpu {
            paused.extend(piece.take(live, &linked.per_cpu, (data, areas.data(registry)))?);
        }

        let Redirects {
            functions,
            changes,
            occupied,
        } = redirects::plan(live, self.symbols, registry, self.note, &linked.functions)?;
        let orders = registry.all_records().map(|record| record.order);
        let span = |start: Gva, len| Span { start: start.0, len };
        let record = Record {
            id: self.id.to_owned(),
            digest: self.digest.to_owned(),
            order: orders.max().unwrap_or(0) + 1,
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
            changes,
            known: Some(known),
            pending: self.pending.to_vec(),
            escapes: Some(image.escapes()),
        };
        let bytes = record.to_bytes()?;
        if bytes.len() as u64 > areas.record_room() {
            return Ok(Placed::RecordOf(bytes.len() as u64));
        }
        paused.extend(record.changes.iter().cloned());
        paused.push(registry.state_change(areas.slot, State::Applying, State::Applied));
        Ok(Placed::Whole(Box::new(Plan {
            before: areas.lay(registry, &linked, &bytes),
            paused,
            requires: Preconditions::default(),
            occupied,
            unread: Gva(0)..Gva(0),
            laid: registry.laid_code(),
            record,
        })))
    }
}
