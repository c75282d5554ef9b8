//! The NVIDIA Triton configuration of an exported model.

use super::Dtype;
use crate::task::{Task, TaskKind};

/// `config.pbtxt`. Inputs and outputs are matched by position, given as `__N` in their names. `bytes` tells whether the
/// model reads characters.
pub fn config(name: &str, tasks: &[Task], dtype: Dtype, bytes: bool) -> String {
    let bytes = match bytes {
        true => ",\n  {\n    name: \"bytes__2\"\n    data_type: TYPE_INT64\n    dims: [ -1, -1 ]\n  }",
        false => "",
    };
    let float = match dtype {
        Dtype::Float32 | Dtype::Int8 => "TYPE_FP32",
        Dtype::Float16 => "TYPE_FP16",
        Dtype::Bfloat16 => "TYPE_BF16",
    };
    let mut outputs = Vec::new();
    for task in tasks {
        let n = task.labels.len();
        let (logits, labels) = match task.kind {
            TaskKind::Classification => (format!("[ {n} ]"), "[ 1 ]\n    reshape { shape: [ ] }"),
            TaskKind::Tagging(_) => (format!("[ -1, {n} ]"), "[ -1 ]"),
        };
        outputs.push((format!("{}.logits", task.name), float, logits));
        outputs.push((format!("{}.labels", task.name), "TYPE_INT64", labels.to_owned()));
    }
    let outputs: Vec<String> = outputs
        .into_iter()
        .enumerate()
        .map(|(i, (name, kind, dims))| {
            format!("  {{\n    name: \"{name}__{i}\"\n    data_type: {kind}\n    dims: {dims}\n  }}")
        })
        .collect();
    format!(
        "name: \"{name}\"\nplatform: \"pytorch_libtorch\"\nmax_batch_size: 64\ninput [\n  {{\n    name: \"token_ids__0\"\n    \
         data_type: TYPE_INT64\n    dims: [ -1 ]\n    allow_ragged_batch: false\n  }},\n  {{\n    name: \"lengths__1\"\n    \
         data_type: TYPE_INT64\n    dims: [ 1 ]\n  }}{bytes}\n]\noutput [\n{}\n]\n",
        outputs.join(",\n")
    )
}
