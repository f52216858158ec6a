//! Work on many things, as many at a time as there are processors.

use std::panic::resume_unwind;
use std::thread;

/// Does the work for each; `said` is told of each that begins, with its number.
pub(super) fn in_parallel<I: Sync, T: Send>(
    all: &[I],
    work: impl Fn(usize, &I) -> T + Sync,
    said: &dyn Fn(usize, &I),
) -> Vec<T> {
    let jobs = thread::available_parallelism().map_or(1, usize::from);
    let numbered: Vec<(usize, &I)> = all.iter().enumerate().collect();
    let mut done = Vec::new();
    for some in numbered.chunks(jobs) {
        some.iter().for_each(|(number, one)| said(*number, one));
        done.extend(thread::scope(|scope| {
            let work = &work;
            let threads: Vec<_> = some
                .iter()
                .map(|(number, one)| scope.spawn(move || work(*number, one)))
                .collect();
            let ends = threads.into_iter().map(|thread| thread.join());
            ends.map(|end| end.unwrap_or_else(|panic| resume_unwind(panic)))
                .collect::<Vec<T>>()
        }));
    }
    done
}
