//! Viterbi decoding in exported models: TorchScript and ONNX.

use tch::{Device, Kind, Tensor};

use super::Crf;
use crate::model::Script;
use crate::onnx::{Attribute, Element, Graph, Size, Value};

impl Crf {
    /// Viterbi as two ONNX scans, forward over the words and back: logits [B, W, C] and `here` [B, W], true on words,
    /// to labels [B, W], undefined beyond a sentence's end.
    pub fn onnx(&self, graph: &mut Graph, logits: &Value, here: &Value) -> Value {
        let float = |x: Tensor| x.to_kind(Kind::Float);
        let (transitions, start, end) = self.scores();
        let n_tags = start.size()[0];
        let [transitions, start, end] = [transitions, start, end].map(|x| graph.constant(&float(x)));
        let stay = graph.constant(&Tensor::arange(n_tags, (Kind::Int64, Device::Cpu)).unsqueeze(0)); // [1, C]
        let x = graph.transpose(logits, &[1, 0, 2]); // [W, B, C]
        let on = graph.transpose(here, &[1, 0]);
        let on = graph.unsqueeze(&on, 2); // [W, B, 1]

        // Maps `best` [B, C] before a word to `best` after it and each tag's back-pointer; the first word uses the
        // start scores.
        let mut body = graph.body("forward");
        let sizes = [Size::Free("B"), Size::Is(n_tags)];
        let best = body.input("best", Element::Float, &sizes);
        let first = body.input("first", Element::Bool, &[Size::Is(1)]);
        let x_t = body.input("x", Element::Float, &sizes);
        let on_t = body.input("on", Element::Bool, &[Size::Free("B"), Size::Is(1)]);
        let wide = body.unsqueeze(&best, 2);
        let paths = body.op("Add", &[&wide, &transitions], vec![]); // [B, C, C]
        let attributes = || vec![Attribute::Ints("axes", vec![1]), Attribute::Int("keepdims", 0)];
        let score = body.op("ReduceMax", &[&paths], attributes());
        let score = body.op("Where", &[&first, &start, &score], vec![]);
        let axis = || vec![Attribute::Int("axis", 1), Attribute::Int("keepdims", 0)];
        let origin = body.op("ArgMax", &[&paths], axis());
        let origin = body.op("Where", &[&on_t, &origin, &stay], vec![]);
        let score = body.op("Add", &[&score, &x_t], vec![]);
        let after = body.op("Where", &[&on_t, &score, &best], vec![]);
        let never = body.constant(&Tensor::from_slice(&[0.0f32]));
        let never = body.cast(&never, Element::Bool);
        body.output(&after, "after", Element::Float, &sizes);
        body.output(&never, "later", Element::Bool, &[Size::Is(1)]);
        body.output(&origin, "origin", Element::Int64, &sizes);
        let zeros = graph.slice(&x, 0, 0, 1);
        let zeros = graph.squeeze(&zeros, 0); // [B, C]: its values are never read
        let yes = graph.constant(&Tensor::from_slice(&[1.0f32]));
        let yes = graph.cast(&yes, Element::Bool);
        let scan = vec![Attribute::Body("body", body), Attribute::Int("num_scan_inputs", 2)];
        let found = graph.ops("Scan", &[&zeros, &yes, &x, &on], scan, 3);

        let total = graph.op("Add", &[&found[0], &end], vec![]);
        let last = graph.op("ArgMax", &[&total], axis()); // [B]
        let mut body = graph.body("back");
        let tag = body.input("tag", Element::Int64, &[Size::Free("B")]);
        let origin = body.input("origin", Element::Int64, &sizes);
        let wide = body.unsqueeze(&tag, 1);
        let before = body.op("GatherElements", &[&origin, &wide], vec![Attribute::Int("axis", 1)]);
        let before = body.squeeze(&before, 1);
        body.output(&before, "before", Element::Int64, &[Size::Free("B")]);
        body.output(&tag, "here", Element::Int64, &[Size::Free("B")]);
        let backwards = |name| Attribute::Ints(name, vec![1]);
        let scan = vec![
            Attribute::Body("body", body),
            Attribute::Int("num_scan_inputs", 1),
            backwards("scan_input_directions"),
            backwards("scan_output_directions"),
        ];
        let tags = graph.ops("Scan", &[&last, &found[2]], scan, 2).swap_remove(1); // [W, B]
        graph.transpose(&tags, &[1, 0])
    }

    /// Viterbi over a batch as the body of a TorchScript function: `logits` [B, W, C] and `n_words` `[B]` to `labels`.
    pub fn script(&self) -> Script {
        let constrained = self.constraints.as_ref();
        let constants = constrained.map_or(Vec::new(), |(pairs, first)| {
            vec![("forbidden_pairs", pairs.shallow_clone()), ("forbidden_first", first.shallow_clone())]
        });
        let (pairs, first) = match constrained {
            Some(_) => (" + self.forbidden_pairs.float()", " + self.forbidden_first.float()"),
            None => ("", ""),
        };
        let source = format!(
            "    x = logits.float()
    transitions = (self.crf.transitions.float(){pairs}).unsqueeze(0)
    best = self.crf.start.float(){first} + x[:, 0]
    stay = torch.arange(x.size(2), device=x.device).unsqueeze(0).expand(x.size(0), -1)
    back: List[Tensor] = []
    for t in range(1, x.size(1)):
        score, origin = (best.unsqueeze(2) + transitions).max(1)
        here = (n_words > t).unsqueeze(1)
        best = torch.where(here, score + x[:, t], best)
        back.append(torch.where(here, origin, stay))
    tag = (best + self.crf.end.float()).argmax(1)
    tags = [tag]
    for i in range(len(back)):
        tag = back[len(back) - 1 - i].gather(1, tag.unsqueeze(1)).squeeze(1)
        tags.append(tag)
    labels = torch.stack(tags, 1).flip([1])
"
        );
        Script { source, constants, ..Script::default() }
    }
}
