//! Token embedding: a learned table, pretrained vectors and character features, concatenated; with dropout.
//!
//! word dropout: a token is read as unknown (Iyyer 2015, section 3.2; Gal & Ghahramani 2016 drop word types). row
//! dropout: the table rows of a word type are 0 throughout the batch (Merity 2018, arXiv 1708.02182, section 4.3).
//!
//! B sentences, T tokens, L bytes of the longest word, E embedding size, V tokens known from training, X further
//! tokens, U distinct tokens of a step.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::characters::{Characters, CharactersConfig};
use super::dropout::{Masks, dropout};
use super::parameters::Scope;
use super::{Mode, Script, Site, Vocabulary};
use crate::data::{Batch, VectorsConfig};
use crate::libtorch::{bernoulli, upload};
use crate::onnx::{Attribute, Graph, Value};
use crate::optim::Touched;

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EmbeddingConfig {
    /// Dimension of the learned token embedding; 0 for none, if there are vectors or characters. Default 128.
    #[schemars(range(min = 0, max = 100_000))]
    pub dim: i64,
    /// Pretrained word vectors, in addition to the learned embedding. Default: none.
    pub vectors: Vec<VectorsConfig>,
    /// Character features, computed from the spelling of each word: `{kind: cnn}`, `{kind: lstm}` or `{kind: none}`.
    /// Default `cnn`.
    pub characters: CharactersConfig,
    /// Dropout on the embedded tokens. Default 0.3.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub dropout: f64,
    /// Use one mask of `dropout` for all tokens of a sentence. Default true.
    pub locked_dropout: bool,
    /// Fraction of word types whose embedding, except for the character features, is zero throughout a batch. Default
    /// 0.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub row_dropout: f64,
    /// Fraction of tokens that are read as the unknown word; their character features stay. Default 0.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub word_dropout: f64,
}

impl Default for EmbeddingConfig {
    fn default() -> Self {
        EmbeddingConfig {
            dim: 128,
            vectors: Vec::new(),
            characters: CharactersConfig::default(),
            dropout: 0.3,
            locked_dropout: true,
            row_dropout: 0.0,
            word_dropout: 0.0,
        }
    }
}

/// A table of pretrained vectors.
struct Pretrained {
    /// Vectors of the tokens known from training, [V, E]; trainable or not.
    trained: Table,
    /// Vectors of tokens that do not occur in training, or are too rare for its vocabulary, [X, E]; never trained.
    further: Option<Tensor>,
}

/// A table of vectors [V, E], and its parameter index if it is trained.
struct Table {
    values: Tensor,
    parameter: Option<usize>,
}

/// The table rows that a step reads. A step reads and trains only these, so its cost does not depend on the vocabulary
/// size.
pub struct TableRows {
    /// Ids in the trained tables: padding, unknown, then the others; if updates are deferred on the device, the id at
    /// every position [T * B].
    pub touched: Touched,
    /// These rows of each trained table, [U, E] or [T, B, E]; they receive the gradient.
    pub leaves: Vec<Tensor>,
    /// Row of each touched id in a leaf, `[V]`, undefined for other ids; `None` if the rows are in the order of the
    /// batch's tokens.
    places: Option<Tensor>,
}

/// Embedding tables and character features.
pub struct Embedding {
    learned: Option<Table>,
    pretrained: Vec<Pretrained>,
    characters: Option<Characters>,
    config: EmbeddingConfig,
    padding: i64,
    pads: bool,
    unknown: i64,
    n_trained: i64,
    device: Device,
}

impl Embedding {
    pub fn new(mut scope: Scope, config: &EmbeddingConfig, vocabulary: &Vocabulary) -> Self {
        let (n_trained, device) = (vocabulary.n_trained as i64, scope.device());
        let (padding, pads, unknown) = (vocabulary.padding.into(), vocabulary.pads, vocabulary.unknown.into());
        let learned = (config.dim > 0).then(|| Table {
            parameter: Some(scope.count()),
            values: scope.normal_rows("weight", &[n_trained, config.dim], pads.then_some(padding)),
        });
        let mut pretrained = Vec::new();
        for (i, (table, config)) in vocabulary.vectors.iter().zip(&config.vectors).enumerate() {
            let (first, rest) =
                (table.narrow(0, 0, n_trained), table.narrow(0, n_trained, table.size()[0] - n_trained));
            let name = format!("vectors_{i}");
            let trained = match config.trainable {
                true => Table { parameter: Some(scope.count()), values: scope.add(&name, first.copy()) },
                false => Table { parameter: None, values: scope.constant(&name, first.copy()) },
            };
            let further = (rest.size()[0] > 0).then(|| scope.constant(&format!("further_{i}"), rest.copy()));
            pretrained.push(Pretrained { trained, further });
        }
        let characters = Characters::new(scope.sub("characters"), &config.characters);
        Embedding { learned, pretrained, characters, config: config.clone(), padding, pads, unknown, n_trained, device }
    }

    /// Features per token: E.
    pub fn width(&self) -> i64 {
        let pretrained = self.pretrained.iter().map(|table| table.trained.values.size()[1]).sum::<i64>();
        let characters = self.characters.as_ref().map_or(0, Characters::width);
        self.learned.as_ref().map_or(0, |table| table.values.size()[1]) + pretrained + characters
    }

    /// `forward(token_ids)`, or `forward(token_ids, bytes)` with character features.
    pub fn script(&self) -> Script {
        let mut parts = String::new();
        let n = self.n_trained;
        if self.learned.is_some() {
            parts += "    parts.append(torch.embedding(self.weight, known))\n";
        }
        for (i, table) in self.pretrained.iter().enumerate() {
            parts += &match table.further {
                None => format!("    parts.append(torch.embedding(self.vectors_{i}, known))\n"),
                Some(_) => format!(
                    "    further = torch.embedding(self.further_{i}, (token_ids - {n}).clamp(min=0))
    parts.append(torch.where((token_ids < {n}).unsqueeze(-1), torch.embedding(self.vectors_{i}, known), further))\n"
                ),
            };
        }
        let mut inputs = "token_ids: Tensor";
        if self.characters.is_some() {
            parts += "    parts.append(self.characters.forward(bytes))\n";
            inputs = "token_ids: Tensor, bytes: Tensor";
        }
        let source = format!(
            "
def forward(self, {inputs}) -> Tensor:
    known = token_ids.masked_fill(token_ids >= {n}, {})
    parts: List[Tensor] = []
{parts}    return torch.cat(parts, -1)
",
            self.unknown
        );
        Script { source, ..Script::default() }
    }

    pub fn characters_script(&self) -> Option<Script> {
        self.characters.as_ref().map(Characters::script)
    }

    pub fn onnx(&self, graph: &mut Graph, token_ids: &Value, bytes: Option<&Value>) -> Value {
        let n = graph.constant(&Tensor::from(self.n_trained));
        let trained = graph.op("Less", &[token_ids, &n], vec![]); // [B, T]
        let unknown = graph.constant(&Tensor::from(self.unknown));
        let known = graph.op("Where", &[&trained, token_ids, &unknown], vec![]);
        let gather = |graph: &mut Graph, table: &Tensor, ids: &Value| {
            let table = graph.constant(table);
            graph.op("Gather", &[&table, ids], vec![])
        };
        let mut parts = Vec::new();
        parts.extend(self.learned.as_ref().map(|table| gather(graph, &table.values, &known)));
        for table in &self.pretrained {
            let vectors = gather(graph, &table.trained.values, &known);
            parts.push(match &table.further {
                None => vectors,
                Some(further) => {
                    let zero = graph.constant(&Tensor::from(0i64));
                    let ids = graph.op("Sub", &[token_ids, &n], vec![]);
                    let ids = graph.op("Max", &[&ids, &zero], vec![]);
                    let further = gather(graph, further, &ids);
                    let trained = graph.unsqueeze(&trained, 2);
                    graph.op("Where", &[&trained, &vectors, &further], vec![])
                }
            });
        }
        if let (Some(characters), Some(bytes)) = (&self.characters, bytes) {
            parts.push(characters.onnx(graph, bytes));
        }
        graph.op("Concat", &parts.iter().collect::<Vec<_>>(), vec![Attribute::Int("axis", -1)])
    }

    fn tables(&self) -> impl Iterator<Item = &Table> {
        self.learned.iter().chain(self.pretrained.iter().map(|table| &table.trained))
    }

    /// The table rows that `token_ids`, which may contain repetitions, touch.
    pub fn touched(&self, token_ids: &[i32]) -> Touched {
        // A tokenizer without a padding token pads with any other, even the unknown one.
        let mut special = vec![self.padding, self.unknown];
        special.dedup();
        let mut ids: Vec<i64> = token_ids.iter().map(|&id| i64::from(id)).collect();
        ids.sort_unstable();
        ids.dedup();
        ids.retain(|id| *id < self.n_trained && !special.contains(id));
        ids.splice(0..0, special);
        Touched {
            ids: upload(&ids, self.device),
            host: ids,
            padding: self.padding_row(),
            tables: self.trained_tables(),
        }
    }

    /// Parameter indices of the trained tables.
    pub fn trained_tables(&self) -> Vec<usize> {
        self.tables().filter_map(|table| table.parameter).collect()
    }

    /// The padding row, which is never updated; -1 if there is none.
    fn padding_row(&self) -> i64 {
        if self.pads { self.padding } else { -1 }
    }

    /// The table rows that `token_ids` [B, T] read, one per position; the ids stay on the device.
    pub fn places(&self, token_ids: &Tensor, batch: &Batch) -> Touched {
        // Time-major, as cuDNN reads.
        let ids = self.known(token_ids, batch).transpose(0, 1).contiguous();
        Touched { ids: ids.flatten(0, 1), host: Vec::new(), padding: self.padding_row(), tables: self.trained_tables() }
    }

    /// Copies of the rows at `places`, in the order of the batch's tokens, to be read instead of the tables.
    pub fn rows_at(&self, places: Touched, batch: &Batch) -> TableRows {
        let leaf = |table: &Table| {
            let rows = tch::no_grad(|| table.values.index_select(0, &places.ids));
            rows.view([-1, batch.rows.len() as i64, rows.size()[1]]).set_requires_grad(true)
        };
        let leaves = self.tables().filter(|table| table.parameter.is_some()).map(leaf).collect();
        TableRows { leaves, places: None, touched: places }
    }

    /// Which tokens have only pretrained vectors, [B, T]; `None` if the set has no such tokens.
    fn further(&self, token_ids: &Tensor, batch: &Batch) -> Option<Tensor> {
        (batch.max_id >= self.n_trained).then(|| token_ids.ge(self.n_trained))
    }

    /// The rows of the trained tables for `token_ids`: unknown for tokens that have only pretrained vectors.
    fn known(&self, token_ids: &Tensor, batch: &Batch) -> Tensor {
        match self.further(token_ids, batch) {
            Some(further) => token_ids.masked_fill(&further, self.unknown),
            None => token_ids.shallow_clone(),
        }
    }

    /// `token_ids` [B, T] after word dropout.
    pub fn drop_words(&self, token_ids: &Tensor, mode: Mode) -> Tensor {
        match mode.draws(Site::WordDropout).filter(|_| self.config.word_dropout > 0.0) {
            Some(draws) => {
                let drawn = bernoulli(&token_ids.size(), self.config.word_dropout, draws, token_ids.device()).gt(0.5);
                token_ids.masked_fill(&drawn, self.unknown)
            }
            None => token_ids.shallow_clone(),
        }
    }

    /// Copies the `touched` rows into autograd leaves, which receive the gradient.
    pub fn rows(&self, touched: Touched) -> TableRows {
        let (ids, device) = (&touched.ids, touched.ids.device());
        let places = Tensor::empty([self.n_trained], (Kind::Int64, device));
        let _ = places.shallow_clone().index_copy_(0, ids, &Tensor::arange(ids.size()[0], (Kind::Int64, device)));
        let trained = self.tables().filter(|table| table.parameter.is_some());
        let leaf = |table: &Table| tch::no_grad(|| table.values.index_select(0, ids)).set_requires_grad(true);
        TableRows { leaves: trained.map(leaf).collect(), places: Some(places), touched }
    }

    /// Ids [B, T] and, with character features, the batch's bytes [B, T, L] to [B, T, E].
    pub fn forward(&self, ids: &Tensor, batch: &Batch, rows: Option<&TableRows>, mode: Mode) -> Tensor {
        let (further, known) = (self.further(ids, batch), self.known(ids, batch));
        let places = rows.and_then(|rows| rows.places.as_ref()).map(|places| places.take(&known));
        let look_up = |table: &Table| {
            let leaf = rows.and_then(|rows| {
                let at = rows.touched.tables.iter().position(|&index| Some(index) == table.parameter)?;
                Some(&rows.leaves[at])
            });
            match (leaf, &places) {
                // The leaf's first row is padding.
                (Some(leaf), Some(places)) => Tensor::embedding(leaf, places, self.padding_row().min(0), false, false),
                (Some(leaf), None) => leaf.transpose(0, 1),
                (None, _) => Tensor::embedding(&table.values, &known, self.padding_row(), false, false),
            }
        };
        let mut parts: Vec<Tensor> = self.learned.iter().map(look_up).collect();
        for table in &self.pretrained {
            let vectors = look_up(&table.trained);
            parts.push(match (&table.further, &further) {
                (Some(rows), Some(further)) => {
                    let rows = Tensor::embedding(rows, &(ids - self.n_trained).clamp_min(0), -1, false, false);
                    rows.where_self(&further.unsqueeze(-1), &vectors)
                }
                _ => vectors,
            });
        }
        let row_draws = mode.from_row(0).draws(Site::RowDropout).filter(|_| self.config.row_dropout > 0.0);
        if let Some(draws) = row_draws.filter(|_| !parts.is_empty()) {
            let share = 1.0 - self.config.row_dropout;
            let n_types = if further.is_some() { batch.max_id + 1 } else { self.n_trained };
            let kept = bernoulli(&[1, n_types], share, draws, ids.device()) / share;
            let kept = kept.take(ids).unsqueeze(-1); // [B, T, 1]
            parts.iter_mut().for_each(|part| *part = &*part * &kept);
        }
        if let (Some(characters), Some(bytes)) = (&self.characters, &batch.bytes) {
            parts.push(characters.forward(bytes, mode));
        }
        let embedded = if parts.len() == 1 { parts.swap_remove(0) } else { Tensor::cat(&parts, -1) };
        let masks = if self.config.locked_dropout { Masks::Locked } else { Masks::PerElement };
        dropout(&embedded, self.config.dropout, masks, mode, Site::Embedding)
    }
}
