//! The last check, in the pause: of the tasks that run, and of those that ran since the snapshot.

use super::cpus::Place;
use super::list::{Counts, newest_threads, threads};
use super::snapshot::{FRAMES_MAX, Quiescence, Snapshot, Task, switches};
use super::verdict::{State, Unsure, Verdict, Why};
use crate::addr::Gva;
use crate::unwind::{KernelView, SetupError};
use crate::vcpu::Registers;

impl Snapshot<'_> {
    /// Checks whether any context is inside an old function while all vCPUs are paused. `vcpus` are the registers of every vCPU. The work
    /// grows with the CPUs and with the tasks that ran since [`Snapshot::rescan`]; if any ran, two words of every task are compared, too.
    /// Gives `None` where `is_over` becomes true before all tasks are checked.
    ///
    /// # Errors
    ///
    /// Something that all checks depend on cannot be read.
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
            // The states were found with the code as it was before.
            self.tasks.clear();
            return Ok(Some(verdict));
        }
        let running = self.check_cpus(view, vcpus, &mut verdict)?;
        let changed = self.check_changed_in_pause(view, &running, is_over)?;
        let all_checked = match changed {
            Some(changed) => self.check_new(view, &running, &changed, is_over)?,
            None => false,
        };
        if !all_checked {
            return Ok(None);
        }
        self.check_unlisted(view, &running, &mut verdict)?;
        // A task that sleeps may have been switched to since it was checked, which its counts do not tell.
        for at in &running {
            let found = self.tasks.binary_search_by_key(at, |task| task.at);
            if let Some(task) = found.ok().and_then(|index| self.tasks.get_mut(index)) {
                task.state = State::Running;
            }
        }
        for task in self
            .tasks
            .iter()
            .filter(|task| running.binary_search(&task.at).is_err())
        {
            let unchecked = State::Unsure(Why::NotChecked);
            let state = if task.state == State::Running {
                &unchecked
            } else {
                &task.state
            };
            self.report(view, task.at, state, &mut verdict);
        }
        Ok(Some(verdict))
    }

    /// Checks every CPU. Gives the tasks that are running, or being switched to or from, sorted.
    fn check_cpus(
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
                self.check_kernel_mode(view, cpu, registers, (current, queued), verdict);
            }
        }
        running.sort_unstable();
        Ok(running)
    }

    /// Checks a CPU that is in the kernel. In the middle of a task switch, one of two tasks has the CPU's stack pointer; the other has a
    /// saved stack pointer.
    fn check_kernel_mode(
        &mut self,
        view: &dyn KernelView,
        cpu: usize,
        registers: &Registers,
        (current, queued): (Gva, Gva),
        verdict: &mut Verdict,
    ) {
        let mut buffer = std::mem::take(&mut self.buffer);
        let check = self.stack_check(view);
        let (task, other) = match current == queued {
            true => (current, None),
            false if check.is_on_stack_of(queued, registers.rsp()) => (queued, Some(current)),
            false => (current, Some(queued)),
        };
        let state = check.running(task, cpu, registers, &mut buffer);
        self.report(view, task, &state, verdict);
        if let Some(other) = other {
            let state = self.stack_check(view).sleeping(other, &mut buffer);
            self.report(view, other, &state, verdict);
        }
        self.buffer = buffer;
    }

    /// Checks the tasks that ran since the last pass and do not run now. Gives those that ran; `None` where the time was over before all
    /// were checked.
    fn check_changed_in_pause(
        &mut self,
        view: &dyn KernelView,
        running: &[Gva],
        is_over: &dyn Fn() -> bool,
    ) -> Result<Option<Vec<Gva>>, SetupError> {
        let any = self.finder.cpus.switches(view)? != self.switches;
        let mut changed = Vec::new();
        let mut tasks = std::mem::take(&mut self.tasks);
        let mut all_checked = true;
        for task in &mut tasks {
            if task.state == State::Running || any && switches(view, task) != Some(task.switches) {
                if is_over() {
                    all_checked = false;
                    break;
                }
                changed.push(task.at);
                self.check_paused(view, task, running);
            }
        }
        self.tasks = tasks;
        Ok(all_checked.then_some(changed))
    }

    fn check_paused(&mut self, view: &dyn KernelView, task: &mut Task, running: &[Gva]) {
        task.state = State::Running;
        if running.binary_search(&task.at).is_err() {
            let mut buffer = std::mem::take(&mut self.buffer);
            let seen = switches(view, task);
            task.state = self.stack_check(view).sleeping_or_dead(task.at, &mut buffer);
            // If the guest runs on, the next pause uses this check.
            task.switches = seen.unwrap_or_default();
            self.buffer = buffer;
        }
    }

    /// Finds and checks the tasks born since the last pass. Gives false where the time was over before all were checked.
    ///
    /// New processes are at the end of the kernel's list, new threads at the end of their process's list, and their parents ran since the
    /// last pass. The whole list is read if tasks also died, because a thread may then have taken its process's place in the list
    /// (`de_thread`, fs/exec.c), and if the list changed during each pass.
    fn check_new(
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
                let known = |at| self.is_in_snapshot(view, at);
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
        let mut new: Vec<Gva> = found.into_iter().filter(|&at| !self.is_in_snapshot(view, at)).collect();
        new.sort_unstable();
        new.dedup();
        // A thread that replaces its leader also takes over the leader's start time (`de_thread`). It is not a birth.
        let latest = self.tasks.iter().map(|task| task.start_time).max();
        let births = new.iter().filter(|&&at| Some(self.start_time(view, at)) > latest);
        let listed_births = births.count() as u64;
        let born = self.counts.map(|before| now.forks.wrapping_sub(before.forks));
        // The next pass reads the list again.
        self.counts = None;
        let mut checked = Vec::with_capacity(new.len());
        for &at in &new {
            if is_over() {
                return Ok(false);
            }
            let mut task = self.unchecked(view, at);
            self.check_paused(view, &mut task, running);
            checked.push(task);
        }
        self.tasks.retain(|task| new.binary_search(&task.at).is_err());
        self.tasks.extend(checked);
        self.tasks.sort_by_key(|task| task.at);
        // A task that was born since and is on no list may be exiting already.
        if born != Some(listed_births) {
            self.unlisted = self.unlisted_stacks(view)?;
        }
        Ok(true)
    }

    /// Checks the stacks of tasks that are on no list. Those that run were checked with their CPUs.
    fn check_unlisted(
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
            match self.stack_check(view).unlisted(stack, &mut buffer) {
                State::Unsure(why) if verdict.unsure.len() < Verdict::NAMED_MAX => {
                    verdict.unsure.push(Unsure { task: None, why });
                }
                _ => {}
            }
        }
        self.buffer = buffer;
        Ok(())
    }

    fn is_in_snapshot(&self, view: &dyn KernelView, at: Gva) -> bool {
        let found = self.tasks.binary_search_by_key(&at, |task| task.at);
        let task = found.ok().and_then(|index| self.tasks.get(index));
        task.is_some_and(|task| task.start_time == self.start_time(view, at))
    }
}
