//! Resolves symbols in the guest's kernel and modules, for a patch that is being linked.

use super::exports::Export;
use super::modules::{GuestModule, ModuleSymbol};
use super::{KernelError, Live, exports, modules};
use crate::addr::Gva;
use crate::module::{ResolveError, ResolveSymbol};
use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

/// The name of the kernel image in `klp_find_object_symbol`.
pub const VMLINUX: &str = "vmlinux";

/// The symbols of a guest's kernel and of its modules. A module's symbols are read once.
pub struct GuestSymbols<'a> {
    live: Live<'a>,
    modules: OnceCell<Vec<GuestModule>>,
    symbols: RefCell<BTreeMap<String, Rc<[ModuleSymbol]>>>,
    /// Modules in which a symbol was found, by name.
    used: RefCell<BTreeMap<String, GuestModule>>,
}

impl<'a> GuestSymbols<'a> {
    /// The symbols of this guest.
    pub fn new(live: &Live<'a>) -> Self {
        Self {
            live: *live,
            modules: OnceCell::new(),
            symbols: RefCell::default(),
            used: RefCell::default(),
        }
    }

    /// All modules of the guest, the last loaded first.
    pub fn modules(&self) -> Result<&[GuestModule], KernelError> {
        if self.modules.get().is_none() {
            let all = modules::all(&self.live)?;
            return Ok(self.modules.get_or_init(|| all));
        }
        Ok(self.modules.get().map_or(&[], Vec::as_slice))
    }

    /// The module of that name, if the guest has loaded it.
    pub fn module(&self, name: &str) -> Result<Option<&GuestModule>, KernelError> {
        Ok(self.modules()?.iter().find(|module| module.name == name))
    }

    /// The symbols of a module, in the order of its table.
    pub fn of_module(&self, module: &GuestModule) -> Result<Rc<[ModuleSymbol]>, KernelError> {
        if let Some(symbols) = self.symbols.borrow().get(&module.name) {
            return Ok(symbols.clone());
        }
        let symbols: Rc<[_]> = modules::symbols(&self.live, module)?.into();
        self.symbols.borrow_mut().insert(module.name.clone(), symbols.clone());
        Ok(symbols)
    }

    /// The modules in which symbols were found so far. The patch that needs the symbols must keep these modules loaded.
    pub fn used(&self) -> Vec<GuestModule> {
        self.used.borrow().values().cloned().collect()
    }

    /// Adds a module to the used ones.
    pub fn uses(&self, module: &GuestModule) {
        self.used.borrow_mut().insert(module.name.clone(), module.clone());
    }

    /// The export `name` of the image, or else of a module. That module does not count as used.
    pub fn export(&self, name: &str) -> Result<Option<Export>, KernelError> {
        match exports::find(&self.live, name)? {
            Some(export) => Ok(Some(export)),
            None => Ok(modules::exporting(&self.live, self.modules()?, name)?.map(|(_, export)| export)),
        }
    }

    fn exported_by_module(&self, name: &str) -> Result<Option<Gva>, KernelError> {
        let found = modules::exporting(&self.live, self.modules()?, name)?;
        Ok(found.map(|(module, export)| {
            self.uses(module);
            export.address
        }))
    }

    fn in_module(&self, object: &str, name: &str, sympos: u64) -> Result<Gva, ResolveError> {
        let module = self.module(object)?;
        let module = module.ok_or_else(|| ResolveError::NotLoaded {
            object: object.to_owned(),
        })?;
        let symbols = self.of_module(module)?;
        let named = symbols.iter().filter(|symbol| symbol.name == name);
        let found = nth(object, named.map(|symbol| symbol.address).collect(), sympos)?;
        self.uses(module);
        Ok(found)
    }
}

impl ResolveSymbol for GuestSymbols<'_> {
    fn exported(&self, name: &str) -> Result<Gva, ResolveError> {
        if let Some(export) = exports::find(&self.live, name)? {
            return Ok(export.address);
        }
        if let Some(address) = self.exported_by_module(name)? {
            return Ok(address);
        }
        if self.live.kernel.symbols.named(name).next().is_some() {
            return Err(ResolveError::NotExported);
        }
        Err(ResolveError::NotFound {
            object: "the guest's kernel and its modules".to_owned(),
        })
    }

    fn any(&self, object: Option<&str>, name: &str, sympos: u64) -> Result<Gva, ResolveError> {
        match object {
            None | Some(VMLINUX) => {
                let named = self.live.kernel.symbols.named(name);
                nth(VMLINUX, named.map(|symbol| symbol.address).collect(), sympos)
            }
            Some(object) => self.in_module(object, name, sympos),
        }
    }
}

/// Finds a symbol as `klp_find_object_symbol` (kernel/livepatch/core.c) does: for position 0 there must be exactly one symbol of that name;
/// position n is the n-th one in the order of the table.
fn nth(object: &str, found: Vec<Gva>, sympos: u64) -> Result<Gva, ResolveError> {
    let object = object.to_owned();
    match (found.as_slice(), sympos) {
        ([], _) => Err(ResolveError::NotFound { object }),
        ([only], 0) => Ok(*only),
        (_, 0) => Err(ResolveError::Ambiguous {
            object,
            addresses: found,
        }),
        (all, _) => {
            let nth = usize::try_from(sympos - 1).ok().and_then(|nth| all.get(nth));
            nth.copied().ok_or(ResolveError::Position {
                object,
                sympos,
                found: all.len(),
            })
        }
    }
}
