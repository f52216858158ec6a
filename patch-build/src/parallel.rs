//! Work on many things, as many at a time as there are processors.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

/// Does the work for each, the next as soon as a processor is free; `said` is told of each that begins, with its number. What comes of
/// them is in their order.
pub(crate) fn in_parallel<I: Sync, T: Send>(
    all: &[I],
    work: impl Fn(usize, &I) -> T + Sync,
    said: &dyn Fn(usize, &I),
) -> Vec<T> {
    let jobs = thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicUsize::new(0);
    let (begins, begun) = mpsc::channel();
    let worker = |begins: &mpsc::Sender<usize>| {
        let mut done = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(one) = all.get(number) else {
                return done;
            };
            // Nobody listens any more where the other side panics.
            if begins.send(number).is_err() {
                return done;
            }
            done.push((number, work(number, one)));
        }
    };
    let mut done: Vec<(usize, T)> = thread::scope(|scope| {
        let threads: Vec<_> = (0..jobs.min(all.len()))
            .map(|_| {
                let (worker, begins) = (&worker, begins.clone());
                scope.spawn(move || worker(&begins))
            })
            .collect();
        drop(begins);
        for number in begun {
            all.get(number).into_iter().for_each(|one| said(number, one));
        }
        let ends = threads.into_iter().map(|thread| thread.join());
        ends.flat_map(|end| end.unwrap_or_else(|panic| resume_unwind(panic)))
            .collect()
    });
    done.sort_by_key(|(number, _)| *number);
    done.into_iter().map(|(_, made)| made).collect()
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::time::Duration;

    use super::*;

    #[test]
    fn results_are_in_order_and_each_beginning_is_said() {
        let said = RefCell::new(Vec::new());
        let all = [30_u64, 1, 2, 3, 4];
        let work = |number: usize, millis: &u64| {
            thread::sleep(Duration::from_millis(*millis));
            number * 10
        };
        let made = in_parallel(&all, work, &|number, _| said.borrow_mut().push(number));
        assert_eq!(made, [0, 10, 20, 30, 40]);
        let mut said = said.into_inner();
        said.sort_unstable();
        assert_eq!(said, [0, 1, 2, 3, 4]);
        assert_eq!(in_parallel(&[], |_, (): &()| (), &|_, ()| ()), []);
    }

    #[test]
    fn what_takes_long_holds_up_only_one_processor() {
        let jobs = thread::available_parallelism().map_or(1, usize::from);
        // The first goes on until all others have begun.
        let begun = AtomicUsize::new(0);
        let count = 4 * jobs;
        let work = |number: usize, (): &()| {
            begun.fetch_add(1, Ordering::SeqCst);
            for _ in 0..500 {
                if number > 0 || jobs == 1 || begun.load(Ordering::SeqCst) == count {
                    return true;
                }
                thread::sleep(Duration::from_millis(20));
            }
            false
        };
        assert_eq!(in_parallel(&vec![(); count], work, &|_, ()| ()), vec![true; count]);
    }
}
