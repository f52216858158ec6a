//! Reads the guest's loaded modules: the addresses of their code and data, and their ORC tables.
//!
//! Format: `struct module` (include/linux/module.h): `mem[]` since 6.4, `core_layout` and `init_layout` before;
//! `arch.orc_unwind` (arch/x86/include/asm/module.h).

use super::error::SetupError;
use super::list;
use super::table::OrcTable;
use super::view::KernelView;
use crate::addr::Gva;
use crate::btf::{BtfError, Struct};
use crate::text::plain;
use std::ops::Range;

/// Most modules of a guest.
const MODULES_MAX: usize = 4096;
/// Largest `struct module` that is read, in bytes.
const STRUCT_BYTES_MAX: usize = 16 << 10;
/// The kinds of memory that hold code, `enum mod_mem_type`.
const CODE_KINDS: [&str; 2] = ["MOD_TEXT", "MOD_INIT_TEXT"];
/// The layouts of kernels before 6.4.
const LAYOUTS: [&str; 2] = ["core_layout", "init_layout"];

/// The memory of one module.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ModuleCode {
    pub name: Box<str>,
    pub text: Vec<Range<Gva>>,
    pub data: Vec<Range<Gva>>,
    pub orc: Option<OrcTable>,
}

/// Offsets in `struct module` that describe a part of its memory: base, total size, and size of the text at its start.
#[derive(Debug, Clone)]
struct Area {
    base: u64,
    size: u64,
    text_size: Option<u64>,
    is_code: bool,
}

/// Where the list of modules is, and the offsets of what is read of each.
#[derive(Debug, Clone)]
pub(super) struct Modules {
    head: Gva,
    bytes: usize,
    name: Range<usize>,
    node: u64,
    areas: Vec<Area>,
    orc_count: u64,
    orc_ips: u64,
    orc_entries: u64,
}

impl Modules {
    /// Looks up the list; `None` for a kernel that was built without modules.
    pub fn find(view: &dyn KernelView) -> Result<Option<Self>, SetupError> {
        let Some(head) = view.symbol("modules") else {
            return Ok(None);
        };
        let module = view.btf().structure("module")?;
        Ok(Some(Self {
            head,
            bytes: usize::try_from(module.size()).unwrap_or(0).min(STRUCT_BYTES_MAX),
            name: name(&module)?,
            node: module.offset("list")?,
            areas: areas(view, &module)?,
            orc_count: module.offset("arch.num_orcs")?,
            orc_ips: module.offset("arch.orc_unwind_ip")?,
            orc_entries: module.offset("arch.orc_unwind")?,
        }))
    }

    /// Reads the modules that are loaded now.
    pub fn read(&self, view: &dyn KernelView) -> Result<Vec<ModuleCode>, SetupError> {
        let mut bytes = vec![0; self.bytes];
        let mut found = Vec::new();
        for at in list::forward(view, "the list of modules", self.head, self.node, MODULES_MAX)? {
            let unreadable = |source| SetupError::Unreadable {
                what: "struct module",
                at,
                source,
            };
            view.read(at, &mut bytes).map_err(unreadable)?;
            found.push(decode(self, &bytes));
        }
        Ok(found)
    }
}

/// `mem[]`, or the two layouts of kernels before 6.4.
fn areas(view: &dyn KernelView, module: &Struct<'_>) -> Result<Vec<Area>, SetupError> {
    let mut areas = Vec::new();
    if let Some(mem) = module.try_member("mem") {
        let code = CODE_KINDS.map(|name| view.btf().enumerator(name).map(i64::cast_unsigned));
        let [text, init_text] = code;
        let (text, init_text) = (text?, init_text?);
        for index in 0..mem.elements.unwrap_or(0).min(32) {
            let base = module.offset(&format!("mem[{index}].base"))?;
            let size = module.offset(&format!("mem[{index}].size"))?;
            areas.push(Area {
                base,
                size,
                text_size: None,
                is_code: index == text || index == init_text,
            });
        }
    } else {
        for name in LAYOUTS {
            let member = |part: &str| module.offset(&format!("{name}.{part}"));
            let (base, size, text) = (member("base")?, member("size")?, member("text_size")?);
            areas.push(Area {
                base,
                size,
                text_size: Some(text),
                is_code: true,
            });
        }
    }
    Ok(areas)
}

fn name(module: &Struct<'_>) -> Result<Range<usize>, BtfError> {
    let name = module.member("name")?;
    let at = |offset| usize::try_from(offset).unwrap_or(usize::MAX);
    Ok(at(name.offset())..at(name.end()))
}

fn decode(layout: &Modules, bytes: &[u8]) -> ModuleCode {
    let half = |at: u64| {
        let at = usize::try_from(at).ok()?;
        let bytes = bytes.get(at..)?.first_chunk::<4>()?;
        Some(u64::from(u32::from_le_bytes(*bytes)))
    };
    let word = |at: u64| {
        let at = usize::try_from(at).ok()?;
        Some(Gva(u64::from_le_bytes(*bytes.get(at..)?.first_chunk::<8>()?)))
    };
    let name = plain(bytes.get(layout.name.clone()).unwrap_or_default());
    let mut module = ModuleCode {
        name: name.into(),
        ..ModuleCode::default()
    };
    for area in &layout.areas {
        let (Some(base), Some(size)) = (word(area.base), half(area.size)) else {
            continue;
        };
        let text = if area.is_code {
            area.text_size.map_or(Some(size), half).unwrap_or(0).min(size)
        } else {
            0
        };
        let (Some(middle), Some(end)) = (base.checked_add(text), base.checked_add(size)) else {
            continue;
        };
        if text != 0 {
            module.text.push(base..middle);
        }
        if middle != end {
            module.data.push(middle..end);
        }
    }
    let orc = (word(layout.orc_ips), word(layout.orc_entries), half(layout.orc_count));
    if let (Some(ips), Some(entries), Some(count)) = orc
        && ips != Gva(0)
        && entries != Gva(0)
    {
        module.orc = OrcTable::new(ips, entries, count).ok();
    }
    module
}
