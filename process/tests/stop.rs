//! Stopping threads of real little processes of this host.

mod victim;

use nix::libc;
use nix::sys::signal::Signal;
use process::{Doing, StopError, Stopped, Thread, threads};
use std::time::{Duration, Instant};
use victim::Victim;

/// How long a stop may take: the host may be busy.
const WITHIN: Duration = Duration::from_secs(5);
/// How long what must happen is waited for.
const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until that is so.
#[track_caller]
fn until(what: &str, mut so: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < end, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Demands that no thread of the process is stopped or traced, and that all workers work.
#[track_caller]
fn assert_free(victim: &mut Victim) {
    for (thread, stat) in threads(victim.pid()).unwrap() {
        assert!(!matches!(stat.state, 't' | 'T'), "{stat:?}");
        assert_eq!(victim::tracer(thread), 0, "{stat:?}");
    }
    let before = victim.counts();
    until("all workers work", || {
        let now = victim.counts();
        now.iter().zip(&before).all(|(now, before)| now > before)
    });
}

#[test]
fn chosen_threads_stop_and_others_run_on() {
    let mut victim = Victim::start();
    let chosen = [victim.workers[0], victim.workers[1]];
    let stopped = Stopped::stop(&chosen, WITHIN).unwrap();
    let before = victim.counts();
    until("the third worker works", || victim.counts()[2] > before[2] + 1000);
    assert_eq!(victim.counts()[..2], before[..2]);
    for thread in chosen {
        assert_eq!(thread.stat().unwrap().state, 't');
    }
    assert_eq!(stopped.registers().unwrap().len(), 2);
    assert!(stopped.threads().eq(chosen));
    stopped.resume().unwrap();
    assert_free(&mut victim);
}

#[test]
fn a_thread_that_waits_for_events_and_is_not_chosen_is_not_woken() {
    let mut victim = Victim::start();
    for _ in 0..200 {
        drop(Stopped::stop(&victim.workers, WITHIN).unwrap());
    }
    assert_eq!(victim.interrupted_waits(), 0);
    // The rule has a reason.
    drop(Stopped::stop(&[victim.waiter], WITHIN).unwrap());
    until("the waiter is woken", || victim.interrupted_waits() == 1);
    assert_free(&mut victim);
}

#[test]
fn a_stopped_thread_tells_its_system_call() {
    let victim = Victim::start();
    let Doing::Call { number, args } = victim.waiter.doing().unwrap() else {
        panic!("{:?}", victim.waiter.doing());
    };
    assert_eq!(number, libc::SYS_epoll_wait.cast_unsigned());
    let stopped = Stopped::stop(&[victim.waiter], WITHIN).unwrap();
    let registers = stopped.registers().unwrap()[0];
    assert_eq!(registers.call, Some(number));
    assert_eq!(registers.args, args[..3]);
    assert_eq!(registers.result, -i64::from(libc::EINTR));
}

#[test]
fn a_signal_that_comes_in_a_stop_arrives_after_it() {
    let mut victim = Victim::start();
    let stopped = Stopped::stop(&victim.workers, WITHIN).unwrap();
    victim.signal(0, libc::SIGUSR1);
    for _ in 0..3 {
        victim.signal(1, libc::SIGRTMIN());
    }
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(victim.signals(), [0, 0]);
    drop(stopped);
    until("all signals arrive", || victim.signals() == [1, 3]);
    assert_free(&mut victim);
}

#[test]
fn no_signal_is_lost_in_many_stops() {
    let mut victim = Victim::start();
    let (pid, tid) = (victim.pid(), victim.workers[0].tid);
    let sender = std::thread::spawn(move || {
        for _ in 0..2000 {
            victim::send(pid, tid, libc::SIGRTMIN());
            std::thread::sleep(Duration::from_micros(50));
        }
    });
    let mut stops = 0;
    while !sender.is_finished() || stops < 200 {
        Stopped::stop(&victim.workers, WITHIN).unwrap().resume().unwrap();
        stops += 1;
    }
    sender.join().unwrap();
    until("all signals arrive", || victim.signals()[1] == 2000);
    assert_free(&mut victim);
}

#[test]
fn a_killed_tracer_leaves_nothing_stopped_and_no_signal_lost() {
    let mut victim = Victim::start();
    let mut sent = 0;
    for _ in 0..10 {
        // A signal that comes between seizing and interrupting is what the thread is stopped in front of.
        let sender = victim.start_sender(0);
        let mut tracer = victim.start_tracer();
        sent += sender.stop();
        tracer.kill().unwrap();
        tracer.wait().unwrap();
        until("all signals arrive", || victim.signals()[1] == sent);
        assert_free(&mut victim);
    }
}

#[test]
fn a_tracer_that_is_killed_in_the_middle_of_stops_loses_no_signal() {
    let mut victim = Victim::start();
    let mut sent = 0;
    for _ in 0..10 {
        let mut tracer = victim.start_stopper();
        for _ in 0..100 {
            victim.signal(0, libc::SIGRTMIN());
            sent += 1;
        }
        tracer.kill().unwrap();
        tracer.wait().unwrap();
        until("all signals arrive", || victim.signals()[1] == sent);
        assert_free(&mut victim);
    }
}

#[test]
fn a_thread_that_has_ended_is_named_and_the_others_run() {
    let mut victim = Victim::start();
    let chosen = victim.workers.clone();
    victim.end_worker(2);
    until("it has ended", || chosen[2].stat().is_err());
    let error = Stopped::stop(&chosen, WITHIN).unwrap_err();
    assert!(
        matches!(error, StopError::Gone(thread) if thread == chosen[2]),
        "{error}"
    );
    assert_free(&mut victim);
}

#[test]
fn threads_end_while_they_are_being_stopped() {
    for delay_us in [0, 20, 50, 100, 200, 500] {
        let mut victim = Victim::start();
        let chosen = victim.workers.clone();
        victim.end_worker_after(2, delay_us);
        let end = Instant::now() + PATIENCE;
        let error = loop {
            match Stopped::stop(&chosen, WITHIN) {
                Ok(stopped) => drop(stopped),
                Err(error) => break error,
            }
            assert!(Instant::now() < end);
        };
        assert!(
            matches!(error, StopError::Gone(thread) if thread == chosen[2]),
            "{error}"
        );
        assert_free(&mut victim);
    }
}

#[test]
fn another_thread_of_the_same_number_is_not_touched() {
    let mut victim = Victim::start();
    let former = Thread {
        start_time: victim.waiter.start_time - 1,
        ..victim.waiter
    };
    let error = Stopped::stop(&[victim.workers[0], former], WITHIN).unwrap_err();
    assert!(matches!(error, StopError::Gone(thread) if thread == former), "{error}");
    assert_free(&mut victim);
}

#[test]
fn a_process_that_is_killed_in_a_stop_ends_at_once() {
    let mut victim = Victim::start();
    let stopped = Stopped::stop(&victim.workers, WITHIN).unwrap();
    victim.kill();
    let error = stopped.resume().unwrap_err();
    assert!(matches!(error, StopError::Gone(_)), "{error}");
    let began = Instant::now();
    assert_eq!(victim.wait(), Some(Signal::SIGKILL as i32));
    assert!(began.elapsed() < PATIENCE);
}

#[test]
fn a_process_that_has_ended_and_is_not_waited_for_is_named() {
    let victim = Victim::start();
    let (all, leader) = (victim.workers.clone(), threads(victim.pid()).unwrap()[0].0);
    victim.kill();
    until("it is a zombie", || leader.stat().is_ok_and(|stat| stat.has_ended()));
    for thread in [leader, all[0]] {
        let error = Stopped::stop(&[thread], WITHIN).unwrap_err();
        assert!(matches!(error, StopError::Gone(gone) if gone == thread), "{error}");
    }
}

#[test]
fn a_process_that_its_operator_stopped_stays_so() {
    let mut victim = Victim::start();
    victim::send_all(victim.pid(), libc::SIGSTOP);
    until("it is stopped", || victim.workers[0].stat().unwrap().state == 'T');
    let error = Stopped::stop(&victim.workers, WITHIN).unwrap_err();
    let is_named = matches!(error, StopError::GroupStopped { signal, .. } if signal == libc::SIGSTOP);
    assert!(is_named, "{error}");
    until("it is stopped again", || victim.workers[0].stat().unwrap().state == 'T');
    assert!(victim.workers.iter().all(|thread| victim::tracer(*thread) == 0));
    victim::send_all(victim.pid(), libc::SIGCONT);
    assert_free(&mut victim);
}

#[test]
fn an_operator_who_stops_the_process_in_a_stop_finds_it_stopped() {
    let mut victim = Victim::start();
    let stopped = Stopped::stop(&victim.workers, WITHIN).unwrap();
    victim::send_all(victim.pid(), libc::SIGSTOP);
    stopped.resume().unwrap();
    for thread in victim.workers.clone() {
        until("it is stopped", || thread.stat().unwrap().state == 'T');
    }
    victim::send_all(victim.pid(), libc::SIGCONT);
    assert_free(&mut victim);
}

#[test]
fn another_tracer_is_named() {
    let mut victim = Victim::start();
    let mut tracer = victim.start_tracer();
    let error = Stopped::stop(&victim.workers, WITHIN).unwrap_err();
    let StopError::Traced { thread, tracer: by } = error else {
        panic!("{error}");
    };
    assert_eq!(thread, victim.workers[0]);
    // The tracer is a thread of that process.
    assert!(
        threads(tracer.id().cast_signed())
            .unwrap()
            .iter()
            .any(|(thread, _)| thread.tid == by)
    );
    tracer.kill().unwrap();
    tracer.wait().unwrap();
    assert_free(&mut victim);
}

#[test]
fn a_thread_that_cannot_stop_is_named_and_holds_up_no_other() {
    let mut victim = Victim::start();
    // The kernel lets no tracer stop a thread that waits for its child to start a program.
    let sleeper = victim.start_vfork(6000);
    let chosen = [victim.workers[0], sleeper, victim.workers[1]];
    let pause = std::thread::spawn(move || Stopped::stop(&chosen, Duration::from_secs(2)).unwrap_err());
    let is_traced = |thread: Thread| victim::tracer(thread) != 0;
    until("all are traced", || chosen.into_iter().all(is_traced));
    until("the others are let go", || {
        !is_traced(chosen[0]) && !is_traced(chosen[2])
    });
    assert!(is_traced(sleeper) && !pause.is_finished());
    let error = pause.join().unwrap();
    assert!(
        matches!(error, StopError::Late { thread, .. } if thread == sleeper),
        "{error}"
    );
    assert_free(&mut victim);
}
