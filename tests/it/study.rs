//! `study` and `compare`: all runs, a second call, a failing run, and the comparison.

use serde_json::Value;

use crate::util::{Folder, SMALL, small};

fn study(more: &str) -> Folder {
    let folder = small();
    folder.file("study.yaml", format!("{SMALL}  max_steps: 24\nstudy:\n  seeds: [1, 2]\n{more}"));
    folder
}

fn said(folder: &Folder, arguments: &[&str], code: i32) -> (String, String) {
    let output = folder.polytask(arguments).assert().code(code).get_output().clone();
    (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_study_runs_everything_once_and_says_whether_multi_task_helped() {
    let more =
        "  strategies:\n    equal: {}\n    gentle: {strategy: gradnorm, alpha: 0.5}\n  data_fractions: [0.5, 1]\n";
    let folder = study(more);
    // A twin cannot read the head of a task that it does not have.
    let inputs = "crf, inputs: [trunk, topic]}";
    folder.file("study.yaml", folder.read("study.yaml").replace("crf}", inputs));
    let command = ["study", "study.yaml", "--jobs", "2"];
    let (table, _) = said(&folder, &command, 0);
    for part in
        ["50 %", "100 %", "equal", "gentle", "each task alone", "delta-m", "within noise", "single-task model needs"]
    {
        assert!(table.contains(part), "`{part}` is not in\n{table}");
    }
    // 2 seeds, 2 shares of the data, 2 strategies and 2 twins.
    let runs = || std::fs::read_dir(folder.path().join("runs/small-study/runs")).unwrap().count();
    assert_eq!(runs(), 16);
    let twin = folder.read("runs/small-study/experiments/only-slots-f0.5-s2.yaml");
    assert!(twin.contains("stratify: topic"), "a twin's share of the rows is that of the whole experiment: {twin}");
    assert!(!twin.contains("topic:") && twin.contains("train_fraction: 0.5") && twin.contains("seed: 2"), "{twin}");

    let changed = |name: &str| {
        std::fs::metadata(folder.path().join("runs/small-study/runs").join(name)).unwrap().modified().unwrap()
    };
    let before = changed("equal-s1/report.json");
    std::fs::remove_dir_all(folder.path().join("runs/small-study/runs/gentle-s1")).unwrap();
    let (again, log) = said(&folder, &command, 0);
    assert!(log.contains("16 runs, 15 of them done"), "{log}");
    assert!(!log.contains("different rows"), "{log}");
    assert_eq!((before, runs()), (changed("equal-s1/report.json"), 16), "finished runs are kept");
    let scores = |table: &str| table.lines().filter(|line| line.contains(" within noise")).map(str::to_owned).collect();
    let (first, second): (Vec<String>, Vec<String>) = (scores(&table), scores(&again));
    assert_eq!(first, second);

    let (json, _) = said(&folder, &["compare", "runs/small-study", "--json", "--html", "page.html"], 0);
    let json: Value = serde_json::from_str(&json).unwrap();
    let group = &json["groups"][0];
    assert_eq!((group["fraction"].as_f64(), group["seeds"].as_array().unwrap().len()), (Some(0.5), 2));
    assert!(group["tasks"][0]["difference"]["low"].is_number() && json["savings"].as_array().unwrap().len() == 8);
    let page = folder.read("page.html");
    assert!(page.contains("<polyline") && page.contains("cosine of gradients") && !page.contains("http"));

    // Single runs instead of a study.
    let path = |name: &str| format!("runs/small-study/runs/{name}");
    let (table, _) = said(&folder, &["compare", &path("equal-s1"), &path("only-topic-s1")], 0);
    assert!(table.contains("unknown: one seed"), "{table}");
    // A study that was killed while it wrote its files.
    std::fs::remove_dir_all(folder.path().join("runs/small-study/experiments")).unwrap();
    assert!(said(&folder, &command, 0).1.contains("16 runs, 16 of them done"));
    let (_, error) = said(&folder, &["compare", "study.yaml"], 2);
    assert!(error.contains("is not a run directory"), "{error}");
    folder.file("study.yaml", folder.read("study.yaml").replace("hidden: 10", "hidden: 11"));
    let (_, error) = said(&folder, &command, 2);
    assert!(error.contains("of a different experiment"), "{error}");
    assert!(error.contains("model.trunk.hidden: was `10`, is `11`"), "{error}");
}

#[test]
fn variants_are_held_to_the_experiment_without_their_changes() {
    let folder = study(
        "  strategies: {equal: {}}\n  variants:\n    wide: {model.trunk.hidden: 14}\n    plain: {tasks.slots.decoder: softmax, \
         model: {embedding: {characters: {kind: cnn, dim: 4}}}}\n",
    );
    let command = ["study", "study.yaml", "--set", "training.max_epochs=1", "--set", "study.single_task_twins=false"];
    let (table, _) = said(&folder, &command, 0);
    let rows = |name: &str| table.lines().filter(|line| line.contains(&format!(" {name} "))).count();
    // One row of scores, and one difference for each task.
    assert_eq!((rows("equal (wide)"), rows("equal (plain)")), (3, 3), "{table}");
    assert!(table.contains("Difference from the experiment without the variant's changes"), "{table}");
    let run = |name: &str| folder.read(&format!("runs/small-study/runs/{name}/resolved.yaml"));
    assert!(run("equal.wide-s1").contains("hidden: 14") && !run("equal-s1").contains("hidden: 14"));
    assert!(run("equal.plain-s2").contains("decoder: softmax") && run("equal.plain-s2").contains("kind: cnn"));
    let (json, _) = said(&folder, &["compare", "runs/small-study", "--json"], 0);
    let json: Value = serde_json::from_str(&json).unwrap();
    let mean = |group: usize| json["groups"][group]["tasks"][0]["mean"].as_f64().unwrap();
    assert_eq!(json["groups"][1]["variant"], "wide");
    let difference = json["groups"][1]["tasks"][0]["difference"]["mean"].as_f64().unwrap();
    assert!((mean(1) - mean(0) - difference).abs() < 1e-12, "{json}");
    // With twins, which have none of the variants' changes.
    let (table, log) = said(&folder, &command[..4], 0);
    assert!(log.contains("10 runs, 6 of them done") && !log.contains("no verdict"), "{log}");
    let alone = table.split("Difference from the single-task model").nth(1).unwrap();
    assert!(!alone.split("Difference from").next().unwrap().contains("wide"), "{table}");
    for (wrong, message) in [
        ("study.variants.wide={model.trunk.hiden: 14}", "study.variants.wide: model.trunk: unknown key `hiden`"),
        ("study.variants.wide={seed: 7}", "study.variants.wide: must not change `seed`: use `study.seeds`"),
        (
            "study.variants.wide={model.trunk.hidden: 0}",
            "study.variants.wide: model.trunk.hidden: must be from 1 to 100000",
        ),
    ] {
        for command in ["study", "check"] {
            let (out, error) = said(&folder, &[command, "study.yaml", "--set", wrong], 2);
            assert!((out + &error).contains(message), "{error}");
        }
    }
}

#[test]
fn runs_of_no_study_share_a_row_where_nothing_but_the_seed_differs() {
    let folder = small();
    let mut runs = Vec::new();
    for seed in [1, 2] {
        for hidden in [8, 12] {
            for (name, task) in [("both", None), ("alone", Some("tasks.slots=null"))] {
                let run = format!("{name}-{hidden}-{seed}");
                let (seed, hidden) = (format!("seed={seed}"), format!("model.trunk.hidden={hidden}"));
                folder
                    .train(&run, &[&["training.max_epochs=1", &*seed, &*hidden][..], task.as_slice()].concat())
                    .success();
                runs.push(run);
            }
        }
    }
    let arguments: Vec<&str> = ["compare", "--json"].into_iter().chain(runs.iter().map(String::as_str)).collect();
    let json: Value = serde_json::from_str(&said(&folder, &arguments, 0).0).unwrap();
    let rows = |kind: &str| -> Vec<(String, String, usize)> {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let row = |row: &Value| (text(&row["label"]), text(&row["variant"]), row["seeds"].as_array().unwrap().len());
        json[kind].as_array().unwrap().iter().map(row).collect()
    };
    let both = |label: &str| [8, 12].map(|n| (label.to_owned(), format!("model.trunk.hidden={n}"), 2)).to_vec();
    assert_eq!((rows("groups"), rows("twins")), (both("equal"), both("only-topic")));
    for (group, twin) in json["groups"].as_array().unwrap().iter().zip(json["twins"].as_array().unwrap()) {
        let (mean, alone) = (group["tasks"][0]["mean"].as_f64().unwrap(), twin["tasks"][0]["mean"].as_f64().unwrap());
        let difference = group["tasks"][0]["difference"]["mean"].as_f64().unwrap();
        assert!((mean - alone - difference).abs() < 1e-12, "each is held to the twin that is like it");
    }
    // Runs that differ only in the seed form one row; a twin with other settings gives no verdict.
    let alike = ["both-8-1", "both-8-2", "alone-8-1", "alone-8-2"];
    let (table, log) = said(&folder, &[&["compare"], &alike[..]].concat(), 0);
    assert!(table.contains(" equal ") && !table.contains("hidden") && !log.contains("no verdict"), "{table}{log}");
    let (table, log) = said(&folder, &["compare", "both-8-1", "both-8-2", "alone-12-1"], 0);
    assert!(!table.contains("Difference from the single-task model"), "{table}");
    assert!(log.contains("no single-task run for `topic` has the settings, seed and data fraction of equal"), "{log}");
    // A run that differs in many settings is named by its path; the learning rate is selected on dev.
    let much = ["model.trunk.hidden=9", "model.embedding.dim=9", "model.embedding.dropout=0", "model.trunk.dropout=0"];
    folder.train("other/both-8-1", &[&["training.max_epochs=1", "seed=1"], &much[..]].concat()).success();
    let rate = ["training.max_epochs=1", "seed=2", "model.trunk.hidden=8", "training.optimizer.learning_rate=1e-4"];
    folder.train("slow", &rate).success();
    let (table, _) = said(&folder, &["compare", "both-8-1", "both-8-2", "slow", "other/both-8-1"], 0);
    assert!(table.contains("equal (other/both-8-1)") && table.contains("1e-2") && !table.contains("1e-4"), "{table}");
}

#[test]
fn a_twin_of_tags_has_the_cut_of_the_whole_experiment() {
    let folder = study("  strategies: {equal: {}}\n  data_fractions: [0.5]\n");
    let topic = "topic: {type: classification, set: toy, column: topic}";
    let text = folder.read("study.yaml");
    assert!(text.contains(topic), "{text}");
    folder.file("study.yaml", text.replace(topic, "again: {type: tagging, set: toy, column: slots, scheme: plain}"));
    said(&folder, &["study", "study.yaml"], 0);
    let twin = folder.read("runs/small-study/experiments/only-slots-f0.5-s2.yaml");
    assert!(twin.contains("stratify_tags: slots"), "{twin}");
}

#[test]
fn a_task_without_test_rows_is_compared_on_dev() {
    let folder = small();
    let two = SMALL
        .replace("tasks:", "    other: {format: jsonl, tokens: tokens, train: train.jsonl, dev: dev.jsonl}\ntasks:")
        .replace("slots: {type: tagging, set: toy", "slots: {type: tagging, set: other");
    folder.file("two.yaml", two);
    for (out, more) in [("both", ""), ("alone", "tasks.topic=null")] {
        let mut arguments = vec!["train", "two.yaml", "--out", out];
        if !more.is_empty() {
            arguments.extend(["--set", more, "--set", "data.sets.toy=null"]);
        }
        folder.polytask(&arguments).assert().success();
    }
    let (json, _) = said(&folder, &["compare", "both", "alone", "--json"], 0);
    let json: Value = serde_json::from_str(&json).unwrap();
    folder.file("dev2.jsonl", folder.read("dev.jsonl").replacen("rock", "jazz", 1));
    let other = ["train", "two.yaml", "--out", "moved", "--set", "data.sets.other.dev=dev2.jsonl"];
    folder.polytask(&other).assert().success();
    let (_, log) = said(&folder, &["compare", "both", "alone", "moved"], 0);
    let told: Vec<&str> = log.lines().filter(|line| line.contains("different rows")).collect();
    let expected = "`slots` is scored on different rows in both and moved, so its scores are not comparable";
    assert!(matches!(told.as_slice(), [one] if one.contains(expected)), "{log}");
    let slots = &json["groups"][0]["tasks"][1];
    assert!(slots["mean"].as_f64().unwrap() > 0.3, "{slots}");
    assert!(slots["difference"]["mean"].as_f64().unwrap().abs() < 0.6, "{slots}");
}

#[test]
fn a_task_without_dev_labels_is_not_trained_alone() {
    let folder = study("  strategies: {equal: {}}\n");
    folder.file("bare.jsonl", folder.read("dev.jsonl").replace("\"slots\"", "\"other\""));
    let command = ["study", "study.yaml", "--set", "data.sets.toy.dev=bare.jsonl"];
    let (table, log) = said(&folder, &command, 0);
    assert!(log.contains("no single-task model is trained for `slots`: dev has no label of it"), "{log}");
    assert!(
        log.contains("4 runs") && table.contains("each task alone") && table.contains("slots f1 (test)"),
        "{table}"
    );
}

#[test]
fn a_single_task_has_no_twin() {
    let folder = study("  strategies: {equal: {}}\n");
    // A study needs its folder to itself.
    let held = folder.path().join("runs/small-study");
    std::fs::create_dir_all(&held).unwrap();
    let lock = polytask::run::RunDirectory { path: held }.lock().unwrap();
    let (_, error) = said(&folder, &["study", "study.yaml"], 2);
    assert!(error.contains("is in use"), "{error}");
    drop(lock);
    let (table, _) = said(&folder, &["study", "study.yaml", "--set", "tasks.topic=null"], 0);
    assert!(table.contains("equal") && !table.contains("alone"), "{table}");
    assert_eq!(std::fs::read_dir(folder.path().join("runs/small-study/runs")).unwrap().count(), 2);
}

#[test]
fn a_run_that_fails_is_reported_and_the_rest_goes_on() {
    let folder = study("  strategies: {equal: {}}\n  learning_rates: [0.01, 1.0e+38]\n  single_task_twins: false\n");
    let (table, error) = said(&folder, &["study", "study.yaml"], 1);
    assert!(table.contains("equal"), "{table}");
    assert!(error.contains("2 runs failed") && error.contains("is not finite"), "{error}");
    let (_, error) = said(&folder, &["study", "small.yaml"], 2);
    assert!(error.contains("small.yaml has no `study:`"), "{error}");
}

#[test]
fn a_benchmark_measures_every_strategy() {
    let folder = small();
    let (json, _) = said(&folder, &["bench", "small.yaml", "--steps", "3", "--rounds", "2", "--json"], 0);
    let json: Value = serde_json::from_str(&json).unwrap();
    let strategies = json["strategies"].as_array().unwrap();
    assert_eq!(strategies.len(), 10);
    assert!(strategies.iter().all(|s| s["tokens_per_sec"].as_f64().unwrap() > 0.0 && s["ratio"][0].is_number()));
    let traced = ["bench", "small.yaml", "--steps", "3", "--rounds", "1", "--only", "equal", "--trace"];
    said(&folder, &[&traced[..], &["trace.json"]].concat(), 0);
    let trace: Value = serde_json::from_slice(&std::fs::read(folder.path().join("trace.json")).unwrap()).unwrap();
    assert!(trace["traceEvents"].as_array().unwrap().len() > 100);
    let (_, error) = said(&folder, &[&traced[..], &["nowhere/trace.json"]].concat(), 1);
    assert!(error.contains("there is no folder nowhere"), "{error}");
}
