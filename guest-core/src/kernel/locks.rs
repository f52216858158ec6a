//! Locks of the kernel under which it changes its own text or its lists of modules: while one is held, vmpatch waits.

use super::{KernelError, Live};
use crate::addr::Gva;
use crate::memory::VirtMemory;

/// Mutexes, each with what its owner may be doing. A kernel without one of them was built without that feature.
const MUTEXES: [(&str, &str); 6] = [
    ("text_mutex", "rewriting kernel text"),
    ("ftrace_lock", "changing what is traced"),
    ("module_mutex", "loading or unloading a module"),
    ("klp_mutex", "applying a livepatch of its own"),
    ("jump_label_mutex", "flipping a static key"),
    ("kprobe_mutex", "setting a kprobe"),
];
/// Flag bits in the low part of `mutex.owner` (kernel/locking/mutex.c: waiters, handoff, pickup) and of an rt_mutex's
/// owner (`RT_MUTEX_HAS_WAITERS`); a task's address has them clear.
const OWNER_FLAGS: u64 = 7;

/// Where the lock words are. Looked up once, read in each pause.
#[derive(Debug, Clone)]
pub struct Locks {
    words: Vec<(Gva, u64, &'static str, &'static str)>,
}

/// A lock that is held.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the guest is {doing} ({name} is held)")]
pub struct Held {
    /// The lock's symbol.
    pub name: &'static str,
    /// What its owner may be doing.
    pub doing: &'static str,
}

impl Locks {
    /// Finds the locks. `text_mutex` must be there; of the others, those that the kernel has.
    pub fn find(live: &Live<'_>) -> Result<Self, KernelError> {
        let btf = &live.kernel.btf;
        let mutex = btf.structure("mutex")?;
        let owner = mutex.try_member("owner").or_else(|| mutex.try_member("rtmutex.owner"));
        let owner = owner.ok_or(KernelError::Disagrees {
            what: "struct mutex",
            found: "neither owner nor rtmutex.owner".to_owned(),
            expected: "an owner".to_owned(),
        })?;
        live.kernel.symbol("text_mutex")?;
        let mut words: Vec<_> = MUTEXES
            .iter()
            .filter_map(|(name, doing)| {
                let at = live.kernel.symbols.unique(name)?.wrapping_add(owner.offset());
                Some((at, !OWNER_FLAGS, *name, *doing))
            })
            .collect();
        let hotplug = live.kernel.symbols.unique("cpu_hotplug_lock");
        if let (Some(at), Some(block)) = (hotplug, btf.structure("percpu_rw_semaphore")?.try_member("block")) {
            words.push((
                at.wrapping_add(block.offset()),
                0xffff_ffff,
                "cpu_hotplug_lock",
                "bringing a CPU up or down",
            ));
        }
        Ok(Self { words })
    }

    /// The first lock that is held. Only meaningful while all vCPUs are stopped.
    pub fn held(&self, live: &Live<'_>) -> Result<Option<Held>, KernelError> {
        for (at, mask, name, doing) in &self.words {
            let word = live.read_u64(*at).map_err(|source| KernelError::Unreadable {
                what: name,
                at: *at,
                source,
            })?;
            if word & mask != 0 {
                return Ok(Some(Held { name, doing }));
            }
        }
        Ok(None)
    }
}
