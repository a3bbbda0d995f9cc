//! The thread that writes the file.
//!
//! Each write ends with the closing bracket, and the next one begins on top of it. So the file is
//! valid JSON between any two writes, however the program ends. Should one be torn, viewers still
//! take it: the format allows the bracket to be missing.

use super::encoder::{Encoder, Event};
use crate::{Error, console};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, SyncSender};

/// Bytes that are written at once, at most some more.
const PIECE: usize = 256 << 10;
const END: &[u8] = b"\n]\n";

pub(super) fn start(file: File, queue: Receiver<Event>) -> Result<(), Error> {
    let thread = std::thread::Builder::new().name("mobula-timeline".to_owned());
    let spawned = thread.spawn(move || {
        if let Err(error) = serve(&file, &queue) {
            console::note(format!("the timeline ends here: cannot write it: {error}"));
        }
    });
    spawned.map(drop).map_err(|source| Error::system("starting a thread", source))
}

/// Writes what there is, then waits for more.
fn serve(file: &File, queue: &Receiver<Event>) -> std::io::Result<()> {
    let mut encoder = Encoder::new(std::process::id());
    let (mut end, mut piece) = (0, Vec::new());
    while let Ok(first) = queue.recv() {
        let mut marks = Vec::new();
        take(&mut encoder, first, &mut piece, &mut marks);
        while piece.len() < PIECE
            && let Ok(next) = queue.try_recv()
        {
            take(&mut encoder, next, &mut piece, &mut marks);
        }
        if !piece.is_empty() {
            let events = piece.len();
            piece.extend_from_slice(END);
            file.write_all_at(&piece, end)?;
            end += events as u64;
            piece.clear();
        }
        // Who waits for a mark may have given up.
        for mark in marks {
            let _ = mark.send(());
        }
    }
    Ok(())
}

fn take(encoder: &mut Encoder, event: Event, out: &mut Vec<u8>, marks: &mut Vec<SyncSender<()>>) {
    match event {
        Event::Mark(mark) => marks.push(mark),
        event => encoder.add(event, out),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::sync_channel;

    #[test]
    fn the_file_is_whole_after_every_write() {
        let path = tempfile::NamedTempFile::new().expect("a file");
        let file = path.reopen().expect("the same");
        let (events, queue) = sync_channel(4);
        start(file, queue).expect("a thread");
        for n in 1..=3 {
            events.send(Event::Process { pid: n, name: "x".repeat(10) }).expect("it listens");
            let (mark, written) = sync_channel(1);
            events.send(Event::Mark(mark)).expect("it listens");
            written.recv().expect("written");
            let text = std::fs::read(path.path()).expect("the file");
            let all: Vec<serde_json::Value> = serde_json::from_slice(&text).expect("a JSON array");
            assert_eq!(all.len(), n as usize);
        }
    }
}
