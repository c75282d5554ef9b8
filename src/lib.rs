//! polytask trains multi-task text classifiers and taggers: one shared embedding + LSTM trunk with a head per task, on CUDA
//! or on the CPU, from one YAML file per experiment.
//!
//! # Modules
//!
//! A module imports only from modules below it in this table; a test checks this.
//!
//! | module | contents |
//! |---|---|
//! | [`commands`] | the subcommands, one file each, and code that they share |
//! | [`config`] | experiment files: reading, defaults, checks, JSON Schema |
//! | [`train`] | the training loop, a single step, early stopping |
//! | [`export`] | the model as a TorchScript file, its verification, its model card |
//! | [`compare`] | statistics over runs, and the HTML report |
//! | [`evaluate`] | losses and scores of a model on a split |
//! | [`model`] | embedding, trunk, heads, and what each head reads from the trunk |
//! | [`weighting`] | strategies that weight the task losses |
//! | [`optim`] | optimizers, deferred updates of embedding rows, learning-rate schedules |
//! | [`data`] | file formats and their cache, tokenizer, word vectors, labels, batches, sampling |
//! | [`metrics`] | accuracy and F1 from label ids, without tensors |
//! | [`run`] | the run directory, checkpoints, records |
//! | [`onnx`] | writing ONNX files |
//! | [`libtorch`] | bindings to libtorch that tch lacks; the only `unsafe` code |
//! | [`task`], [`rng`], [`problem`] | tasks and tag schemes, seeds, error messages about inputs |
//!
//! How a batch passes through them: the [`data::Sampler`] plans an epoch as row numbers, [`data::DeviceSplit`] gathers a batch
//! on the device, [`model::Model`] runs the trunk once and each head on its own rows, a [`weighting::LossWeighting`] combines
//! the heads' losses into one, and [`train::Trainer`] clips, updates and records without waiting for the device.
//!
//! A step reads and updates only the embedding rows that it needs; updates of other rows are deferred until these are read. On
//! the CPU a batch is split into parts, which workers run forward and backward in parallel. On CUDA a step whose shape occurred
//! before is [replayed](train::graphs) as one call. Both use the same [`train`] code, and tests check that results agree.

#[allow(clippy::print_stderr, clippy::print_stdout)]
pub mod commands;
pub mod compare;
pub mod config;
pub mod data;
pub mod evaluate;
pub mod export;
#[allow(unsafe_code)]
pub mod libtorch;
pub mod metrics;
pub mod model;
pub mod onnx;
pub mod optim;
pub mod problem;
pub mod rng;
pub mod run;
pub mod task;
pub mod train;
pub mod weighting;
