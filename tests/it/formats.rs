//! Every format, read through an experiment: rows, labels, and errors by line.

use std::io::Write;
use std::path::Path;

use polytask::config::Experiment;
use polytask::data::{Corpus, Rows, Split, load};
use polytask::problem::Problem;

use crate::util::Folder;

/// Loads `train.*` of one set; `tasks` are lines of YAML.
fn read(folder: &Folder, set: &str, tasks: &str) -> (Corpus, Vec<Problem>) {
    let yaml =
        format!("name: t\ndata:\n  root: {}\n  sets:\n    s: {{{set}}}\ntasks:\n{tasks}\n", folder.path().display());
    let path = folder.file("experiment.yaml", yaml);
    let experiment = Experiment::load(&path, &[]).unwrap();
    load(&experiment.data, &experiment.task_columns(), &Split::ALL, experiment.tokenizer.splitter(), &|_: &Path| {})
        .unwrap()
}

const TOPIC: &str = "  topic: {type: classification, set: s, column: topic}";
const BOTH: &str =
    "  topic: {type: classification, set: s, column: topic}\n  tags: {type: tagging, set: s, column: tags}";

fn sentences(corpus: &Corpus) -> Vec<String> {
    let rows = corpus.rows(Split::Train)[0];
    (0..rows.len()).map(|row| rows.text_of(row)).collect()
}

fn labels(corpus: &Corpus, column: usize) -> Vec<String> {
    let rows: &Rows = corpus.rows(Split::Train)[0];
    let column = &rows.columns[column];
    let label = |&value: &u32| if value == u32::MAX { "-".to_owned() } else { column.strings.get(value).to_owned() };
    column.values.iter().map(label).collect()
}

fn messages(problems: &[Problem]) -> Vec<String> {
    problems.iter().map(|problem| problem.to_string().rsplit('/').next().unwrap().to_owned()).collect()
}

#[test]
fn parallel() {
    let folder = Folder::new();
    folder.file("d/seq.in", "play it \nstop\nbad row\n");
    folder.file("d/tags", "O B-x \nO\nO\n");
    folder.file("d/topic", "m\n\nm\n");
    let (corpus, problems) = read(&folder, "format: parallel, tokens: seq.in, train: d, dev: d", BOTH);
    assert_eq!(sentences(&corpus), ["play it", "stop"]);
    assert_eq!(
        (labels(&corpus, 0), labels(&corpus, 1)),
        (vec!["m".into(), "-".into()], vec!["O".into(), "B-x".into(), "O".into()])
    );
    assert_eq!(messages(&problems)[0], "seq.in:3: 2 words but 1 tag in `tags`");
    folder.file("d/topic", "m\n");
    let (_, problems) = read(&folder, "format: parallel, tokens: seq.in, train: d, dev: d", BOTH);
    assert_eq!(messages(&problems)[0], "topic:2: 1 line, but `seq.in` has 3");
}

#[test]
fn conll() {
    let folder = Folder::new();
    let text = "-DOCSTART- -X- O\n\n# topic = news\nEU NNP B-x\nrules VB O\n\n#tag NN O\r\n\nalone\n\nlast NN I-x";
    folder.file("t.conll", text);
    let set = "format: conll, columns: [word, pos, tags], train: t.conll, dev: t.conll";
    let (corpus, problems) = read(&folder, set, BOTH);
    assert_eq!(sentences(&corpus), ["EU rules", "#tag", "last"]);
    assert_eq!(labels(&corpus, 0), ["news", "-", "-"]);
    assert_eq!(labels(&corpus, 1), ["B-x", "O", "O", "I-x"]);
    assert_eq!(messages(&problems)[0], "t.conll:9: 1 column, but 3 are needed");
    assert!(
        messages(&problems)
            .iter()
            .any(|m| m.starts_with("t.conll:11: `tags`, word 1 `last`: `I-x`: does not continue"))
    );
}

#[test]
fn comments_of_conll_are_no_words_and_columns_without_a_name_are_errors() {
    let folder = Folder::new();
    let text = "# some words of mine\n# topic=news\na B-x\n\n# topic =\n# O\n\nb NN O\n";
    folder.file("t.conll", text);
    let (corpus, problems) = read(&folder, "format: conll, columns: [word, tags], train: t.conll, dev: t.conll", BOTH);
    assert_eq!(
        (sentences(&corpus), labels(&corpus, 0)),
        (vec!["a".into(), "#".into()], vec!["news".into(), "-".into()])
    );
    assert_eq!(messages(&problems)[0], "t.conll:8: 3 columns, but `columns:` names 2");
    folder.file("t.conll", "# newdoc id = x\n# newpar\n# topic: news\n# text: x = y\n# more:\n1 a B-x\n\n# topic: o=d\n1 # O\n2 b _\n\n# : O\n2 c O\n");
    let set = "format: conll, columns: [n, word, tags], tokens: word, train: t.conll, dev: t.conll";
    let (corpus, _) = read(&folder, set, &BOTH.replace("column: tags", "column: tags, scheme: plain"));
    assert_eq!(
        (sentences(&corpus), labels(&corpus, 0)),
        (vec!["a".into(), "# b".into(), ": c".into()], vec!["news".into(), "o=d".into(), "-".into()])
    );
    // Without `columns:`, a sentence has as many columns as its last line; if that has tabs, lines without tabs are
    // comments.
    folder.file("t.conll", "# made by hand, see LICENSE\n\n# doc 17\na B-x\n\n# doc\nb\tO\n\n# O\nc O\n");
    let numbered = &BOTH.replace("column: tags", "column: '1'");
    let (corpus, _) = read(&folder, "format: conll, train: t.conll, dev: t.conll", numbered);
    assert_eq!(sentences(&corpus), ["a", "b", "# c"]);
    let text = "# topic = a\n# topic = b\nx O\n\n# topic = a\n# topic = a\n# topic =\n# more = a\n# more = b\ny O\n";
    folder.file("t.conll", text);
    let (corpus, problems) = read(&folder, "format: conll, columns: [word, tags], train: t.conll, dev: t.conll", BOTH);
    assert_eq!((sentences(&corpus), labels(&corpus, 0)), (vec!["y".into()], vec!["a".into()]));
    assert_eq!(messages(&problems)[0], "t.conll:2: a second `topic`, `b`, for a sentence that already has `a`");
}

#[test]
fn a_key_twice_and_a_quote_that_stays_open_are_errors() {
    let folder = Folder::new();
    let row = "{\"tokens\": [\"a\"], \"topic\": \"x\", \"tags\": [\"O\"]}\n";
    folder.file("t.jsonl", row.to_owned() + &row.replace("\"tags\"", "\"topic\": \"y\", \"tags\"") + "{}\n");
    let (corpus, problems) = read(&folder, "format: jsonl, tokens: tokens, train: t.jsonl, dev: t.jsonl", BOTH);
    assert_eq!(labels(&corpus, 0), ["x"]);
    let expected = ["t.jsonl:2: the key `topic` occurs twice (column 44)", "t.jsonl:3: no `tokens`: the row is empty"];
    assert_eq!(messages(&problems)[..2], expected);
    folder.file("t.jsonl", "{\"data\": {\"text\": \"a\", \"text\": \"b\"}, \"topic\": \"x\"}\n");
    let topic = "  topic: {type: classification, set: s, column: topic}";
    let (_, problems) = read(&folder, "format: jsonl, text: data.text, train: t.jsonl, dev: t.jsonl", topic);
    assert_eq!(messages(&problems)[0], "t.jsonl:1: the key `text` occurs twice (column 35)");
    let set = "format: csv, train: t.csv, dev: t.csv";
    for (text, topics, line) in [
        ("text,topic\na,x\nb,\"y\nc,z\nd,x\n", vec!["x"], Some(3)),
        ("text,topic\r\n\"a \"\"b\"\"\",x\r\n\"b\nb\",\"y\r\n", vec!["x"], Some(4)),
        ("text,topic\na \"b,x\n\"c\"\"\",\"y\"", vec!["x", "y"], None),
        ("text,\"topic\na,x\nb,y\n", vec![], Some(1)),
    ] {
        folder.file("t.csv", text);
        let (corpus, problems) = read(&folder, set, topic);
        assert_eq!(labels(&corpus, 0), topics, "{text}");
        let told = line.map(|line| format!("t.csv:{line}: a `\"` is never closed"));
        let open = messages(&problems).into_iter().find(|message| message.contains("never closed"));
        assert!(open.is_some() == told.is_some(), "{problems:?}");
        assert!(open.zip(told).is_none_or(|(open, told)| open.starts_with(&told)), "{problems:?}");
    }
}

#[test]
fn rasa_leaves_entities_away_where_there_are_none_and_spans_are_of_the_text_they_name() {
    let folder = Folder::new();
    let examples = "[{\"text\": \"to Rome\", \"intent\": \"go\", \"entities\": [{\"start\": 3, \"end\": 7, \"entity\": \"city\"}]},\n\
                    {\"text\": \"hello Rome\", \"intent\": \"greet\"}]";
    folder.file("t.json", format!("{{\"rasa_nlu_data\": {{\"common_examples\": {examples}}}}}"));
    let tasks = "  tags: {type: tagging, set: s, column: entities}";
    let misnamed = tasks.replace("column: entities", "column: entites");
    let (_, problems) = read(&folder, "format: rasa, train: t.json, dev: t.json", &misnamed);
    assert!(messages(&problems)[0].contains("no row has a `entites`"), "{problems:?}");
    let (corpus, problems) = read(&folder, "format: rasa, train: t.json, dev: t.json", tasks);
    assert_eq!((labels(&corpus, 0), problems.len()), (["O", "B-city", "O", "O"].map(str::to_owned).to_vec(), 0));
    let span = "{\"start\": 3, \"end\": 7, \"label\": \"city\", \"text\": \"Oslo\"}";
    folder.file("t.jsonl", format!("{{\"text\": \"to Rome\", \"entities\": [{span}]}}\n"));
    let (_, problems) = read(&folder, "format: jsonl, train: t.jsonl, dev: t.jsonl", tasks);
    assert_eq!(
        messages(&problems)[0],
        "t.jsonl:1: span 3..7 `city` is recorded as `Oslo`, but the text at its offsets is `Rome`"
    );
}

#[test]
fn a_bad_tag_is_named_by_the_line_of_its_word() {
    let folder = Folder::new();
    folder.file("t.conll", "# topic = a\nto O\nOslo X-city\n\nyes O\nRome I-city\n");
    let (_, problems) = read(&folder, "format: conll, columns: [word, tags], train: t.conll, dev: t.conll", BOTH);
    assert_eq!(messages(&problems)[0], "t.conll:3: `tags`, word 2: `X-city` is not a bio tag");
    assert!(messages(&problems)[1].starts_with("t.conll:6: `tags`, word 2 `Rome`"), "{problems:?}");
    // If the sentence has lines without a word, its first line is named instead.
    let row = |id: &str, word: &str, tag: &str| format!("{id}\t{word}\t_\t{tag}\t_\t_\t_\t_\t_\t_\n");
    let text = [row("1", "do", "O"), row("2-3", "nt", "_"), row("2", "n", "O"), row("3", "t", "X-x")].concat();
    folder.file("t.conllu", format!("\n{text}"));
    let tasks = "  tags: {type: tagging, set: s, column: upos}";
    let (_, problems) = read(&folder, "format: conllu, train: t.conllu, dev: t.conllu", tasks);
    assert_eq!(messages(&problems)[0], "t.conllu:2: `upos`, word 3: `X-x` is not a bio tag");
}

#[test]
fn spans_of_characters_are_written_in_the_tasks_scheme() {
    let folder = Folder::new();
    folder.file(
        "t.jsonl",
        "{\"text\": \"to New York now\", \"tags\": [{\"start\": 3, \"end\": 11, \"label\": \"city\"}]}\n",
    );
    for (scheme, expected) in [
        ("bmes", ["O", "B-city", "E-city", "O"]),
        ("iob1", ["O", "I-city", "I-city", "O"]),
        ("iob2", ["O", "B-city", "I-city", "O"]),
    ] {
        let tasks = format!("  tags: {{type: tagging, set: s, column: tags, scheme: {scheme}}}");
        let (corpus, problems) = read(&folder, "format: jsonl, train: t.jsonl, dev: t.jsonl", &tasks);
        assert_eq!((labels(&corpus, 0), problems.len()), (expected.map(str::to_owned).to_vec(), 0), "{scheme}");
    }
}

#[test]
fn plain_tags_are_no_spans() {
    let folder = Folder::new();
    for (value, expected) in [
        ("[]", "t.jsonl:1: 3 words but 0 tags in `tags`"),
        (r#"[{"start": 3, "end": 11, "label": "city"}]"#, "t.jsonl:1: `tags` is not a list of tags, one per word"),
    ] {
        folder.file("t.jsonl", format!("{{\"text\": \"to New York\", \"tags\": {value}}}\n"));
        let tasks = "  tags: {type: tagging, set: s, column: tags, scheme: plain}";
        let (_, problems) = read(&folder, "format: jsonl, train: t.jsonl, dev: t.jsonl", tasks);
        assert_eq!(messages(&problems)[0], expected);
    }
}

#[test]
fn a_column_of_a_task_is_read_once_though_cuts_go_by_it() {
    let folder = Folder::new();
    let odd =
        "{\"text\": \"in Oslo now\", \"topic\": \"a\", \"tags\": [{\"start\": 3, \"end\": 9, \"label\": \"x\"}]}\n";
    folder.file("t.jsonl", odd.repeat(10));
    let (corpus, problems) =
        read(&folder, "format: jsonl, train: t.jsonl, dev_fraction: 0.3, stratify_tags: tags", BOTH);
    assert_eq!((corpus.rows(Split::Train)[0].len(), corpus.rows(Split::Dev)[0].len()), (7, 3));
    assert_eq!(problems.len(), 10, "{problems:?}");
}

#[test]
fn conllu() {
    let folder = Folder::new();
    let row = |id: &str, word: &str, upos: &str| format!("{id}\t{word}\t_\t{upos}\t_\t_\t_\t_\t_\t_\n");
    let text = format!(
        "# topic = a\n{}{}{}{}\n{}\n",
        row("1-2", "dont", "_"),
        row("1", "do", "AUX"),
        row("2", "nt", "PART"),
        row("2.1", "ghost", "X"),
        row("1", "#", "SYM")
    );
    folder.file("t.conllu", text);
    let tasks = format!("{TOPIC}\n  tags: {{type: tagging, set: s, column: upos, scheme: plain}}");
    let (corpus, problems) = read(&folder, "format: conllu, train: t.conllu, dev: t.conllu", &tasks);
    assert_eq!((sentences(&corpus), problems.len()), (vec!["do nt".to_owned(), "#".to_owned()], 0));
    assert_eq!(labels(&corpus, 1), ["AUX", "PART", "SYM"]);
}

#[test]
fn jsonl_text_tokens_tags_and_spans() {
    let folder = Folder::new();
    let text = "{\"text\": \"né in Oslo\", \"topic\": 3, \"tags\": [{\"start\": 6, \"end\": 10, \"label\": \"city\"}]}\n\
        {\"text\": \"two words\", \"tags\": \"O B-city\"}\n{\"text\": \"none\", \"topic\": null, \"tags\": []}\n\
        {\"text\": \"cut in word\", \"tags\": [[0, 2, \"x\"]]}\n{\"text\": \"out\", \"tags\": [[7, 9, \"x\"]]}\n\
        {\"text\": \"\"}\n{\"txt\": \"a\"}\n{\"text\": \"a  b\", \"tags\": [[1, 3, \"x\"]]}\n\
        {\"text\": \"a\", \"tags\": [[0, 1, \"\"]]}\n";
    folder.file("t.jsonl", text);
    let (corpus, problems) = read(&folder, "format: jsonl, train: t.jsonl, dev: t.jsonl", BOTH);
    assert_eq!(sentences(&corpus), ["né in Oslo", "two words", "none", "cut in word"]);
    assert_eq!(labels(&corpus, 0), ["3", "-", "-", "-"]);
    assert_eq!(labels(&corpus, 1), ["O", "O", "B-city", "O", "B-city", "O", "B-x", "O", "O"]);
    let messages = messages(&problems);
    for expected in [
        "t.jsonl:4: span 0..2 `x` does not end at word boundaries; it is extended to whole words; `tokenizer.split` sets how text is split",
        "t.jsonl:5: span 7..9 `x` ends beyond the text, which ends at 3",
        "t.jsonl:6: empty sentence, skipped",
        "t.jsonl:7: no `text`; the keys are `txt`",
        "t.jsonl:8: span 1..3 `x` covers no word",
        "t.jsonl:9: span 0..1 `` has no label",
    ] {
        assert!(messages.iter().any(|message| message == expected), "{expected} is not in {messages:?}");
    }
}

#[test]
fn numbers_are_tags_and_what_cannot_be_is_named() {
    let folder = Folder::new();
    let plain = "  tags: {type: tagging, set: s, column: tags, scheme: plain}";
    folder.file("t.jsonl", "{\"tokens\": [\"a\", \"b\"], \"tags\": [5, 3]}\n");
    let set = "format: jsonl, tokens: tokens, train: t.jsonl, dev: t.jsonl";
    let (corpus, problems) = read(&folder, set, plain);
    assert!(labels(&corpus, 0) == ["5", "3"] && problems.is_empty(), "{problems:?}");
    let (_, problems) = read(&folder, set, &plain.replace("column: tags", "column: tgs"));
    let expected = "t.jsonl: no row has a `tgs` for task `tags`; the keys of its first row are `tokens`, `tags`";
    assert!(messages(&problems).iter().any(|message| message == expected), "{problems:?}");
    let nested = "{\"text\": \"new york city\", \"tags\": [[0, 13, \"x\"], [4, 8, \"y\"]]}\n{\"text\": null}\n";
    folder.file("t.jsonl", nested);
    let (_, problems) = read(&folder, "format: jsonl, train: t.jsonl, dev: t.jsonl", BOTH);
    let messages = messages(&problems);
    for expected in [
        "t.jsonl:1: span 4..8 `y` overlaps another span, but a word can have only one tag",
        "t.jsonl:2: `text` is null",
    ] {
        assert!(messages.iter().any(|message| message == expected), "{expected} is not in {messages:?}");
    }
    // Spans with word offsets.
    folder.file("t.jsonl", "{\"tokens\": [\"to\", \"New\", \"York\"], \"tags\": [[1, 3, \"city\"]]}\n{\"tokens\": [\"a\"], \"tags\": [[0, 2, \"x\"]]}\n");
    let set = "format: jsonl, tokens: tokens, offsets: words, train: t.jsonl, dev: t.jsonl";
    let (corpus, problems) = read(&folder, set, &BOTH.replace("slots", "tags"));
    assert_eq!(labels(&corpus, 1), ["O", "B-city", "I-city"]);
    assert_eq!(self::messages(&problems)[0], "t.jsonl:2: span 0..2 `x` ends beyond the text, which ends at 1");
    // As annotation tools write it.
    let doccano = r#"{"start_offset": 3, "end_offset": 7, "label": "city"}"#;
    let studio = r#"{"start": 3, "end": 7, "labels": ["city"]}"#;
    folder.file("t.jsonl", format!(
        "{{\"data\": {{\"text\": \"in Oslo\"}}, \"topic\": [\"a\"], \"tags\": [{doccano}]}}\n\
         {{\"data\": {{\"text\": \"to Rome\"}}, \"tags\": [{studio}]}}\n{{\"data\": {{\"text\": \"a b\"}}, \"tags\": [\"O\", null]}}\n"
    ));
    let (corpus, problems) = read(&folder, "format: jsonl, text: data.text, train: t.jsonl, dev: t.jsonl", BOTH);
    assert_eq!(
        (sentences(&corpus), labels(&corpus, 0)),
        (vec!["in Oslo".into(), "to Rome".into()], vec!["a".into(), "-".into()])
    );
    assert_eq!(labels(&corpus, 1), ["O", "B-city", "O", "B-city"]);
    assert_eq!(self::messages(&problems)[0], "t.jsonl:3: `tags`: a word has no tag; tag all or none");
    // CoNLL-U: `_` is a value of `feats` but a missing label in `upos`; a wrong scheme is recognized.
    let line = |id: u8, upos: &str, feats: &str| format!("{id}\tw\t_\t{upos}\t_\t{feats}\t_\t_\t_\tB-a\n");
    folder.file(
        "t.conllu",
        line(1, "X", "_") + &line(2, "Y", "Case=Nom") + "\n" + &line(1, "_", "_").replace("B-a", "S-a"),
    );
    let tasks = "  feats: {type: tagging, set: s, column: feats, scheme: plain}\n  upos: {type: tagging, set: s, column: upos, scheme: plain}\n  \
        spans: {type: tagging, set: s, column: misc}";
    let (corpus, problems) = read(&folder, "format: conllu, train: t.conllu, dev: t.conllu", tasks);
    assert_eq!(labels(&corpus, 0), ["_", "Case=Nom", "_"]);
    assert_eq!(labels(&corpus, 1), ["X", "Y", "-"]);
    let expected =
        "t.conllu:4: `misc`, word 1: `S-a` is not a bio tag; all tags of this column would fit `scheme: bioes`";
    assert!(problems.iter().any(|problem| problem.to_string().ends_with(expected)), "{problems:?}");
}

#[test]
fn json_arrays_and_rasa_know_their_lines() {
    let folder = Folder::new();
    folder.file("t.json", "{\"a\": [\n  [\"hello you\", \"x\"],\n  [\"bye\", \"y\"],\n  [7, \"y\"]\n]}");
    let tasks = "  topic: {type: classification, set: s, column: \"1\"}";
    let (corpus, problems) = read(&folder, "format: json, text: \"0\", train: t.json#a, dev: t.json#a", tasks);
    assert_eq!(
        (sentences(&corpus), labels(&corpus, 0)),
        (vec!["hello you".into(), "bye".into()], vec!["x".into(), "y".into()])
    );
    assert_eq!(messages(&problems)[0], "t.json:4: `0` is not a string");
    assert_eq!(corpus.rows(Split::Train)[0].place(1).line, 3);
    let (_, problems) = read(&folder, "format: json, text: \"0\", train: t.json#b, dev: t.json#a", tasks);
    assert_eq!(messages(&problems)[0], "t.json: no key `b`; the keys are `a`");

    folder.file("t.json", "{\"a\": [[\"hello you\", \"x\"], [\"bye\", \"y\"], [7, \"y\"]]}");
    let (corpus, problems) = read(&folder, "format: json, text: \"0\", train: t.json#a, dev: t.json#a", tasks);
    assert_eq!(messages(&problems)[0], "t.json, row 3: `0` is not a string");
    assert!(corpus.rows(Split::Train)[0].place(1).to_string().ends_with("t.json, row 2"));

    let rasa = r#"{"rasa_nlu_data": {"common_examples": [
        {"text": "fly to New York", "intent": "go", "entities": [{"start": 7, "end": 15, "value": "New York", "entity": "city"}]}]}}"#;
    folder.file("r.json", rasa);
    let tasks =
        "  intent: {type: classification, set: s, column: intent}\n  e: {type: tagging, set: s, column: entities}";
    let (corpus, problems) = read(&folder, "format: rasa, train: r.json, dev: r.json", tasks);
    assert_eq!((labels(&corpus, 1), problems.len()), (["O", "O", "B-city", "I-city"].map(str::to_owned).to_vec(), 0));
}

#[test]
fn csv_tsv_and_lines() {
    let folder = Folder::new();
    // Line numbers are right with LF and with CRLF, as Windows and Python's csv write.
    for (text, expected, long) in [
        (
            "topic,text\na,\"one, two\"\nb,\"three\nfour\"\nc\nd,five\n",
            &["one, two", "three four", "five"] as &[&str],
            "3: 1 row",
        ),
        ("topic,text\r\na,\"three\r\nfour\"\r\n\r\nc\r\nd,\"five\nsix\"\r\n", &["three four", "five six"], "2: 2 rows"),
    ] {
        folder.file("t.csv", text);
        let (corpus, problems) = read(&folder, "format: csv, train: t.csv, dev: t.csv", TOPIC);
        assert_eq!(sentences(&corpus), expected);
        let long = format!("t.csv:{long} with line breaks between `\"`; this is the first");
        assert_eq!(messages(&problems)[..2], ["t.csv:5: 1 value, but the header has 2".to_owned(), long]);
    }
    folder.file("t.csv", "\"1\",\"one, two\"\n\"2\",three\n4\n");
    let (corpus, problems) = read(&folder, "format: csv, columns: [topic, text], train: t.csv, dev: t.csv", TOPIC);
    assert_eq!(
        (sentences(&corpus), labels(&corpus, 0)),
        (vec!["one, two".into(), "three".into()], vec!["1".into(), "2".into()])
    );
    assert_eq!(messages(&problems)[0], "t.csv:3: 1 value, but `columns:` names 2");
    folder.file("t.csv", "topic, text\na,one\n");
    let (_, problems) = read(&folder, "format: csv, columns: [topic, text], train: t.csv, dev: t.csv", TOPIC);
    assert_eq!(messages(&problems)[0], "t.csv:1: this line already names the columns: remove `columns:`");
    folder.file("t.csv", "topic,text\na,\"one\nb,two\nc,three\n");
    let (_, problems) = read(&folder, "format: csv, train: t.csv, dev: t.csv", TOPIC);
    let open = "a `\"` is never closed; the rest is not read (`quotes: false` makes it an ordinary character)";
    assert_eq!(messages(&problems)[0], format!("t.csv:2: {open}"));
    folder.file("t.csv", "topic,text\nc,three\n\"a,one\nb,two\"\n");
    let (_, problems) = read(&folder, "format: csv, train: t.csv, dev: t.csv", TOPIC);
    assert_eq!(messages(&problems)[0], "t.csv:3: 1 value, but the header has 2; a value in `\"` contains several");
    folder.file("t.csv", "topic,text,topic\na,one,b\n");
    let (_, problems) = read(&folder, "format: csv, train: t.csv, dev: t.csv", TOPIC);
    assert_eq!(messages(&problems)[0], "t.csv:1: several columns are named `topic`");
    folder.file("t.tsv", "text\ttopic\nhi there\tx\n\"so he\ty\nsaid\"\tx\n");
    let (corpus, problems) = read(&folder, "format: tsv, train: t.tsv, dev: t.tsv", TOPIC);
    assert_eq!(labels(&corpus, 0), ["x"]);
    assert_eq!(
        messages(&problems)[0],
        "t.tsv:3: a value in `\"` has 2 lines; `quotes: false` makes `\"` an ordinary character"
    );
    let (corpus, problems) = read(&folder, "format: tsv, quotes: false, train: t.tsv, dev: t.tsv", TOPIC);
    assert_eq!((labels(&corpus, 0), problems.len()), (["x", "y", "x"].map(str::to_owned).to_vec(), 0));
    assert_eq!(sentences(&corpus)[1], "\"so he");
    folder.file("t.lines", b"x caf\xe9 \x85 open\nbroken\n");
    let set = "format: lines, columns: [topic, text], encoding: latin1, train: t.lines, dev: t.lines";
    let (corpus, problems) = read(&folder, set, TOPIC);
    assert!(sentences(&corpus)[0].starts_with("café"), "{:?}", sentences(&corpus));
    assert_eq!(messages(&problems)[0], "t.lines:2: 1 value, but `columns:` names 2");
    let set = "format: lines, columns: [topic, text], train: t.lines, dev: t.lines";
    let (_, problems) = read(&folder, set, TOPIC);
    assert!(messages(&problems)[0].starts_with("t.lines:1: invalid UTF-8"), "{problems:?}");
}

#[test]
fn packed_files_are_read_by_the_lines_that_they_hold() {
    let folder = Folder::new();
    let packed = {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(b"{\"text\": \"a b\", \"topic\": \"x\"}\n{\n").unwrap();
        encoder.finish().unwrap()
    };
    folder.file("t.jsonl.gz", &packed);
    let (corpus, problems) = read(&folder, "format: jsonl, train: t.jsonl.gz, dev: t.jsonl.gz", TOPIC);
    assert_eq!((sentences(&corpus), labels(&corpus, 0)), (vec!["a b".to_owned()], vec!["x".to_owned()]));
    assert!(messages(&problems)[0].starts_with("t.jsonl.gz:2: "), "{problems:?}");
    folder.file("t.jsonl.gz", &packed[..packed.len() - 3]);
    let (_, problems) = read(&folder, "format: jsonl, train: t.jsonl.gz, dev: t.jsonl.gz", TOPIC);
    assert!(messages(&problems)[0].starts_with("t.jsonl.gz: cannot be read: "), "{problems:?}");
}

#[test]
fn characters_and_several_files() {
    let folder = Folder::new();
    folder.file("a.jsonl", "{\"text\": \"我去北京\", \"topic\": \"x\", \"tags\": [[2, 4, \"city\"]]}\n");
    folder.file("b.jsonl", "{\"text\": \"好\", \"topic\": \"y\"}\n");
    let tasks = format!("{BOTH}\ntokenizer: {{model: word, split: character}}");
    let (corpus, problems) = read(&folder, "format: jsonl, train: [a.jsonl, b.jsonl], dev: b.jsonl", &tasks);
    assert_eq!(sentences(&corpus), ["我 去 北 京", "好"]);
    let unscored = "b.jsonl: no row of dev has a `tags`: `tags` is not scored on it; the keys of its first row are `text`, `topic`";
    assert_eq!(messages(&problems), [unscored]);
    assert_eq!(labels(&corpus, 1), ["O", "O", "B-city", "I-city", "-"]);
    let place = corpus.rows(Split::Train)[0].place(1).to_string();
    assert!(place.ends_with("b.jsonl:1"), "{place}");
}

#[test]
fn large_files_are_read_in_parts_without_a_seam() {
    let folder = Folder::new();
    let n = 120_000;
    let text: String = (0..n).map(|i| format!("w{} B-x\nz{} O\n\n", i % 977, i % 13)).collect();
    assert!(text.len() > 1 << 20);
    folder.file("t.conll", text);
    let tasks = "  tags: {type: tagging, set: s, column: \"1\"}";
    let (corpus, problems) = read(&folder, "format: conll, train: t.conll, dev: t.conll", tasks);
    let rows = corpus.rows(Split::Train)[0];
    assert_eq!((rows.len(), problems.len()), (n, 0));
    for row in [0, 59_999, 119_999] {
        assert_eq!(rows.text_of(row), format!("w{} z{}", row % 977, row % 13));
        assert_eq!(rows.place(row).line, 3 * row + 1);
    }
}
