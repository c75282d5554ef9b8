//! `polytask export`: a trained run as files for other programs, verified before they are kept.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde_json::json;
use tch::{Device, Tensor};

use super::cli::{ExportArgs, ExportFormat, VerifyArgs};
use super::exported_file::{self, FILES, FORMAT, ZIP};
use super::saved_model::{self, Trained};
use super::{End, prepare, say, table};
use crate::data::{DeviceSplit, EncodedSplit, Split, TokenizerConfig};
use crate::evaluate::{Report, evaluate};
use crate::export::{self, Cases, Dtype, Mismatch, Output, card, triton};
use crate::metrics::Score;
use crate::problem::invalid;
use crate::run::{atomic, checkpoint};
use crate::task::Task;

pub fn run(args: &ExportArgs) -> Result<End> {
    let out = &args.out;
    may_write(args)?;
    let folder = atomic::folder_of(out);
    if !folder.is_dir() {
        return Err(invalid(format!("{} cannot be written: {} is not a folder", out.display(), folder.display())));
    }
    let dtype = args.dtype;
    match (args.format, dtype) {
        (ExportFormat::Onnx, Dtype::Float16 | Dtype::Bfloat16 | Dtype::Int8) => {
            return Err(invalid(
                "--format onnx writes only float32; onnxruntime's own tools can make the file smaller",
            ));
        }
        (ExportFormat::Safetensors, Dtype::Int8) => {
            return Err(invalid("--format safetensors does not support int8: use float32, float16 or bfloat16"));
        }
        _ => {}
    }
    if args.run.is_file() {
        return Err(invalid(format!(
            "{} is a file, not a run directory: export the run that the model was trained in",
            args.run.display()
        )));
    }
    let trained = saved_model::open(&args.run, &args.checkpoint, Device::Cpu)?;
    if args.format == ExportFormat::Triton && !matches!(trained.experiment.tokenizer, TokenizerConfig::Word(_)) {
        return Err(invalid(
            "--format triton needs `tokenizer: {model: word}`: the server passes only token ids and lengths",
        ));
    }
    let dev = dev(&trained)?;
    let made_up = made_up(&trained)?;
    let report = match &dev {
        Some(dev) => Some(evaluate(&trained.model, dev, &trained.tasks)?),
        None => serde_json::from_value(trained.about["dev"].clone()).ok(),
    };
    let (dev, report) = (dev.as_ref(), report.as_ref());
    // Built in a temporary folder next to `out`, which is removed on drop if anything fails.
    let partial = tempfile::Builder::new().prefix(".partial-").tempdir_in(folder);
    let partial = partial.map_err(|error| invalid(format!("{} cannot be written: {error}", out.display())))?;
    let unfinished = atomic::Unfinished::new(partial.path());
    let built = partial.path().join("new");
    let content = Content { args, trained: &trained, dev, made_up: &made_up, report, dtype };
    let found = match args.format {
        ExportFormat::Torchscript => Some(content.torchscript(&built)?),
        ExportFormat::Triton => Some(content.triton(&built)?),
        ExportFormat::Onnx => {
            content.onnx(&built)?;
            None
        }
        ExportFormat::Safetensors => {
            content.safetensors(&built)?;
            None
        }
    };
    // If `out` is a folder, the temporary folder holds it during the swap: a signal must not remove it then.
    let unfinished = Some(unfinished).filter(|_| !out.is_dir());
    put_in_place(&built, out, partial)?;
    drop(unfinished);
    if let Some((off, scores)) = found {
        log::info!(
            "{}: verified in a separate process: logits differ from the original model's by at most {off:.1e} of the largest \
             logit",
            out.display()
        );
        if let (Some(scores), Some(report)) = (scores, report) {
            say(scores_table(report, &scores, dtype))?;
        }
    } else {
        match args.format {
            ExportFormat::Onnx => log::info!("{}: written, but not verified, which needs onnxruntime", out.display()),
            _ => log::info!("{}: written, and verified by reading it back", out.display()),
        }
    }
    Ok(End::Done)
}

/// Fails if `out` exists and `--force` is not given, or if it is nothing that `export` writes in this format.
fn may_write(args: &ExportArgs) -> Result<()> {
    let out = &args.out;
    if !out.exists() {
        return Ok(());
    }
    if !args.force {
        return Err(invalid(format!("{} exists; --force replaces it", out.display())));
    }
    let (ours, what) = match args.format {
        ExportFormat::Torchscript => (is_empty_or_begins_with(out, &ZIP), "TorchScript file"),
        // The field `ir_version` of a model.
        ExportFormat::Onnx => (is_empty_or_begins_with(out, &[0x08]), "ONNX file"),
        _ => (out.join(MARKER).is_file(), "folder that polytask exported"),
    };
    match ours {
        true => Ok(()),
        false => Err(invalid(format!("{} is no {what}: it is not replaced", out.display()))),
    }
}

fn is_empty_or_begins_with(path: &Path, start: &[u8]) -> bool {
    let mut found = Vec::new();
    let read = File::open(path).and_then(|file| file.take(start.len() as u64).read_to_end(&mut found));
    read.is_ok() && (found.is_empty() || found == start)
}

/// A file that every exported folder contains.
const MARKER: &str = "polytask.json";

/// Renames `built` to `out`. A file is replaced atomically; a folder is moved into `partial` first, and moved back if
/// the rename fails.
fn put_in_place(built: &Path, out: &Path, partial: tempfile::TempDir) -> Result<()> {
    let name = || format!("{} could not be written", out.display());
    if !out.is_dir() {
        return atomic::rename(built, out).with_context(name);
    }
    let old = partial.path().join("old");
    std::fs::rename(out, &old).with_context(name)?;
    if let Err(error) = atomic::rename(built, out) {
        if std::fs::rename(&old, out).is_err() {
            let kept = partial.keep().join("old");
            bail!("{} could not be written ({error}); the previous export is in {}", out.display(), kept.display());
        }
        return Err(error).with_context(name);
    }
    Ok(())
}

/// The dev data, for scores; `None` if it is empty or cannot be read, since an export can do without.
fn dev(trained: &Trained) -> Result<Option<DeviceSplit>> {
    match prepare::corpus_of(&trained.experiment, Split::Dev) {
        Ok(corpus) => {
            let dev = prepare::encoded(&corpus, Split::Dev, &trained.tokenizer, &trained.tasks, Device::Cpu)?;
            Ok((!dev.set.is_empty()).then_some(dev))
        }
        Err(error) => {
            log::warn!("dev cannot be read, so the exported model is verified but not scored: {error:#}");
            Ok(None)
        }
    }
}

/// Artificial sentences of 1 to 48 words to verify an export with; a word is one vocabulary token, or two joined.
fn made_up(trained: &Trained) -> Result<DeviceSplit> {
    let tokenizer = &trained.tokenizer;
    // The tokenizer would split the padding and unknown tokens off a word.
    let special = |id: usize| id == tokenizer.padding as usize || id == tokenizer.unknown as usize;
    let tokens =
        tokenizer.vocabulary().into_iter().enumerate().filter(|(id, token)| !special(*id) && !token.is_empty());
    let mut vocabulary: Vec<String> = tokens.map(|(_, token)| token).collect();
    if vocabulary.is_empty() {
        vocabulary.push("a".to_owned());
    }
    let token = |i: usize| vocabulary[i % vocabulary.len()].as_str();
    let word = |i: usize| if i.is_multiple_of(2) { token(i).to_owned() } else { [token(i), token(i + 1)].concat() };
    let words: Vec<Vec<String>> = (1..=48).map(|n| (0..n).map(|i| word(i * i + 7 * n)).collect()).collect();
    let sentences: Vec<Vec<&str>> = words.iter().map(|words| words.iter().map(String::as_str).collect()).collect();
    let set = EncodedSplit::of_words(&sentences, &trained.tokenizer, &trained.tasks)?;
    Ok(DeviceSplit::new(set, trained.tokenizer.padding, Device::Cpu))
}

struct Content<'a> {
    args: &'a ExportArgs,
    trained: &'a Trained,
    dev: Option<&'a DeviceSplit>,
    made_up: &'a DeviceSplit,
    /// On dev, computed now or stored with the checkpoint.
    report: Option<&'a Report>,
    dtype: Dtype,
}

impl Content<'_> {
    /// The sentences that an export is verified with.
    fn sentences(&self) -> &DeviceSplit {
        self.dev.unwrap_or(self.made_up)
    }

    /// Sentences whose words are all single tokens, which a Triton server can process.
    fn sentences_of_whole_words(&self) -> Result<&DeviceSplit> {
        let whole = |data: &&DeviceSplit| data.set.first_tokens.is_none();
        if !whole(&self.sentences()) {
            log::warn!(
                "some words of dev are split into several tokens, perhaps at spaces; a Triton server cannot take such words"
            );
        }
        let found = [self.sentences(), self.made_up].into_iter().find(whole);
        found.ok_or_else(|| invalid("--format triton: the tokenizer splits its own words into several tokens"))
    }

    /// [`FILES`] with their texts.
    fn files(&self) -> Result<Vec<(&'static str, String)>> {
        let (trained, experiment) = (self.trained, &self.trained.experiment);
        let about = json!({
            "format": FORMAT,
            "polytask": env!("CARGO_PKG_VERSION"),
            "libtorch": "2.11.0",
            "name": experiment.name,
            "checkpoint": self.args.checkpoint,
            "epoch": trained.about["epoch"],
            "dtype": self.dtype.name(),
            "tokenizer": experiment.tokenizer,
            "max_bytes": trained.tokenizer.max_bytes(),
            "dev": self.report,
        });
        let sources = experiment.data.sets.iter();
        let sources = sources.map(|(name, set)| (name.as_str(), set.source.as_deref().unwrap_or("not stated")));
        let card = card::card(
            &card::About {
                name: &experiment.name,
                checkpoint: &self.args.checkpoint,
                dtype: self.dtype.name(),
                n_parameters: trained.model.parameters.count(),
                sources: sources.collect(),
                dev: self.report,
            },
            &trained.tasks,
        );
        let labels =
            trained.tasks.iter().flat_map(|task| task.labels.iter().map(|label| format!("{}\t{label}\n", task.name)));
        let vocabulary = match &experiment.tokenizer {
            TokenizerConfig::Word(_) => {
                trained.tokenizer.vocabulary().iter().map(|token| format!("{token}\n")).collect()
            }
            _ => String::new(),
        };
        let texts = [
            serde_json::to_string_pretty(&about)?,
            experiment.to_yaml()?,
            serde_json::to_string_pretty(&trained.tasks)?,
            trained.tokenizer.to_json()?,
            card,
            labels.collect(),
            vocabulary,
        ];
        Ok(FILES.into_iter().zip(texts).collect())
    }

    /// Writes one file, verifies it in a separate process, and scores it on dev if available.
    fn torchscript(&self, file: &Path) -> Result<(f64, Option<Vec<Vec<Score>>>)> {
        let (model, tasks) = (&self.trained.model, &self.trained.tasks);
        let module = export::build(model, tasks, self.dtype, Output::Dictionary)?;
        module.save(file, &self.files()?)?;
        let cases = Cases::new(model, self.sentences(), tasks);
        let list = file.with_extension("cases");
        cases.write(&list)?;
        let program = std::env::current_exe().context("the program's own path is unknown")?;
        let mut command = Command::new(program);
        command.args(["-q", "verify-export"]).arg(file).arg(&list).stdin(Stdio::null());
        let output = command.output().context("the verification could not be started")?;
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            bail!(
                "the exported model failed the verification and was discarded: {}",
                why.trim_start_matches("error: ")
            );
        }
        let off = said.parse().with_context(|| format!("unexpected output of the verification: `{said}`"))?;
        let scores = self.dev.map(|dev| export::scores(&module, model, dev, tasks)).transpose()?;
        Ok((off, scores))
    }

    /// Writes one ONNX file, with the texts of [`FILES`] in its metadata.
    fn onnx(&self, file: &Path) -> Result<()> {
        let trained = self.trained;
        let pieces = match trained.experiment.tokenizer {
            // Found by encoding: a tokenizer file's rules may split words, and so may spaces in words.
            TokenizerConfig::Word(_) | TokenizerConfig::File(_) => {
                [self.sentences(), self.made_up].iter().any(|data| data.set.first_tokens.is_some())
            }
            _ => true,
        };
        let graph = trained.model.onnx(&trained.tasks, pieces);
        atomic::write(file, &graph.into_bytes(&self.files()?))
    }

    /// Writes a folder with the weights under PyTorch's names, the tokenizer and the configuration.
    fn safetensors(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir(folder)?;
        let kind = self.dtype.kind();
        let weights = self.trained.model.parameters.with_constants();
        let weights: Vec<(&str, Tensor)> =
            weights.map(|(name, tensor)| (name, tensor.detach().to_kind(kind).contiguous())).collect();
        let file = folder.join("model.safetensors");
        checkpoint::write_plain(&file, &weights)?;
        let back = Tensor::read_safetensors(&file)?;
        for (name, tensor) in &weights {
            let same = back.iter().any(|(found, value)| found == name && value == tensor);
            if !same {
                bail!(Mismatch(format!("weights `{name}` are different when read back from the file")));
            }
        }
        for (name, text) in self.files()? {
            if name != "resolved.yaml" {
                std::fs::write(folder.join(name), text)?;
            }
        }
        let config = json!({
            "model": self.trained.experiment.model,
            "heads": self.trained.experiment.tasks,
            "tasks": self.trained.tasks,
            "n_tokens": self.trained.tokenizer.size(),
            "n_trained": self.trained.tokenizer.n_trained(),
            "padding": self.trained.tokenizer.padding,
            "unknown": self.trained.tokenizer.unknown,
        });
        std::fs::write(folder.join("config.json"), serde_json::to_string_pretty(&config)?)?;
        Ok(())
    }

    /// Writes a model repository for Triton's PyTorch backend, with a module that returns a tuple.
    fn triton(&self, folder: &Path) -> Result<(f64, Option<Vec<Vec<Score>>>)> {
        let tasks = &self.trained.tasks;
        let name = &self.trained.experiment.name;
        let version = folder.join(name).join("1");
        std::fs::create_dir_all(&version)?;
        let checked = folder.join("checked.pt");
        let found = self.torchscript(&checked)?;
        std::fs::remove_file(&checked)?;
        std::fs::remove_file(checked.with_extension("cases"))?;
        let module = export::build(&self.trained.model, tasks, self.dtype, Output::Tuple)?;
        let file = version.join("model.pt");
        module.save(&file, &self.files()?)?;
        // The tuple form is read back and verified as well.
        let cases = Cases::new(&self.trained.model, self.sentences_of_whole_words()?, tasks);
        cases.check(&exported_file::open(&file)?.module, tasks, self.dtype)?;
        std::fs::write(folder.join(MARKER), &self.files()?[0].1)?;
        std::fs::write(
            folder.join(name).join("config.pbtxt"),
            triton::config(name, tasks, self.dtype, self.trained.model.reads_bytes()),
        )?;
        Ok(found)
    }
}

fn scores_table(report: &Report, exported: &[Vec<Score>], dtype: Dtype) -> comfy_table::Table {
    let mut out = table::table(&["task", "metric on dev", "original", dtype.name()], 2);
    for (task, exported) in report.tasks.iter().zip(exported) {
        for (i, (live, exported)) in task.scores.iter().zip(exported).enumerate() {
            let name = if i == 0 { task.name.clone() } else { String::new() };
            out.add_row([
                name,
                live.name.replace('_', " "),
                table::percent(live.value),
                table::percent(exported.value),
            ]);
        }
    }
    out
}

/// `polytask verify-export`, the verification in a separate process: prints the largest relative difference of logits.
pub fn verify(args: &VerifyArgs) -> Result<End> {
    let exported = exported_file::open(&args.model)?;
    let tasks: Vec<Task> = serde_json::from_str(&exported.files[2])?;
    let dtype = Dtype::value_variants().iter().find(|dtype| exported.about["dtype"] == dtype.name());
    let dtype = dtype.with_context(|| format!("unknown dtype {}", exported.about["dtype"]))?;
    let cases = Cases::read(&args.cases)?;
    let off = cases.check(&exported.module, &tasks, *dtype)?;
    say(format!("{off:e}"))?;
    Ok(End::Done)
}
