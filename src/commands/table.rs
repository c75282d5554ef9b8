//! Tables for people: fractions are shown as percent.

use comfy_table::{CellAlignment, Table, TableComponent, presets};

use crate::evaluate::Report;

pub fn percent(value: f64) -> String {
    format!("{:.2}", 100.0 * value)
}

/// Thousands apart by commas.
pub fn count(n: usize) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
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
    for (i, task) in first.tasks.iter().enumerate() {
        for (j, score) in task.scores.iter().enumerate() {
            let mut row = vec![if j == 0 { task.name.clone() } else { String::new() }, score.name.replace('_', " ")];
            row.extend(splits.iter().map(|(_, report)| {
                let task = &report.tasks[i];
                if task.n_sentences > 0 { percent(task.scores[j].value) } else { "-".to_owned() }
            }));
            table.add_row(row);
        }
        let mut row = vec![String::new(), "loss (nats)".to_owned()];
        row.extend(splits.iter().map(|(_, report)| {
            let task = &report.tasks[i];
            if task.n_sentences > 0 { format!("{:.4}", task.loss) } else { "-".to_owned() }
        }));
        table.add_row(row);
    }
    if first.sentence_accuracy.is_some() {
        let mut row = vec!["all".to_owned(), "sentence accuracy".to_owned()];
        row.extend(splits.iter().map(|(_, report)| report.sentence_accuracy.map_or("-".to_owned(), percent)));
        table.add_row(row);
    }
    table
}

#[cfg(test)]
mod tests {
    #[test]
    fn counts_have_commas() {
        assert_eq!([0, 999, 1000, 1234567].map(super::count), ["0", "999", "1,000", "1,234,567"]);
    }
}
