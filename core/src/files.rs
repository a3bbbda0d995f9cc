//! Files that are appended to.

use std::fs::File;
use std::io::{Result, Seek, SeekFrom, Write};

/// Appends all of it, or, where there is no room for that, nothing: half a line or record would spoil
/// what is appended later.
pub(crate) fn append_whole(file: &mut File, bytes: &[u8]) -> Result<()> {
    let length = file.stream_position()?;
    let written = file.write_all(bytes);
    if written.is_err() {
        // Should that fail too, the first error is the one that says why.
        let _ = file.set_len(length).and_then(|()| file.seek(SeekFrom::Start(length)));
    }
    written
}
