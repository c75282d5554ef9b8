//! Preparation shared by several commands: threads and device, data, tokenizer, tasks, a new model.

use std::path::Path;

use anyhow::Result;
use tch::Device;

use super::{data_checks, saved_model, table};
use crate::commands::cli::Machine;
use crate::config::Experiment;
use crate::data::vectors::{self, Coverage};
use crate::data::{self, Corpus, DeviceSplit, EncodedSplit, Split, Tokenizer, TokenizerConfig, Unseen, labels};
use crate::libtorch;
use crate::model::{ClassWeights, HeadConfig, Model, Vocabulary};
use crate::problem::{Problem, counted, fail_on_errors, invalid};
use crate::rng::Seed;
use crate::run::RunDirectory;
use crate::task::{Task, TaskId};

/// Maximum number of threads per core.
const MOST_PER_CORE: usize = 8;

/// Sets the number of threads and opens the device.
pub fn machine(machine: &Machine) -> Result<(Device, usize)> {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = machine.threads.map_or(cores, usize::from);
    let device = libtorch::device(&machine.device).map_err(|error| invalid(format!("{error:#}")))?;
    if threads > MOST_PER_CORE * cores {
        return Err(invalid(format!(
            "--threads {threads}: the limit is {MOST_PER_CORE} threads per core, and this machine has {}",
            counted(cores, "core")
        )));
    }
    let workers = match device {
        Device::Cpu => machine.workers.map_or(threads, usize::from),
        _ => 1,
    };
    libtorch::configure(threads, workers, true)?;
    Ok((device, threads))
}

pub fn device_name(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        _ => "cpu".to_owned(),
    }
}

/// Reads all data of an experiment, showing the file being read.
pub fn corpus(experiment: &Experiment) -> Result<(Corpus, Vec<Problem>)> {
    let (corpus, mut problems) = read(experiment, &Split::ALL)?;
    problems.extend(data_checks::unnamed_labels(experiment, &corpus));
    Ok((corpus, problems))
}

/// Reads only one split, and train if the split is cut from it. Fails on errors in the data.
pub fn corpus_of(experiment: &Experiment, split: Split) -> Result<Corpus> {
    let (corpus, problems) = read(experiment, &[split])?;
    fail_on_errors(problems)?;
    Ok(corpus)
}

fn read(experiment: &Experiment, splits: &[Split]) -> Result<(Corpus, Vec<Problem>)> {
    let spinner = super::progress::spinner("reading");
    let tell = |path: &Path| spinner.set_message(path.display().to_string());
    let splitter = experiment.tokenizer.splitter();
    let corpus = data::load(&experiment.data, &experiment.task_columns(), splits, splitter, &tell);
    spinner.finish_and_clear();
    corpus
}

/// The task table, with the labels listed in the experiment, or else those of the training rows.
pub fn tasks(experiment: &Experiment, corpus: &Corpus) -> Vec<Task> {
    let task = |(i, (name, head)): (usize, (&String, &HeadConfig))| {
        let columns: Vec<_> = corpus
            .columns_of(TaskId(i))
            .map(|(set, column)| &set.splits[Split::Train as usize].columns[column])
            .collect();
        let labels = match head.labels() {
            Some(names) => labels::named(head.kind(), names),
            None => labels::collect(head.kind(), &columns),
        };
        Task { name: name.clone(), kind: head.kind(), labels }
    };
    experiment.tasks.iter().enumerate().map(task).collect()
}

pub fn encoded(
    corpus: &Corpus,
    split: Split,
    tokenizer: &Tokenizer,
    tasks: &[Task],
    device: Device,
) -> Result<DeviceSplit> {
    Ok(DeviceSplit::new(EncodedSplit::build(corpus, split, tokenizer, tasks)?, tokenizer.padding, device))
}

/// The training rows, with the experiment's class weights.
pub fn training(
    experiment: &Experiment,
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    tasks: &[Task],
    device: Device,
) -> Result<DeviceSplit> {
    let mut train = encoded(corpus, Split::Train, tokenizer, tasks, device)?;
    // A resumed run keeps the labels that it started with.
    if let Some((id, unseen)) = train.set.unseen.first_key_value() {
        let Task { name, kind, .. } = &tasks[id.0];
        let lacking = labels::names(*kind, &unseen.labels).join(", ");
        return Err(invalid(format!(
            "`{name}`: train has labels that it did not have when the run started: {lacking}"
        )));
    }
    for (i, head) in experiment.tasks.values().enumerate() {
        if head.class_weights() == ClassWeights::Balanced {
            train.balance(TaskId(i), tasks[i].labels.len());
        }
    }
    Ok(train)
}

/// Warns about labels of a split that the model cannot predict.
pub fn warn_of_unseen(data: &DeviceSplit, split: Split, tasks: &[Task]) {
    for (id, Unseen { labels, rows }) in &data.set.unseen {
        let names = labels::names(tasks[id.0].kind, labels);
        let shown = names.iter().take(5).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let more = if names.len() > 5 { format!(" and {} more", names.len() - 5) } else { String::new() };
        log::warn!(
            "`{}`: {} has labels that train does not have, which count as errors: {shown}{more} ({} of its rows)",
            tasks[id.0].name,
            split.name(),
            table::count(rows.len())
        );
    }
}

pub fn model(experiment: &Experiment, tasks: &[Task], tokenizer: &Tokenizer, device: Device) -> Result<Model> {
    let heads: Vec<&HeadConfig> = experiment.tasks.values().collect();
    let vocabulary = Vocabulary {
        n_trained: tokenizer.n_trained(),
        padding: tokenizer.padding,
        pads: tokenizer.pads,
        unknown: tokenizer.unknown,
        vectors: tokenizer.vectors(),
    };
    Model::new(&experiment.model, &heads, tasks, &vocabulary, (Seed(experiment.seed), device))
}

/// Builds the tokenizer of an experiment, with its pretrained vectors.
pub fn tokenizer(experiment: &Experiment, corpus: &Corpus) -> Result<(Tokenizer, Vec<Coverage>)> {
    let (train, root) = (corpus.rows(Split::Train), &experiment.data.root);
    let max_bytes = experiment.model.embedding.characters.max_bytes();
    let mut tokenizer = Tokenizer::build(&experiment.tokenizer, root, &train, max_bytes)?;
    // Errors in it are reported by `init_from`.
    if let Some(run) = experiment.init_from.as_ref().and_then(|from| RunDirectory::open(from).ok()) {
        extend_by_run(&mut tokenizer, experiment, &run)?;
    }
    let configs = &experiment.model.embedding.vectors;
    let coverage = match configs.is_empty() {
        true => Vec::new(),
        false => vectors::attach(&mut tokenizer, configs, root, &train, Seed(experiment.seed))?,
    };
    Ok((tokenizer, coverage))
}

/// Adds the words that an earlier run knows, whether or not they occur in this run's text.
fn extend_by_run(tokenizer: &mut Tokenizer, experiment: &Experiment, run: &RunDirectory) -> Result<()> {
    let (theirs, _, earlier) = saved_model::of_run(run)?;
    let words = |experiment: &Experiment| matches!(experiment.tokenizer, TokenizerConfig::Word(_));
    if words(experiment) && words(&theirs) {
        tokenizer.learn(earlier.vocabulary().iter().take(earlier.n_trained()).map(String::as_str))?;
    }
    Ok(())
}

/// The coverage of the training text by pretrained vectors, in one line.
pub fn coverage_line(coverage: &Coverage) -> String {
    let ((types, known), (tokens, known_tokens)) = (coverage.types, coverage.tokens);
    let case = match coverage.case_lost {
        true => "; the file has no capital letters: `tokenizer.lowercase: true` lets it cover more words in use",
        false => "",
    };
    format!(
        "{}: {} words, {} dimensions; covers {} of {} distinct training words ({:.1} % of the text){case}",
        coverage.file.display(),
        table::count(coverage.n_words),
        coverage.dim,
        table::count(known),
        table::count(types),
        100.0 * known_tokens as f64 / tokens.max(1) as f64
    )
}
