//! TensorBoard event files: length-framed protobuf `Event` records with masked CRC-32C.
//!
//! The format is TFRecord (tensorflow/core/lib/io/record_writer.h) around
//! tensorflow/core/util/event.proto; only scalars are written.

use crate::Error;
use crate::error::AtPath;
use crate::files::append_whole;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Appends scalars to one event file.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Starts a new file in `dir`, named after the time in seconds since 1970 and the process.
    pub fn create(dir: &Path, time: f64) -> Result<Self, Error> {
        std::fs::create_dir_all(dir).at("create", dir)?;
        let name = format!("events.out.tfevents.{}.{}", (time * 1e3) as u64, std::process::id());
        let path = dir.join(name);
        let file = File::create(&path).at("create", &path)?;
        let mut writer = Self { path, file };
        let mut event = double(1, time);
        event.extend(bytes(3, b"brain.Event:2"));
        writer.record(&event)?;
        Ok(writer)
    }

    /// Appends one event with all of the values.
    pub fn scalars(
        &mut self,
        time: f64,
        step: u64,
        values: &BTreeMap<String, f64>,
    ) -> Result<(), Error> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut entry = bytes(1, tag.as_bytes());
            entry.extend(float(2, *value as f32));
            summary.extend(bytes(1, &entry));
        }
        let mut event = double(1, time);
        event.extend(integer(2, step));
        event.extend(bytes(5, &summary));
        self.record(&event)
    }

    /// One TFRecord, whole or not at all; a crash leaves at most one torn record at the end.
    fn record(&mut self, event: &[u8]) -> Result<(), Error> {
        let length = (event.len() as u64).to_le_bytes();
        let mut record = length.to_vec();
        record.extend(masked_crc32c(&length).to_le_bytes());
        record.extend(event);
        record.extend(masked_crc32c(event).to_le_bytes());
        append_whole(&mut self.file, &record).at("append to", &self.path)
    }
}

// The four protobuf wire types that an event needs.

fn key(field: u8, wire_type: u8) -> Vec<u8> {
    vec![field << 3 | wire_type]
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

fn integer(field: u8, value: u64) -> Vec<u8> {
    [key(field, 0), varint(value)].concat()
}

fn double(field: u8, value: f64) -> Vec<u8> {
    [key(field, 1), value.to_le_bytes().to_vec()].concat()
}

fn bytes(field: u8, value: &[u8]) -> Vec<u8> {
    [key(field, 2), varint(value.len() as u64), value.to_vec()].concat()
}

fn float(field: u8, value: f32) -> Vec<u8> {
    [key(field, 5), value.to_le_bytes().to_vec()].concat()
}

fn masked_crc32c(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli, reflected polynomial 0x82f63b78), bit by bit: events are small.
fn crc32c(data: &[u8]) -> u32 {
    !data.iter().fold(!0u32, |crc, byte| {
        (0..8)
            .fold(crc ^ u32::from(*byte), |c, _| (c >> 1) ^ (0x82f6_3b78 & (c & 1).wrapping_neg()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The check value of CRC-32C/iSCSI.
    #[test]
    fn crc32c_matches_the_catalogue() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn records_are_framed_and_checksummed() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let mut writer = EventWriter::create(dir.path(), 1.5).expect("create");
        writer.scalars(2.0, 300, &BTreeMap::from([("loss".to_owned(), 0.5)])).expect("write");
        let data = std::fs::read(&writer.path).expect("read");
        let (mut at, mut events) = (0, Vec::new());
        while at < data.len() {
            let word = |i: usize| u32::from_le_bytes(data[i..i + 4].try_into().expect("4 bytes"));
            let length = word(at) as usize;
            assert_eq!(word(at + 8), masked_crc32c(&data[at..at + 8]));
            let event = &data[at + 12..at + 12 + length];
            assert_eq!(word(at + 12 + length), masked_crc32c(event));
            events.push(event.to_vec());
            at += 16 + length;
        }
        assert_eq!(events.len(), 2);
        assert!(events[0].ends_with(b"brain.Event:2"));
        // step 300 as a varint, then the summary with the tag and 0.5f32.
        assert_eq!(&events[1][9..12], [0x10, 0xac, 0x02]);
        assert!(events[1].ends_with(&[0x15, 0, 0, 0, 0x3f]));
    }
}
