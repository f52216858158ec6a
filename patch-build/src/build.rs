//! From object files to a module: compare, select, write.

use std::collections::BTreeSet;

use guest_core::module::Note;
use guest_core::module::note::{AllowedRisk, OldCode};

use crate::compare::{CompareError, Comparison, Unit};
use crate::elf::{self, ElfError, Object};
use crate::facts::KernelFacts;
use crate::pair::ObjectPair;
use crate::parallel::in_parallel;
use crate::running::{Places, Shipped, ShippedError};
use crate::select::{Finding, OutSymbol, Resolver, Risk, SelectError, Selection, Side};
use crate::sheet::ReviewSheet;
use crate::write::{self, Layer, Named, ObjectOf};

/// What to build a module from.
#[derive(Debug)]
pub struct Inputs<'a> {
    /// The source files, compiled before and after the change.
    pub pairs: &'a [ObjectPair],
    /// The kernel.
    pub facts: &'a KernelFacts,
    /// Name, version, flaws, description, sources and builder of the patch. Functions and allowed risks are filled in.
    pub about: &'a Note,
    /// Risks that are taken.
    pub allow: &'a BTreeSet<Risk>,
    /// Places that may hold inlined copies of changed code and were not compiled: what, and why it may be there.
    pub not_compiled: &'a [(String, String)],
}

/// Compiles for that kernel. Errors are for people: what the compiler said.
pub trait Compile: Sync {
    /// A C text as a file of a module of that name, without linking it.
    fn glue(&self, module_name: &str, c_text: &str) -> Result<Vec<u8>, String>;

    /// A source file of one of the pairs as it was, and as the kernel's own build does: functions side by side in one section.
    fn as_shipped(&self, source: &str) -> Result<Vec<u8>, String>;
}

/// What came of it.
#[derive(Debug)]
pub enum Built {
    /// The change changes no code and no data.
    Nothing,
    /// A module.
    Module {
        /// Its file.
        bytes: Vec<u8>,
        /// What is in it, for those who review it.
        sheet: ReviewSheet,
    },
    /// Something speaks against it that was not allowed.
    Refused {
        /// What.
        findings: Vec<Finding>,
        /// What would be in the module.
        sheet: ReviewSheet,
    },
}

/// Why nothing could be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A source file's two versions could not be compared.
    #[error("comparing {file}")]
    Compare {
        /// The file.
        file: String,
        /// Why not.
        source: CompareError,
    },
    /// What the kernel shipped could not be read.
    #[error("reading the kernel that the patch is for")]
    Shipped(#[from] ShippedError),
    /// No module can be made of the change.
    #[error(transparent)]
    Select(#[from] SelectError),
    /// A file could not be compiled as the kernel's own build does.
    #[error("compiling {file} once more, as it was shipped: {reason}")]
    AsShipped {
        /// The file.
        file: String,
        /// What the compiler said.
        reason: String,
    },
    /// The module's own part did not compile.
    #[error("compiling the part of the module that enables the patch: {0}")]
    Glue(String),
    /// That part, or the module, is no object file.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// The note could not be written.
    #[error("writing the module's note")]
    Note(#[from] serde_json::Error),
}

/// Builds a module. The same inputs give the same bytes.
///
/// Errors: see [`BuildError`]; what a person may allow is [`Built::Refused`].
pub fn build(inputs: &Inputs<'_>, compile: &dyn Compile) -> Result<Built, BuildError> {
    let sides = sides(inputs, compile)?;
    let mut selection = Selection::of(&sides, &inputs.facts.exports)?;
    selection
        .findings
        .extend(inputs.not_compiled.iter().map(|(place, reason)| Finding {
            risk: Risk::Inlined,
            place: place.clone(),
            reason: reason.clone(),
        }));
    if selection.is_empty() && selection.findings.is_empty() {
        return Ok(Built::Nothing);
    }
    let patched = selection.patched();
    let mut layer = Layer::new(Resolver {
        sides: &sides,
        exports: &inputs.facts.exports,
        patched: &patched,
    });
    layer.lay(&selection)?;
    let mut note = inputs.about.clone();
    note.kernel = inputs.facts.release.clone();
    note.functions = old_code(&sides, &selection);
    note.allowed = allowed(&selection.findings);
    let sheet = ReviewSheet::of(&note, &sides, &selection, &layer.output.object);
    let refused: Vec<Finding> = selection
        .findings
        .iter()
        .filter(|finding| !inputs.allow.contains(&finding.risk))
        .cloned()
        .collect();
    if !refused.is_empty() {
        return Ok(Built::Refused {
            findings: refused,
            sheet,
        });
    }
    if selection.is_empty() {
        return Ok(Built::Nothing);
    }
    let objects = objects(&sides, &selection, &layer);
    let named = Named {
        name: &note.name,
        description: &note.description,
        version: &note.version,
        vermagic: &inputs.facts.vermagic,
        namespaces: namespaces(inputs.facts, &layer),
    };
    let text = write::text(&named, &objects);
    let compiled = compile.glue(&note.name, &text).map_err(BuildError::Glue)?;
    write::add_glue(&mut layer.output, &Object::parse(&compiled)?);
    let mut object = layer.output.object;
    // Elsewhere all checksums are 0, and nobody looks at them.
    if inputs.facts.config.enabled("MODVERSIONS") {
        write::add_versions(&mut object, &inputs.facts.exports);
    }
    write::add_note(&mut object, note.to_bytes()?);
    Ok(Built::Module {
        bytes: elf::write(&object)?,
        sheet,
    })
}

fn sides<'k>(inputs: &Inputs<'k>, compile: &dyn Compile) -> Result<Vec<Side<'k>>, BuildError> {
    let sides = in_parallel(inputs.pairs, |_, pair| side(pair, inputs.facts, compile), &|_, _| {});
    sides.into_iter().collect()
}

fn side<'k>(pair: &ObjectPair, facts: &'k KernelFacts, compile: &dyn Compile) -> Result<Side<'k>, BuildError> {
    let failed = |source| BuildError::Compare {
        file: pair.source.clone(),
        source,
    };
    let comparison = Comparison::of(&pair.before, &pair.after).map_err(failed)?;
    let shipped = match &pair.module {
        None => Shipped::kernel(facts)?,
        Some(name) => Shipped::module(facts, name)?,
    };
    let mut places = Places::find(&comparison.before, &shipped);
    if !places.are_complete(&comparison.before) {
        let object = compile
            .as_shipped(&pair.source)
            .map_err(|reason| BuildError::AsShipped {
                file: pair.source.clone(),
                reason,
            })?;
        let unit = Unit::plain(&object).map_err(failed)?;
        places.complete(&comparison.before, &unit, &shipped);
    }
    Ok(Side {
        source: pair.source.clone(),
        has_ftrace: pair.has_ftrace,
        comparison,
        places,
        shipped,
    })
}

/// The code that is replaced, as shipped. What is not the compiled code is left out: nothing would be known of it.
fn old_code(sides: &[Side<'_>], selection: &Selection) -> Vec<OldCode> {
    let old = selection.replaced.iter().filter_map(|replaced| {
        let side = sides.get(replaced.new.0)?;
        let name = &side.comparison.before.item(replaced.old).name;
        let code = side.places.code(replaced.old)?.clone();
        Some(OldCode::new(name, replaced.found.sympos, side.shipped.name(), code))
    });
    old.collect()
}

fn allowed(findings: &[Finding]) -> Vec<AllowedRisk> {
    let allowed = findings.iter().map(|finding| AllowedRisk {
        risk: finding.risk.name().to_owned(),
        place: finding.place.clone(),
        reason: finding.reason.clone(),
    });
    allowed.collect()
}

/// The functions to replace, by object: the kernel image first, then modules by name.
fn objects<'s>(sides: &'s [Side<'_>], selection: &Selection, layer: &Layer<'_, '_>) -> Vec<ObjectOf<'s>> {
    let modules: BTreeSet<Option<&str>> = selection
        .replaced
        .iter()
        .filter_map(|replaced| Some(sides.get(replaced.new.0)?.shipped.name()))
        .collect();
    let functions = |module: Option<&str>| {
        let of = selection.replaced.iter().filter_map(|replaced| {
            let side = sides.get(replaced.new.0).filter(|side| side.shipped.name() == module)?;
            let old = side.comparison.before.item(replaced.old);
            Some((old.name.clone(), replaced.found.sympos, layer.symbol(replaced.new)?))
        });
        of.collect()
    };
    modules
        .into_iter()
        .map(|module| ObjectOf {
            module,
            functions: functions(module),
        })
        .collect()
}

/// Namespaces of the exported symbols that are used.
fn namespaces(facts: &KernelFacts, layer: &Layer<'_, '_>) -> Vec<String> {
    let used = layer.output.out_symbols().filter_map(|symbol| match symbol {
        OutSymbol::Exported(name) => Some(facts.exports.get(name)?.namespace.clone()),
        _ => None,
    });
    let namespaces: BTreeSet<String> = used.filter(|namespace| !namespace.is_empty()).collect();
    namespaces.into_iter().collect()
}
