//! The program as a user runs it: exit codes, messages, repeated runs, kills and resumes.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use crate::util::{Folder, SMALL, rows, small};

fn stderr(folder: &Folder, arguments: &[&str], code: i32) -> String {
    let output = folder.polytask(arguments).assert().code(code).get_output().clone();
    String::from_utf8(output.stderr).unwrap()
}

/// metrics.jsonl without `tokens_per_sec`, which depends on the clock.
fn metrics(folder: &Folder, run: &str) -> Vec<serde_json::Value> {
    let lines = folder.read(&format!("{run}/metrics.jsonl"));
    let parse = |line| {
        let mut record: serde_json::Value = serde_json::from_str(line).unwrap();
        record.as_object_mut().unwrap().remove("tokens_per_sec");
        record
    };
    lines.lines().map(parse).collect()
}

fn bytes(folder: &Folder, file: &str) -> Vec<u8> {
    std::fs::read(folder.path().join(file)).unwrap()
}

#[test]
fn a_run_trains_evaluates_and_predicts() {
    let folder = small();
    let output = folder.polytask(&["train", "small.yaml"]).assert().success();
    let output = output.get_output().clone();
    let table = String::from_utf8(output.stdout).unwrap();
    for part in ["topic", "accuracy", "slots", "f1", "sentence accuracy", "labels of 2+ tasks", "dev", "test"] {
        assert!(table.contains(part), "{part} is not in\n{table}");
    }
    for file in [
        "experiment.yaml",
        "resolved.yaml",
        "environment.json",
        "tokenizer.json",
        "labels.json",
        "metrics.jsonl",
        "report.json",
        "checkpoints/best.safetensors",
        "checkpoints/last.safetensors",
        "checkpoints/best-topic.safetensors",
        "checkpoints/best-slots.safetensors",
    ] {
        assert!(folder.path().join("runs/small").join(file).is_file(), "{file} is missing");
    }
    // The report and `evaluate --json` agree.
    let json = folder.polytask(&["evaluate", "runs/small", "--json"]).assert().success().get_output().clone();
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    let report: serde_json::Value = serde_json::from_str(&folder.read("runs/small/report.json")).unwrap();
    assert_eq!(json["report"], report["splits"]["test"]);
    assert!(json["report"]["tasks"][1]["scores"][0]["value"].as_f64().unwrap() > 0.9, "{json}");
    let last = folder.polytask(&["evaluate", "runs/small", "--json", "--checkpoint", "last"]).assert().success();
    let last: serde_json::Value = serde_json::from_slice(&last.get_output().stdout).unwrap();
    assert_eq!(last["epoch"], 6);
    let table = folder.polytask(&["evaluate", "runs/small", "--by-label"]).assert().success().get_output().clone();
    let table = String::from_utf8(table.stdout).unwrap();
    for part in ["precision", "food", "travel", "thing"] {
        assert!(table.contains(part), "{part} is not in\n{table}");
    }
    // `--predictions` writes every sentence with gold and predicted labels.
    let command = ["evaluate", "runs/small", "--predictions", "said.jsonl"];
    folder.polytask(&command).assert().success();
    let said = folder.read("said.jsonl");
    let said: Vec<serde_json::Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let first: serde_json::Value = serde_json::from_str(folder.read("dev.jsonl").lines().next().unwrap()).unwrap();
    assert_eq!((&said[0]["words"], &said[0]["slots"]["gold"]), (&first["tokens"], &first["slots"]));
    assert!(said[0]["place"].as_str().unwrap().ends_with("dev.jsonl:1"));
    for task in ["topic", "slots"] {
        let labelled: Vec<_> = said.iter().map(|row| &row[task]).filter(|of| !of["gold"].is_null()).collect();
        let right = labelled.iter().filter(|of| of["gold"] == of["predicted"]).count();
        assert_eq!(labelled.iter().filter(|of| of["right"] == true).count(), right);
        let n = report["splits"]["test"]["tasks"].as_array().unwrap().iter().find(|of| of["name"] == task).unwrap();
        assert_eq!(labelled.len() as u64, n["n_sentences"].as_u64().unwrap());
        if task == "topic" {
            assert_eq!(right as f64 / labelled.len() as f64, n["scores"][0]["value"].as_f64().unwrap());
        }
    }

    // CoNLL in and out: comments are kept, consecutive empty lines are merged.
    let input = "# id = 1\nplay\tx\nthe\ty\nrock\tz\n\n\ncook\nsoup";
    let command = ["predict", "runs/small", "--format", "conll"];
    let output = folder.polytask(&command).write_stdin(input).assert().success().get_output().clone();
    let conll = String::from_utf8(output.stdout).unwrap();
    assert_eq!(
        conll,
        "# topic = music\n# id = 1\nplay\tx\tO\nthe\ty\tO\nrock\tz\tB-thing\n\n# topic = food\ncook\tO\nsoup\tB-thing\n\n"
    );
    // The layout of the run's own CoNLL files: -DOCSTART- and comments hold no words, and a predicted class replaces
    // the one in a comment.
    let input = "-DOCSTART- x y\n\n# topic = food\n1\tplay\tx\n# \tthe\ty\n3\trock\tz\n";
    folder.file(
        "runs/small/resolved.yaml",
        folder.read("runs/small/resolved.yaml").replace(
            "  sets:\n",
            "  sets:\n    form: {format: conll, columns: [id, form, tag], tokens: form, train: f, dev: f}\n",
        ),
    );
    let output = folder.polytask(&command).write_stdin(input).assert().success().get_output().clone();
    let conll = String::from_utf8(output.stdout).unwrap();
    let expected = "-DOCSTART- x y\n\n# topic = music\n1\tplay\tx\tO\n# \tthe\ty\tO\n3\trock\tz\tB-thing\n\n";
    assert_eq!(conll, expected);
    folder.polytask(&[&command[..], &["--top", "2"]].concat()).assert().code(2);
    // Offsets of `tokens` refer to `text` if it is given; with `--format text`, JSON is read as text.
    let input = "{\"tokens\": [\"play\", \"rock\"], \"text\": \"play  rock\"}\n";
    let read = |more: &[&str]| -> serde_json::Value {
        let command = [&["predict", "runs/small"], more].concat();
        let output = folder.polytask(&command).write_stdin(input).assert().success().get_output().clone();
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let found = read(&["--top", "2"]);
    assert_eq!((&found["text"], &found["slots"]["spans"][0]["start"]), (&"play  rock".into(), &6.into()));
    let top = found["topic"]["top"].as_array().unwrap();
    assert_eq!((top.len(), &top[0]["label"]), (2, &found["topic"]["label"]));
    assert_eq!(read(&["--format", "text"])["words"][0], "{\"tokens\":");
    // The field names of the run's data work, and a file's extension selects its format.
    let fields = folder.read("runs/small/resolved.yaml").replace(
        "    form: {format",
        "    said: {format: jsonl, text: data.said, train: f, dev: f}\n    form: {format",
    );
    folder.file("runs/small/resolved.yaml", fields);
    let from = |name: &str, content: &str| {
        folder.file(name, content);
        let output = folder.polytask(&["predict", "runs/small", "--input", name]).assert().get_output().clone();
        (output.status.code(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
    };
    let (code, said) = from("in.json", "{\"data\": {\"said\": \"play the rock\"}, \"text\": 7, \"id\": 9}\n");
    assert!(said.contains("warning: `text` of the input is not copied"), "{said}");
    let said: serde_json::Value = serde_json::from_str(said.lines().next().unwrap()).unwrap();
    assert_eq!((code, &said["text"], &said["id"]), (Some(0), &"play the rock".into(), &9.into()));
    let (code, said) = from("bad.jsonl", "{\"text\": \"play rock\", \"tokens\": [\"play\", 12]}\n");
    assert!(code == Some(2) && said.contains("bad.jsonl:1: `tokens` is not a list of strings"), "{said}");
    let (_, said) = from("tool.jsonl", "{\"text\": \"play rock\", \"tokens\": [{\"text\": \"play\"}]}\n");
    assert_eq!(serde_json::from_str::<serde_json::Value>(&said).unwrap_or_default()["words"][1], "rock", "{said}");
    let line = |id: u8, word: &str| format!("{id}\t{word}\t_\t_\t_\t_\t_\t_\t_\t_\n");
    let (_, said) = from("in.conllu", &[line(1, "cook"), line(2, "soup")].concat());
    assert!(said.starts_with("# topic = food\n") && said.ends_with("_\tslots=B-thing\n\n"), "{said}");
    assert_eq!(said.lines().nth(2).unwrap().split('\t').count(), 10);
    let upos = folder.read("runs/small/resolved.yaml").replace("column: slots", "column: upos");
    folder.file("runs/small/resolved.yaml", upos);
    let range = "1-2\tcooksoup\t_\t_\t_\t_\t_\t_\t_\t_\n";
    let (_, said) = from("in.conllu", &[range, &line(1, "cook"), &line(2, "soup")].concat());
    assert!(said.contains(range) && said.ends_with("\n2\tsoup\t_\tB-thing\t_\t_\t_\t_\t_\t_\n\n"), "{said}");
    let (code, said) = from("in.csv", "a,b\n");
    assert!(code == Some(2) && said.contains("a .csv file is neither"), "{said}");

    // Plain text, and tokens or text as JSON; empty lines and other fields are kept; offsets count characters.
    let input = "play the rock\n{\"tokens\": [\"cook\", \"the\", \"soup\", \"bowl\"], \"id\": 7, \"topic\": 1}\n\n\
                 {\"text\": \"  visit   the oslo\"}\n";
    let output = folder.polytask(&["predict", "runs/small"]).write_stdin(input).assert().success().get_output().clone();
    let lines: Vec<serde_json::Value> =
        String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 4);
    assert_eq!((&lines[0]["topic"]["label"], &lines[1]["topic"]["label"]), (&"music".into(), &"food".into()));
    assert_eq!(lines[1]["slots"]["tags"], serde_json::json!(["O", "O", "B-thing", "I-thing"]));
    assert_eq!(lines[1]["slots"]["spans"][0]["text"], "soup bowl");
    assert_eq!(lines[1]["id"], 7);
    assert_eq!(lines[2], serde_json::json!({"text": "", "words": [], "topic": null, "slots": null}));
    let span = &lines[3]["slots"]["spans"][0];
    assert_eq!((span["start"].as_u64(), span["end"].as_u64()), (Some(14), Some(18)));

    // Lines of a file keep their order, even if there are more than one window holds.
    folder.file("in.txt", "play the rock\nvisit the jazz now\n".repeat(2000));
    folder.polytask(&["predict", "runs/small", "--input", "in.txt", "--output", "out.jsonl"]).assert().success();
    let lines: Vec<String> = folder.read("out.jsonl").lines().map(str::to_owned).collect();
    assert_eq!(lines.len(), 4000);
    assert!(lines.chunks(2).all(|pair| pair[0].contains("play the rock") && pair[1].contains("visit the jazz")));
}

#[test]
fn two_runs_of_one_file_are_identical_and_take_directories_of_their_own() {
    let folder = small();
    folder.polytask(&["train", "small.yaml", "--threads", "1"]).assert().success();
    folder.polytask(&["train", "small.yaml", "--threads", "1"]).assert().success();
    assert_eq!(metrics(&folder, "runs/small"), metrics(&folder, "runs/small-2"));
    let last = |run: &str| bytes(&folder, &format!("{run}/checkpoints/best-slots.safetensors"));
    assert_eq!(last("runs/small"), last("runs/small-2"));
    // Training from resolved.yaml gives the same run.
    folder.polytask(&["train", "runs/small/resolved.yaml", "--out", "again", "--threads", "1"]).assert().success();
    assert_eq!(metrics(&folder, "runs/small"), metrics(&folder, "again"));
    // Another seed gives another result.
    folder.polytask(&["train", "small.yaml", "--out", "other", "--threads", "1", "--set", "seed=4"]).assert().success();
    assert_ne!(metrics(&folder, "runs/small"), metrics(&folder, "other"));
}

#[test]
fn the_run_that_began_last_is_resumed() {
    let folder = small();
    let train = |more: &[&str]| stderr(&folder, &[&["train", "small.yaml"], more].concat(), 0);
    let gone = |run: &str| std::fs::remove_dir_all(folder.path().join(run)).unwrap();
    for _ in 0..3 {
        train(&[]);
    }
    gone("runs/small-2");
    assert!(train(&["--resume"]).contains("runs/small-3"));
    train(&[]);
    // The latest run took the free name small-2; the run of another experiment does not count.
    stderr(&folder, &["train", "small.yaml", "--set", "name=small-9"], 0);
    assert!(train(&["--resume"]).contains("runs/small-2"));
    // Training an older run further does not make it the latest.
    train(&["--out", "runs/small-3", "--resume", "--set", "training.max_epochs=7"]);
    assert!(train(&["--resume"]).contains("runs/small-2"));
}

/// The step after which a run says that it resumes.
fn resumed_at(said: &str) -> u64 {
    let step = said.split("resuming after step ").nth(1).and_then(|rest| rest.split(' ').next());
    step.unwrap_or_else(|| panic!("it does not resume: {said}")).parse().unwrap()
}

/// Trains once without interruption and once with kills: weights must be identical bit for bit, and so must the
/// records.
pub fn check_kills(folder: &Folder, kills: usize, more: &[&str]) {
    for run in ["whole", "killed"] {
        std::fs::remove_dir_all(folder.path().join(run)).ok();
    }
    let train = |out: &str, resume: bool| {
        let mut arguments = vec!["train", "small.yaml", "--out", out, "--threads", "2"];
        if out == "killed" {
            arguments.extend(["--set", "training.checkpoint_every_steps=7"]);
        }
        arguments.extend(more);
        if resume {
            arguments.push("--resume");
        }
        arguments.into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let run = |arguments: Vec<String>| -> String {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let output = folder.polytask(&arguments).assert().success().get_output().clone();
        String::from_utf8(output.stderr).unwrap()
    };
    run(train("whole", false));
    for kill in 0..kills {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_polytask"));
        command.current_dir(folder.path()).args(train("killed", kill > 0));
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // Wait for some new steps, then kill it.
        let size = || std::fs::metadata(folder.path().join("killed/metrics.jsonl")).map_or(0, |file| file.len());
        let (before, started) = (size(), Instant::now());
        while size() < before + 1500
            && child.try_wait().unwrap().is_none()
            && started.elapsed() < Duration::from_secs(60)
        {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(child.try_wait().unwrap().is_none() || kill > 0, "the run ended before it could be killed");
        child.kill().ok();
        child.wait().unwrap();
    }
    assert!(resumed_at(&run(train("killed", true))) > 0);
    for checkpoint in ["last", "best", "best-topic", "best-slots"] {
        let file = |run: &str| bytes(folder, &format!("{run}/checkpoints/{checkpoint}.safetensors"));
        assert!(file("whole") == file("killed"), "{more:?}: checkpoint {checkpoint} differs");
    }
    assert!(metrics(folder, "whole") == metrics(folder, "killed"), "{more:?}: metrics.jsonl differs");
    // Resuming a finished run trains no further steps.
    let said = run(train("killed", true));
    let last = metrics(folder, "whole").last().unwrap()["step"].as_u64().unwrap();
    assert!(resumed_at(&said) == last && !said.contains("tokens/s"), "{said}");
}

#[test]
fn an_epoch_shorter_than_the_log_interval_has_a_record_at_its_end() {
    let folder = small();
    let more = ["--set", "training.max_epochs=2", "--set", "training.log_every_steps=50"];
    folder.polytask(&[&["train", "small.yaml", "--out", "run"], more.as_slice()].concat()).assert().success();
    let kinds: Vec<_> =
        metrics(&folder, "run").into_iter().map(|record| (record["kind"].clone(), record["step"].clone())).collect();
    assert_eq!(
        kinds,
        [("train", 11), ("dev", 11), ("train", 22), ("dev", 22)].map(|(kind, step)| (kind.into(), step.into()))
    );
}

#[test]
fn a_killed_run_resumes_to_the_same_weights_bit_for_bit() {
    let folder = small();
    folder.file("train.jsonl", rows(700));
    check_kills(&folder, 3, &["--set", "training.freeze_epochs={embedding: 1}"]);
}

#[test]
fn every_strategy_says_why_weights_moved_and_resumes_bit_for_bit() {
    let folder = small();
    folder.file("train.jsonl", rows(400));
    for (strategy, detail) in [
        ("{strategy: uncertainty}", "sigma"),
        ("{strategy: uncertainty_softmax, temperature: 2}", "weight"),
        ("{strategy: gradnorm, initial_loss: {mean_of_first: 5}}", "training_rate"),
        ("{strategy: gradnorm, reference: last_layer, initial_loss: log_classes}", "target"),
        ("{strategy: dwa}", "loss_ratio"),
        ("{strategy: random}", "weight"),
        ("{strategy: fixed, weights: {topic: 1, slots: 3}}", "weight"),
        ("{strategy: equal}", "weight"),
    ] {
        let weighting = format!("weighting={strategy}");
        let more: Vec<&str> = [
            &weighting,
            "training.accumulate_steps=2",
            "training.batch_size=4",
            // Options that change the path from the trunk to a head, or have state of their own.
            "model.embedding.characters={kind: cnn, dim: 4, filters: 4}",
            "model.embedding.vectors=[{file: vectors.txt}]",
            "model.trunk={layers: 2, hidden: 8, locked_dropout: true, connection: highway}",
            "tasks.topic.layer=1",
            "tasks.slots.inputs=[trunk, topic]",
            "training.ema_decay=0.99",
        ]
        .into_iter()
        .flat_map(|value| ["--set", value])
        .collect();
        check_kills(&folder, 1, &more);
        let records = metrics(&folder, "whole");
        let trained = records.iter().rfind(|record| record["kind"] == "train").unwrap();
        assert!(trained[detail]["topic"].as_f64().is_some_and(f64::is_finite), "{strategy}: {trained}");
        let compared = records.iter().rfind(|record| record["gradient_cosine"].is_object()).unwrap();
        let cosine = compared["gradient_cosine"]["topic-slots"].as_f64().unwrap();
        assert!((-1.0..=1.0).contains(&cosine) && compared["task_gradient_norm"]["slots"].as_f64().unwrap() > 0.0);
    }
}

#[test]
fn a_learning_rate_is_found() {
    let folder = small();
    folder.file("train.jsonl", rows(400));
    let command = ["find-lr", "small.yaml", "--from", "1e-5", "--to", "10", "--json", "--threads", "1"];
    let output = folder.polytask(&command).assert().success().get_output().clone();
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let suggestion = found["suggestion"].as_f64().unwrap();
    assert!((1e-3..1.0).contains(&suggestion), "{suggestion}");
    let output = folder.polytask(&["find-lr", "small.yaml", "--html", "lr.html"]).assert().success();
    assert!(String::from_utf8_lossy(&output.get_output().stdout).contains("the loss falls fastest at"));
    assert!(folder.read("lr.html").contains("<polyline"));
    folder.polytask(&["find-lr", "small.yaml", "--from", "1"]).assert().code(2);
    // Round-robin sampling: the curve begins once both tasks have occurred.
    let two = SMALL
        .replace("tasks:", "    other: {format: jsonl, tokens: tokens, train: train.jsonl, dev: dev.jsonl}\ntasks:")
        .replace("slots: {type: tagging, set: toy", "slots: {type: tagging, set: other");
    folder.file("two.yaml", two);
    let command = ["find-lr", "two.yaml", "--steps", "20", "--to", "1e-6", "--from", "1e-7", "--json"];
    let command = [&command[..], &["--set", "training.sampling=round_robin"]].concat();
    let output = folder.polytask(&command).assert().success().get_output().clone();
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["points"].as_array().unwrap().len(), 19, "{found}");
}

#[test]
fn the_mathematics_of_weighting_hold_on_this_device() {
    let output = small().polytask(&["selftest"]).assert().success().get_output().clone();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("checks passed") && !text.contains("FAILED"), "{text}");
}

#[test]
fn a_selftest_of_an_experiment_takes_its_steps_again_and_apart() {
    let folder = small();
    let command = ["selftest", "small.yaml", "--device", "cpu", "--set", "weighting=gradnorm"];
    let output = folder.polytask(&command).assert().success().get_output().clone();
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [
        "passed  20 steps of the experiment give the same weights each time, bit for bit",
        "passed  10 + 10 steps with a stop in between give the same weights as 20 steps, bit for bit",
        "all 14 checks passed",
    ] {
        assert!(text.contains(part), "`{part}` is not in\n{text}");
    }
    assert!(!folder.path().join("runs").exists());
    assert!(stderr(&folder, &["selftest", "--steps", "4"], 2).contains("<EXPERIMENT>"));
}

/// Starts a run in `out` and waits until it trains.
fn training(folder: &Folder, more: &[&str]) -> Child {
    let child = std::process::Command::new(env!("CARGO_BIN_EXE_polytask"))
        .current_dir(folder.path())
        .args(["train", "small.yaml", "--out", "out"])
        .args(more)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let started = Instant::now();
    while !folder.path().join("out/metrics.jsonl").exists() && started.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

pub fn interrupt(child: &Child) {
    let kill = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(kill.unwrap().success());
}

/// A signal handler writes to the stack of the interrupted thread, and oneDNN's matrix products have theirs on the
/// heap.
#[test]
fn signals_interrupt_no_thread_that_computes() {
    let folder = small();
    folder.file("train.jsonl", rows(2000));
    let mut child = training(&folder, &["--set", "training.max_epochs=1000"]);
    let blocked = |thread: std::io::Result<std::fs::DirEntry>| {
        let status = std::fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
        u64::from_str_radix(mask.trim(), 16).unwrap()
    };
    let threads = std::fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
    let masks: Vec<u64> = threads.map(blocked).collect();
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let (int, term) = (1 << 1, 1 << 14);
    // Only the thread that waits for signals does not block them.
    let n_open = masks.iter().filter(|mask| **mask & int == 0 || **mask & term == 0).count();
    assert!(masks.len() > 1 && n_open == 1, "{masks:x?}");
}

#[test]
fn a_second_interrupt_ends_the_run_at_once() {
    let folder = small();
    folder.file("train.jsonl", rows(2000));
    // The step may end before the second interrupt arrives, but not every time.
    let at_once = (0..5).filter(|_| {
        std::fs::remove_dir_all(folder.path().join("out")).ok();
        let mut child = training(&folder, &["--set", "training.batch_size=2000", "--set", "model.trunk.hidden=256"]);
        interrupt(&child);
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
        assert!(lines.any(|line| line.contains("interrupt again to stop immediately")));
        interrupt(&child);
        let rest: Vec<String> = lines.collect();
        assert_eq!(child.wait().unwrap().code(), Some(130), "{rest:?}");
        !rest.iter().any(|line| line.contains("everything is saved"))
    });
    assert!(at_once.count() > 0);
}

#[test]
fn an_interrupt_finishes_the_step_saves_and_says_how_to_go_on() {
    let folder = small();
    folder.file("train.jsonl", rows(2000));
    let child = training(&folder, &["--workers", "2", "--threads", "2"]);
    std::thread::sleep(Duration::from_millis(100));
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{text}");
    assert!(text.contains("polytask train small.yaml --out out --threads 2 --workers 2 --resume"), "{text}");
    let more = ["--out", "out", "--workers", "2", "--threads", "2"];
    let resumed = stderr(&folder, &[&["train", "small.yaml", "--resume"], more.as_slice()].concat(), 0);
    assert!(resumed_at(&resumed) > 0, "{resumed}");
    let more = ["--out", "whole", "--workers", "2", "--threads", "2"];
    stderr(&folder, &[&["train", "small.yaml"], more.as_slice()].concat(), 0);
    let last = |run: &str| bytes(&folder, &format!("{run}/checkpoints/last.safetensors"));
    assert!(last("out") == last("whole"), "an interrupted run comes to the same weights");
}

#[test]
fn what_is_wrong_with_the_command_or_the_experiment_ends_with_2() {
    let folder = small();
    assert!(stderr(&folder, &["train", "none.yaml"], 2).contains("experiment file none.yaml does not exist"));
    assert!(stderr(&folder, &["trian"], 2).contains("train"));
    let wrong = stderr(&folder, &["train", "small.yaml", "--set", "training.batch_sise=3"], 2);
    assert!(wrong.contains("did you mean `batch_size`?"), "{wrong}");
    assert!(!folder.path().join("runs").exists(), "nothing is left behind");
    assert!(stderr(&folder, &["train", "small.yaml", "--device", "gpu"], 2).contains("unknown device `gpu`"));
    assert!(stderr(&folder, &["train", "small.yaml", "--out", "."], 2).contains("is not empty"));
    assert!(stderr(&folder, &["evaluate", "."], 2).contains("is not a run directory"));
    assert!(stderr(&folder, &["train", "small.yaml", "--resume"], 2).contains("there is no runs/small to resume"));
    folder.file("missing.yaml", SMALL.replace("train: train.jsonl", "source: the moon, train: train-2.jsonl"));
    let missing = stderr(&folder, &["train", "missing.yaml"], 2);
    assert!(
        missing.contains("train-2.jsonl does not exist") && missing.contains("Where to get it: the moon"),
        "{missing}"
    );
}

#[test]
fn broken_data_is_told_by_file_and_line() {
    let folder = small();
    let mut lines: Vec<String> = rows(30).lines().map(str::to_owned).collect();
    lines[4] = "{\"tokens\": [\"a\", \"b\"], \"slots\": [\"O\"]}".to_owned();
    lines[11] = "{\"tokens\": [\"a\"".to_owned();
    lines[20] = "{\"tokens\": [\"a\"], \"slots\": [\"X-thing\"]}".to_owned();
    folder.file("train.jsonl", lines.join("\n"));
    let text = stderr(&folder, &["train", "small.yaml"], 2);
    for part in [
        "train.jsonl:5: 2 words but 1 tag in `slots`",
        "train.jsonl:12: not JSON",
        "train.jsonl:21: `slots`, word 1: `X-thing` is not a bio tag",
    ] {
        assert!(text.contains(part), "`{part}` is not in\n{text}");
    }
    let output = folder.polytask(&["check", "small.yaml"]).assert().code(2).get_output().clone();
    assert!(String::from_utf8(output.stdout).unwrap().contains("3 errors"));
    assert!(!folder.path().join("runs/small").exists());
}

#[test]
fn a_loss_that_is_not_finite_ends_the_run_with_1_and_is_named() {
    let folder = small();
    let arguments = [
        "train",
        "small.yaml",
        "--set",
        "training.optimizer={kind: sgd, learning_rate: 1e30}",
        "--set",
        "training.clip_norm=0",
    ];
    let text = stderr(&folder, &arguments, 1);
    assert!(text.contains("is not finite") && text.contains("train.jsonl:") && text.contains("step "), "{text}");
    assert!(!text.contains("panicked"), "{text}");
}

#[test]
fn damaged_runs_are_told() {
    let folder = small();
    folder.polytask(&["train", "small.yaml", "--out", "run", "--set", "training.max_epochs=1"]).assert().success();
    let best = folder.path().join("run/checkpoints/best.safetensors");
    let content = std::fs::read(&best).unwrap();
    std::fs::write(&best, &content[..content.len() / 2]).unwrap();
    assert!(stderr(&folder, &["evaluate", "run"], 1).contains("is damaged or not a checkpoint"));
    assert!(stderr(&folder, &["evaluate", "run", "--checkpoint", "bets"], 2).contains("it has best, best-slots"));
    let changed = ["train", "small.yaml", "--out", "run", "--resume", "--set", "training.batch_size=9"];
    let changed = stderr(&folder, &changed, 2);
    assert!(
        changed.contains("\n  training.batch_size: was `8`, is `9`\n") && changed.contains("when it ends"),
        "{changed}"
    );
}

#[test]
fn without_dev_the_last_weights_are_kept() {
    let folder = small();
    let none = ["data.sets.toy.dev=null", "data.sets.toy.dev_fraction=0", "training.max_epochs=2"];
    let set: Vec<&str> = none.iter().flat_map(|value| ["--set", *value]).collect();
    let said = stderr(&folder, &[&["train", "small.yaml", "--out", "run"], &set[..]].concat(), 0);
    assert!(said.contains("without dev the last weights are kept") && !said.contains("dev topic"), "{said}");
    assert!(metrics(&folder, "run").iter().all(|record| record["kind"] == "train"));
    let report: serde_json::Value = serde_json::from_str(&folder.read("run/report.json")).unwrap();
    assert_eq!((&report["epoch"], report["splits"].get("dev")), (&2.into(), None));
    assert!(report["splits"]["test"].is_object());
    folder.polytask(&["predict", "run", "--input", "-", "--output", "-"]).write_stdin("play rock\n").assert().success();
    let export = ["export", "run", "--format", "torchscript", "--out", "model.pt", "--dtype", "float16"];
    folder.polytask(&export).assert().success();
    assert!(stderr(&folder, &["evaluate", "run", "--split", "dev"], 2).contains("the experiment has no split dev"));
    let patient =
        [&["train", "small.yaml"], &set[..], &["--set", "training.early_stopping.patience_epochs=2"]].concat();
    assert!(stderr(&folder, &patient, 2).contains("patience_epochs: needs dev"));
}

#[test]
fn a_finished_run_is_lengthened_to_what_a_longer_one_is() {
    let folder = small();
    let train = |out: &str, epochs: usize, more: &[&str], code: i32| {
        let epochs = format!("training.max_epochs={epochs}");
        let first =
            ["train", "small.yaml", "--out", out, "--threads", "2", "--set", "training.schedule=constant", "--set"];
        stderr(&folder, &[&first[..], &[epochs.as_str()], more].concat(), code)
    };
    train("long", 3, &[], 0);
    train("short", 1, &[], 0);
    let said = train("short", 3, &["--resume"], 0);
    assert!(
        resumed_at(&said) == 11 && said.contains("the run now ends after 33 steps; the learning rate continues from"),
        "{said}"
    );
    for checkpoint in ["last", "best", "best-topic", "best-slots"] {
        let file = |run: &str| bytes(&folder, &format!("{run}/checkpoints/{checkpoint}.safetensors"));
        assert!(file("long") == file("short"), "checkpoint {checkpoint} differs");
    }
    assert!(metrics(&folder, "long") == metrics(&folder, "short"));
    assert_eq!(folder.read("long/resolved.yaml"), folder.read("short/resolved.yaml"));
    let said = train("short", 2, &["--resume"], 2);
    assert!(said.contains("short has already taken 33 steps, and cannot end after 22"), "{said}");
    // DWA compares whole epochs: it sees the same ones although the short run ended within an epoch.
    let steps = |steps: &'static str| ["--set", "weighting=dwa", "--set", steps];
    train("long-dwa", 9, &steps("training.max_steps=40"), 0);
    train("short-dwa", 9, &steps("training.max_steps=27"), 0);
    train("short-dwa", 9, &[&steps("training.max_steps=40")[..], &["--resume"]].concat(), 0);
    assert!(folder.weights("long-dwa", "last") == folder.weights("short-dwa", "last"));
    // A run that was stopped early continues with more patience.
    let patience = |epochs: &'static str| ["--set", epochs, "--set", "training.optimizer.learning_rate=1e-12"];
    let early = train("early", 9, &patience("training.early_stopping.patience_epochs=1"), 0);
    assert!(early.contains("no better score in 1 epoch"), "{early}");
    let more = [&patience("training.early_stopping.patience_epochs=3")[..], &["--resume"]].concat();
    assert!(resumed_at(&train("early", 9, &more, 0)) == 22);
    assert_eq!(metrics(&folder, "early").last().unwrap()["step"], 44);
}

#[test]
fn rows_without_any_label_are_left_out_with_a_warning() {
    let folder = small();
    let bare = "{\"tokens\": [\"a\", \"b\"]}\n".repeat(40);
    folder.file("train.jsonl", rows(90) + &bare);
    let said = stderr(&folder, &["train", "small.yaml"], 0);
    // Rows 34 and 69 of `rows`, counted from 0, have neither topic nor slots; with the 40 bare rows that makes 42.
    assert!(said.contains("train.jsonl:35: 42 rows without a label"), "{said}");
    folder.file("train.jsonl", bare);
    let said = stderr(&folder, &["train", "small.yaml"], 2);
    assert!(said.contains("no row has a `topic` for task `topic`"), "{said}");
}

#[test]
fn options_are_listed_whole_and_by_key() {
    let folder = Folder::new();
    let listed = |arguments: &[&str]| {
        let output = folder.polytask(arguments).assert().success().get_output().clone();
        String::from_utf8(output.stdout).unwrap()
    };
    let all = listed(&["options"]);
    for part in ["extends:", "  NAME:", "kind: sgd", "model: bpe", "trainable:", "mean_of_first:"] {
        assert!(all.contains(part), "`{part}` is not in\n{all}");
    }
    let pooling = listed(&["options", "tasks.intent.pooling"]);
    assert!(pooling.starts_with(" pooling:") && pooling.contains("attention"), "{pooling}");
    assert!(!pooling.contains("decoder"), "{pooling}");
    let error = stderr(&folder, &["options", "training.optimiser"], 2);
    assert!(error.contains("no option `training.optimiser`"), "{error}");
}
