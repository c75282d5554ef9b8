//! `polytask predict`: labels a stream of sentences in order, as they arrive.

mod conll;

use std::fs::File;
use std::io::{BufRead, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use tch::Device;

use super::cli::{PredictArgs, PredictFormat};
use super::saved_model::{self, Trained};
use super::{End, output, prepare, stop_flag};
use crate::data::words::character_ranges;
use crate::data::{ConllLayout, DeviceSplit, EncodedSplit, SetConfig, gzip, json_row, json_value, labels};
use crate::evaluate::predict;
use crate::model::Decoded;
use crate::problem::{InvalidInput, Place, Problem, counted, invalid};
use crate::run::atomic::Partial;
use crate::task::{Task, TaskKind};

/// Maximum number of sentences labelled together: enough to batch by length, few enough to keep a pipe flowing.
const WINDOW: usize = 2048;

/// One sentence of the input.
struct Sentence {
    text: String,
    /// Byte ranges of its words.
    words: Vec<(usize, usize)>,
    /// The other keys of its JSON line, which are copied to the output.
    rest: Map<String, Value>,
    /// Its lines, if the input is CoNLL.
    lines: Vec<conll::Written>,
}

/// One unit of input, with the number of its first line: a line, or in CoNLL the lines of a sentence.
type Unit = (usize, Vec<u8>);

pub fn run(args: &PredictArgs) -> Result<End> {
    // `-` means standard input or output, as when no file is given.
    let file = |path: &Option<PathBuf>| path.clone().filter(|path| path != Path::new("-"));
    let args = &PredictArgs { input: file(&args.input), output: file(&args.output), ..args.clone() };
    let format = format_of(args)?;
    if args.top > 0 && format == PredictFormat::Conll {
        return Err(invalid("--top needs JSON lines: CoNLL has one class per sentence"));
    }
    let (device, _) = prepare::machine(&args.machine)?;
    let source: Box<dyn Read + Send> = match &args.input {
        None => Box::new(std::io::stdin()),
        Some(path) if path.is_dir() => return Err(invalid(format!("{} is a folder", path.display()))),
        Some(path) => Box::new(File::open(path).map_err(|error| invalid(format!("{}: {error}", path.display())))?),
    };
    let stop = stop_flag("stopping after this batch");
    let read: Vec<&Path> = args.input.as_deref().into_iter().chain([args.run.as_path()]).collect();
    // The output file appears complete or not at all.
    let mut file = args.output.as_deref().map(|path| output(path, &read)).transpose()?;
    let trained = saved_model::open(&args.run, &args.checkpoint, device)?;
    let conllu = extension(args) == Some("conllu");
    let layout = (format == PredictFormat::Conll).then(|| conll::layout_of(&trained.experiment, conllu));
    let name = args.input.as_deref().unwrap_or(Path::new("standard input"));
    let target = args.output.as_deref().unwrap_or(Path::new("standard output"));
    let n_done = {
        let mut out: BufWriter<Box<dyn Write>> = BufWriter::new(match &mut file {
            Some(file) => Box::new(file),
            None => Box::new(std::io::stdout().lock()),
        });
        let units = read_units(source, layout.is_some());
        let mut n_done = 0;
        while let Some(window) = next_window(&units, &stop)? {
            // Sentences before an invalid line are still labelled.
            let mut broken = None;
            let sentences = window.iter().map(|unit| sentence(unit, (format, layout.as_ref()), &trained, name));
            let sentences: Vec<Sentence> =
                sentences.map_while(|it| it.map_err(|why| broken = Some(why)).ok()).collect();
            let labelled = label(&sentences, &trained, device)?;
            let shown = sentences.iter().zip(&labelled).map(|(sentence, decoded)| match &layout {
                Some(layout) => conll::written(&sentence.lines, layout, decoded.as_deref(), &trained),
                None => object(sentence, decoded.as_deref(), &trained.tasks, usize::from(args.top)).to_string(),
            });
            let written = shown.into_iter().try_for_each(|text| writeln!(out, "{text}")).and_then(|()| out.flush());
            written.with_context(|| target.display().to_string())?;
            if let Some(why) = broken {
                return Err(why);
            }
            n_done += window.len();
        }
        let ended = matches!(units.try_recv(), Err(TryRecvError::Disconnected));
        (!ended).then_some(n_done)
    };
    if let Some(n_done) = n_done {
        match &args.output {
            None => log::info!("stopped after {}", counted(n_done, "sentence")),
            Some(path) => {
                log::info!("stopped after {}; {} was not written", counted(n_done, "sentence"), path.display())
            }
        }
        return Ok(End::Interrupted);
    }
    file.map_or(Ok(()), Partial::keep)?;
    Ok(End::Done)
}

fn extension(args: &PredictArgs) -> Option<&str> {
    let path = args.input.as_deref()?;
    let unpacked = if path.extension()? == "gz" { Path::new(path.file_stem()?) } else { path };
    unpacked.extension()?.to_str()
}

/// The requested format, or the one that the input's file name implies.
fn format_of(args: &PredictArgs) -> Result<PredictFormat> {
    match (args.format, extension(args)) {
        (PredictFormat::Auto, Some("conll" | "conllu")) => Ok(PredictFormat::Conll),
        (PredictFormat::Auto, Some(extension @ ("csv" | "tsv"))) => Err(invalid(format!(
            "a .{extension} file is neither plain text nor JSON lines: label it with `polytask evaluate`, --set and \
             --predictions, or read each line as a sentence with --format text"
        ))),
        (format, _) => Ok(format),
    }
}

/// Reads in a separate thread, so that sentences can be labelled while the next ones are read.
fn read_units(source: Box<dyn Read + Send>, conll: bool) -> Receiver<std::io::Result<Unit>> {
    let (sender, receiver) = sync_channel(2 * WINDOW);
    std::thread::spawn(move || {
        let mut block: Unit = (1, Vec::new());
        let lines = match gzip::unpacked(source) {
            Ok(source) => source.split(b'\n'),
            // The receiver may be gone.
            Err(error) => return drop(sender.send(Err(error))),
        };
        for (i, line) in lines.enumerate() {
            let next = match line {
                Ok(line) if conll && !line.trim_ascii().is_empty() => {
                    block.1.extend(line);
                    block.1.push(b'\n');
                    continue;
                }
                Ok(_) if conll => std::mem::replace(&mut block, (i + 2, Vec::new())),
                Ok(line) => (i + 1, line),
                Err(error) => return drop(sender.send(Err(error))),
            };
            // Several empty lines separate sentences like one.
            let empty = conll && next.1.is_empty();
            if !empty && sender.send(Ok(next)).is_err() {
                return;
            }
        }
        if !block.1.is_empty() {
            let _ = sender.send(Ok(block));
        }
    });
    receiver
}

/// The sentences read so far, at least one; `None` at the end of the input, or when `stop` is set.
fn next_window(units: &Receiver<std::io::Result<Unit>>, stop: &AtomicBool) -> Result<Option<Vec<Unit>>> {
    let first = loop {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        match units.recv_timeout(Duration::from_millis(100)) {
            Ok(unit) => break unit?,
            Err(RecvTimeoutError::Timeout) => (),
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
        }
    };
    let mut window = vec![first];
    while window.len() < WINDOW {
        match units.try_recv() {
            Ok(unit) => window.push(unit?),
            Err(_) => break,
        }
    }
    Ok(Some(window))
}

fn sentence(
    (number, line): &Unit,
    (format, layout): (PredictFormat, Option<&ConllLayout>),
    trained: &Trained,
    file: &Path,
) -> Result<Sentence> {
    let number = *number;
    let wrong = |message: String| InvalidInput(vec![Problem::error(Place::new(file, number), message)]);
    let line = std::str::from_utf8(line).map_err(|_| wrong("invalid UTF-8".to_owned()))?;
    let line = line.strip_suffix('\r').unwrap_or(line);
    let line = line.strip_prefix('\u{feff}').filter(|_| number == 1).unwrap_or(line);
    if let Some(layout) = layout {
        let (lines, words) = conll::lines(line, layout, &trained.tasks);
        let (text, words) = joined(words.into_iter());
        return Ok(Sentence { text, words, rest: Map::new(), lines });
    }
    let is_array = |line: &str| {
        let in_json = file.extension().is_some_and(|extension| extension == "json" || extension == "jsonl");
        let items: Vec<Value> = serde_json::from_str(line).unwrap_or_default();
        let are_rows = [Value::is_object, Value::is_string, Value::is_array].iter().any(|are| items.iter().all(are));
        line.starts_with('[') && ((in_json && number == 1) || (!items.is_empty() && are_rows))
    };
    let trimmed = line.trim_start();
    if format == PredictFormat::Text {
        return Ok(split(line.to_owned(), trained));
    }
    if trimmed.starts_with('{') {
        return Ok(of_json(trimmed, trained).map_err(wrong)?);
    }
    if is_array(trimmed) {
        let message = "a JSON array, but each line must be an object; --format text reads each line as a sentence";
        return Err(wrong(message.to_owned()).into());
    }
    Ok(split(line.to_owned(), trained))
}

/// A sentence from a JSON object, whose keys may have the names used in the run's data.
fn of_json(line: &str, trained: &Trained) -> Result<Sentence, String> {
    let row = json_row(line).map_err(|message| format!("{message}; --format text reads each line as a sentence"))?;
    let field = |own: &dyn Fn(&SetConfig) -> Option<&String>, default: &'static str| {
        let names = trained.experiment.data.sets.values().filter_map(own).map(String::as_str);
        names.chain([default]).find_map(|name| Some((name.to_owned(), json_value(&row, name)?)))
    };
    let tokens = field(&|set| set.tokens.as_ref(), "tokens");
    let text =
        field(&|set| set.text.as_ref(), "text").filter(|(name, _)| tokens.as_ref().is_none_or(|(own, _)| own != name));
    let words: Option<Vec<&str>> = match &tokens {
        Some((_, Value::String(text))) => Some(text.split_whitespace().collect()),
        Some((_, Value::Array(tokens))) => tokens.iter().map(Value::as_str).collect(),
        _ => None,
    };
    // `tokens` may hold objects, as annotation tools write them, if there is also a text.
    let objects = |value: &Value| value.as_array().is_some_and(|items| items.iter().all(Value::is_object));
    let (whole, words) = match (&tokens, words, text.as_ref().and_then(|(_, text)| text.as_str())) {
        (_, Some(tokens), text) => {
            let own = text.and_then(|text| Some((text.to_owned(), ranges_in(text, &tokens)?)));
            own.unwrap_or_else(|| joined(tokens.into_iter()))
        }
        (Some((name, found)), None, text) if text.is_none() || !objects(found) => {
            return Err(format!("`{name}` is not a list of strings"));
        }
        (_, None, Some(text)) => (text.to_owned(), trained.tokenizer.splitter.split(text)),
        (_, None, None) => {
            let needed = "a JSON line needs `text` (a string) or `tokens` (a list of strings), or the run's names for these keys";
            return Err(needed.to_owned());
        }
    };
    let read: Vec<String> = [tokens, text].into_iter().flatten().map(|(name, _)| name).collect();
    let Value::Object(mut rest) = row else { return Err("a JSON line must be an object".to_owned()) };
    rest.retain(|key, _| !read.contains(key));
    let ours = |key: &str| ["text", "words"].contains(&key) || trained.tasks.iter().any(|task| task.name == key);
    if let Some(key) = rest.keys().find(|key| ours(key)) {
        static TOLD: Once = Once::new();
        TOLD.call_once(|| log::warn!("`{key}` of the input is not copied: the output has its own `{key}`"));
        rest.retain(|key, _| !ours(key));
    }
    Ok(Sentence { text: whole, words, rest, lines: Vec::new() })
}

fn split(text: String, trained: &Trained) -> Sentence {
    let words = trained.tokenizer.splitter.split(&text);
    Sentence { text, words, rest: Map::new(), lines: Vec::new() }
}

/// The words joined by spaces, and their byte ranges.
fn joined<'a>(tokens: impl Iterator<Item = &'a str>) -> (String, Vec<(usize, usize)>) {
    let (mut text, mut words) = (String::new(), Vec::new());
    for token in tokens {
        if !text.is_empty() {
            text.push(' ');
        }
        words.push((text.len(), text.len() + token.len()));
        text += token;
    }
    (text, words)
}

/// Byte ranges of words that occur in a text in this order; `None` if they do not.
fn ranges_in(text: &str, tokens: &[&str]) -> Option<Vec<(usize, usize)>> {
    let mut at = 0;
    let range = |token: &&str| {
        let start = at + text[at..].find(token)?;
        at = start + token.len();
        Some((start, at))
    };
    tokens.iter().map(range).collect()
}

/// The predictions of every task for each sentence; `None` for sentences without words.
fn label(sentences: &[Sentence], trained: &Trained, device: Device) -> Result<Vec<Option<Vec<Decoded>>>> {
    let filled: Vec<usize> = (0..sentences.len()).filter(|&i| !sentences[i].words.is_empty()).collect();
    let words: Vec<Vec<&str>> = filled
        .iter()
        .map(|&i| sentences[i].words.iter().map(|&(start, end)| &sentences[i].text[start..end]).collect())
        .collect();
    let set = EncodedSplit::of_words(&words, &trained.tokenizer, &trained.tasks)?;
    let decoded = match set.is_empty() {
        true => Vec::new(),
        false => {
            let data = DeviceSplit::new(set, trained.tokenizer.padding, device);
            predict(&trained.model, &data)?
        }
    };
    let mut all: Vec<Option<Vec<Decoded>>> = sentences.iter().map(|_| None).collect();
    for (i, decoded) in filled.into_iter().zip(decoded) {
        all[i] = Some(decoded);
    }
    Ok(all)
}

/// A score rounded to 6 decimals, about the precision of float32.
pub fn probability(score: f32) -> f64 {
    (f64::from(score) * 1e6).round() / 1e6
}

/// A sentence as a JSON object, with the `top` most probable classes if `top` > 0. Without words, every task is null.
fn object(sentence: &Sentence, decoded: Option<&[Decoded]>, tasks: &[Task], top: usize) -> Value {
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
        let scores: Vec<f64> = decoded.scores.iter().copied().map(probability).collect();
        let value = match task.kind {
            TaskKind::Classification if top > 0 => {
                let mut classes: Vec<(&String, f32)> = task.labels.iter().zip(decoded.distribution.clone()).collect();
                classes.sort_by(|a, b| b.1.total_cmp(&a.1));
                let named = |(label, score): &(&String, f32)| json!({"label": label, "score": probability(*score)});
                let shown: Vec<Value> = classes.iter().take(top).map(named).collect();
                json!({"label": written[0], "score": scores[0], "top": shown})
            }
            TaskKind::Classification => json!({"label": written[0], "score": scores[0]}),
            TaskKind::Tagging(_) if !task.kind.has_spans() => json!({"tags": written, "scores": scores}),
            TaskKind::Tagging(_) => {
                let spans = spans.iter().map(|span| {
                    let (bytes, characters) = (&sentence.words, &ranges);
                    json!({
                        "label": span.kind,
                        "text": sentence.text[bytes[span.start].0..bytes[span.end - 1].1],
                        "start": characters[span.start].0,
                        "end": characters[span.end - 1].1,
                        // The lowest score of its words.
                        "score": scores[span.start..span.end].iter().copied().fold(1.0, f64::min),
                    })
                });
                json!({"tags": written, "scores": scores, "spans": spans.collect::<Vec<_>>()})
            }
        };
        out.insert(task.name.clone(), value);
    }
    Value::Object(out)
}
