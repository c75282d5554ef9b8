//! polytask trains one shared embedding + LSTM trunk under several heads, on CUDA or on the CPU, from one YAML file an
//! experiment.
//!
//! # The house
//!
//! Imports point down this table; a test reads the source for it.
//!
//! | module | what it is for |
//! |---|---|
//! | [`commands`] | a file a verb, and what verbs share: the only place that knows everything |
//! | [`config`] | the experiment as written and as checked |
//! | [`train`] | the loop, one step, early stopping |
//! | [`export`] | the model as one TorchScript file |
//! | [`compare`] | statistics over runs, and their page |
//! | [`evaluate`] | losses and scores of a model over a split |
//! | [`model`] | embedding, trunk, what heads read of it, heads |
//! | [`weighting`] | how task losses become one |
//! | [`optim`] | optimizers, rows of tables that wait, schedules |
//! | [`data`] | formats, their cache, tokenizer, word vectors, labels, batches, the order of rows |
//! | [`metrics`] | counting over label ids; no tensors |
//! | [`run`] | the run directory, checkpoints, records |
//! | [`onnx`] | writing ONNX files |
//! | [`libtorch`] | what tch lacks; the only `unsafe` |
//! | [`task`], [`rng`], [`problem`] | the task table, seeds, messages about inputs |
//!
//! A batch's life: the [`data::Sampler`] plans an epoch as row numbers, [`data::DeviceSet`] gathers a batch on the device,
//! [`model::Model`] runs the trunk once and each head on its own rows, a [`weighting::LossWeighting`] makes one loss of
//! theirs, and [`train::Trainer`] clips, updates and records without waiting for the device.
//!
//! Tables are read and trained by the rows that a step holds; the updates of the others wait until they are read. On the CPU a
//! batch is cut in parts, which workers take forward and backward side by side. On CUDA a step of a shape that was met before
//! is [replayed](train::graphs) as one call. Either way it is the same [`train`] code, and the tests hold it to the same
//! numbers.

pub mod commands;
pub mod compare;
pub mod config;
pub mod data;
pub mod evaluate;
pub mod export;
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
