//! User mistakes and failures: no user file is lost, nothing half-written remains, and the error says what to do.

use std::path::Path;
use std::process::Stdio;

use serde_json::Value;

use crate::util::{Folder, SMALL, small};

fn failed(folder: &Folder, arguments: &[&str], code: i32) -> String {
    let output = folder.polytask(arguments).assert().code(code).get_output().clone();
    String::from_utf8(output.stderr).unwrap()
}

fn trained(folder: &Folder, out: &str) {
    folder.polytask(&["train", "small.yaml", "--out", out, "--set", "training.max_epochs=1"]).assert().code(0);
}

fn exists(folder: &Folder, path: &str) -> bool {
    folder.path().join(path).exists()
}

#[test]
fn a_run_that_fails_takes_its_own_folder_away_and_nothing_else() {
    let folder = small();
    folder.file("precious/thesis.txt", "years");
    std::fs::create_dir(folder.path().join("empty")).unwrap();
    let broken = ["--set", "data.sets.toy.train=none.jsonl"];
    let train = |out: &str, more: &[&str]| failed(&folder, &[&["train", "small.yaml", "--out", out], more].concat(), 2);
    assert!(train("missing/../precious", &broken).contains("does not exist"));
    assert!(train("missing/../precious", &[]).contains("is not empty"));
    for more in [&broken[..], &["--set", "training.freeze_epochs={heads.nope: 1}"]] {
        train("empty", more);
        train("new", more);
        assert!(exists(&folder, "empty") && !exists(&folder, "empty/resolved.yaml") && !exists(&folder, "new"));
    }
    assert!(
        failed(&folder, &["train", "small.yaml", "--set", "name=.."], 2).contains("beginning with a letter or digit")
    );
    assert_eq!(folder.read("precious/thesis.txt"), "years");
    // The remains of a run that was killed while it wrote its first files do not block a new run.
    std::fs::create_dir_all(folder.path().join("killed/checkpoints")).unwrap();
    std::fs::create_dir_all(folder.path().join("mine/checkpoints")).unwrap();
    for file in ["killed/experiment.yaml", "killed/.partial-run", "mine/experiment.yaml"] {
        folder.file(file, "years");
    }
    trained(&folder, "killed");
    assert!(!exists(&folder, "killed/.partial-run"));
    let part = ["--set", "training.freeze_epochs={heads.topic.nope: 1}"];
    assert!(train("mine", &part).contains("is not empty and contains no run"));
    assert_eq!(folder.read("mine/experiment.yaml"), "years");
    // A libtorch exception, here out of memory, is reported like other errors.
    let command =
        "ulimit -v 20000000; exec \"$0\" train small.yaml --out new --device cpu --set model.trunk.hidden=100000";
    let mut shell = std::process::Command::new("sh");
    let output =
        shell.args(["-c", command, env!("CARGO_BIN_EXE_polytask")]).current_dir(folder.path()).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    let last = text.lines().last().unwrap();
    assert!(last.starts_with("error: ") && !text.contains("panicked") && !exists(&folder, "new"), "{text}");
}

#[test]
fn a_reader_that_is_gone_ends_a_command_quietly() {
    let folder = small();
    trained(&folder, "run");
    for arguments in [&["check", "small.yaml"][..], &["evaluate", "run", "--json"], &["compare", "run"]] {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_polytask"));
        let command = command.current_dir(folder.path()).args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(0) && !text.contains("panicked"), "{arguments:?}: {text}");
    }
}

#[test]
fn a_full_disk_is_named() {
    let folder = small();
    trained(&folder, "run");
    for arguments in [&["evaluate", "run"][..], &["predict", "run", "--input", "train.jsonl"]] {
        let full = std::fs::File::create("/dev/full").unwrap();
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_polytask"));
        let output = command.current_dir(folder.path()).args(arguments).stdout(full).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && text.contains("error: standard output: No space left"), "{text}");
    }
}

#[test]
fn names_that_results_or_exports_need_are_refused() {
    let folder = small();
    for name in ["text", "step", "class"] {
        folder.file("named.yaml", SMALL.replace("  topic: {", &format!("  {name}: {{")));
        let text = failed(&folder, &["check", "named.yaml"], 2);
        assert!(text.contains(&format!("named.yaml:8: tasks.{name}:")), "{text}");
    }
}

#[test]
fn a_base_file_finds_the_data_beside_itself() {
    let folder = small();
    folder.file("base/base.yaml", SMALL.replace("root: .", "root: ${EXPERIMENT_DIR}/data"));
    for name in ["train.jsonl", "dev.jsonl"] {
        folder.file(&format!("base/data/{name}"), folder.read(name));
    }
    folder.file("child/child.yaml", "extends: ../base/base.yaml\nseed: 4\n");
    folder.polytask(&["check", "child/child.yaml"]).assert().code(0);
}

#[test]
fn check_tells_all_that_training_would_refuse() {
    let folder = small();
    folder.file("train.jsonl", folder.read("train.jsonl") + "{\"tokens\": [\"a\"], \"slots\": [\"X-thing\"]}\n");
    let sets = [
        "model.embedding.vectors=[{file: none.txt}]",
        "tokenizer.lowercase=true",
        "init_from=nowhere",
        "data.sets.toy.stratify=topik",
    ];
    let mut arguments = vec!["check", "small.yaml"];
    arguments.extend(sets.iter().flat_map(|set| ["--set", set]));
    let output = folder.polytask(&arguments).assert().code(2).get_output().clone();
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [
        "train.jsonl:91: `slots`, word 1: `X-thing` is not a bio tag",
        "none.txt: No such file",
        "scripts/get_vectors",
        "nowhere: not a run directory",
        "data.sets.toy.stratify: no training row has a `topik`",
        "4 errors",
    ] {
        assert!(text.contains(part), "`{part}` is not in\n{text}");
    }
    let unlabelled = folder.read("dev.jsonl").replace("\"topic\"", "\"other\"");
    folder.file("dev.jsonl", unlabelled);
    let output = folder.polytask(&["check", "small.yaml"]).assert().code(2).get_output().clone();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("`topic`: dev has no label of this task"), "{text}");
}

#[test]
fn predictions_go_where_they_are_sent_and_read_what_training_reads() {
    let folder = small();
    trained(&folder, "run");
    folder.file(
        "in.txt",
        "\u{feff}play the rock\n {\"tokens\": [\"play\", \"the\", \"rock\"]}\n{\"tokens\": \"play the rock\"}\n",
    );
    folder.file("target.jsonl", "old");
    std::os::unix::fs::symlink(folder.path().join("target.jsonl"), folder.path().join("link")).unwrap();
    let predict = |output: &str| folder.polytask(&["predict", "run", "--input", "in.txt", "--output", output]).assert();
    predict("link").code(0);
    let text = folder.read("target.jsonl");
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines.len() == 3 && lines[0] == lines[1] && lines[1] == lines[2], "{text}");
    let printed = predict("/dev/stdout").code(0).get_output().clone();
    assert_eq!(String::from_utf8(printed.stdout).unwrap(), text);
    assert!(!Path::new("/dev/stdout").is_file() || Path::new("/dev/stdout").is_symlink());
    assert!(failed(&folder, &["predict", "run", "--input", "."], 2).contains(". is a folder"));
    assert!(
        failed(&folder, &["predict", "run", "--input", "in.txt", "--output", "./in.txt"], 2)
            .contains("is an input of this command")
    );
    let curve = ["find-lr", "small.yaml", "--html", "small.yaml"];
    assert!(failed(&folder, &curve, 2).contains("small.yaml is an input of this command"));
    // Predictions before a broken line are printed; an output file is complete or absent.
    folder.file("in.txt", "play the rock\nplay\n{\"text\": }\nrock\n");
    let printed = folder.polytask(&["predict", "run", "--input", "in.txt"]).assert().code(2).get_output().clone();
    assert_eq!(String::from_utf8_lossy(&printed.stdout).lines().count(), 2);
    assert!(String::from_utf8_lossy(&printed.stderr).contains("in.txt:3: not JSON"));
    assert!(failed(&folder, &["predict", "run", "--input", "in.txt", "--output", "new"], 2).contains("in.txt:3"));
    assert!(!exists(&folder, "new"));
    // Input keys that the output uses, a JSON array, data without labels.
    folder.file("in.txt", "{\"text\": \"play\", \"topic\": \"old\", \"id\": 3}\n[\"play\"]\n");
    let printed = folder.polytask(&["predict", "run", "--input", "in.txt"]).assert().code(2).get_output().clone();
    let said = String::from_utf8_lossy(&printed.stderr).into_owned();
    assert!(said.contains("warning: `topic` of the input is not copied") && said.contains("in.txt:2: a JSON array"));
    let first: serde_json::Value = serde_json::from_slice(&printed.stdout).unwrap();
    assert!(first["id"] == 3 && first["topic"]["label"].is_string(), "{first}");
    folder.file("bare.jsonl", "{\"tokens\": [\"play\"]}\n");
    let bare = ["evaluate", "run", "--input", "bare.jsonl"];
    assert!(failed(&folder, &bare, 2).contains("test has no label of any task"));
    folder.polytask(&[&bare[..], &["--predictions", "told.jsonl"]].concat()).assert().code(0);
    folder
        .train("cut", &["data.sets.toy.dev=null", "data.sets.toy.dev_fraction=0.2", "training.max_epochs=1"])
        .success();
    let scored = folder.polytask(&["evaluate", "cut", "--split", "dev", "--input", "dev.jsonl", "--json"]).assert();
    let scored: serde_json::Value = serde_json::from_slice(&scored.code(0).get_output().stdout).unwrap();
    assert_eq!(scored["report"]["tasks"][0]["n_sentences"], 26, "of 30 rows every seventh has no topic: {scored}");
    // Damage that leaves the file format valid.
    let path = folder.path().join("run/checkpoints/best.safetensors");
    let mut content = std::fs::read(&path).unwrap();
    let at = content.len() - 8;
    content[at..].fill(0xff);
    std::fs::write(&path, content).unwrap();
    assert!(failed(&folder, &["predict", "run", "--input", "in.txt"], 1).contains("contain NaN"));
}

#[test]
fn an_interrupt_leaves_nothing_half_written() {
    let folder = small();
    folder.file("train.jsonl", crate::util::rows(20_000));
    let arguments = ["find-lr", "small.yaml", "--html", "page.html", "--steps", "60000", "--from", "1e-9"];
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_polytask"));
    let mut child = command.args(arguments).current_dir(folder.path()).spawn().unwrap();
    let begun = || {
        let mut names = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
        names.any(|name| name.to_string_lossy().starts_with(".partial"))
    };
    while !begun() {
        assert!(child.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    crate::cli::interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(!begun() && !exists(&folder, "page.html"));
}

#[test]
fn comparisons_count_a_run_once_and_studies_take_no_folder_of_others() {
    let folder = small();
    trained(&folder, "run");
    let output = folder.polytask(&["compare", "run", "./run/", "--json"]).assert().code(0).get_output().clone();
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["groups"][0]["seeds"], serde_json::json!([3]));
    folder.file("study.yaml", format!("{SMALL}study:\n  strategies: {{equal: {{}}}}\n  seeds: [1]\n"));
    assert!(failed(&folder, &["study", "study.yaml", "--out", "run"], 2).contains("run is not empty"));
    assert!(failed(&folder, &["study", "study.yaml", "--device", "gpu,cpu"], 2).contains("unknown device `gpu`"));
    assert!(!exists(&folder, "runs"));
    assert!(failed(&folder, &["bench", "run", "--set", "seed=1"], 2).contains("not to trained models"));
}

#[test]
fn a_trained_run_needs_the_data_alone_that_it_is_scored_on() {
    let folder = small();
    trained(&folder, "run");
    std::fs::remove_file(folder.path().join("train.jsonl")).unwrap();
    let scores = |arguments: &[&str]| {
        let output = folder.polytask(&[&["evaluate", "run", "--json"], arguments].concat()).assert().code(0);
        let json: Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
        json["report"].clone()
    };
    let test = scores(&[]);
    assert_eq!(scores(&["--split", "dev"]), test);
    std::fs::rename(folder.path().join("dev.jsonl"), folder.path().join("moved.jsonl")).unwrap();
    assert_eq!(scores(&["--set", "data.sets.toy.test=moved.jsonl"]), test);
    folder.file("half.jsonl", folder.read("moved.jsonl").replace("\"topic\"", "\"other\""));
    let arguments = ["evaluate", "run", "--set", "data.sets.toy.test=half.jsonl"];
    let output = folder.polytask(&arguments).assert().code(0).get_output().clone();
    assert!(String::from_utf8_lossy(&output.stderr).contains("`topic`: no row of test has a label"));
    folder.file("none.jsonl", "");
    let arguments = ["evaluate", "run", "--set", "data.sets.toy.test=none.jsonl"];
    assert!(failed(&folder, &arguments, 2).contains("no usable row in test"));
    let dev = "data.sets.toy.dev=moved.jsonl";
    assert!(
        failed(&folder, &["evaluate", "run", "--set", "model.trunk.hidden=3"], 2).contains("only keys below `data.`")
    );
    assert!(failed(&folder, &["evaluate", "run", "--set", dev], 2).contains("dev.jsonl does not exist"));
    assert!(failed(&folder, &["train", "small.yaml", "--set", dev], 2).contains("train.jsonl does not exist"));
}

#[test]
fn labels_that_are_named_are_the_model_s() {
    let folder = small();
    let train = |labels: &str, code: i32| {
        let set = format!("tasks.topic.labels={labels}");
        let command = ["train", "small.yaml", "--out", "run", "--set", "training.max_epochs=1", "--set", &set];
        failed(&folder, &command, code)
    };
    let text = train("[travel, food]", 2);
    assert!(text.contains("train.jsonl:1: `topic`: label `music` is not in `tasks.topic.labels`"), "{text}");
    assert!(train("[food, food]", 2).contains("tasks.topic.labels: give at least one, and each only once"));
    let check = ["check", "small.yaml", "--set", "tasks.topic.labels=[travel, food]"];
    let output = folder.polytask(&check).assert().code(2).get_output().clone();
    assert!(String::from_utf8_lossy(&output.stdout).contains("label `music` is not in `tasks.topic.labels`"));
    train("[travel, sports, food, music]", 0);
    let tasks: Value = serde_json::from_str(&folder.read("run/labels.json")).unwrap();
    assert_eq!(tasks[0]["labels"], serde_json::json!(["travel", "sports", "food", "music"]));
}

#[test]
fn two_processes_do_not_train_in_one_run() {
    let folder = small();
    trained(&folder, "run");
    let run = polytask::run::RunDirectory::open(&folder.path().join("run")).unwrap();
    let resume = ["train", "small.yaml", "--out", "run", "--set", "training.max_epochs=1", "--resume"];
    let lock = run.lock().unwrap();
    assert!(failed(&folder, &resume, 2).contains("run is in use"));
    drop(lock);
    folder.polytask(&resume).assert().code(0);
    // Concurrent runs without `--out` get separate directories.
    let spawn = || {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_polytask"));
        let arguments = ["train", "small.yaml", "--set", "training.max_epochs=1"];
        let command = command.current_dir(folder.path()).args(arguments);
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let children = [spawn(), spawn(), spawn()];
    assert!(children.into_iter().all(|mut child| child.wait().unwrap().success()));
    assert!(["small", "small-2", "small-3"].iter().all(|name| exists(&folder, &format!("runs/{name}/report.json"))));
}

#[test]
fn data_that_changed_under_a_run_is_told() {
    let folder = small();
    trained(&folder, "run");
    let row =
        "{\"tokens\": [\"play\", \"the\", \"rock\"], \"topic\": \"sports\", \"slots\": [\"O\", \"O\", \"B-team\"]}\n";
    let scores = || -> Value {
        let output = folder.polytask(&["evaluate", "run", "--json"]).assert().code(0).get_output().clone();
        serde_json::from_slice::<Value>(&output.stdout).unwrap()["report"].take()
    };
    let before = scores();
    let dev = folder.read("dev.jsonl");
    folder.file("dev.jsonl", format!("{dev}{row}"));
    // Labels that the model does not know count as missed and do not affect its loss.
    let (text, after) = (failed(&folder, &["evaluate", "run"], 0), scores());
    for label in
        ["`topic`: test has labels", "`sports` (1 of its rows)", "`slots`: test has labels", "`team` (1 of its rows)"]
    {
        assert!(text.contains(label), "{text}");
    }
    let (old, new) = (&before["tasks"], &after["tasks"]);
    let accuracy = |of: &Value| of[0]["scores"][0]["value"].as_f64().unwrap();
    let n = |of: &Value| of[0]["n_sentences"].as_f64().unwrap();
    assert!((accuracy(new) - accuracy(old) * n(old) / (n(old) + 1.0)).abs() < 1e-12, "{new}");
    let recall = |of: &Value| of[1]["scores"][2]["value"].as_f64().unwrap();
    assert!(recall(new) < recall(old), "{new}");
    for task in [0, 1] {
        assert_eq!(old[task]["loss"], new[task]["loss"]);
    }
    let missed = new[1]["labels"].as_array().unwrap().iter().find(|label| label["label"] == "team").unwrap();
    assert_eq!((missed["recall"].as_f64(), missed["n"].as_u64()), (Some(0.0), Some(1)));
    // A run that was killed before its first checkpoint resumes only with the labels that it started with.
    trained(&folder, "killed");
    std::fs::remove_file(folder.path().join("killed/report.json")).unwrap();
    for checkpoint in ["last", "best", "best-topic", "best-slots"] {
        std::fs::remove_file(folder.path().join(format!("killed/checkpoints/{checkpoint}.safetensors"))).unwrap();
    }
    let train = folder.read("train.jsonl");
    folder.file("train.jsonl", train.replace("food", "meal"));
    let text = failed(&folder, &["train", "killed/resolved.yaml", "--out", "killed", "--resume"], 2);
    assert!(text.contains("`topic`: train has labels that it did not have when the run started: meal"), "{text}");
    folder.file("train.jsonl", train);
    // A change of case is visible to character features, although the lowercased tokens are the same.
    let cased = ["train", "small.yaml", "--out", "cased", "--set", "tokenizer={model: word, lowercase: true}"];
    let more =
        ["--set", "model.embedding.characters={kind: cnn, dim: 4, filters: 4}", "--set", "training.max_epochs=1"];
    let cased = [&cased[..], &more].concat();
    folder.file("dev.jsonl", &dev);
    failed(&folder, &cased, 0);
    folder.file("dev.jsonl", dev.replace("rock", "Rock"));
    let text = failed(&folder, &[&cased[..], &["--resume"]].concat(), 2);
    assert!(text.contains("its data has changed"), "{text}");
    folder.file("dev.jsonl", dev + &row.replace("sports", "music").replace("team", "thing"));
    let text = failed(&folder, &["train", "run/resolved.yaml", "--out", "run", "--resume"], 2);
    assert!(text.contains("its data has changed"), "{text}");
    folder.file("bare.jsonl", folder.read("dev.jsonl").replace("\"topic\"", "\"other\""));
    let text = failed(
        &folder,
        &[
            "train",
            "small.yaml",
            "--out",
            "new",
            "--set",
            "training.early_stopping.metric=topic",
            "--set",
            "data.sets.toy.dev=bare.jsonl",
        ],
        2,
    );
    assert!(text.contains("dev has no labels for this metric") && !exists(&folder, "new"), "{text}");
}
