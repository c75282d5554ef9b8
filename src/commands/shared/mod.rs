//! Code shared by several commands.

pub mod build_trainer;
pub(super) mod data_checks;
pub(super) mod exported_file;
pub(super) mod init_from;
pub mod prepare;
pub(super) mod progress;
pub(super) mod rehearsal;
pub(super) mod run_report;
pub(super) mod saved_model;
pub(super) mod signals;
pub(super) mod table;
