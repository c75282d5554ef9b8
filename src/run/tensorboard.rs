//! TensorBoard event files: TFRecord framing around `Event` messages of scalars.
//!
//! Format: tensorflow/core/lib/io/record_writer.h and tensorflow/core/util/event.proto. A record is the length (u64),
//! its masked CRC-32C, the message, and the message's masked CRC-32C, all little-endian.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use prost::Message;

pub struct EventWriter {
    file: File,
}

fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[derive(Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
    #[prost(message, optional, tag = "7")]
    session_log: Option<SessionLog>,
}

#[derive(Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Scalar>,
}

/// `Summary.Value` of one number.
#[derive(Message)]
struct Scalar {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

#[derive(Message)]
struct SessionLog {
    /// 1 is START.
    #[prost(int32, tag = "1")]
    status: i32,
}

impl EventWriter {
    /// Opens a new event file in `folder`. TensorBoard then discards events of earlier files from `first_step` on.
    pub fn create(folder: &Path, first_step: u64) -> Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
        let name = format!("events.out.tfevents.{}.{}.polytask", now / 1_000_000_000, now % 1_000_000_000);
        let path = folder.join(name);
        let file = File::create(&path).with_context(|| format!("{} cannot be written", path.display()))?;
        let mut writer = EventWriter { file };
        writer.record(0, Event { file_version: Some("brain.Event:2".to_owned()), ..Event::default() })?;
        if first_step > 0 {
            writer.record(first_step, Event { session_log: Some(SessionLog { status: 1 }), ..Event::default() })?;
        }
        Ok(writer)
    }

    pub fn scalar(&mut self, step: u64, tag: &str, value: f64) -> Result<()> {
        let value = vec![Scalar { tag: tag.to_owned(), simple_value: Some(value as f32) }];
        self.record(step, Event { summary: Some(Summary { value }), ..Event::default() })
    }

    fn record(&mut self, step: u64, event: Event) -> Result<()> {
        let wall_time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
        let message = Event { wall_time, step: step as i64, ..event }.encode_to_vec();
        let length = (message.len() as u64).to_le_bytes();
        let mut out = length.to_vec();
        out.extend(masked_crc(&length).to_le_bytes());
        out.extend(&message);
        out.extend(masked_crc(&message).to_le_bytes());
        self.file.write_all(&out).context("the TensorBoard file cannot be written")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_framed_and_hold_what_was_written() {
        // RFC 3720, B.4: the CRC-32C of 32 zeros.
        assert_eq!(masked_crc(&[0; 32]), 0x8a91_36aau32.rotate_right(15).wrapping_add(0xa282_ead8));
        let folder = tempfile::tempdir().unwrap();
        EventWriter::create(folder.path(), 7).unwrap().scalar(8, "loss/topic", 0.25).unwrap();
        let file = std::fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
        let mut rest = &std::fs::read(file).unwrap()[..];
        let mut events = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let message = &rest[12..12 + length];
            assert_eq!(rest[8..12], masked_crc(&rest[..8]).to_le_bytes());
            assert_eq!(rest[12 + length..16 + length], masked_crc(message).to_le_bytes());
            events.push(Event::decode(message).unwrap());
            rest = &rest[16 + length..];
        }
        assert_eq!(events[0].file_version.as_deref(), Some("brain.Event:2"));
        assert_eq!((events[1].step, events[1].session_log.as_ref().unwrap().status), (7, 1));
        let value = &events[2].summary.as_ref().unwrap().value[0];
        assert_eq!((events[2].step, value.tag.as_str(), value.simple_value), (8, "loss/topic", Some(0.25)));
    }
}
