//! From files to batches: formats, word splitting, tokenizers, label ids, encoded splits, batches and sampling.

mod batch;
mod cache;
mod corpus;
mod cuts;
mod device_split;
mod encoded;
mod formats;
pub mod gzip;
pub mod labels;
mod rows;
mod sampler;
mod set;
mod tokenizer;
pub mod vectors;
pub mod words;

pub use batch::{Batch, BatchPlan, Lengths, Targets};
pub use corpus::{Corpus, LoadedSet, load};
pub use device_split::DeviceSplit;
pub use encoded::{EncodedSplit, Spelling, TargetValues, Unseen};
pub use formats::{ConllLayout, ConllLine, Format, Offsets, json_row, json_value, line_of_a_word};
pub use rows::{ABSENT, Column, Field, Rows, RowsBuilder, Strings, Wanted};
pub use sampler::{Sampler, SamplingConfig};
pub use set::{DataConfig, OneOrMany, SetConfig, Split, TaskColumn};
pub use tokenizer::{FileConfig, PieceConfig, Tokenizer, TokenizerConfig, WordConfig};
pub use vectors::VectorsConfig;
