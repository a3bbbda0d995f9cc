//! What copies print, line by line behind their rank.

use std::io::{BufRead, BufReader, Read, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// A line without end, such as another program's progress bar, is passed on in pieces.
const MAX_LINE: u64 = 64 << 10;

/// Copies the output of all ranks, a thread a stream.
pub(super) struct Outputs {
    open: Sender<()>,
    closed: Receiver<()>,
}

impl Outputs {
    pub(super) fn new() -> Self {
        let (open, closed) = channel();
        Self { open, closed }
    }

    /// Copies `from` to `to` until its end.
    pub(super) fn copy(
        &self,
        rank: usize,
        from: impl Read + Send + 'static,
        to: impl Write + Send + 'static,
    ) {
        let open = self.open.clone();
        std::thread::spawn(move || {
            copy_lines(&format!("[rank {rank}] "), from, to);
            drop(open);
        });
    }

    /// Waits for the end of all streams; not for longer than `grace`, since a process that left its
    /// group may hold one open for good.
    pub(super) fn finish(self, grace: Duration) {
        drop(self.open);
        // Nobody sends: this returns when the last sender is dropped.
        let end = self.closed.recv_timeout(grace);
        debug_assert!(matches!(
            end,
            Err(RecvTimeoutError::Disconnected | RecvTimeoutError::Timeout)
        ));
    }
}

fn copy_lines(prefix: &str, from: impl Read, mut to: impl Write) {
    let mut reader = BufReader::new(from);
    let mut line = prefix.as_bytes().to_vec();
    while matches!(reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line), Ok(n) if n > 0) {
        if !line.ends_with(b"\n") {
            line.push(b'\n');
        }
        // In one piece, so that lines of two ranks never mix. A reader that has gone must not
        // block the copies on their own output.
        let _ = to.write_all(&line).and_then(|()| to.flush());
        line.truncate(prefix.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copied(text: &[u8]) -> Vec<u8> {
        let mut to = Vec::new();
        copy_lines("[rank 3] ", text, &mut to);
        to
    }

    #[test]
    fn each_line_has_its_rank() {
        assert_eq!(copied(b""), b"");
        assert_eq!(copied(b"a\n\nb"), b"[rank 3] a\n[rank 3] \n[rank 3] b\n");
        assert_eq!(copied(b"\xff\n"), b"[rank 3] \xff\n");
    }

    #[test]
    fn a_line_without_end_is_passed_on_in_pieces() {
        let text = copied(&vec![b'x'; MAX_LINE as usize + 1]);
        assert_eq!(text.iter().filter(|b| **b == b'\n').count(), 2);
        assert_eq!(text.iter().filter(|b| **b == b'x').count(), MAX_LINE as usize + 1);
    }
}
