//! Integration tests: the library on small and on real data, and the program as a user runs it.

#![allow(clippy::print_stdout, clippy::unwrap_used)]

mod cli;
mod config;
mod doctor;
mod experiments;
mod export;
mod fast;
mod formats;
mod heads;
mod metrics;
mod mistakes;
mod parity;
mod python;
mod real_data;
mod study;
mod tidy;
mod training;
mod util;
mod weighting;
