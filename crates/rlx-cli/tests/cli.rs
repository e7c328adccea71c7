//! The command line from outside: standard output, standard error, exit status.

use std::process::{Command, Output};

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

#[test]
fn help_lists_the_verbs_and_the_settings() {
    let short = run(&["-h"]);
    for verb in ["devices", "doctor", "completions"] {
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
    insta::assert_snapshot!(run(&[]), @"");
    insta::assert_snapshot!(run(&["devicse"]), @"");
    insta::assert_snapshot!(run(&["devices", "--threads", "0"]), @"");
    insta::assert_snapshot!(run(&["devices", "--precision", "f8"]), @"");
    insta::assert_snapshot!(run(&["devices", "--device", "tpu"]), @"");
    insta::assert_snapshot!(run(&["devices", "--device", "cuda"]), @"");
    insta::assert_snapshot!(run(&["completions"]), @"");
    insta::assert_snapshot!(run(&["completions", "bash", "--json"]), @"");
}

#[test]
fn settings_that_do_not_parse_are_bad_use() {
    insta::assert_snapshot!(run_with(("RLX_THREADS", "two"), &["devices"]), @"");
    insta::assert_snapshot!(run_with(("RLX_SOFT_MEMORY_BUDGET_BYTES", "12XiB"), &["doctor"]), @"");
    insta::assert_snapshot!(run_with(("RLX_ISA", "sse"), &["devices"]), @"");
    insta::assert_snapshot!(run_with(("RLX_DENY_DEVICES", "cpu"), &["devices"]), @"");
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
