//! Tables for the terminal; fractions are shown as percentages.

use comfy_table::{CellAlignment, Table, TableComponent, presets};

pub use crate::compare::percent;
use crate::evaluate::Report;
use crate::problem::shown;

/// `value` with `n` decimals, without a minus sign if it rounds to zero.
pub fn decimals(value: f64, n: usize) -> String {
    let text = format!("{value:.n$}");
    let nothing = text.strip_prefix('-').filter(|digits| digits.chars().all(|c| c == '0' || c == '.'));
    nothing.map_or(text.clone(), str::to_owned)
}

/// `n` with commas between thousands.
pub fn count(n: usize) -> String {
    indicatif::HumanCount(n as u64).to_string()
}

/// A table with names on the left and numbers on the right, from column `numbers_from` on.
pub fn table(header: &[&str], numbers_from: usize) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY).set_header(header.to_vec());
    table.remove_style(TableComponent::HorizontalLines).remove_style(TableComponent::MiddleIntersections);
    for (i, column) in table.column_iter_mut().enumerate() {
        if i >= numbers_from {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// Scores of one or more splits side by side.
pub fn reports(splits: &[(&str, &Report)]) -> Table {
    let mut header = vec!["task", "metric"];
    header.extend(splits.iter().map(|(name, _)| *name));
    let mut table = table(&header, 2);
    let Some((_, first)) = splits.first() else { return table };
    let mut add = |task: &str, metric: &str, cell: &dyn Fn(&Report) -> Option<String>| {
        let mut row = vec![task.to_owned(), metric.replace('_', " ")];
        row.extend(splits.iter().map(|(_, report)| cell(report).unwrap_or("-".to_owned())));
        table.add_row(row);
    };
    for (i, task) in first.tasks.iter().enumerate() {
        let names = splits.iter().map(|(_, report)| &report.tasks[i].scores).find(|scores| !scores.is_empty());
        let mut name = task.name.as_str();
        for (j, score) in names.into_iter().flatten().enumerate() {
            let value = |report: &Report| report.tasks[i].scores.get(j).map(|score| percent(score.value));
            add(std::mem::take(&mut name), &score.name, &value);
        }
        add(name, "loss (nats)", &|report| report.tasks[i].loss.map(|loss| decimals(loss, 4)));
    }
    if splits.iter().any(|(_, report)| report.sentence_accuracy.is_some()) {
        add("all", "sentence accuracy", &|report| report.sentence_accuracy.map(percent));
        // Sentence accuracy covers only sentences with labels of several tasks.
        let partly = |report: &Report| report.tasks.iter().any(|task| task.n_sentences > report.n_joint);
        if splits.iter().any(|(_, report)| partly(report)) {
            add("", "sentences with labels of 2+ tasks", &|report| Some(count(report.n_joint)));
        }
    }
    table
}

/// Scores of every label of every task.
pub fn by_label(report: &Report) -> Table {
    let mut table = table(&["task", "label", "precision", "recall", "f1", "n", "mistaken for"], 2);
    for task in &report.tasks {
        let mut name = task.name.as_str();
        for of in &task.labels {
            let numbers = [of.precision, of.recall, of.f1].map(percent);
            let mut row = vec![std::mem::take(&mut name).to_owned(), shown(&of.label)];
            let taken_for = of.taken_for.as_ref().map(|(label, n)| format!("{} ({})", shown(label), count(*n)));
            row.extend(numbers.into_iter().chain([count(of.n), taken_for.unwrap_or_default()]));
            table.add_row(row);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    #[test]
    fn counts_have_commas() {
        assert_eq!([0, 999, 1000, 1234567].map(super::count), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([-1e-9, -0.0016, 2.0].map(|x| super::decimals(x, 3)), ["0.000", "-0.002", "2.000"]);
    }
}
