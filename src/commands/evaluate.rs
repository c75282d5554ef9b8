//! `polytask evaluate`: scores of a checkpoint on dev or test.

use anyhow::Result;
use serde_json::json;

use super::cli::EvaluateArgs;
use super::{End, prepare, say, table};
use crate::data::Split;
use crate::evaluate::evaluate;
use crate::problem::invalid;

pub fn run(args: &EvaluateArgs) -> Result<End> {
    let (device, _) = prepare::machine(&args.machine)?;
    let trained = prepare::trained_on(&args.run, &args.checkpoint, device, &args.overrides)?;
    let split: Split = args.split.into();
    let corpus = prepare::corpus_of(&trained.experiment, split)?;
    let data = prepare::encoded(&corpus, split, &trained.tokenizer, &trained.tasks, device)?;
    if data.set.is_empty() {
        let given = trained.experiment.data.sets.values().any(|set| set.paths(split, &Split::ALL).is_some());
        let what = if given { "usable row in" } else { "split" };
        return Err(invalid(format!("the experiment has no {what} {}", split.name())));
    }
    prepare::warn_of_unseen(&data, split, &trained.tasks);
    let report = evaluate(&trained.model, &data, &trained.tasks)?;
    for task in report.tasks.iter().filter(|task| task.n_sentences == 0) {
        log::warn!("`{}`: no row of {} has a label, so there is no score", task.name, split.name());
    }
    if args.json {
        let content = json!({
            // An exported model says which one it was made of.
            "checkpoint": trained.about["checkpoint"].as_str().unwrap_or(&args.checkpoint),
            "epoch": trained.about["epoch"],
            "split": split.name(),
            "report": report,
        });
        say(serde_json::to_string_pretty(&content)?)?;
    } else {
        say(table::reports(&[(split.name(), &report)]))?;
        if args.by_label {
            say(table::by_label(&report))?;
        }
    }
    Ok(End::Done)
}
