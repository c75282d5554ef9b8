//! The composition root: one file a verb. What is printed is printed here.

mod bench;
mod check;
pub mod cli;
mod compare;
mod evaluate;
mod export;
mod find_lr;
mod kernels;
mod predict;
pub mod prepare;
mod progress;
mod rehearsal;
mod selftest;
mod study;
mod table;
mod train;
pub mod trainer;
mod transfer;

use std::process::ExitCode;

use clap::Parser;

use crate::problem::InvalidInput;
use cli::{Cli, Command};

/// How a command that did not fail came to its end.
pub enum End {
    Done,
    /// `check` found errors; they are printed.
    Invalid,
    /// Stopped by Ctrl-C or SIGTERM, everything saved.
    Interrupted,
}

/// Runs the command line. Exit codes: 0 done; 1 the run failed; 2 the command line, the experiment or the data is wrong;
/// 130 interrupted, everything saved.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let level = match (cli.quiet, cli.verbose) {
        (true, _) => log::LevelFilter::Error,
        (_, 0) => log::LevelFilter::Info,
        (_, 1) => log::LevelFilter::Debug,
        _ => log::LevelFilter::Trace,
    };
    let mut logger = env_logger::Builder::new();
    logger.filter_level(level).parse_default_env().format(|out, record| {
        use std::io::Write;
        match record.level() {
            log::Level::Info => writeln!(out, "{}", record.args()),
            level => writeln!(out, "{}: {}", level.as_str().to_lowercase(), record.args()),
        }
    });
    logger.init();
    let result = match &cli.command {
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
        Command::Selftest(args) => selftest::run(args),
    };
    match result {
        Ok(End::Done) => ExitCode::SUCCESS,
        Ok(End::Invalid) => ExitCode::from(2),
        Ok(End::Interrupted) => ExitCode::from(130),
        Err(error) => {
            // A reader that has seen enough, such as `head`, is no failure.
            let broken_pipe = error.chain().any(|cause| {
                cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
            });
            if broken_pipe {
                return ExitCode::SUCCESS;
            }
            match error.chain().find_map(|cause| cause.downcast_ref::<InvalidInput>()) {
                Some(invalid) => {
                    eprintln!("error: {invalid}");
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
