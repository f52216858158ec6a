//! The only writer of the program's output. It tells whether a report was written, and never panics as `println!` does where standard
//! output or standard error is a closed pipe or a full disk.

use std::io::{self, ErrorKind, Write};

/// Writes a report to standard output.
///
/// A reader that has closed its pipe does not want the report: that is no error. Others are: the report is not all there.
pub fn report(text: &str) -> io::Result<()> {
    written(&mut io::stdout().lock(), text)
}

/// Writes to standard error. Where that fails there is nobody left to tell.
pub fn message(text: &str) {
    let _ = written(&mut io::stderr().lock(), text);
}

fn written(to: &mut impl Write, text: &str) -> io::Result<()> {
    match to.write_all(text.as_bytes()).and_then(|()| to.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fails each write with this error.
    struct Failing(ErrorKind);

    impl Write for Failing {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Err(self.0.into())
        }
    }

    #[test]
    fn a_closed_pipe_is_no_error_and_a_full_disk_is_one() {
        written(&mut Failing(ErrorKind::BrokenPipe), "report").unwrap();
        let error = written(&mut Failing(ErrorKind::StorageFull), "report").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StorageFull);
    }

    /// `/dev/full` takes nothing, also where all of a text fits a buffer.
    #[test]
    fn what_is_still_in_a_buffer_is_not_written() {
        let mut buffer = io::BufWriter::new(std::fs::File::create("/dev/full").unwrap());
        assert!(written(&mut buffer, "report").is_err());
    }
}
