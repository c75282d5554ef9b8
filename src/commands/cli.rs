//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::data::Split;
use crate::export::Dtype;

/// Train multi-task text classifiers and taggers on a shared embedding + LSTM trunk, one YAML file per experiment.
#[derive(Parser)]
#[command(name = "polytask", version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    /// Print more messages (-v); RUST_LOG takes the filters of env_logger
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Print only errors
    #[arg(short, long, global = true)]
    pub quiet: bool,
}

#[derive(Subcommand)]
pub enum Command {
    /// Train an experiment, evaluate its best checkpoint on test and print a table of scores
    Train(TrainArgs),
    /// Score a trained run on train, dev or test, or on another file
    Evaluate(EvaluateArgs),
    /// Label sentences with a trained run: text, JSON lines or CoNLL in, JSON lines or CoNLL out
    Predict(PredictArgs),
    /// Find errors and suspicious values in an experiment and its data, before training
    Check(CheckArgs),
    /// Write a trained run as a file or folder for other programs
    Export(ExportArgs),
    #[command(hide = true)]
    VerifyExport(VerifyArgs),
    /// Run the study of an experiment: strategies, seeds, data fractions and single-task models
    Study(StudyArgs),
    /// Compare runs or studies: did multi-task training help?
    Compare(CompareArgs),
    /// Find a learning rate: record the loss while the rate rises from step to step
    FindLr(FindLrArgs),
    /// Time a training step and each weighting strategy, or how fast a trained model labels
    Bench(BenchArgs),
    /// List every key that an experiment file may have
    Options(OptionsArgs),
    /// Check loss weighting on this machine's device, and that an experiment's first steps are reproducible, also
    /// across a stop
    Selftest(SelftestArgs),
}

#[derive(Args, Clone)]
pub struct Machine {
    /// Device to compute on: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub device: String,
    /// Number of CPU threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Split each batch into N parts that run in parallel on the CPU and share the threads [default: one part per
    /// thread]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub workers: Option<u16>,
}

#[derive(Args, Clone)]
pub struct TrainArgs {
    /// The experiment file, or with --resume the run directory
    pub experiment: PathBuf,
    /// The run directory [default: runs/NAME, numbered if it exists]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Set a value of the experiment, as in --set model.trunk.hidden=128
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Resume the run in --out from its last checkpoint [without --out: the newest run of this experiment]
    #[arg(long)]
    pub resume: bool,
    #[command(flatten)]
    pub machine: Machine,
}

#[derive(Args)]
pub struct EvaluateArgs {
    /// The run directory, or an exported model.pt
    pub run: PathBuf,
    /// The split to score
    #[arg(long, value_enum, default_value = "test")]
    pub split: Split,
    /// Score this file in place of that split; it must be in the format of the run's data
    #[arg(long, value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// The checkpoint to use: best, last (the weights of the last step, not averaged) or best-TASK
    #[arg(long, default_value = "best")]
    pub checkpoint: String,
    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
    /// Set a value below data, as in --set data.sets.chats.test=/data/new.jsonl
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Also print the scores of every class, tag or span type and what it is most often mistaken for
    #[arg(long)]
    pub by_label: bool,
    /// Write the gold and predicted labels of every sentence, as JSON lines
    #[arg(long, value_name = "FILE")]
    pub predictions: Option<PathBuf>,
    #[command(flatten)]
    pub machine: Machine,
}

#[derive(Args, Clone)]
pub struct PredictArgs {
    /// The run directory, or an exported model.pt
    pub run: PathBuf,
    /// The sentences to label [default: standard input]
    #[arg(long, value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// The file to write the labels to [default: standard output]
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// The format of input and output
    #[arg(long, value_enum, default_value = "auto")]
    pub format: PredictFormat,
    /// Also write the K most probable classes
    #[arg(long, value_name = "K", default_value_t = 0, hide_default_value = true)]
    pub top: u16,
    /// The checkpoint to use: best, last (the weights of the last step, not averaged) or best-TASK
    #[arg(long, default_value = "best")]
    pub checkpoint: String,
    #[command(flatten)]
    pub machine: Machine,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PredictFormat {
    /// One sentence per line, or JSON lines with `text` or `tokens`; JSON lines out. Input files .conll and .conllu are
    /// read as conll
    Auto,
    /// One sentence per line, even if it looks like JSON; JSON lines out
    Text,
    /// One word per line; the same lines out, with an added column per tagging task and a comment per class
    Conll,
}

#[derive(Args)]
pub struct ExportArgs {
    /// The run directory
    pub run: PathBuf,
    /// What to write: one TorchScript file, a folder with safetensors, an ONNX file, or a model repository
    /// for NVIDIA Triton
    #[arg(long, value_enum)]
    pub format: ExportFormat,
    /// The file or folder to write
    #[arg(long, value_name = "PATH")]
    pub out: PathBuf,
    /// The checkpoint to use: best, last (the weights of the last step, not averaged) or best-TASK
    #[arg(long, default_value = "best")]
    pub checkpoint: String,
    /// Precision of the weights
    #[arg(long, value_enum, default_value = "float32")]
    pub dtype: Dtype,
    /// Replace an existing export
    #[arg(long)]
    pub force: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ExportFormat {
    Torchscript,
    Safetensors,
    Onnx,
    Triton,
}

#[derive(Args)]
pub struct VerifyArgs {
    pub model: PathBuf,
    pub cases: PathBuf,
}

#[derive(Args)]
pub struct StudyArgs {
    /// The experiment file, which has a `study:` block
    pub experiment: PathBuf,
    /// The folder of the study [default: runs/NAME-study]; finished runs in it are kept
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Set a value of the experiment, as in --set training.max_epochs=5
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Number of runs in parallel, distributed over the devices; at least one per device
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub jobs: u16,
    /// Devices to distribute the runs over, as in cuda:0,cuda:1 [default: auto]
    #[arg(long = "device", value_name = "DEVICE", value_delimiter = ',')]
    pub devices: Vec<String>,
    /// Number of CPU threads of each run [default: all cores, divided among the runs]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
}

#[derive(Args)]
pub struct CompareArgs {
    /// Run directories or study folders
    #[arg(required = true)]
    pub runs: Vec<PathBuf>,
    /// Print JSON instead of tables
    #[arg(long)]
    pub json: bool,
    /// Also write a self-contained HTML page with the curves
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

#[derive(Args)]
pub struct FindLrArgs {
    /// The experiment file
    pub experiment: PathBuf,
    /// Set a value of the experiment, as in --set training.batch_size=64
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// The first learning rate
    #[arg(long, value_name = "RATE", default_value_t = 1e-6)]
    pub from: f64,
    /// The last learning rate
    #[arg(long, value_name = "RATE", default_value_t = 1.0)]
    pub to: f64,
    /// Largest number of steps; the test ends earlier if the loss diverges
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u16).range(20..))]
    pub steps: u16,
    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
    /// Also write an HTML page with the curve
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    #[command(flatten)]
    pub machine: Machine,
}

#[derive(Args)]
pub struct BenchArgs {
    /// The experiment file; or a run directory or exported model, to time labelling
    pub experiment: PathBuf,
    /// Set a value of the experiment, as in --set training.batch_size=64
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Steps of each strategy in a round
    #[arg(long, value_name = "N", default_value_t = 40, value_parser = clap::value_parser!(u16).range(1..))]
    pub steps: u16,
    /// Strategies to time, by their names in the table, separated by `;`, as in --only equal [default: all]
    #[arg(long, value_name = "NAME", value_delimiter = ';')]
    pub only: Vec<String>,
    /// Instead of timing, write the batches, the initial weights and the losses of the steps to a folder
    #[arg(long, value_name = "DIR")]
    pub write: Option<PathBuf>,
    /// Write what the GPU does during the first strategy's steps to a file, for Perfetto or chrome://tracing; on the
    /// CPU, the operators that the main thread runs
    #[arg(long, value_name = "FILE", conflicts_with = "write")]
    pub trace: Option<PathBuf>,
    /// Number of rounds; every strategy is timed in each
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..))]
    pub rounds: u16,
    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub machine: Machine,
}

#[derive(Args)]
pub struct OptionsArgs {
    /// List only the keys below this key, as in training.optimizer
    pub path: Option<String>,
    /// Print the JSON Schema of experiment files, with which editors complete and check them
    #[arg(long)]
    pub schema: bool,
}

#[derive(Args)]
pub struct SelftestArgs {
    /// An experiment file: its first steps must give the same weights each time, also with a stop in between
    pub experiment: Option<PathBuf>,
    /// Set a value of the experiment, as in --set model.trunk.hidden=128
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "experiment")]
    pub overrides: Vec<String>,
    /// Number of steps to take
    #[arg(long, value_name = "N", default_value = "20", requires = "experiment")]
    #[arg(value_parser = clap::value_parser!(u16).range(2..))]
    pub steps: u16,
    #[command(flatten)]
    pub machine: Machine,
}

#[derive(Args)]
pub struct CheckArgs {
    /// The experiment file
    pub experiment: PathBuf,
    /// Set a value of the experiment, as in --set model.trunk.hidden=128
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// List every problem, not only the first few of each kind
    #[arg(long)]
    pub all: bool,
}
