//! The composition root: one module per command. All output is printed here.

mod bench;
mod check;
pub mod cli;
mod compare;
mod evaluate;
mod export;
mod find_lr;
mod options;
mod predict;
mod selftest;
pub mod shared;
mod study;
mod train;

use std::fmt::Display;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;

use crate::libtorch::caught;
use crate::problem::{InvalidInput, invalid};
use crate::run::atomic::Partial;
use cli::{Cli, Command};
use shared::signals::stop_flag;
// For the commands, as `super::NAME`.
use shared::{
    build_trainer, data_checks, exported_file, init_from, prepare, progress, rehearsal, run_report, saved_model,
    signals, table,
};

/// The outcome of a command that did not fail.
pub enum End {
    Done,
    /// `check` found errors; they are printed.
    Invalid,
    /// Stopped by Ctrl-C or SIGTERM, everything saved.
    Interrupted,
}

/// Runs the command line. Exit codes: 0 done; 1 the run failed; 2 the command line, the experiment or the data is
/// wrong; 130 interrupted, everything saved.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let level = match (cli.quiet, cli.verbose) {
        (true, _) => log::LevelFilter::Error,
        (_, 0) => log::LevelFilter::Info,
        (_, 1) => log::LevelFilter::Debug,
        _ => log::LevelFilter::Trace,
    };
    let mut logger = env_logger::Builder::new();
    logger.filter_level(level).parse_default_env().format(|out, record| match record.level() {
        log::Level::Info => writeln!(out, "{}", record.args()),
        log::Level::Warn => writeln!(out, "warning: {}", record.args()),
        level => writeln!(out, "{}: {}", level.as_str().to_lowercase(), record.args()),
    });
    logger.init();
    // Panics from libtorch are reported like other errors.
    std::panic::set_hook(Box::new(|panic| log::debug!("{panic}")));
    match caught(|| run(&cli.command)) {
        Ok(End::Done) => ExitCode::SUCCESS,
        Ok(End::Invalid) => ExitCode::from(2),
        Ok(End::Interrupted) => ExitCode::from(130),
        Err(error) => {
            // A reader that closes the pipe early, such as `head`, is not a failure.
            let broken_pipe = error.chain().any(|cause| {
                cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
            });
            if broken_pipe {
                return ExitCode::SUCCESS;
            }
            match error.chain().find_map(|cause| cause.downcast_ref::<InvalidInput>()) {
                Some(invalid) => {
                    invalid.shown().iter().for_each(|problem| eprintln!("error: {problem}"));
                    invalid.rest().iter().for_each(|rest| eprintln!("{rest}"));
                    ExitCode::from(2)
                }
                None => {
                    eprintln!("error: {error:#}");
                    ExitCode::FAILURE
                }
            }
        }
    }
}

fn run(command: &Command) -> Result<End> {
    signals::listen()?;
    match command {
        Command::Train(args) => train::run(args),
        Command::Evaluate(args) => evaluate::run(args),
        Command::Predict(args) => predict::run(args),
        Command::Check(args) => check::run(args),
        Command::Export(args) => export::run(args),
        Command::VerifyExport(args) => export::verify(args),
        Command::Study(args) => study::run(args),
        Command::Compare(args) => compare::run(args),
        Command::FindLr(args) => find_lr::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Options(args) => options::run(args),
        Command::Selftest(args) => selftest::run(args),
    }
}

/// Opens a command's output file before the work begins; it must not be one of the files that the command reads.
fn output(path: &Path, read: &[&Path]) -> Result<Partial> {
    let same =
        |other: &&Path| path.canonicalize().is_ok_and(|path| other.canonicalize().is_ok_and(|other| path == other));
    if path == Path::new("-") {
        return Err(invalid("`-` is not a file; use /dev/stdout for standard output"));
    }
    if path.is_file() && read.iter().any(same) {
        return Err(invalid(format!("{} is an input of this command: choose another output file", path.display())));
    }
    Partial::new(path).map_err(|error| invalid(format!("{} cannot be written: {error}", path.display())))
}

/// Prints a result. A closed pipe is an error, which [`main`] treats as success.
fn say(text: impl Display) -> Result<()> {
    writeln!(std::io::stdout().lock(), "{text}").context("standard output")
}
