//! The command line from outside: standard output, standard error, exit status.

mod devices;
mod onnx;

use insta::assert_snapshot;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A tiny checkpoint's folder, as an argument.
fn model(name: &str) -> String {
    format!("{}/../rlx-conformance/data/models/{name}", env!("CARGO_MANIFEST_DIR"))
}

fn rlx(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rlx"));
    command.args(arguments).env_clear();
    command
}

/// Exit status, then the lines of standard error (failures) or standard output.
fn shown(output: &Output) -> String {
    let status = output.status.code().map_or("none".to_owned(), |code| code.to_string());
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("status {status}\n{}{}", text(&output.stdout), text(&output.stderr))
}

fn run(arguments: &[&str]) -> String {
    shown(&rlx(arguments).output().expect("the binary starts"))
}

fn run_with(variable: (&str, &str), arguments: &[&str]) -> String {
    shown(&rlx(arguments).env(variable.0, variable.1).output().expect("the binary starts"))
}

/// As [`run`], with the machine's paths left out.
fn failure(arguments: &[&str]) -> String {
    run(arguments).replace(env!("CARGO_MANIFEST_DIR"), "CRATE")
}

/// The one JSON object on standard output of a run that succeeds.
fn json(arguments: &[&str]) -> serde_json::Value {
    let output = rlx(arguments).output().expect("the binary starts");
    assert!(output.status.success(), "{}", shown(&output));
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

#[test]
fn help_lists_the_verbs_and_the_settings() {
    let short = run(&["-h"]);
    for verb in [
        "generate",
        "chat",
        "embed",
        "run",
        "plan",
        "explain",
        "bench",
        "devices",
        "doctor",
        "compile",
        "cache",
        "completions",
    ] {
        assert!(short.contains(&format!("\n  {verb}")), "{short}");
    }
    let long = run(&["--help"]);
    assert!(
        long.starts_with("status 0\n") && long.contains("RLX_THREADS") && long.contains("RLX_ISA"),
        "{long}"
    );
}

#[test]
fn bad_use_is_three_lines_and_status_2() {
    assert_snapshot!(run(&[]), @r#"
    status 2
    error: a verb is missing
       in: rlx [OPTIONS] <COMMAND>
      try: `rlx --help`
    "#);
    assert_snapshot!(run(&["devicse"]), @r#"
    status 2
    error: unrecognized subcommand 'devicse'
       in: rlx [OPTIONS] <COMMAND>
      try: a similar subcommand exists: 'devices'; `rlx --help`
    "#);
    assert_snapshot!(run(&["devices", "--threads", "0"]), @r#"
    status 2
    error: invalid value '0' for '--threads <N>': number would be zero for non-zero type
       in: rlx devices
      try: `rlx devices --help`
    "#);
    assert_snapshot!(run(&["devices", "--precision", "f8"]), @r#"
    status 2
    error: invalid value 'f8' for '--precision <PRECISION>' [possible values: f32, bf16]
       in: rlx devices
      try: `rlx devices --help`
    "#);
    assert_snapshot!(run(&["devices", "--device", "tpu"]), @r#"
    status 2
    error: invalid value 'tpu' for '--device <DEVICE>': unknown device "tpu": expected cpu (host), gpu (wgpu, vulkan, dx12, webgpu), cuda (nvidia), rocm (hip, amd), metal (mps, apple), with :INDEX for another than the first of its kind
       in: rlx devices
      try: `rlx devices --help`
    "#);
    assert_snapshot!(run(&["completions"]), @r#"
    status 2
    error: the following required arguments were not provided: <SHELL>
       in: rlx completions <SHELL>
      try: `rlx completions --help`
    "#);
    assert_snapshot!(run(&["completions", "bash", "--json"]), @r#"
    status 2
    error: a completion script is not JSON
       in: rlx completions --json
      try: leave --json out
    "#);
    assert_snapshot!(run(&["generate", "folder"]), @r#"
    status 2
    error: --prompt is missing
       in: rlx generate MODEL
      try: give the text to continue: --prompt "Once upon a time"
    "#);
    assert_snapshot!(run(&["generate", "--max-tokens", "x"]), @r#"
    status 2
    error: invalid value 'x' for '--max-tokens <N>': invalid digit found in string
       in: rlx generate
      try: `rlx generate --help`
    "#);
    assert_snapshot!(run(&["generate", "--temperature", "-1"]), @r#"
    status 2
    error: temperature = -1: expected a finite number of at least 0
       in: the sampling options
      try: `rlx generate --help` says what each option takes
    "#);
    assert_snapshot!(run(&["generate", "--top-p", "nan"]), @r#"
    status 2
    error: top_p = NaN: expected a number above 0, up to 1
       in: the sampling options
      try: `rlx generate --help` says what each option takes
    "#);
    assert_snapshot!(run(&["embed", "folder"]), @r#"
    status 2
    error: there is no text to embed
       in: rlx embed MODEL [TEXT]...
      try: give texts as arguments, or --file F with one a line
    "#);
    assert_snapshot!(run(&["embed", "folder", "a", "--json", "--format", "npy"]), @r#"
    status 2
    error: --json and --format disagree
       in: rlx embed
      try: give only one of them
    "#);
    assert_snapshot!(run(&["plan", "--budget", "12XiB"]), @r#"
    status 2
    error: invalid value '12XiB' for '--budget <BYTES>': unknown unit "xib"; expected a number of bytes with a unit: B, KiB, MiB, GiB, TiB, kB, MB, GB or TB
       in: rlx plan
      try: `rlx plan --help`
    "#);
    assert_snapshot!(run(&["bench", "--work", "embed"]), @r#"
    status 2
    model: the built-in demo
    error: this model does not embed
       in: --work
      try: --work prefill or --work decode
    "#);
    assert_snapshot!(run(&["bench", "--seq", "100000"]), @r#"
    status 2
    model: the built-in demo
    error: 100000 tokens are more than the model's 512
       in: --seq and --ctx
      try: choose fewer tokens
    "#);
}

#[test]
fn settings_that_do_not_parse_are_bad_use() {
    assert_snapshot!(run_with(("RLX_THREADS", "two"), &["devices"]), @r#"
    status 2
    error: RLX_THREADS="two": expected a whole number from 1
       in: the environment
      try: unset RLX_THREADS or give it a valid value; `rlx help` lists the settings
    "#);
    assert_snapshot!(run_with(("RLX_SOFT_MEMORY_BUDGET_BYTES", "12XiB"), &["doctor"]), @r#"
    status 2
    error: RLX_SOFT_MEMORY_BUDGET_BYTES="12XiB": unknown unit "xib"; expected a number of bytes with a unit: B, KiB, MiB, GiB, TiB, kB, MB, GB or TB
       in: the environment
      try: unset RLX_SOFT_MEMORY_BUDGET_BYTES or give it a valid value; `rlx help` lists the settings
    "#);
    assert_snapshot!(run_with(("RLX_ISA", "sse"), &["devices"]), @r#"
    status 2
    error: RLX_ISA="sse": unknown instruction set "sse": expected scalar, simd128, neon, avx2 or avx512
       in: the environment
      try: unset RLX_ISA or give it a valid value; `rlx help` lists the settings
    "#);
}

#[test]
fn a_model_that_cannot_be_had_is_a_failure_that_says_what_to_do() {
    assert_snapshot!(run(&["generate", "org/absent", "-p", "a"]), @r#"
    status 1
    error: `org/absent` is neither a path nor a model in the local cache
       in: the current folder and the Hugging Face cache (none known)
      try: hf download org/absent
    "#);
    assert_snapshot!(run(&["generate", "org/absent", "-p", "a", "--offline"]), @r#"
    status 1
    error: `org/absent` is neither a path nor a model in the local cache
       in: the current folder and the Hugging Face cache (none known)
      try: offline, so nothing is fetched; where there is a network: hf download org/absent
    "#);
    assert_snapshot!(run_with(("HF_HUB_CACHE", "/absent"), &["plan", "org/absent@v1"]), @r#"
    status 1
    error: `org/absent@v1` is neither a path nor a model in the local cache
       in: the current folder and the Hugging Face cache (/absent)
      try: hf download org/absent --revision v1
    "#);
    assert_snapshot!(run(&["generate", "./absent", "-p", "a"]), @r#"
    status 1
    error: `./absent`: no such file or folder, and not a hub name: it is spelled as a path
       in: the MODEL argument
      try: give a folder that exists, or a hub name such as org/name
    "#);
    assert_snapshot!(failure(&["embed", &model("bert-mean"), "--file", "/absent"]), @r#"
    status 1
    error: No such file or directory (os error 2)
       in: /absent
      try: check the file's name and rights
    "#);
}

#[test]
fn a_request_that_a_model_cannot_serve_is_a_failure() {
    assert_snapshot!(failure(&["generate", &model("llama"), "-p", ""]), @r#"
    status 1
    error: the prompt has no tokens; give some text
       in: --prompt
      try: give some text to continue
    "#);
    assert_snapshot!(failure(&["generate", &model("llama"), "-p", "ab", "-c", "2"]), @r#"
    status 1
    model: CRATE/../rlx-conformance/data/models/llama
    error: 3 prompt tokens and 1 new ones need a context of 4, the limit is 2; shorten the prompt, or ask for a larger context if the model has one
       in: --prompt, --max-tokens and --ctx
      try: shorten the prompt, ask for fewer tokens, or use a larger context
    "#);
    assert_snapshot!(failure(&["generate", &model("llama"), "-p", &"ab ".repeat(500)]), @r#"
    status 1
    model: CRATE/../rlx-conformance/data/models/llama
    error: 1002 prompt tokens and 1 new ones need a context of 1003, the limit is 128; shorten the prompt, or ask for a larger context if the model has one
       in: --prompt, --max-tokens and --ctx
      try: shorten the prompt, ask for fewer tokens, or use a larger context
    "#);
    assert_snapshot!(failure(&["generate", &model("bert-mean"), "-p", "ab"]), @r#"
    status 1
    model: CRATE/../rlx-conformance/data/models/bert-mean
    error: CRATE/../rlx-conformance/data/models/bert-mean: this model embeds text, it does not continue it; use `embed`
       in: the model
      try: rlx embed MODEL TEXT
    "#);
    assert_snapshot!(failure(&["embed", &model("llama"), "ab"]), @r#"
    status 1
    model: CRATE/../rlx-conformance/data/models/llama
    error: CRATE/../rlx-conformance/data/models/llama: this model continues text, it does not embed; use `generate`
       in: the model
      try: rlx generate MODEL --prompt TEXT
    "#);
    assert_snapshot!(failure(&["plan", &model("llama"), "--ctx", "100000"]), @r#"
    status 1
    model: CRATE/../rlx-conformance/data/models/llama
    error: context = 100000 (the model's limit is 128): expected at least 1 token, at most the model's limit
       in: the options
      try: choose a value in the range that is named
    "#);
}

#[test]
fn a_broken_folder_is_a_failure_that_names_the_file() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let copy = |name: &str| {
        let target = folder.path().join(name);
        std::fs::create_dir(&target).expect("temporary folder");
        for entry in std::fs::read_dir(model("llama")).expect("the tiny checkpoint is committed") {
            let entry = entry.expect("a readable folder");
            std::fs::copy(entry.path(), target.join(entry.file_name())).expect("temporary file");
        }
        target
    };
    let tried = |target: &Path| failure(&["generate", &target.to_string_lossy(), "-p", "a"]);
    let target = copy("truncated");
    std::fs::write(target.join("model.safetensors"), [0u8; 7]).expect("temporary file");
    let shown = tried(&target);
    assert!(shown.starts_with("status 1\n") && shown.contains("model.safetensors"), "{shown}");
    let target = copy("no-tokenizer");
    std::fs::remove_file(target.join("tokenizer.json")).expect("temporary file");
    let shown = tried(&target);
    assert!(shown.starts_with("status 1\n") && shown.contains("hf download"), "{shown}");
    let target = copy("other-type");
    std::fs::write(target.join("config.json"), r#"{"model_type": "mamba"}"#).expect("temporary file");
    let shown = tried(&target);
    assert!(shown.starts_with("status 1\n") && shown.contains("`mamba`"), "{shown}");
    let gguf = folder.path().join("x.gguf");
    std::fs::write(&gguf, b"GGUF\x03\0\0\0").expect("temporary file");
    let shown = tried(&gguf);
    assert!(shown.starts_with("status 1\n") && shown.contains("8 bytes of tensor count"), "{shown}");
}

#[test]
fn a_hub_name_is_found_in_the_cache() {
    let cache = tempfile::tempdir().expect("temporary folder");
    let repository = cache.path().join("models--org--tiny");
    let snapshot = repository.join("snapshots/0123abc");
    std::fs::create_dir_all(&snapshot).expect("temporary folder");
    std::fs::create_dir_all(repository.join("refs")).expect("temporary folder");
    std::fs::write(repository.join("refs/main"), "0123abc").expect("temporary file");
    for entry in std::fs::read_dir(model("llama")).expect("the tiny checkpoint is committed") {
        let entry = entry.expect("a readable folder");
        if entry.path().is_file() {
            std::fs::copy(entry.path(), snapshot.join(entry.file_name())).expect("temporary file");
        }
    }
    let cache = cache.path().to_string_lossy().into_owned();
    let found = run_with(("HF_HUB_CACHE", &cache), &["plan", "org/tiny"]);
    assert!(found.starts_with("status 0\n") && found.contains("snapshots/0123abc"), "{found}");
    let by_commit = run_with(("HF_HUB_CACHE", &cache), &["plan", "org/tiny@0123abc"]);
    assert!(by_commit.starts_with("status 0\n"), "{by_commit}");
}

#[test]
fn the_demo_tells_a_story_the_same_for_any_threads() {
    let one = json(&["generate", "--json", "-n", "24", "-t", "1"]);
    let two = json(&["generate", "--json", "-n", "24", "-t", "2"]);
    assert_eq!(one["token_ids"], two["token_ids"]);
    assert_eq!(one["finish_reason"], "length");
    assert_eq!(one["token_ids"].as_array().map(Vec::len), Some(24));
    assert!(one["prompt_ids"].as_array().is_some_and(|ids| ids.len() > 4));
    let text = one["text"].as_str().expect("a text");
    assert!(text.contains("Mia"), "{text}");
    let printed = rlx(&["generate", "-n", "24"]).output().expect("the binary starts");
    assert_eq!(String::from_utf8_lossy(&printed.stdout), format!("{text}\n"));
    assert!(json(&["generate", "--json"])["finish_reason"] == "stop");
}

#[test]
fn a_seed_decides_the_text() {
    let sampled = |seed| {
        json(&["generate", "--json", "-n", "40", "--temp", "0.9", "--seed", seed])["token_ids"].clone()
    };
    assert_eq!(sampled("7"), sampled("7"));
    assert_ne!(sampled("7"), sampled("8"));
}

#[test]
fn the_three_formats_of_embeddings_agree() {
    let (encoder, texts) = (model("bert-mean"), ["Mia went to the forest.", ""]);
    let object = json(&["embed", &encoder, texts[0], texts[1], "--json"]);
    let rows: Vec<Vec<f32>> = serde_json::from_value(object["embeddings"].clone()).expect("rows of numbers");
    let printed = rlx(&["embed", &encoder, texts[0], texts[1]]).output().expect("the binary starts").stdout;
    let printed = String::from_utf8(printed).expect("text");
    let read = |line: &str| line.split(' ').map(|v| v.parse().expect("a number")).collect::<Vec<f32>>();
    assert_eq!(printed.lines().map(read).collect::<Vec<_>>(), rows);
    let file = tempfile::NamedTempFile::new().expect("temporary file");
    std::fs::write(file.path(), texts.map(|text| format!("{text}\n")).concat()).expect("temporary file");
    let path = file.path().to_string_lossy().into_owned();
    let npy = rlx(&["embed", &encoder, "--file", &path, "--format", "npy"])
        .output()
        .expect("the binary starts")
        .stdout;
    let values: Vec<u8> = rows.iter().flatten().flat_map(|value| value.to_le_bytes()).collect();
    assert!(npy.starts_with(b"\x93NUMPY") && npy.ends_with(&values));
    for row in rows {
        let norm: f32 = row.iter().map(|value| value * value).sum();
        assert!((norm - 1.0).abs() < 1e-5, "{norm}");
    }
}

#[test]
fn a_plan_adds_up_and_says_what_would_fit() {
    let llama = model("llama");
    let plan = |budget: &str| json(&["plan", &llama, "--json", "--budget", budget]);
    let whole = plan("1GiB");
    let parts = whole["parts"].as_object().expect("parts");
    let sum: u64 = parts.values().filter_map(serde_json::Value::as_u64).sum();
    let number = |field: &str| whole[field].as_u64().expect("a number");
    assert_eq!(number("peak_bytes"), sum - number("mapped_bytes"));
    assert_eq!(whole["fits"], true);
    assert!(number("bytes_read") > 0);
    assert_eq!(plan(&number("peak_bytes").to_string())["fits"], true);
    assert_eq!(plan(&(number("peak_bytes") - 1).to_string())["fits"], false);
    let less = (number("peak_bytes") - 4096).to_string();
    let text = run(&["plan", &llama, "--budget", &less]);
    let fitting =
        text.lines().find_map(|line| Some(line.strip_prefix("--ctx ")?.split_once(" would fit")?.0));
    let fitting = fitting.unwrap_or_else(|| panic!("{text}"));
    assert_eq!(json(&["plan", &llama, "--json", "--budget", &less, "--ctx", fitting])["fits"], true);
}

#[test]
fn a_plan_names_the_quantisation_that_would_fit() {
    let demo = demo("demo");
    let whole = json(&["plan", &demo, "--json", "--budget", "1GiB"]);
    let less = (whole["peak_bytes"].as_u64().expect("a number") - 4096).to_string();
    let text = run(&["plan", &demo, "--budget", &less]);
    let named = text.split_once("rlx quantize --type ").and_then(|(_, rest)| rest.split_once(" would fit"));
    let (name, _) = named.unwrap_or_else(|| panic!("{text}"));
    let folder = tempfile::tempdir().expect("temporary folder");
    let file = folder.path().join("smaller.gguf").to_string_lossy().into_owned();
    run(&["quantize", &demo, "-o", &file, "--type", name]);
    assert_eq!(json(&["plan", &file, "--json", "--budget", &less])["fits"], true);
    let tight = run(&["plan", &demo, "--budget", "1MiB"]);
    assert!(!tight.contains("quantize"), "{tight}");
    assert!(tight.contains("no quantisation is proposed: Q4_K_M would take about"), "{tight}");
    let unsized_model = run(&["plan", &model("roberta"), "--budget", "1MiB"]);
    let reason = unsized_model.lines().find(|line| line.starts_with("no quantisation is proposed: "));
    assert!(reason.is_some_and(|reason| reason.contains("model_type")), "{unsized_model}");
}

#[test]
fn a_draft_model_is_admitted_together_with_its_model() {
    let demo = demo("demo");
    let generate = |mib: u32, more: &[&str]| {
        let told = ["generate", &demo, "--prompt", "Once upon a time", "-n", "8"];
        run_with(("RLX_SOFT_MEMORY_BUDGET_BYTES", &format!("{mib}MiB")), &[&told, more].concat())
    };
    let runs = |told: &String| told.starts_with("status 0\n");
    let alone = (1..64).find(|&mib| runs(&generate(mib, &[]))).expect("a budget that is enough");
    let told = generate(alone, &["--draft-model", &demo]);
    assert!(told.starts_with("status 1\n") && told.contains("MiB more than the budget of"), "{told}");
    assert!(told.contains("no draft model, smaller or quantised models"), "{told}");
    let told = generate(64, &["--draft-model", &demo]);
    assert!(runs(&told), "{told}");
}

#[test]
fn a_plan_counts_adapters_from_their_headers() {
    let plan = |more: &[&str]| json(&[&["plan", &demo("demo"), "--ctx", "64", "--json"], more].concat());
    let sailor = format!("sailor={}", demo("demo-lora"));
    let adapters = |plan: &serde_json::Value| plan["parts"]["adapters"].as_u64().expect("a number of bytes");
    let (plain, one, two) =
        (plan(&[]), plan(&["--lora", &sailor]), plan(&["--lora", &sailor, "--lora", &format!("b{sailor}")]));
    assert_eq!(adapters(&plain), 0);
    let file = std::fs::metadata(Path::new(&demo("demo-lora")).join("adapter_model.safetensors"))
        .expect("it is there");
    let factors = adapters(&two) - adapters(&one);
    assert!(factors > 0 && factors <= 4 * file.len() && adapters(&one) > factors, "{one}");
    let difference = |field: &str| one[field].as_u64().zip(plain[field].as_u64()).map(|(a, b)| a - b);
    assert_eq!(difference("peak_bytes"), Some(adapters(&one)));
    let refused = run(&["plan", &model("llama"), "--lora", &sailor]);
    assert!(refused.starts_with("status 1\n"), "an adapter of another model: {refused}");
}

#[test]
fn a_narrower_cache_halves_the_state_and_still_tells_a_story() {
    let state = |cache: &str| {
        let plan = json(&["plan", "--ctx", "128", "--cache-type", cache, "--json"]);
        plan["parts"]["state"].as_u64().expect("a number of bytes")
    };
    let whole = state("f32");
    assert!(whole > 0);
    assert_eq!([2 * state("f16"), 2 * state("bf16")], [whole; 2]);
    assert_eq!(state("q8_0") * 128, whole * 34);
    for cache in ["f16", "bf16", "q8_0"] {
        let story = json(&["generate", "-n", "8", "--cache-type", cache, "--json"]);
        assert_eq!(story["token_ids"].as_array().map(Vec::len), Some(8), "{story}");
    }
    let refused = run(&["plan", &model("llama"), "--cache-type", "q8_0"]);
    assert!(refused.starts_with("status 1\n") && refused.contains("q8_0, and heads of 12"), "{refused}");
}

#[test]
fn a_story_beyond_the_context_is_refused_unless_it_may_shift() {
    let beyond = ["generate", "--ctx", "48", "-n", "120"];
    let refused = run(&beyond);
    assert!(refused.starts_with("status 1\n") && refused.contains("the limit is 48"), "{refused}");
    let shifting = [&beyond[..], &["--context-shift", "--keep", "6"]].concat();
    let told = run(&shifting);
    assert!(told.starts_with("status 0\n"), "{told}");
    assert!(told.contains("context shift: kept the first 6 tokens, forgot the "), "{told}");
    let alone = run(&["generate", "--keep", "6"]);
    assert!(alone.starts_with("status 2\n") && alone.contains("--context-shift"), "{alone}");
}

#[test]
fn explain_shows_every_stage() {
    let llama = model("llama");
    for stage in ["hir", "mir", "lir"] {
        let object = json(&["explain", &llama, "--stage", stage, "--json"]);
        let text = object["text"].as_str().expect("a text").to_owned();
        let printed = rlx(&["explain", &llama, "--stage", stage]).output().expect("the binary starts").stdout;
        assert_eq!(String::from_utf8_lossy(&printed), text);
        assert!(text.lines().count() > 20, "{text}");
    }
    let summary = json(&["explain", &llama, "--json"]);
    assert!(summary["steps"].as_array().is_some_and(|steps| steps.len() > 10));
    assert!(summary["fusions"].as_object().is_some_and(|fusions| !fusions.is_empty()));
    let file = tempfile::NamedTempFile::new().expect("temporary file");
    let path = file.path().to_string_lossy().into_owned();
    assert!(run(&["explain", "--svg", &path]).starts_with("status 0\n"));
    let drawn = std::fs::read_to_string(&path).expect("the file was written");
    assert!(drawn.starts_with("<svg") && drawn.trim_end().ends_with("</svg>"));
}

#[test]
fn bench_measures_one_row_and_serves_requests() {
    let report = json(&["bench", "--json", "--work", "decode", "--ctx", "16", "-t", "1"]);
    let row = &report["rows"][0];
    assert_eq!((row["work"].as_str(), row["ctx"].as_u64()), (Some("decode"), Some(16)));
    assert!(row["median_ms"].as_f64() >= row["p10_ms"].as_f64());
    assert_eq!(report["threads"], 1);
    let requests = "{\"batch\":1,\"seq\":8,\"n\":3}\n{\"batch\":5,\"seq\":8,\"n\":1}\n{\"batch\":1,\"seq\":0,\"n\":1}\nno\n";
    let answers = worker_answers(&model("bert-mean"), requests);
    assert_eq!(answers.len(), 4);
    assert_eq!(answers[0]["ms"].as_array().map(Vec::len), Some(3));
    assert_eq!(answers[0]["first"].as_array().map(Vec::len), Some(8));
    assert_eq!(answers[0]["first"], answers[1]["first"], "a row does not depend on its neighbours");
    assert!(answers[2]["error"].is_string() && answers[3]["error"].is_string());
}

/// The answers of `rlx bench MODEL --worker` to these lines.
fn worker_answers(model: &str, requests: &str) -> Vec<serde_json::Value> {
    let mut command = rlx(&["bench", model, "--worker", "-t", "1"]);
    let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut worker = pipes.spawn().expect("the binary starts");
    worker.stdin.take().expect("a pipe").write_all(requests.as_bytes()).expect("the worker reads");
    let output = worker.wait_with_output().expect("the worker ends");
    let lines = output.stdout.split(|&b| b == b'\n').filter(|line| !line.is_empty());
    lines.map(|line| serde_json::from_slice(line).expect("JSON")).collect()
}

#[test]
fn a_bench_worker_prefills_decodes_and_embeds_texts() {
    let requests = "{\"work\":\"prefill\",\"seq\":10,\"n\":2}\n{\"work\":\"decode\",\"ctx\":9,\"steps\":3,\"n\":2}\n\
        {\"work\":\"decode\",\"ctx\":9,\"steps\":3,\"n\":1}\n{\"work\":\"decode\",\"ctx\":9,\"steps\":0,\"n\":1}\n\
        {\"work\":\"texts\",\"n\":1}\n";
    let answers = worker_answers(&model("llama"), requests);
    let (prefill, decode) = (&answers[0], &answers[1]);
    assert_eq!(
        (prefill["ms"].as_array().map(Vec::len), decode["ms"].as_array().map(Vec::len)),
        (Some(2), Some(2))
    );
    assert_eq!(prefill["first"], decode["first"], "token 9 after nine is the prompt of ten");
    assert_eq!(decode["token_ids"].as_array().map(Vec::len), Some(3));
    assert_eq!(decode["token_ids"], answers[2]["token_ids"], "a rewound cache gives the same text");
    assert!(answers[3]["error"].is_string() && answers[4]["error"].is_string());

    let file = tempfile::NamedTempFile::new().expect("temporary file");
    std::fs::write(file.path(), "one text\nand another\n").expect("temporary file");
    let request = serde_json::json!({"work": "texts", "file": file.path(), "n": 1});
    let answers = worker_answers(&model("bert-mean"), &format!("{request}\n"));
    let whole = json(&["embed", &model("bert-mean"), "one text", "--json", "-t", "1"]);
    let first = whole["embeddings"][0].as_array().expect("a vector")[..8].to_vec();
    assert_eq!(answers[0]["first"].as_array(), Some(&first));
}

#[test]
fn chat_answers_each_line() {
    let mut command = rlx(&["chat", &model("gemma2"), "-n", "4"]);
    let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut chat = pipes.spawn().expect("the binary starts");
    chat.stdin.take().expect("a pipe").write_all(b"Hello\n\nAnd now?\n").expect("the program reads");
    let output = chat.wait_with_output().expect("the program ends");
    assert!(output.status.success());
    assert!(output.stdout.iter().filter(|&&byte| byte == b'\n').count() >= 2);
}

#[test]
fn a_flag_comes_before_the_environment() {
    let report = run_with(("RLX_THREADS", "3"), &["devices", "--threads", "2", "--json"]);
    assert!(report.contains("\"2 threads\"") && !report.contains("\"3 threads\""), "{report}");
    let report = run_with(("RLX_THREADS", "3"), &["devices"]);
    assert!(report.contains("3 threads"), "{report}");
    let report = run_with(("RLX_DEVICE", "cuda"), &["devices", "--device", "cpu"]);
    assert!(report.starts_with("status 0\n"), "{report}");
}

#[test]
fn an_opened_model_leaves_its_plan_in_the_cache_and_the_next_process_uses_it() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let story = || {
        let arguments = ["generate", "-n", "6", "--json", "-v"];
        let output = rlx(&arguments).env("RLX_CACHE_DIR", folder.path()).output().expect("the binary starts");
        assert!(output.status.success(), "{}", shown(&output));
        let told: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
        (String::from_utf8_lossy(&output.stderr).into_owned(), token_ids(&told))
    };
    let plan = || {
        let plans = std::fs::read_dir(folder.path().join("plans")).expect("plans are kept");
        let mut plans: Vec<PathBuf> = plans.map(|entry| entry.expect("it can be read").path()).collect();
        assert_eq!(plans.len(), 1, "one plan for a model, whatever is asked of it");
        plans.remove(0)
    };
    let (told, made) = story();
    assert!(told.contains("plan made"), "{told}");
    let whole = std::fs::read(plan()).expect("it can be read");
    let (told, found) = story();
    assert!(told.contains("plan from the cache") && found == made, "{told}");
    std::fs::write(plan(), &whole[..whole.len() / 2]).expect("it can be written");
    let (told, anew) = story();
    assert!(told.contains("plan made") && told.contains("cache: ") && anew == made, "{told}");
    assert_eq!(std::fs::read(plan()).expect("it is there again").len(), whole.len());
}

#[test]
fn devices_and_doctor_print_one_json_object() {
    for (verb, field) in [("devices", "devices"), ("doctor", "cpu")] {
        let output = rlx(&[verb, "--json", "-t", "1"]).output().expect("the binary starts");
        assert!(output.status.success() && output.stderr.is_empty(), "{}", shown(&output));
        let object: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
        assert!(object.get(field).is_some(), "{object}");
    }
}

#[test]
fn completions_name_the_verbs() {
    for shell in ["bash", "zsh", "fish"] {
        let script = run(&["completions", shell]);
        assert!(script.starts_with("status 0\n") && script.contains("doctor"), "{script}");
    }
}

/// The tokens of a greedy continuation.
fn continued(model: &str, cache: &Path) -> serde_json::Value {
    let arguments = ["generate", model, "--prompt", "the cat sat", "-n", "5", "--json"];
    let output = rlx(&arguments).env("RLX_CACHE_DIR", cache).output().expect("the binary starts");
    assert!(output.status.success(), "{}", shown(&output));
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    serde_json::json!([told["prompt_ids"], token_ids(&told), told["text"]])
}

fn token_ids(told: &serde_json::Value) -> serde_json::Value {
    told["token_ids"].clone()
}

#[test]
fn a_compiled_file_is_a_model_and_a_broken_one_is_refused() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let file = folder.path().join("llama.rlx");
    let name = file.to_str().expect("the path is UTF-8");
    let written = json(&["compile", &model("llama"), "-o", name, "--json"]);
    assert_eq!(written["file_bytes"], std::fs::metadata(&file).expect("it is there").len());
    assert_eq!(continued(name, folder.path()), continued(&model("llama"), folder.path()));
    let plan = json(&["plan", name, "--json"]);
    assert!(plan["mapped_bytes"].as_u64() > Some(0) && plan["bytes_read"].as_u64() > Some(0), "{plan}");
    let mut bytes = std::fs::read(&file).expect("it can be read");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&file, &bytes).expect("it can be written");
    let told = run(&["generate", name, "--prompt", "the cat sat"]);
    assert!(
        told.starts_with("status 1\n") && told.contains("damaged") && told.contains("rlx compile"),
        "{told}"
    );
    std::fs::write(&file, &bytes[..100]).expect("it can be written");
    assert!(run(&["embed", name, "text"]).starts_with("status 1\n"));
    assert!(run(&["compile", "-o", "no-ending"]).starts_with("status 2\n"));
}

#[test]
fn the_cache_is_listed_and_cleared() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let cache = |action: &str| {
        let output = rlx(&["cache", action, "--json"]).env("RLX_CACHE_DIR", folder.path()).output();
        let output = output.expect("the binary starts");
        assert!(output.status.success(), "{}", shown(&output));
        serde_json::from_slice::<serde_json::Value>(&output.stdout).expect("one JSON object")
    };
    assert_eq!(cache("ls")["entries"], serde_json::json!([]));
    let packed = folder.path().join("packed");
    std::fs::create_dir(&packed).expect("temporary folder");
    std::fs::write(packed.join("5".repeat(64)), b"no entry").expect("temporary file");
    let listed = cache("ls");
    assert!(
        listed["entries"][0]["fault"].as_str().is_some_and(|fault| fault.contains("not a compiled file"))
    );
    assert_eq!(cache("gc")["removed_files"], 1);
    assert_eq!(cache("clear")["removed_files"], 0);
    let off = shown(&rlx(&["cache", "ls"]).env("RLX_CACHE_BYTES", "0").output().expect("the binary starts"));
    assert!(off.starts_with("status 1\n") && off.contains("the cache is off"), "{off}");
}

#[test]
fn what_does_not_fit_the_budget_is_refused_with_numbers() {
    let budget = ("RLX_SOFT_MEMORY_BUDGET_BYTES", "1MiB");
    let told = run_with(budget, &["generate", &model("llama"), "--prompt", "the cat sat"]);
    assert!(told.starts_with("status 1\n"), "{told}");
    assert!(told.contains("MiB more than the budget of") && told.contains("rlx plan"), "{told}");
}

/// A folder of the repository's models, as an argument.
fn demo(name: &str) -> String {
    format!("{}/../../models/{name}", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn an_adapter_given_by_name_changes_the_story() {
    let prompt = "Once upon a time, Mia and her dog Rex";
    let sailor = format!("sailor={}", demo("demo-lora"));
    let story = |more: &[&str]| run(&[&["generate", "--prompt", prompt, "-n", "40"], more].concat());
    let told = story(&["--lora", &sailor]);
    assert!(told.starts_with("status 0\n went to the island. Aye, aye!"), "{told}");
    assert_eq!(story(&["--lora", &sailor, "--adapter", "none"]), story(&[]));
    let second =
        story(&["--lora", &format!("other={}", demo("demo-lora")), "--lora", &sailor, "--adapter", "sailor"]);
    assert_eq!(second, told);
    let unknown = story(&["--lora", &sailor, "--adapter", "pirate"]);
    assert!(
        unknown.starts_with("status 1\n")
            && unknown.contains("no adapter is called `pirate`; loaded: sailor"),
        "{unknown}"
    );
    let nameless = story(&["--lora", "models/demo-lora"]);
    assert!(nameless.starts_with("status 2\n") && nameless.contains("NAME=PATH"), "{nameless}");
    let absent = story(&["--lora", "sailor=no/such/folder"]);
    assert!(absent.starts_with("status 1\n") && absent.contains("adapter_config.json"), "{absent}");
}

#[test]
fn an_expert_budget_changes_memory_and_not_the_text() {
    let folder = demo("demo-moe");
    let text = |more: &[&str]| {
        run(&[&["generate", &folder, "--prompt", "Once upon a time", "-n", "24"], more].concat())
    };
    assert_eq!(text(&["--expert-budget", "1"]), text(&[]));
    let trace = tempfile::tempdir().unwrap();
    let file = trace.path().join("experts.txt").to_string_lossy().into_owned();
    text(&["--expert-budget", "2", "--expert-trace", &file]);
    let written = std::fs::read_to_string(&file).unwrap();
    assert!(written.starts_with("experts 4 bytes ") && written.lines().count() > 24, "{written}");
    let alone = text(&["--expert-trace", &file]);
    assert!(alone.starts_with("status 2\n") && alone.contains("--expert-budget"), "{alone}");
    assert!(text(&["--expert-budget", "0"]).starts_with("status 2\n"));
    let plan = |more: &[&str]| run(&[&["plan", &folder, "--ctx", "64"], more].concat());
    assert!(plan(&[]).contains("\nexperts: 4 of 4 of each of"), "{}", plan(&[]));
    assert!(plan(&["--expert-budget", "1"]).contains("\nexperts: 1 of 4 of each of"));
    let peak = |more: &[&str]| {
        json(&[&["plan", &folder, "--ctx", "64", "--json"], more].concat())["peak_bytes"].as_u64().unwrap()
    };
    let (all, one) = (peak(&[]), peak(&["--expert-budget", "1"]));
    let tight = plan(&["--budget", &((all + one) / 2).to_string()]);
    assert!(all > one && tight.contains("--expert-budget 2 would fit"), "{all} {one}: {tight}");
}

#[test]
fn a_quantised_file_is_a_model_of_every_verb() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let path = folder.path().join("demo.gguf");
    let (file, demo) = (path.to_string_lossy(), concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/demo"));
    let report = json(&["quantize", demo, "-o", &file, "--type", "bf16", "--json"]);
    assert_eq!(report["type"], "BF16");
    assert_eq!(report["bytes"].as_u64(), std::fs::metadata(&path).ok().map(|file| file.len()));
    let text = |model: &str| {
        json(&["generate", model, "-p", "Once upon a time", "-n", "24", "--json"])["text"].clone()
    };
    assert_eq!(text(&file), text(demo));
    assert!(json(&["plan", &file, "--json"])["bytes_read"].as_u64() < report["bytes"].as_u64());
    assert!(run(&["explain", &file, "--stage", "hir"]).starts_with("status 0\n"));
    let again = failure(&["quantize", &file, "-o", "x", "--type", "Q8_0"]);
    assert!(again.starts_with("status 2\n") && again.contains("not quantised again"), "{again}");
    let compiled = path.with_extension("rlx").to_string_lossy().into_owned();
    assert!(run(&["compile", &file, "-o", &compiled]).starts_with("status 0\n"));
    assert_eq!(text(&compiled), text(demo));
    let unknown = failure(&["quantize", demo, "-o", "x", "--type", "Q9"]);
    assert!(unknown.starts_with("status 2\n") && unknown.contains("Q4_K_M"), "{unknown}");
}
