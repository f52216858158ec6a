//! The last look, with all vCPUs stopped: at what runs, and at what ran since the survey.

use super::cpus::Place;
use super::list::{Counts, newest_threads, threads};
use super::survey::{FRAMES_MAX, Quiescence, Survey, Task, switches};
use super::verdict::{State, Unsure, Verdict, Why};
use crate::addr::Gva;
use crate::unwind::{KernelView, SetupError};
use crate::vcpu::Registers;

impl Survey<'_> {
    /// Says whether any context is in an old function, now that all vCPUs are stopped. `vcpus`: the registers of every
    /// vCPU. Work grows with the CPUs and with what ran since [`Survey::settle`]; where anything ran at all, two words
    /// of every task are compared, too. None where `is_over` says that the pause has lasted long enough, before all were seen.
    ///
    /// Error: something that every look rests on could not be read. Nothing is known then.
    pub fn recheck(
        &mut self,
        view: &dyn KernelView,
        vcpus: &[Registers],
        is_over: &dyn Fn() -> bool,
    ) -> Result<Option<Verdict>, SetupError> {
        let mut verdict = Verdict::default();
        self.frames_left.set(FRAMES_MAX);
        if self.code.refresh(view, &self.patches)? {
            verdict.unsure.push(Unsure {
                task: None,
                why: Why::CodeChanged,
            });
            // what is known rests on the code there was
            self.tasks.clear();
            return Ok(Some(verdict));
        }
        let running = self.look_at_cpus(view, vcpus, &mut verdict)?;
        let changed = self.look_at_changed_in_pause(view, &running, is_over)?;
        let all_seen = match changed {
            Some(changed) => self.look_at_new(view, &running, &changed, is_over)?,
            None => false,
        };
        if !all_seen {
            return Ok(None);
        }
        self.look_at_unlisted(view, &running, &mut verdict)?;
        for task in self
            .tasks
            .iter()
            .filter(|task| running.binary_search(&task.at).is_err())
        {
            let unseen = State::Unsure(Why::NotLookedAt);
            let state = if task.state == State::Running {
                &unseen
            } else {
                &task.state
            };
            self.report(view, task.at, state, &mut verdict);
        }
        Ok(Some(verdict))
    }

    /// Looks at every CPU. Gives the tasks that are running, or being switched to or from, sorted.
    fn look_at_cpus(
        &mut self,
        view: &dyn KernelView,
        vcpus: &[Registers],
        verdict: &mut Verdict,
    ) -> Result<Vec<Gva>, SetupError> {
        let cpus = &self.finder.cpus;
        let mut vcpu_of: Vec<Option<usize>> = vec![None; cpus.count()];
        let mut in_user_mode_somewhere = 0;
        for (vcpu, registers) in vcpus.iter().enumerate() {
            let place = cpus.place(view, registers);
            let cpu = match place {
                Place::Elsewhere => continue,
                Place::User(None) => {
                    in_user_mode_somewhere += 1;
                    continue;
                }
                Place::User(Some(cpu)) | Place::Kernel(cpu) => Some(cpu),
                Place::Unknown => None,
            };
            match cpu.and_then(|cpu| vcpu_of.get_mut(cpu)) {
                Some(slot) if slot.is_none() => *slot = Some(vcpu),
                _ => {
                    let why = Why::WhichCpu {
                        vcpu,
                        rip: registers.rip,
                    };
                    verdict.unsure.push(Unsure { task: None, why });
                }
            }
        }
        let online = cpus.online(view)?;
        let alone = |cpu: &&usize| vcpu_of.get(**cpu).is_some_and(Option::is_none);
        let without: Vec<usize> = online.iter().filter(alone).copied().collect();
        if without.len() != in_user_mode_somewhere {
            let why = match without.first() {
                Some(&cpu) => Why::NoVcpu { cpu },
                None => Why::TooManyVcpus,
            };
            verdict.unsure.push(Unsure { task: None, why });
        }
        let mut running = Vec::new();
        for cpu in without {
            let (current, queued) = cpus.running(view, cpu)?;
            running.extend([current, queued]);
        }
        for (cpu, vcpu) in vcpu_of.iter().enumerate() {
            let Some(registers) = vcpu.and_then(|vcpu| vcpus.get(vcpu)) else {
                continue;
            };
            let (current, queued) = cpus.running(view, cpu)?;
            running.extend([current, queued]);
            if !registers.in_user_mode() {
                self.look_at_kernel(view, cpu, registers, (current, queued), verdict);
            }
        }
        running.sort_unstable();
        Ok(running)
    }

    /// Looks at a CPU that is in the kernel. In the middle of a task switch one of two tasks has the CPU's stack
    /// pointer, the other has its own saved.
    fn look_at_kernel(
        &mut self,
        view: &dyn KernelView,
        cpu: usize,
        registers: &Registers,
        (current, queued): (Gva, Gva),
        verdict: &mut Verdict,
    ) {
        let mut buffer = std::mem::take(&mut self.buffer);
        let look = self.look(view);
        let (task, other) = match current == queued {
            true => (current, None),
            false if look.is_on_stack_of(queued, registers.rsp()) => (queued, Some(current)),
            false => (current, Some(queued)),
        };
        let state = look.running(task, cpu, registers, &mut buffer);
        self.report(view, task, &state, verdict);
        if let Some(other) = other {
            let state = self.look(view).sleeping(other, &mut buffer);
            self.report(view, other, &state, verdict);
        }
        self.buffer = buffer;
    }

    /// Looks at the tasks that ran since the last pass and do not run now. Gives those that ran; none where the time was over
    /// before all were seen.
    fn look_at_changed_in_pause(
        &mut self,
        view: &dyn KernelView,
        running: &[Gva],
        is_over: &dyn Fn() -> bool,
    ) -> Result<Option<Vec<Gva>>, SetupError> {
        let any = self.finder.cpus.switches(view)? != self.switches;
        let mut changed = Vec::new();
        let mut tasks = std::mem::take(&mut self.tasks);
        let mut all_seen = true;
        for task in &mut tasks {
            if task.state == State::Running || any && switches(view, task) != Ok(task.switches) {
                if is_over() {
                    all_seen = false;
                    break;
                }
                changed.push(task.at);
                self.look_in_pause(view, task, running);
            }
        }
        self.tasks = tasks;
        Ok(all_seen.then_some(changed))
    }

    fn look_in_pause(&mut self, view: &dyn KernelView, task: &mut Task, running: &[Gva]) {
        task.state = State::Running;
        if running.binary_search(&task.at).is_err() {
            let mut buffer = std::mem::take(&mut self.buffer);
            let seen = switches(view, task);
            task.state = self.look(view).sleeping_or_dead(task.at, &mut buffer);
            // where the guest runs on, this look counts for the next pause
            task.switches = seen.unwrap_or_default();
            self.buffer = buffer;
        }
    }

    /// Finds and looks at the tasks born since the last pass. Gives false where the time was over before all were seen.
    ///
    /// New processes are at the end of the kernel's list, new threads at the end of their process's, and whoever bore
    /// one ran since then. But where tasks also died, a thread may have taken its process's place in the list
    /// (`de_thread`, fs/exec.c), and where the list never held still, it is not known what is new: then it is read
    /// whole.
    fn look_at_new(
        &mut self,
        view: &dyn KernelView,
        running: &[Gva],
        changed: &[Gva],
        is_over: &dyn Fn() -> bool,
    ) -> Result<bool, SetupError> {
        let finder = self.finder;
        let now = finder.list.counts(view)?;
        if self.counts == Some(now) {
            return Ok(true);
        }
        let died = |before: Counts| {
            let born = now.forks.wrapping_sub(before.forks);
            u64::from(before.threads).wrapping_add(born) != u64::from(now.threads)
        };
        let found = match self.counts {
            Some(before) if before.forks == now.forks => Vec::new(),
            Some(before) if !died(before) => {
                let known = |at| self.is_known(view, at);
                let mut found = finder.list.newest(view, &finder.layout, &known)?;
                let mut heads = Vec::new();
                for &task in running.iter().chain(changed) {
                    heads.extend(threads(view, &finder.layout, task));
                }
                heads.sort_unstable();
                heads.dedup();
                for head in heads.into_iter().filter(|head| head.0 > finder.layout.thread_head) {
                    found.extend(newest_threads(view, &finder.layout, head, &known)?);
                }
                found
            }
            _ => finder.list.all(view, &finder.layout)?.tasks,
        };
        let mut new: Vec<Gva> = found.into_iter().filter(|&at| !self.is_known(view, at)).collect();
        new.sort_unstable();
        new.dedup();
        // a thread that replaces its leader also takes over the leader's start time (`de_thread`): it is no birth
        let latest = self.tasks.iter().map(|task| task.start_time).max();
        let births = new.iter().filter(|&&at| Some(self.start_time(view, at)) > latest);
        let listed_births = births.count() as u64;
        let born = self.counts.map(|before| now.forks.wrapping_sub(before.forks));
        // the next pass reads the list again
        self.counts = None;
        let mut looked = Vec::with_capacity(new.len());
        for &at in &new {
            if is_over() {
                return Ok(false);
            }
            let mut task = self.unknown(view, at);
            self.look_in_pause(view, &mut task, running);
            looked.push(task);
        }
        self.tasks.retain(|task| new.binary_search(&task.at).is_err());
        self.tasks.extend(looked);
        self.tasks.sort_by_key(|task| task.at);
        // a task that was born since, and that no list names, may be exiting already
        if born != Some(listed_births) {
            self.unlisted = self.unlisted_stacks(view)?;
        }
        Ok(true)
    }

    /// Looks at the stacks of tasks that no list names. Those that run were looked at with their CPUs.
    fn look_at_unlisted(
        &mut self,
        view: &dyn KernelView,
        running: &[Gva],
        verdict: &mut Verdict,
    ) -> Result<(), SetupError> {
        let Quiescence {
            layout, cpus, stacks, ..
        } = self.finder;
        let stack = |task: &Gva| view.read_u64(task.wrapping_add(layout.stack)).map(Gva);
        let of_running: Vec<Gva> = running.iter().filter_map(|task| stack(task).ok()).collect();
        let mut buffer = std::mem::take(&mut self.buffer);
        for stack in stacks.still(view, cpus, &self.unlisted) {
            if of_running.contains(&stack) {
                continue;
            }
            match self.look(view).unlisted(stack, &mut buffer) {
                State::Unsure(why) if verdict.unsure.len() < Verdict::NAMED_MAX => {
                    verdict.unsure.push(Unsure { task: None, why });
                }
                _ => {}
            }
        }
        self.buffer = buffer;
        Ok(())
    }

    fn is_known(&self, view: &dyn KernelView, at: Gva) -> bool {
        let found = self.tasks.binary_search_by_key(&at, |task| task.at);
        let task = found.ok().and_then(|index| self.tasks.get(index));
        task.is_some_and(|task| task.start_time == self.start_time(view, at))
    }
}
