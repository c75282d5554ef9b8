//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::data::Split;
use crate::export::Dtype;

/// Multi-task language models on a shared embedding + LSTM trunk, from one YAML file an experiment.
#[derive(Parser)]
#[command(name = "polytask", version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    /// More of what happens (-v); RUST_LOG takes the filters of env_logger
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Errors alone
    #[arg(short, long, global = true)]
    pub quiet: bool,
}

#[derive(Subcommand)]
pub enum Command {
    /// Train an experiment, evaluate its best checkpoint on test, print a table
    Train(TrainArgs),
    /// Score a trained run on train, dev or test, or on other files
    Evaluate(EvaluateArgs),
    /// Label sentences with a trained run: text, JSON lines or CoNLL in, JSON lines or CoNLL out
    Predict(PredictArgs),
    /// Find everything wrong or odd in an experiment and its data, before training
    Check(CheckArgs),
    /// Write a trained run as a file or folder that others load
    Export(ExportArgs),
    #[command(hide = true)]
    VerifyExport(VerifyArgs),
    /// Run the study of an experiment: strategies, seeds, data fractions, single-task twins
    Study(StudyArgs),
    /// Put runs or studies side by side: did multi-task training help?
    Compare(CompareArgs),
    /// Find a learning rate: the loss while the rate rises from step to step
    FindLr(FindLrArgs),
    /// Measure a training step and what each weighting strategy adds, or how fast a trained model labels
    Bench(BenchArgs),
    /// List every key that an experiment file may have
    Options(OptionsArgs),
    /// Check on this machine's device the mathematics of loss weighting, and that an experiment resumes to the same weights
    Selftest(SelftestArgs),
}

#[derive(Args, Clone)]
pub struct Machine {
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub device: String,
    /// Threads on the CPU [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Parts of a batch that go side by side on the CPU, each on threads of its own [default: one a thread]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub workers: Option<u16>,
}

#[derive(Args, Clone)]
pub struct TrainArgs {
    /// The experiment file, or with --resume the run directory
    pub experiment: PathBuf,
    /// The run directory [default: runs/NAME, numbered when taken]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Change a value of the experiment, as in --set model.trunk.hidden=128
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Go on with the run in --out from its last checkpoint [without --out: the newest run of this name]
    #[arg(long)]
    pub resume: bool,
    #[command(flatten)]
    pub machine: Machine,
}

#[derive(Args)]
pub struct EvaluateArgs {
    /// The run directory, or an exported model.pt
    pub run: PathBuf,
    /// Which split
    #[arg(long, value_enum, default_value = "test")]
    pub split: Split,
    /// A file in the place of that split, written as the run's data is
    #[arg(long, value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// Which checkpoint: best, last (the weights of the last step, not averaged) or best-TASK
    #[arg(long, default_value = "best")]
    pub checkpoint: String,
    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
    /// Change what the data is, as in --set data.sets.chats.test=/data/new.jsonl
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Print the scores of every class, tag or type of span too, and what it is most often taken for
    #[arg(long)]
    pub by_label: bool,
    /// Write what is right and what the model says of every sentence, as JSON lines
    #[arg(long, value_name = "FILE")]
    pub predictions: Option<PathBuf>,
    #[command(flatten)]
    pub machine: Machine,
}

#[derive(Args)]
pub struct PredictArgs {
    /// The run directory, or an exported model.pt
    pub run: PathBuf,
    /// What is to be labelled [default: standard input]
    #[arg(long, value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// Where the labels go [default: standard output]
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// What comes in and goes out
    #[arg(long, value_enum, default_value = "auto")]
    pub format: PredictFormat,
    /// Tell the K most probable classes too
    #[arg(long, value_name = "K", default_value_t = 0, hide_default_value = true)]
    pub top: u16,
    /// Which checkpoint: best, last (the weights of the last step, not averaged) or best-TASK
    #[arg(long, default_value = "best")]
    pub checkpoint: String,
    #[command(flatten)]
    pub machine: Machine,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PredictFormat {
    /// A sentence a line, or JSON lines with `text` or `tokens`; JSON lines out. Files .conll and .conllu as conll
    Auto,
    /// A sentence a line, whatever it begins with; JSON lines out
    Text,
    /// A word a line; the same lines out, with a column a tagging task and a comment a class
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
    /// Which checkpoint: best, last (the weights of the last step, not averaged) or best-TASK
    #[arg(long, default_value = "best")]
    pub checkpoint: String,
    /// Precision of the weights
    #[arg(long, value_enum, default_value = "float32")]
    pub dtype: Dtype,
    /// Replace what is there
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
    /// The experiment file, with a `study:`
    pub experiment: PathBuf,
    /// The folder of the study [default: runs/NAME-study]; finished runs in it are kept
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Change a value of the experiment, as in --set training.max_epochs=5
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Runs side by side, in turn on the devices; no fewer than devices
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub jobs: u16,
    /// Devices, which the runs take in turn, as in cuda:0,cuda:1 [default: auto]
    #[arg(long = "device", value_name = "DEVICE", value_delimiter = ',')]
    pub devices: Vec<String>,
    /// Threads of each run on the CPU [default: all cores, shared out]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
}

#[derive(Args)]
pub struct CompareArgs {
    /// Run directories, or folders of studies
    #[arg(required = true)]
    pub runs: Vec<PathBuf>,
    /// Print JSON instead of tables
    #[arg(long)]
    pub json: bool,
    /// Also write one self-contained page with the curves
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

#[derive(Args)]
pub struct FindLrArgs {
    /// The experiment file
    pub experiment: PathBuf,
    /// Change a value of the experiment, as in --set training.batch_size=64
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// The first learning rate
    #[arg(long, value_name = "RATE", default_value_t = 1e-6)]
    pub from: f64,
    /// The last learning rate
    #[arg(long, value_name = "RATE", default_value_t = 1.0)]
    pub to: f64,
    /// Steps at most; the test ends before where the loss runs away
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u16).range(20..))]
    pub steps: u16,
    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
    /// Also write a page with the curve
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    #[command(flatten)]
    pub machine: Machine,
}

#[derive(Args)]
pub struct BenchArgs {
    /// The experiment file; or a run directory or exported model, to measure labelling
    pub experiment: PathBuf,
    /// Change a value of the experiment, as in --set training.batch_size=64
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Steps of a strategy in a round
    #[arg(long, value_name = "N", default_value_t = 40, value_parser = clap::value_parser!(u16).range(1..))]
    pub steps: u16,
    /// Strategies to measure, by the names in the table and apart by `;`, as in --only equal [default: all]
    #[arg(long, value_name = "NAME", value_delimiter = ';')]
    pub only: Vec<String>,
    /// Instead of measuring, write the steps' batches, the first weights and the losses of the steps into a folder
    #[arg(long, value_name = "DIR")]
    pub write: Option<PathBuf>,
    /// Rounds, in each of which every strategy takes its turn
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
    /// Only what is below this key, as in training.optimizer
    pub path: Option<String>,
    /// Print the JSON Schema of experiment files, with which editors complete and check them
    #[arg(long)]
    pub schema: bool,
}

#[derive(Args)]
pub struct SelftestArgs {
    /// An experiment file: its first steps must give the same weights each time, with a stop in between too
    pub experiment: Option<PathBuf>,
    /// Change a value of the experiment, as in --set model.trunk.hidden=128
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "experiment")]
    pub overrides: Vec<String>,
    /// Steps to take
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
    /// Change a value of the experiment, as in --set model.trunk.hidden=128
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// List every problem, not the first of each kind
    #[arg(long)]
    pub all: bool,
}
