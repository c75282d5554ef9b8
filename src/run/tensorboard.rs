//! TensorBoard event files: TFRecord framing around `Event` messages of scalars.
//!
//! Format: tensorflow/core/lib/io/record_writer.h and tensorflow/core/util/event.proto. A record is the length (u64),
//! its masked CRC-32C, the message, and the message's masked CRC-32C, all little-endian.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

pub struct EventWriter {
    file: File,
}

fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A length-delimited protobuf field.
fn field(out: &mut Vec<u8>, number: u8, content: &[u8]) {
    out.push(number << 3 | 2);
    varint(out, content.len() as u64);
    out.extend(content);
}

/// The start of an `Event`: wall_time = 1 (double), step = 2 (int64).
fn event(step: u64) -> Vec<u8> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
    let mut out = vec![1 << 3 | 1];
    out.extend(now.to_le_bytes());
    out.push(2 << 3);
    varint(&mut out, step);
    out
}

impl EventWriter {
    /// Opens a new event file in `folder`. What earlier files say from `first_step` on, TensorBoard then forgets.
    pub fn create(folder: &Path, first_step: u64) -> Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
        let name = format!("events.out.tfevents.{}.{}.polytask", now / 1_000_000_000, now % 1_000_000_000);
        let path = folder.join(name);
        let file = File::create(&path).with_context(|| format!("{} cannot be written", path.display()))?;
        let mut writer = EventWriter { file };
        let mut version = event(0);
        field(&mut version, 3, b"brain.Event:2");
        writer.record(&version)?;
        if first_step > 0 {
            // SessionLog (field 7) with status = START (1).
            let mut start = event(first_step);
            field(&mut start, 7, &[1 << 3, 1]);
            writer.record(&start)?;
        }
        Ok(writer)
    }

    pub fn scalar(&mut self, step: u64, tag: &str, value: f64) -> Result<()> {
        // Summary.Value: tag = 1, simple_value = 2 (float); Summary: value = 1; Event: summary = 5.
        let mut content = Vec::new();
        field(&mut content, 1, tag.as_bytes());
        content.push(2 << 3 | 5);
        content.extend((value as f32).to_le_bytes());
        let mut summary = Vec::new();
        field(&mut summary, 1, &content);
        let mut message = event(step);
        field(&mut message, 5, &summary);
        self.record(&message)
    }

    fn record(&mut self, message: &[u8]) -> Result<()> {
        let length = (message.len() as u64).to_le_bytes();
        let mut out = length.to_vec();
        out.extend(masked_crc(&length).to_le_bytes());
        out.extend(message);
        out.extend(masked_crc(message).to_le_bytes());
        self.file.write_all(&out).context("the TensorBoard file cannot be written")
    }
}
