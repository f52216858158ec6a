//! Locks of the kernel under which it changes its own text or its lists of modules: while one is held, vmpatch waits; and
//! `system_state` (include/linux/kernel.h), which says whether the kernel has started up and is not going down.

use super::{KernelError, Live};
use crate::addr::Gva;
use crate::memory::VirtMemory;

/// Mutexes, each with what its owner may be doing. A kernel without one of them was built without that feature.
const MUTEXES: [(&str, &str); 7] = [
    ("text_mutex", "rewriting kernel text"),
    ("ftrace_lock", "changing what is traced"),
    ("module_mutex", "loading or unloading a module"),
    ("klp_mutex", "applying a livepatch of its own"),
    ("jump_label_mutex", "flipping a static key"),
    ("static_call_mutex", "changing a static call"),
    ("kprobe_mutex", "setting a kprobe"),
];
/// Flag bits in the low part of `mutex.owner` (kernel/locking/mutex.c: waiters, handoff, pickup) and of an rt_mutex's
/// owner (`RT_MUTEX_HAS_WAITERS`); a task's address has them clear.
const OWNER_FLAGS: u64 = 7;
/// The bits of an int in a word.
const INT: u64 = 0xffff_ffff;

/// What the owners of the locks of per-CPU memory are doing.
const PER_CPU: &str = "taking or giving back per-CPU memory";

/// A word that says whether a lock is held.
#[derive(Debug, Clone)]
struct Word {
    at: Gva,
    /// The bits that count.
    mask: u64,
    /// Their value where nobody holds it.
    free: u64,
    held: Held,
}

/// Where the lock words are. Looked up once, read in each pause.
#[derive(Debug, Clone)]
pub struct Locks {
    words: Vec<Word>,
}

/// A lock that is held, or what else speaks against patching at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the guest is {doing} ({name} {how})")]
pub struct Held {
    /// The symbol.
    pub name: &'static str,
    /// What its owner may be doing.
    pub doing: &'static str,
    /// How the symbol shows it.
    pub how: &'static str,
}

impl Held {
    const fn lock(name: &'static str, doing: &'static str) -> Self {
        let how = "is held";
        Self { name, doing, how }
    }
}

impl Locks {
    /// Finds the locks. `text_mutex` and `system_state` must be there; of the others, those that the kernel has.
    pub fn find(live: &Live<'_>) -> Result<Self, KernelError> {
        let btf = &live.kernel.btf;
        live.kernel.symbol("text_mutex")?;
        let mut words = Vec::new();
        for (name, doing) in MUTEXES {
            words.extend(mutex_word(live, name, doing)?);
        }
        let hotplug = live.kernel.symbols.unique("cpu_hotplug_lock");
        if let (Some(at), Some(block)) = (hotplug, btf.structure("percpu_rw_semaphore")?.try_member("block")) {
            words.push(Word {
                at: at.wrapping_add(block.offset()),
                mask: INT,
                free: 0,
                held: Held::lock("cpu_hotplug_lock", "bringing a CPU up or down"),
            });
        }
        words.push(Word {
            at: live.kernel.symbol("system_state")?,
            mask: INT,
            free: btf.enumerator("SYSTEM_RUNNING")?.cast_unsigned(),
            held: Held {
                name: "system_state",
                doing: "starting up, going down or going to sleep",
                how: "is not SYSTEM_RUNNING",
            },
        });
        Ok(Self { words })
    }

    /// The same with those under which the guest takes and gives back per-CPU memory (mm/percpu.c).
    pub fn with_per_cpu(mut self, live: &Live<'_>) -> Result<Self, KernelError> {
        let spinlock = live.kernel.btf.structure("spinlock")?;
        let at = live.kernel.symbol("pcpu_lock")?;
        let held = Held::lock("pcpu_lock", PER_CPU);
        // PREEMPT_RT has a mutex in its place (include/linux/spinlock_types.h).
        let (member, mask) = match spinlock.try_member("rlock.raw_lock.val.counter") {
            Some(value) => (value, INT),
            None => (spinlock.member("lock.owner")?, !OWNER_FLAGS),
        };
        self.words.push(Word {
            at: at.wrapping_add(member.offset()),
            mask,
            free: 0,
            held,
        });
        self.words.extend(mutex_word(live, "pcpu_alloc_mutex", PER_CPU)?);
        Ok(self)
    }

    /// The first lock that is held. Only meaningful while all vCPUs are stopped.
    pub fn held(&self, live: &Live<'_>) -> Result<Option<Held>, KernelError> {
        for Word { at, mask, free, held } in &self.words {
            let word = live.read_u64(*at).map_err(|source| KernelError::Unreadable {
                what: held.name,
                at: *at,
                source,
            })?;
            if word & mask != *free {
                return Ok(Some(*held));
            }
        }
        Ok(None)
    }
}

/// The word of a mutex; `None` where the kernel does not have it.
fn mutex_word(live: &Live<'_>, name: &'static str, doing: &'static str) -> Result<Option<Word>, KernelError> {
    let mutex = live.kernel.btf.structure("mutex")?;
    let owner = mutex.try_member("owner").or_else(|| mutex.try_member("rtmutex.owner"));
    let owner = owner.ok_or(KernelError::Disagrees {
        what: "struct mutex",
        found: "neither owner nor rtmutex.owner".to_owned(),
        expected: "an owner".to_owned(),
    })?;
    Ok(live.kernel.symbols.unique(name).map(|at| Word {
        at: at.wrapping_add(owner.offset()),
        mask: !OWNER_FLAGS,
        free: 0,
        held: Held::lock(name, doing),
    }))
}
