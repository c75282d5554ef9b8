//! The model card that travels with an exported model (Mitchell 2019, arXiv 1810.03993), in Markdown.

use std::fmt::Write;

use crate::evaluate::Report;
use crate::task::{Task, TaskKind};

/// The content of the card, apart from the tasks.
pub struct About<'a> {
    pub name: &'a str,
    pub checkpoint: &'a str,
    pub dtype: &'a str,
    pub n_parameters: usize,
    /// The name and the source of each data set.
    pub sources: Vec<(&'a str, &'a str)>,
    pub dev: Option<&'a Report>,
}

pub fn card(about: &About, tasks: &[Task]) -> String {
    let mut out = format!(
        "# {}\n\nOne shared embedding + LSTM trunk with {} heads, trained with polytask {}. Checkpoint `{}`, {} weights in \
         {}.\n\n## Tasks\n\n",
        about.name,
        tasks.len(),
        env!("CARGO_PKG_VERSION"),
        about.checkpoint,
        about.n_parameters,
        about.dtype
    );
    for task in tasks {
        let what = match task.kind {
            TaskKind::Classification => "one class per sentence".to_owned(),
            TaskKind::Tagging(_) if task.kind.has_spans() => "spans of words, as BIO tags".to_owned(),
            TaskKind::Tagging(_) => "one tag per word".to_owned(),
        };
        let _ = writeln!(out, "- `{}`: {what}, {} labels", task.name, task.labels.len());
    }
    if let Some(dev) = about.dev {
        out += "\n## Scores on dev, in percent\n\n| task | metric | score |\n|---|---|---|\n";
        for task in &dev.tasks {
            for score in &task.scores {
                let _ = writeln!(out, "| {} | {} | {:.2} |", task.name, score.name, 100.0 * score.value);
            }
        }
    }
    out += "\n## Data\n\n";
    for (name, source) in &about.sources {
        let _ = writeln!(out, "- `{name}`: {source}");
    }
    out + "\nThe scores hold for text like that of the data sets above. Check whether their licences allow your use.\n"
}
