//! `metrics.jsonl` and TensorBoard event files, with the same numbers.

use std::fs::{File, OpenOptions};
use std::io::Write;

use anyhow::{Context, Result};
use serde_json::{Map, Value};

use super::atomic;
use super::tensorboard::EventWriter;
use super::{RunDirectory, names};

pub struct Records {
    lines: File,
    events: EventWriter,
}

impl Records {
    /// Opens the records of a run that has done `step` steps; records of later steps are dropped.
    pub fn open(run: &RunDirectory, step: usize) -> Result<Self> {
        let path = run.file(names::METRICS);
        // A run that was killed before its first checkpoint has records too.
        let goes_on = path.exists();
        if goes_on {
            let text = std::fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
            let kept = text.split_inclusive('\n').filter(|line| {
                let record: Option<Value> = serde_json::from_str(line).ok();
                record.and_then(|record| record["step"].as_u64()).is_some_and(|at| at <= step as u64)
            });
            atomic::write(&path, kept.collect::<String>().as_bytes())?;
        }
        let lines = OpenOptions::new().create(true).append(true).open(&path);
        let lines = lines.with_context(|| format!("{} cannot be written", path.display()))?;
        let events = EventWriter::create(&run.path, if goes_on { step as u64 + 1 } else { 0 })?;
        Ok(Records { lines, events })
    }

    /// Adds one record. Every number in it becomes a TensorBoard scalar, with nested names joined by `/`.
    pub fn add(&mut self, kind: &str, step: usize, values: Map<String, Value>) -> Result<()> {
        scalars(kind, &values, &mut |tag, value| self.events.scalar(step as u64, tag, value))?;
        let mut record = Map::new();
        record.insert("kind".to_owned(), kind.into());
        record.insert("step".to_owned(), step.into());
        record.extend(values);
        let line = format!("{}\n", Value::Object(record));
        self.lines.write_all(line.as_bytes()).context("metrics.jsonl cannot be written")
    }
}

fn scalars(prefix: &str, values: &Map<String, Value>, add: &mut dyn FnMut(&str, f64) -> Result<()>) -> Result<()> {
    for (name, value) in values {
        let tag = format!("{prefix}/{name}");
        match value {
            Value::Object(inner) => scalars(&tag, inner, add)?,
            Value::Number(number) => add(&tag, number.as_f64().unwrap_or(f64::NAN))?,
            _ => {}
        }
    }
    Ok(())
}
