//! `check`: warnings about odd data that can be trained on.

use crate::util::{Folder, SMALL, rows, small};

/// The output of `check` for data without errors.
fn said(folder: &Folder, arguments: &[&str]) -> String {
    let output = folder.polytask(&[&["check"], arguments].concat()).assert().code(0).get_output().clone();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn check_passes_sound_data_and_warns_of_odd_data() {
    let folder = small();
    folder.file("dev.jsonl", rows(30) + "{\"tokens\": [\"new\"], \"topic\": \"sports\", \"slots\": [\"I-thing\"]}\n");
    let output = folder.train("run", &["training.max_epochs=1"]).code(0).get_output().clone();
    let (told, part) = (String::from_utf8_lossy(&output.stderr), "30 of the 31 sentences of dev are also in train");
    assert!(told.contains(part), "{told}");
    let text = said(&folder, &["small.yaml", "--all"]);
    for part in [
        "dev.jsonl:31: `topic`: label `sports` is in dev but never in train",
        "does not continue a span of its type",
        "also occurs in train (",
        "0 errors",
    ] {
        assert!(text.contains(part), "`{part}` is not in\n{text}");
    }
    folder.file("none.jsonl", "{\"tokens\": [\"a\"], \"topic\": \"music\", \"slots\": [\"O\"]}\n".repeat(3));
    let text = said(&folder, &["small.yaml", "--set", "data.sets.toy.train=none.jsonl"]);
    assert!(text.contains("`slots`: label `thing` is in dev but never in train"), "{text}");
    assert!(text.contains("`slots`: train has no spans"), "{text}");
    // A misspelt label, and a label without rows.
    folder.file("slip.jsonl", rows(60) + "{\"tokens\": [\"play\"], \"topic\": \"muisc\", \"slots\": [\"O\"]}\n");
    let text = said(&folder, &["small.yaml", "--set", "data.sets.toy.train=slip.jsonl"]);
    assert!(text.contains("slip.jsonl:61: `topic`: label `muisc` is rare and one letter away from `music`"), "{text}");
    let text = said(&folder, &["small.yaml", "--set", "tasks.topic.labels=[music, food, travel, muisc]"]);
    assert!(text.contains("label `muisc` of `tasks.topic.labels` occurs in no training row"), "{text}");
    let row = text.lines().find(|line| line.trim().starts_with("muisc")).unwrap();
    assert_eq!(row.split_whitespace().collect::<Vec<_>>(), ["muisc", "0", "0", "0"]);
    let raw = |n: usize| format!("{{\"text\": \"{}now, or never.\", \"topic\": \"a\"}}\n", "very ".repeat(n));
    folder.file("raw.jsonl", raw(1) + &raw(2000) + &raw(1).replace("\"a\"", "\"b\""));
    let raw =
        SMALL.replace("tokens: tokens, ", "").replace("train.jsonl", "raw.jsonl").replace("dev.jsonl", "raw.jsonl");
    folder.file("raw.yaml", raw.replace("  slots: {type: tagging, set: toy, column: slots, decoder: crf}\n", ""));
    let text = said(&folder, &["raw.yaml", "--all", "--set", "model.trunk.connection=residual"]);
    for part in [
        "`toy`: 50 % of the distinct words end in punctuation, such as `now,`; `tokenizer.split: punctuation`",
        "raw.jsonl:2: a sentence of 2003 words: its whole batch is padded to this length",
        "model.trunk.connection has no effect",
    ] {
        assert!(text.contains(part), "`{part}` is not in\n{text}");
    }
    let text = said(&folder, &["raw.yaml", "--set", "data.max_words=99", "--set", "tokenizer.split=punctuation"]);
    assert!(text.contains("raw.jsonl:2: a sentence with more than 99 words is left out"), "{text}");
    assert!(!text.contains("end in punctuation") && !text.contains("2003 words"), "{text}");
    // `check` refuses what training would refuse.
    let no_part = ["check", "small.yaml", "--set", "training.freeze_epochs={trunk.weight: 1}"];
    let output = folder.polytask(&no_part).assert().code(2).get_output().clone();
    assert!(String::from_utf8_lossy(&output.stdout).contains("the model has no such part"));
    // Dev sentences also leak through training sets of other tasks, since the trunk is shared.
    folder.file("others.jsonl", "{\"tokens\": [\"new\"], \"slots\": [\"O\"]}\n");
    let two = SMALL
        .replace("tasks:", "    other: {format: jsonl, tokens: tokens, train: others.jsonl, dev: others.jsonl}\ntasks:")
        .replace("slots: {type: tagging, set: toy", "slots: {type: tagging, set: other");
    folder.file("two.yaml", two);
    let text = said(&folder, &["two.yaml", "--all"]);
    let lines: Vec<&str> = text.lines().filter(|line| line.contains("this sentence of `toy`'s dev")).collect();
    let across = |line: &str| {
        line.contains("dev.jsonl:31: ")
            && line.contains("also occurs in train of `other`")
            && line.contains("others.jsonl:1)")
    };
    assert!(matches!(lines.as_slice(), [line] if across(line)), "{text}");
}

#[test]
fn the_same_sentence_with_other_labels_and_labels_that_look_the_same_are_told() {
    let folder = small();
    let odd = [
        r#"{"tokens": ["same"], "topic": "music", "slots": ["O"]}"#,
        r#"{"tokens": ["same"], "topic": "food", "slots": ["B-thing"]}"#,
        r#"{"tokens": ["same"], "topic": "music"}"#,
        r#"{"tokens": ["New York"], "topic": "Mu sic", "slots": ["O"]}"#,
    ];
    folder.file("train.jsonl", rows(90) + &odd.join("\n"));
    let text = said(&folder, &["small.yaml"]);
    let lines: Vec<&str> = text.lines().filter(|line| line.contains("train.jsonl:9")).collect();
    let expected = [
        "train.jsonl:94: `topic`: labels `Mu sic` and `music` differ only in case or white space",
        "train.jsonl:92: `topic`: this sentence occurs earlier with other labels",
        "train.jsonl:92: `slots`: this sentence occurs earlier with other labels",
        "train.jsonl:94: the word `New York` contains white space",
    ];
    for part in expected {
        assert!(lines.iter().any(|line| line.contains(part)), "`{part}` is not in\n{text}");
    }
    assert_eq!(lines.len(), expected.len(), "{text}");
}

#[test]
fn a_flood_of_one_kind_hides_no_other() {
    let folder = small();
    let broken = r#"{"tokens": ["a"], "slots": ["I-thing"]}"#;
    folder.file("train.jsonl", rows(90) + &[broken; 30].join("\n"));
    folder.file("dev.jsonl", rows(30) + "{\"tokens\": [\"new\"], \"topic\": \"sports\"}\n");
    let count = |text: &str, part: &str| text.lines().filter(|line| line.contains(part)).count();
    let text = said(&folder, &["small.yaml"]);
    assert_eq!(
        (count(&text, "does not continue a span of its type"), count(&text, "label `sports`")),
        (5, 2),
        "{text}"
    );
    assert!(text.contains("... and 25 more of this kind; --all lists them"), "{text}");
    assert_eq!(count(&said(&folder, &["small.yaml", "--all"]), "does not continue a span of its type"), 30);
}
