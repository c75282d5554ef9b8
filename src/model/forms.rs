//! Export of a model as TorchScript and ONNX.

use super::heads::OnnxInputs;
use super::{Model, Script, WeightDtype, view};
use crate::onnx::{Element, Graph, Size, Value};
use crate::task::{Task, TaskKind};

impl Model {
    /// The model's parts as TorchScript, by parameter prefix; a head's is `heads.TASK`.
    ///
    /// Linear layers are called as `self.NAME.forward(x)`; the exporter provides these modules.
    pub fn scripts(&self, tasks: &[Task], dtype: WeightDtype) -> Vec<(String, Script)> {
        let mut parts =
            vec![("embedding".to_owned(), self.embedding.script()), ("trunk".to_owned(), self.trunk.script(dtype))];
        parts.extend(self.embedding.characters_script().map(|script| ("embedding.characters".to_owned(), script)));
        for ((task, head), view) in tasks.iter().zip(&self.heads).zip(&self.views) {
            let (method, lstm) = view.script(dtype);
            let mut script = head.script();
            script.source += &method;
            parts.push((format!("heads.{}", task.name), script));
            parts.extend(lstm.map(|lstm| (format!("heads.{}.lstm", task.name), lstm)));
        }
        parts
    }

    /// The whole model as an ONNX graph with the inputs and outputs of the TorchScript form; `pieces` if tokens are
    /// subwords.
    pub fn onnx(&self, tasks: &[Task], pieces: bool) -> Graph {
        let mut graph = Graph::new("polytask");
        let (rows, tokens, words) = (Size::Free("B"), Size::Free("T"), Size::Free(if pieces { "W" } else { "T" }));
        let token_ids = graph.input("token_ids", Element::Int64, &[rows, tokens]);
        let lengths = graph.input("lengths", Element::Int64, &[rows]);
        let bytes = self.reads_bytes().then(|| graph.input("bytes", Element::Int64, &[rows, tokens, Size::Free("L")]));
        let places = pieces.then(|| {
            let first = graph.input("first_tokens", Element::Int64, &[rows, words]);
            (first, graph.input("n_words", Element::Int64, &[rows]))
        });
        let embedded = self.embedding.onnx(&mut graph, &token_ids, bytes.as_ref());
        let layers = self.trunk.onnx(&mut graph, &embedded, &lengths);
        let mut found: Vec<Option<(Value, Value)>> = vec![None; tasks.len()];
        for &id in &self.order {
            let view = &self.views[id.0];
            let tokens = view.onnx(&mut graph, &layers, &lengths);
            let (words, n_words) = match &places {
                None => (tokens.clone(), lengths.clone()),
                Some((first, n_words)) => (graph.at(&tokens, first, view.width), n_words.clone()),
            };
            let beside = view.heads.iter().filter_map(|other| {
                let kinds = (self.kinds[other.0], self.kinds[id.0]);
                let logits = &found[other.0].as_ref()?.0;
                Some(view::distribution_onnx(&mut graph, logits, kinds, (&words, &n_words)))
            });
            let beside = beside.collect();
            let inputs = OnnxInputs { tokens, lengths: lengths.clone(), words, n_words, width: view.width, beside };
            found[id.0] = Some(self.heads[id.0].onnx(&mut graph, &inputs));
        }
        for (task, (logits, labels)) in tasks.iter().zip(found.into_iter().flatten()) {
            let mut sizes = match task.kind {
                TaskKind::Classification => vec![rows],
                TaskKind::Tagging(_) => vec![rows, words],
            };
            graph.output(&labels, &format!("{}.labels", task.name), Element::Int64, &sizes);
            sizes.push(Size::Is(task.labels.len() as i64));
            graph.output(&logits, &format!("{}.logits", task.name), Element::Float, &sizes);
        }
        graph
    }
}
