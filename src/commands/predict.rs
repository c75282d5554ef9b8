//! `polytask predict`: sentences in, JSON lines out, in order, as they come.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use tch::Device;

use super::cli::PredictArgs;
use super::prepare::{self, Trained};
use super::{End, output, stop_flag};
use crate::data::words::character_ranges;
use crate::data::{DeviceSet, EncodedSet, labels};
use crate::evaluate::predict;
use crate::model::Decoded;
use crate::problem::{InvalidInput, Place, Problem, invalid};
use crate::run::atomic::Partial;
use crate::task::{Task, TaskKind};

/// Lines that are labelled together at most: enough to batch by length, few enough to keep a pipe flowing.
const WINDOW: usize = 2048;

/// One line of input.
struct Sentence {
    text: String,
    /// Byte ranges of its words.
    words: Vec<(usize, usize)>,
    /// What else its JSON line holds, which is handed on.
    rest: Map<String, Value>,
}

pub fn run(args: &PredictArgs) -> Result<End> {
    let (device, _) = prepare::machine(&args.machine)?;
    let source: Box<dyn Read + Send> = match &args.input {
        None => Box::new(std::io::stdin()),
        Some(path) if path.is_dir() => return Err(invalid(format!("{} is a folder", path.display()))),
        Some(path) => Box::new(File::open(path).map_err(|error| invalid(format!("{}: {error}", path.display())))?),
    };
    let stop = stop_flag("stopping after this batch")?;
    let read: Vec<&Path> = args.input.as_deref().into_iter().chain([args.run.as_path()]).collect();
    // A file appears whole under its name, or not at all.
    let mut file = args.output.as_deref().map(|path| output(path, &read)).transpose()?;
    let trained = prepare::trained(&args.run, &args.checkpoint, device)?;
    let name = args.input.as_deref().unwrap_or(Path::new("standard input"));
    let target = args.output.as_deref().unwrap_or(Path::new("standard output"));
    let n_done = {
        let mut out: BufWriter<Box<dyn Write>> = BufWriter::new(match &mut file {
            Some(file) => Box::new(file),
            None => Box::new(std::io::stdout().lock()),
        });
        let lines = read_lines(source);
        let mut n_done = 0;
        while let Some(window) = next_window(&lines, &stop)? {
            // What stands before a broken line is told all the same.
            let mut broken = None;
            let sentences = window.iter().enumerate().map(|(i, line)| sentence(line, &trained, (name, n_done + i + 1)));
            let sentences: Vec<Sentence> =
                sentences.map_while(|it| it.map_err(|why| broken = Some(why)).ok()).collect();
            let lines = label(&sentences, &trained, device)?;
            let written = lines.iter().try_for_each(|line| writeln!(out, "{line}")).and_then(|()| out.flush());
            written.with_context(|| target.display().to_string())?;
            if let Some(why) = broken {
                return Err(why);
            }
            n_done += window.len();
        }
        let ended = matches!(lines.try_recv(), Err(TryRecvError::Disconnected));
        (!ended).then_some(n_done)
    };
    if let Some(n_done) = n_done {
        match &args.output {
            None => log::info!("stopped after {n_done} lines"),
            Some(path) => log::info!("stopped after {n_done} lines; {} is not written", path.display()),
        }
        return Ok(End::Interrupted);
    }
    file.map_or(Ok(()), Partial::keep)?;
    Ok(End::Done)
}

/// Reads lines in a thread of its own, so that what has come can be labelled while the rest is on its way.
fn read_lines(source: Box<dyn Read + Send>) -> Receiver<std::io::Result<Vec<u8>>> {
    let (sender, receiver) = sync_channel(2 * WINDOW);
    std::thread::spawn(move || {
        for line in BufReader::new(source).split(b'\n') {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    receiver
}

/// The lines at hand, at least one; `None` at the end, or when it is time to stop.
fn next_window(lines: &Receiver<std::io::Result<Vec<u8>>>, stop: &AtomicBool) -> Result<Option<Vec<Vec<u8>>>> {
    let first = loop {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        match lines.recv_timeout(Duration::from_millis(100)) {
            Ok(line) => break line?,
            Err(RecvTimeoutError::Timeout) => (),
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
        }
    };
    let mut window = vec![first];
    while window.len() < WINDOW {
        match lines.try_recv() {
            Ok(line) => window.push(line?),
            Err(_) => break,
        }
    }
    Ok(Some(window))
}

fn sentence(line: &[u8], trained: &Trained, (file, number): (&Path, usize)) -> Result<Sentence> {
    let wrong = |message: String| InvalidInput(vec![Problem::error(Place::new(file, number), message)]);
    let line = std::str::from_utf8(line).map_err(|_| wrong("invalid UTF-8".to_owned()))?;
    let line = line.strip_suffix('\r').unwrap_or(line);
    let line = line.strip_prefix('\u{feff}').filter(|_| number == 1).unwrap_or(line);
    if !line.trim_start().starts_with('{') {
        return Ok(split(line.to_owned(), trained));
    }
    let mut row: Map<String, Value> =
        serde_json::from_str(line).map_err(|error| wrong(format!("not JSON: {error}")))?;
    let (text, tokens) = (row.shift_remove("text"), row.shift_remove("tokens"));
    row.shift_remove("words");
    if let Some(tokens) = &tokens {
        let tokens: Option<Vec<&str>> = match tokens {
            Value::String(text) => Some(text.split_whitespace().collect()),
            Value::Array(tokens) => tokens.iter().map(Value::as_str).collect(),
            _ => None,
        };
        let tokens = tokens.ok_or_else(|| wrong("`tokens` is no list of texts".to_owned()))?;
        let mut text = String::new();
        let mut words = Vec::new();
        for token in tokens {
            if !text.is_empty() {
                text.push(' ');
            }
            words.push((text.len(), text.len() + token.len()));
            text += token;
        }
        return Ok(Sentence { text, words, rest: row });
    }
    match text {
        Some(Value::String(text)) => Ok(Sentence { rest: row, ..split(text, trained) }),
        _ => Err(wrong("a JSON line needs `text` (a text) or `tokens` (a list of texts)".to_owned()).into()),
    }
}

fn split(text: String, trained: &Trained) -> Sentence {
    let words = trained.tokenizer.splitter.split(&text);
    Sentence { text, words, rest: Map::new() }
}

/// One JSON object a sentence.
fn label(sentences: &[Sentence], trained: &Trained, device: Device) -> Result<Vec<Value>> {
    let filled: Vec<usize> = (0..sentences.len()).filter(|&i| !sentences[i].words.is_empty()).collect();
    let words: Vec<Vec<&str>> = filled
        .iter()
        .map(|&i| sentences[i].words.iter().map(|&(start, end)| &sentences[i].text[start..end]).collect())
        .collect();
    let set = EncodedSet::of_words(&words, &trained.tokenizer, &trained.tasks)?;
    let decoded = match set.is_empty() {
        true => Vec::new(),
        false => {
            let data = DeviceSet::new(set, trained.tokenizer.padding, device);
            predict(&trained.model, &data)?
        }
    };
    let mut all: Vec<Value> = sentences.iter().map(|sentence| object(sentence, None, &trained.tasks)).collect();
    for (&i, decoded) in filled.iter().zip(&decoded) {
        all[i] = object(&sentences[i], Some(decoded), &trained.tasks);
    }
    Ok(all)
}

/// A sentence without words has null for every task.
fn object(sentence: &Sentence, decoded: Option<&Vec<Decoded>>, tasks: &[Task]) -> Value {
    let ranges = character_ranges(&sentence.text, &sentence.words);
    let words: Vec<&str> = sentence.words.iter().map(|&(start, end)| &sentence.text[start..end]).collect();
    let mut out = Map::from_iter([("text".to_owned(), json!(sentence.text)), ("words".to_owned(), json!(words))]);
    out.extend(sentence.rest.clone());
    for (i, task) in tasks.iter().enumerate() {
        let Some(decoded) = decoded.map(|decoded| &decoded[i]) else {
            out.insert(task.name.clone(), Value::Null);
            continue;
        };
        let (written, spans) = labels::written(task, &decoded.labels);
        let value = match task.kind {
            TaskKind::Classification => json!({"label": written[0], "score": decoded.scores[0]}),
            TaskKind::Tagging(_) if !task.kind.has_spans() => json!({"tags": written, "scores": decoded.scores}),
            TaskKind::Tagging(_) => {
                let spans = spans.iter().map(|span| {
                    let (bytes, characters) = (&sentence.words, &ranges);
                    json!({
                        "label": span.kind,
                        "text": sentence.text[bytes[span.start].0..bytes[span.end - 1].1],
                        "start": characters[span.start].0,
                        "end": characters[span.end - 1].1,
                        // As sure as of its least sure word.
                        "score": decoded.scores[span.start..span.end].iter().copied().fold(1.0, f32::min),
                    })
                });
                json!({"tags": written, "scores": decoded.scores, "spans": spans.collect::<Vec<_>>()})
            }
        };
        out.insert(task.name.clone(), value);
    }
    Value::Object(out)
}
