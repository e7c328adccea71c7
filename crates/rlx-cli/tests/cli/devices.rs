//! Which device a verb takes, and what is said of those it does not.

use super::*;

#[test]
fn devices_reports_whatever_device_is_asked_for_and_only_bad_use_is_status_2() {
    for (variable, value, told) in [
        ("RLX_DEVICE", "rocm", "the device asked for: this build has no backend for rocm"),
        ("RLX_DEVICE", "cpu:7", "the device asked for: there is no device cpu:7"),
        ("RLX_DEVICE_CHAIN", "rocm,metal", "the device asked for: "),
        ("RLX_DENY_DEVICES", "cpu,gpu,cuda", "the device asked for: "),
    ] {
        for arguments in [&["devices"][..], &["devices", &model("llama")]] {
            let report = run_with((variable, value), arguments);
            assert!(
                report.starts_with("status 0\n") && report.contains(told),
                "{variable}={value}: {report}"
            );
            assert!(!report.lines().any(|line| line.starts_with('*')), "nothing is recommended: {report}");
        }
        let output = rlx(&["devices", "--json"]).env(variable, value).output().expect("the binary starts");
        let object: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
        assert!(object["chosen"].is_null() && object["refused"].is_string(), "{object}");
        let generated = run_with((variable, value), &["generate", "--prompt", "x"]);
        assert!(generated.starts_with("status 1\n") && generated.contains("rlx devices"), "{generated}");
    }
    assert!(run_with(("RLX_DEVICE", "tpu"), &["devices"]).starts_with("status 2\n"));
}

/// Holds with and without a card: one line for it, with what it can do or what is missing, and everything else works.
#[cfg(feature = "cuda")]
#[test]
fn a_build_with_cuda_starts_without_a_driver_and_says_what_is_missing() {
    let report = json(&["devices", "--json"]);
    let rows = report["devices"].as_array().expect("rows");
    let row = rows.iter().find(|row| row["device"] == "cuda").expect("a row for cuda:0");
    assert_eq!(row["registered"], true);
    if row["available"] == false {
        let blocker = row["blocker"].as_str().expect("what is missing");
        assert!(blocker.contains("CUDA") && !blocker.contains('\n'), "{blocker}");
        let asked = run(&["generate", "--device", "cuda", "--prompt", "x", "-n", "1"]);
        assert!(asked.starts_with("status 1\n") && asked.contains(blocker), "{asked}");
    }
    assert!(run(&["generate", "--device", "cpu", "--prompt", "x", "-n", "1"]).starts_with("status 0\n"));
    let output = rlx(&["devices", "--json"]).env("RLX_DEVICE_CHAIN", "cuda,cpu").output().expect("it starts");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(report["chosen"], if row["available"] == true { "cuda" } else { "cpu" }, "{report}");
}

#[cfg(feature = "gpu")]
#[test]
fn devices_are_opened_in_the_precision_that_is_asked_for_and_say_so() {
    let of_gpu = |arguments: &[&str]| {
        let report = json(arguments);
        let rows = report["devices"].as_array().expect("rows").clone();
        let row = rows.into_iter().find(|row| row["device"] == "gpu").expect("a row for gpu:0");
        row["capabilities"].to_string()
    };
    let (default, asked) =
        (of_gpu(&["devices", "--json"]), of_gpu(&["devices", "--json", "--precision", "bf16"]));
    assert!(default.contains("\"f32\"") && !default.contains("bf16"), "{default}");
    assert!(asked.contains("\"bf16 without matrix units\""), "{asked}");
}

#[cfg(feature = "gpu")]
#[test]
fn devices_are_found_without_a_word_of_their_drivers() {
    let output = rlx(&["devices"]).output().expect("the binary starts");
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""));
    assert!(String::from_utf8_lossy(&output.stdout).lines().any(|line| line.contains("gpu")));
}

/// The first device of the chain that the machine has is taken, and `-v` says which, and what the others lack.
#[cfg(feature = "gpu")]
#[test]
fn a_text_is_continued_on_the_first_device_of_the_chain_that_there_is() {
    let arguments = ["generate", "--prompt", "Once upon", "--max-tokens", "3", "-v"];
    let on = |chain: &str| {
        let output = rlx(&arguments).env("RLX_DEVICE_CHAIN", chain).output().expect("the binary starts");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{told}");
        (String::from_utf8_lossy(&output.stdout).into_owned(), told)
    };
    let (text, told) = on("rocm,gpu:0,cpu");
    assert!(told.contains("not on rocm: this build has no backend for it"), "{told}");
    assert!(told.contains(" ms on gpu ("), "{told}");
    let (expected, told) = on("metal,gpu:99,cpu");
    assert!(told.contains("not on metal: ") && told.contains("not on gpu:99: the machine has "), "{told}");
    assert!(told.contains(" ms on cpu"), "{told}");
    assert_eq!(text, expected);
}

/// Holds with and without a card: a driver that computes in software is passed over and named, a card is asked about.
#[cfg(feature = "gpu")]
#[test]
fn without_a_device_asked_for_a_driver_in_software_is_passed_over_by_name() {
    let output = rlx(&["generate", "--prompt", "Once", "-n", "1", "-v"]).output().expect("the binary starts");
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    let software = "not on gpu: its driver computes in software; --device gpu takes it";
    let chosen = told.lines().any(|line| line.contains("`rlx devices MODEL` has the figures"));
    assert!(told.lines().any(|line| line == software) != chosen, "{told}");
}
