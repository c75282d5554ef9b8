//! What several commands share.

pub mod build_trainer;
pub mod data_checks;
pub mod exported_file;
pub mod init_from;
pub mod onednn;
pub mod prepare;
pub mod progress;
pub mod rehearsal;
pub mod run_report;
pub mod saved_model;
pub mod signals;
pub mod table;
