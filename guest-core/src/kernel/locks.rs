//! The locks under which the kernel changes its own text or its lists of modules: while one is held, vmpatch waits. And `system_state`
//! (include/linux/kernel.h), which tells whether the kernel is fully started and not shutting down.

use super::{KernelError, Live};
use crate::addr::{Gpa, Gva};
use crate::memory::{MemoryError, PhysMemory, VirtMemory};
use serde::{Deserialize, Serialize};

/// Mutexes, each with what its owner may be doing. A kernel without one of them was built without the feature.
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
    /// The bits that show whether it is held.
    mask: u64,
    /// Their value if the lock is free.
    free: u64,
    held: Held,
}

/// The word of a lock in guest-physical memory, for those who do not know the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockWord {
    gpa: u64,
    /// The bits that show whether it is held.
    mask: u64,
    /// Their value if the lock is free.
    free: u64,
}

impl LockWord {
    /// True where the lock is free.
    ///
    /// # Errors
    ///
    /// The word cannot be read.
    pub fn is_free(&self, memory: &dyn PhysMemory) -> Result<bool, MemoryError> {
        let mut bytes = [0; 8];
        memory.read(Gpa(self.gpa), &mut bytes)?;
        Ok(u64::from_le_bytes(bytes) & self.mask == self.free)
    }
}

/// The words of the locks. They are looked up once, and read in each pause.
#[derive(Debug, Clone)]
pub struct Locks {
    words: Vec<Word>,
}

/// A lock that is held, or another reason not to patch at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the guest is {doing} ({name} {how})")]
pub struct Held {
    /// Name of its symbol.
    pub name: &'static str,
    /// What its owner may be doing.
    pub doing: &'static str,
    /// The state of the symbol, as in "is held".
    pub how: &'static str,
}

impl Held {
    const fn lock(name: &'static str, doing: &'static str) -> Self {
        let how = "is held";
        Self { name, doing, how }
    }
}

impl Locks {
    /// Finds the locks. The kernel must have `text_mutex` and `system_state`; of the others, those are used that it has.
    ///
    /// # Errors
    ///
    /// The kernel lacks one of the two, or a type that is needed; or it has several symbols of one name.
    pub fn find(live: &Live<'_>) -> Result<Self, KernelError> {
        let btf = &live.kernel.btf;
        live.kernel.symbol("text_mutex")?;
        let mut words = Vec::new();
        for (name, doing) in MUTEXES {
            words.extend(mutex_word(live, name, doing)?);
        }
        let hotplug = live.kernel.symbol_of_feature("cpu_hotplug_lock")?;
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

    /// Adds the locks under which the guest allocates and frees per-CPU memory (mm/percpu.c).
    ///
    /// # Errors
    ///
    /// The kernel's types lack what is needed.
    pub fn with_per_cpu(mut self, live: &Live<'_>) -> Result<Self, KernelError> {
        let spinlock = live.kernel.btf.structure("spinlock")?;
        let at = live.kernel.symbol("pcpu_lock")?;
        let held = Held::lock("pcpu_lock", PER_CPU);
        // With PREEMPT_RT, the spinlock is a mutex (include/linux/spinlock_types.h).
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

    /// Where the words of the locks are in guest-physical memory.
    ///
    /// # Errors
    ///
    /// A word's address is not mapped.
    pub fn words(&self, live: &Live<'_>) -> Result<Vec<LockWord>, KernelError> {
        let words = self.words.iter().map(|word| {
            let gpa = live.physical(word.at).map_err(|source| KernelError::Unreadable {
                what: word.held.name,
                at: word.at,
                source,
            })?;
            let Word { mask, free, .. } = *word;
            Ok(LockWord {
                gpa: gpa.0.0,
                mask,
                free,
            })
        });
        words.collect()
    }

    /// The first lock that is held. While vCPUs run, this may change at any moment.
    ///
    /// # Errors
    ///
    /// A lock cannot be read.
    pub fn held(&self, live: &Live<'_>) -> Result<Option<Held>, KernelError> {
        Ok(self.first_held(live)?.map(|(held, _)| held))
    }

    /// The first lock that is held, with the bits that show it. The bits of a mutex tell its owner.
    pub(crate) fn first_held(&self, live: &Live<'_>) -> Result<Option<(Held, u64)>, KernelError> {
        for Word { at, mask, free, held } in &self.words {
            let word = live.read_u64(*at).map_err(|source| KernelError::Unreadable {
                what: held.name,
                at: *at,
                source,
            })?;
            if word & mask != *free {
                return Ok(Some((*held, word & mask)));
            }
        }
        Ok(None)
    }
}

/// The word of a mutex; `None` if the kernel does not have the mutex.
fn mutex_word(live: &Live<'_>, name: &'static str, doing: &'static str) -> Result<Option<Word>, KernelError> {
    let mutex = live.kernel.btf.structure("mutex")?;
    let owner = mutex.try_member("owner").or_else(|| mutex.try_member("rtmutex.owner"));
    let owner = owner.ok_or(KernelError::Disagrees {
        what: "struct mutex",
        found: "neither owner nor rtmutex.owner".to_owned(),
        expected: "an owner".to_owned(),
    })?;
    Ok(live.kernel.symbol_of_feature(name)?.map(|at| Word {
        at: at.wrapping_add(owner.offset()),
        mask: !OWNER_FLAGS,
        free: 0,
        held: Held::lock(name, doing),
    }))
}
