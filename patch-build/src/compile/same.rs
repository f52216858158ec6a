//! Which files a change of headers changes the code of: by what the compiler reads of each before and after.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::after::digest_of;
use super::command::dependencies;
use super::old_numbers::with_old_numbers;
use super::pace::Pace;
use super::{Error, overlay};
use crate::cache;
use crate::kept;
use crate::parallel::in_parallel;
use crate::plan::Planned;
use crate::source::both::{Both, both};
use crate::source::slice;
use crate::tree::Tree;

/// Whether the change changes the code of each of the files, or might: where one can't be preprocessed, or reads an old header.
///
/// Of a source that can't change each change is looked at once.
///
/// `progress` is told what takes time.
pub fn changed_code(
    tree: &Tree,
    planned: &[&Planned],
    changed: &BTreeMap<String, String>,
    progress: &dyn Fn(&str),
) -> Result<Vec<bool>, Error> {
    if planned.is_empty() {
        return Ok(Vec::new());
    }
    let (change, files) = (digest_of(changed), digest_of_all(planned));
    let key: [&[u8]; 3] = [b"changed code", change.as_bytes(), files.as_bytes()];
    if let Some([kept]) = tree.kept(&key).as_deref()
        && kept.len() == planned.len()
    {
        return Ok(kept.iter().map(|byte| *byte != 0).collect());
    }
    let search = Search {
        tree,
        changed,
        real: Mutex::default(),
    };
    let found = search.look(planned, progress)?;
    let inputs: BTreeSet<&PathBuf> = found.iter().flatten().flat_map(|(_, inputs)| inputs).collect();
    let mut inputs: Vec<PathBuf> = inputs.into_iter().cloned().collect();
    inputs.extend(changed.keys().map(|file| tree.source().join(file)));
    let differs: Vec<bool> = found
        .iter()
        .map(|found| !matches!(found, Some((Said::Same, _))))
        .collect();
    // Of what could not be preprocessed it is not known what it reads.
    if found.iter().all(Option::is_some) {
        let bytes: Vec<u8> = differs.iter().map(|differs| u8::from(*differs)).collect();
        tree.keep(&key, &inputs, &[&bytes])?;
    }
    Ok(differs)
}

fn digest_of_all(planned: &[&Planned]) -> String {
    let parts = planned
        .iter()
        .flat_map(|one| [one.source.as_str(), one.object.as_str(), one.command.text()]);
    kept::digest(&parts.collect::<Vec<_>>())
}

/// What the compiler's texts say of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    Same,
    Differs,
    /// Both texts are needed.
    Nothing,
}

/// What is said of a file, and the unchanged files that it was said by; `None` where it could not be preprocessed, or reads an old header.
type Found = Option<(Said, Vec<PathBuf>)>;

struct Search<'a> {
    tree: &'a Tree,
    changed: &'a BTreeMap<String, String>,
    /// Where the paths that the compiler names lead.
    real: Mutex<HashMap<String, Option<PathBuf>>>,
}

impl Search<'_> {
    fn look(&self, planned: &[&Planned], progress: &dyn Fn(&str)) -> Result<Vec<Found>, Error> {
        let (mut new, mut in_one) = (BTreeMap::new(), BTreeMap::new());
        let mut macros = BTreeSet::new();
        let mut is_in_one = true;
        for (file, text) in self.changed {
            let path = self.tree.source().join(file);
            let old = fs::read_to_string(&path).map_err(cache::Error::io("read", &path))?;
            new.insert(file.clone(), with_old_numbers(&old, text));
            match both(&old, text) {
                Some(Both { text, macros: own }) => {
                    in_one.insert(file.clone(), text);
                    macros.extend(own);
                }
                None => is_in_one = false,
            }
        }
        let is_for_one = |planned: &Planned| is_in_one && !planned.source.ends_with(".S");
        let (first, mut rest): (Vec<usize>, Vec<usize>) = (0..planned.len()).partition(|number| {
            let planned = planned.get(*number);
            planned.is_some_and(|planned| is_for_one(planned))
        });
        let mut all: Vec<Found> = vec![None; planned.len()];
        let found = self.each(planned, &first, &in_one, progress, |root, number, planned| {
            self.in_one(root, number, planned, &macros)
        })?;
        for (number, found) in first.into_iter().zip(found) {
            if matches!(found, Some((Said::Nothing, _))) {
                rest.push(number);
            }
            if let Some(place) = all.get_mut(number) {
                *place = found;
            }
        }
        let found = self.each(planned, &rest, &new, progress, |root, number, planned| {
            self.in_two(root, number, planned)
        })?;
        for (number, found) in rest.into_iter().zip(found) {
            if let Some(place) = all.get_mut(number) {
                *place = found;
            }
        }
        Ok(all)
    }

    /// Does the work for the files of those numbers, with those texts in place of the source's.
    fn each(
        &self,
        planned: &[&Planned],
        numbers: &[usize],
        texts: &BTreeMap<String, String>,
        progress: &dyn Fn(&str),
        work: impl Fn(&Path, usize, &Planned) -> Found + Sync,
    ) -> Result<Vec<Found>, Error> {
        let planned: Vec<&Planned> = numbers
            .iter()
            .filter_map(|number| planned.get(*number).copied())
            .collect();
        if planned.is_empty() {
            return Ok(Vec::new());
        }
        let root = self.tree.folder().join("vmpatch-read");
        if root.exists() {
            fs::remove_dir_all(&root).map_err(cache::Error::io("remove what an interrupted run left in", &root))?;
        }
        let files = planned
            .iter()
            .flat_map(|one| [one.source.as_str(), one.object.as_str()]);
        overlay::make(self.tree.source(), &root, texts, &files.collect::<Vec<_>>())?;
        let pace = Pace::of(planned.len());
        let found = in_parallel(
            &planned,
            |number, planned| work(&root, number, planned),
            &|number, planned: &&Planned| {
                progress(&format!(
                    "looking at what {} uses of the change ({})",
                    planned.source,
                    pace.at(number)
                ));
            },
        );
        fs::remove_dir_all(&root).map_err(cache::Error::io("remove", &root))?;
        Ok(found)
    }

    /// By one text that has both forms of what changed.
    fn in_one(&self, root: &Path, number: usize, planned: &Planned, macros: &BTreeSet<String>) -> Found {
        let (text, inputs) = self.text(root, &format!("both-{number}"), planned, "-P -dU")?;
        let said = match slice::same_in_both(&text, macros, planned.command.forgets_unused()) {
            Some(true) => Said::Same,
            Some(false) => Said::Differs,
            None => Said::Nothing,
        };
        Some((said, inputs))
    }

    /// By the texts before and after.
    fn in_two(&self, root: &Path, number: usize, planned: &Planned) -> Found {
        let before = root.join(format!("vmpatch-before-{number}.i"));
        self.tree.shell(&planned.command.preprocessing(None, &before)).ok()?;
        let one = read(&before)?;
        let (other, inputs) = self.text(root, &format!("after-{number}"), planned, "")?;
        let is_same = match () {
            () if planned.source.ends_with(".S") => slice::same_assembly(&one, &other),
            () if planned.command.forgets_unused() => slice::same_code(&one, &other),
            () => slice::same_words(&one, &other),
        };
        Some((if is_same { Said::Same } else { Said::Differs }, inputs))
    }

    /// What the compiler reads of a file where the source is `root`, and the files that are not in it.
    fn text(&self, root: &Path, name: &str, planned: &Planned, options: &str) -> Option<(String, Vec<PathBuf>)> {
        let path = root.join(format!("vmpatch-{name}.i"));
        let relative = root.strip_prefix(self.tree.folder()).unwrap_or(root);
        let command = planned
            .command
            .preprocessing(Some((self.tree.source(), relative)), &path);
        self.tree.shell(&format!("{command} {options}")).ok()?;
        let list = fs::read_to_string(path.with_extension("i.d")).ok()?;
        let mut inputs = Vec::new();
        for file in dependencies(&list) {
            let real = self.real(file)?;
            if real.starts_with(root) {
                continue;
            }
            let of_source = real
                .strip_prefix(self.tree.source())
                .ok()
                .and_then(|path| path.to_str());
            if of_source.is_some_and(|file| self.changed.contains_key(file)) {
                // The old form of a changed file.
                return None;
            }
            inputs.push(real);
        }
        Some((read(&path)?, inputs))
    }

    fn real(&self, path: &str) -> Option<PathBuf> {
        if let Some(real) = self.real.lock().ok()?.get(path) {
            return real.clone();
        }
        let real = fs::canonicalize(self.tree.folder().join(path)).ok();
        self.real.lock().ok()?.insert(path.to_owned(), real.clone());
        real
    }
}

/// A text that the compiler wrote. It is removed: all of them take as much room as the sources of the kernel.
fn read(path: &Path) -> Option<String> {
    let bytes = fs::read(path).ok()?;
    fs::remove_file(path).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}
