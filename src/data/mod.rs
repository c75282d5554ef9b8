//! From files to batches: formats, words, tokenizer and label maps, encoded sets, batches, and the order of rows.

mod batch;
mod cache;
mod cuts;
mod encoded;
mod formats;
pub mod labels;
mod rows;
mod sampler;
mod set;
mod tokenizer;
pub mod vectors;
pub mod words;

pub use batch::{Batch, DeviceSet, Lengths, Targets};
pub use encoded::{EncodedSet, TargetValues};
pub use formats::Format;
pub use rows::{ABSENT, Column, Field, Rows, RowsBuilder, Strings, Wanted, WantedKind};
pub use sampler::{Sampler, SamplingConfig};
pub use set::{Corpus, DataConfig, LoadedSet, Paths, SetConfig, Split, TaskColumn, load};
pub use tokenizer::{FileConfig, PieceConfig, Tokenizer, TokenizerConfig, WordConfig};
pub use vectors::VectorsConfig;
