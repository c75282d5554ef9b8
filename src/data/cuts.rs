//! Removes rows from a training split: unlabelled rows, long ones, and fractions of it, seeded and stratified.

use rand::seq::SliceRandom;

use super::rows::{ABSENT, Rows, Strings, Wanted};
use crate::problem::Problem;
use crate::task::TaskKind;

/// Removes rows without any label from a training split: a batch of them would have no loss.
pub fn leave_out_unlabelled(train: &mut Rows, wanted: &[Wanted]) -> Option<Problem> {
    let labelled = |row: usize| {
        wanted.iter().enumerate().any(|(column, wanted)| train.labels_of(wanted.kind, column, row).is_some())
    };
    let unlabelled: Vec<bool> = (0..train.len()).map(|row| !labelled(row)).collect();
    if !unlabelled.contains(&false) {
        return None; // Reported per task as an error.
    }
    leave_out(train, &unlabelled, wanted, |n| match n {
        1 => "a row without a label for any task is left out of training".to_owned(),
        n => format!("{n} rows without a label for any task are left out of training; this is the first"),
    })
}

/// Removes sentences of more than `max` words from a training split.
pub fn leave_out_long(train: &mut Rows, wanted: &[Wanted], max: usize) -> Option<Problem> {
    let long: Vec<bool> = (0..train.len()).map(|row| train.words_of(row).len() > max).collect();
    leave_out(train, &long, wanted, |n| match n {
        1 => format!("a sentence with more than {max} words is left out of training"),
        n => format!("{n} sentences with more than {max} words are left out of training; this is the first"),
    })
}

fn leave_out(
    train: &mut Rows,
    taken: &[bool],
    wanted: &[Wanted],
    message: impl Fn(usize) -> String,
) -> Option<Problem> {
    let place = train.place(taken.iter().position(|&taken| taken)?);
    let n = train.split_off(taken, &kinds(wanted)).len();
    Some(Problem::warning(place, message(n)))
}

fn kinds(wanted: &[Wanted]) -> Vec<TaskKind> {
    wanted.iter().map(|wanted| wanted.kind).collect()
}

/// Splits off `fraction` of the rows, the same share of every stratum: rows of one class or, for tags, rows with the
/// same rarest tag or span type. `column` is the column to stratify by. With `keep_single`, every stratum keeps at
/// least one row, unless all strata have only one.
pub fn cut(
    train: &mut Rows,
    (wanted, column): (&[Wanted], usize),
    fraction: f64,
    keep_single: bool,
    mut generator: impl rand::Rng,
) -> Rows {
    let stratum: Vec<u32> = match wanted[column].kind {
        TaskKind::Classification => train.columns[column].values.clone(),
        TaskKind::Tagging(_) => {
            // Only the type counts, so that the scheme of the tags does not change the split.
            let strings = &train.columns[column].strings;
            let mut types = Strings::default();
            let type_of: Vec<_> =
                strings.iter().map(|tag| types.add(tag.split_once('-').map_or(tag, |(_, kind)| kind))).collect();
            let mut counts = vec![0usize; types.len()];
            for &tag in train.columns[column].values.iter().filter(|&&tag| tag != ABSENT) {
                counts[type_of[tag as usize] as usize] += 1;
            }
            let type_of = |&tag: &u32| type_of[tag as usize];
            let rarest = |tags: &[u32]| tags.iter().map(type_of).min_by_key(|&kind| (counts[kind as usize], kind));
            (0..train.len()).map(|row| train.tags_of(column, row).and_then(rarest).unwrap_or(ABSENT)).collect()
        }
    };
    let mut strata: std::collections::BTreeMap<u32, Vec<usize>> = Default::default();
    for (row, stratum) in stratum.into_iter().enumerate() {
        strata.entry(stratum).or_default().push(row);
    }
    if keep_single && strata.values().any(|rows| rows.len() > 1) {
        strata.retain(|_, rows| rows.len() > 1);
    }
    let mut taken = vec![false; train.len()];
    // The running sum keeps the total right even if strata are too small for a share of their own.
    let (mut due, mut n_taken) = (0.0, 0);
    for rows in strata.values_mut() {
        rows.shuffle(&mut generator);
        due += rows.len() as f64 * fraction;
        let most = rows.len() - usize::from(keep_single && rows.len() > 1);
        let n = (due.round() as usize - n_taken).min(most);
        n_taken += n;
        for &row in &rows[..n] {
            taken[row] = true;
        }
    }
    train.split_off(&taken, &kinds(wanted))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::rows::{Field, RowsBuilder};
    use super::*;
    use crate::rng::{Purpose, Seed};
    use crate::task::Scheme;

    #[test]
    fn a_dev_cut_is_stratified_seeded_and_loses_nothing() {
        let wanted = [Wanted { column: "label".into(), kind: TaskKind::Classification }];
        let build = || {
            let mut builder = RowsBuilder::new(Path::new("f"), &wanted);
            for i in 0..200 {
                let label = if i % 4 == 0 { "rare" } else { "common" };
                builder.push(i + 1, &[&format!("w{i}")], &[Field::Class(label.into())]);
            }
            let mut rows = Rows::new(1);
            rows.append_file(Path::new("f"), vec![builder.rows]);
            rows
        };
        let (mut train, mut again, mut other) = (build(), build(), build());
        let generator = |seed| Seed(seed).generator(Purpose::Split, 0);
        let dev = cut(&mut train, (&wanted, 0), 0.1, true, generator(0));
        let rare = dev.columns[0].values.iter().filter(|&&v| dev.columns[0].strings.get(v) == "rare").count();
        assert_eq!((dev.len(), train.len(), rare), (20, 180, 5));
        let lines = |rows: &Rows| (0..rows.len()).map(|r| rows.place(r).line).collect::<Vec<_>>();
        assert_eq!(lines(&dev), lines(&cut(&mut again, (&wanted, 0), 0.1, true, generator(0))));
        assert_ne!(lines(&dev), lines(&cut(&mut other, (&wanted, 0), 0.1, true, generator(1))));
        let mut all = [lines(&dev), lines(&train)].concat();
        all.sort();
        assert_eq!(all, (1..=200).collect::<Vec<_>>());
        let rest = |fraction| {
            let mut rows = build();
            cut(&mut rows, (&wanted, 0), 1.0 - fraction, true, generator(0));
            lines(&rows)
        };
        assert_eq!((rest(0.1).len(), rest(0.3).len()), (20, 60));
        assert!(rest(0.1).iter().all(|line| rest(0.3).contains(line)), "a smaller share is part of a larger one");
        assert_eq!(dev.text_of(0), format!("w{}", dev.place(0).line - 1));
    }

    #[test]
    fn long_sentences_are_left_out_of_training() {
        let wanted = [Wanted { column: "label".into(), kind: TaskKind::Classification }];
        let mut builder = RowsBuilder::new(Path::new("f"), &wanted);
        for (i, n) in [2, 4, 3, 9].into_iter().enumerate() {
            builder.push(i + 1, &vec!["w"; n], &[Field::Class("a".into())]);
        }
        let mut rows = Rows::new(1);
        rows.append_file(Path::new("f"), vec![builder.rows]);
        let problem = leave_out_long(&mut rows, &wanted, 3).unwrap().to_string();
        assert_eq!(problem, "f:2: 2 sentences with more than 3 words are left out of training; this is the first");
        assert_eq!((rows.len(), rows.place(1).line), (2, 3));
        assert!(leave_out_long(&mut rows, &wanted, 3).is_none());
    }

    #[test]
    fn the_only_row_of_a_class_stays_in_train() {
        let wanted = [Wanted { column: "label".into(), kind: TaskKind::Classification }];
        let labels: Vec<String> =
            (0..40).map(|i| if i % 4 == 0 { format!("only{i}") } else { "other".into() }).collect();
        for (fraction, keep, expected) in [(0.25, true, (8, 0)), (0.99, true, (29, 0)), (0.5, false, (20, 5))] {
            let mut builder = RowsBuilder::new(Path::new("f"), &wanted);
            for (i, label) in labels.iter().enumerate() {
                builder.push(i + 1, &["w"], &[Field::Class(label.into())]);
            }
            let mut rows = Rows::new(1);
            rows.append_file(Path::new("f"), vec![builder.rows]);
            let dev = cut(&mut rows, (&wanted, 0), fraction, keep, Seed(0).generator(Purpose::Split, 0));
            let only = dev.columns[0].used().filter(|label| label.starts_with("only")).count();
            assert_eq!((dev.len(), only), expected, "{fraction}");
            assert!(rows.columns[0].used().any(|label| label == "other"), "{fraction}");
        }
    }

    #[test]
    fn the_scheme_of_the_tags_does_not_move_a_cut() {
        let lines = |scheme, one: &str| {
            let wanted = [Wanted { column: "ner".into(), kind: TaskKind::Tagging(scheme) }];
            let mut builder = RowsBuilder::new(Path::new("f"), &wanted);
            for i in 0..90 {
                let tags = if i % 9 == 0 {
                    ["B-rare", "I-rare"]
                } else if i % 2 == 0 {
                    [one, "O"]
                } else {
                    ["O", "O"]
                };
                builder.push(i + 1, &["a", "b"], &[Field::Tags(tags.iter().map(|&tag| tag.into()).collect())]);
            }
            let mut rows = Rows::new(1);
            rows.append_file(Path::new("f"), vec![builder.rows]);
            let dev = cut(&mut rows, (&wanted, 0), 0.3, true, Seed(0).generator(Purpose::Split, 0));
            (0..dev.len()).map(|row| dev.place(row).line).collect::<Vec<_>>()
        };
        let bio = lines(Scheme::Bio, "B-common");
        assert_eq!(bio, lines(Scheme::Bioes, "S-common"));
        assert_eq!(bio.iter().filter(|&line| line % 9 == 1).count(), 3, "three of the ten rare rows");
    }
}
