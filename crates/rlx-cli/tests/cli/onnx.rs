//! ONNX files as models of the command line.

use super::*;

/// A length-delimited field of a protobuf message.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    [&[number << 3 | 2, u8::try_from(bytes.len()).expect("a short field")], bytes].concat()
}

/// `y = Relu(x)` as an ONNX file; of `[n, 4]` if that is said.
fn relu_model(shaped: bool) -> Vec<u8> {
    relu_of(1, shaped)
}

/// The same of elements of another type, by its number in ONNX.
fn relu_of(element: u8, shaped: bool) -> Vec<u8> {
    let number = |tag: u8, value: u8| vec![tag << 3, value];
    let dims = field(2, &[field(1, &field(2, b"n")), field(1, &number(1, 4))].concat());
    let dims = if shaped { dims } else { Vec::new() };
    let kind = field(1, &[number(1, element), dims].concat());
    let info = |name: &str| [field(1, name.as_bytes()), field(2, &kind)].concat();
    let node = [field(1, b"x"), field(2, b"y"), field(4, b"Relu")].concat();
    let graph = [field(1, &node), field(2, b"g"), field(11, &info("x")), field(12, &info("y"))].concat();
    [number(1, 8), field(7, &graph), field(8, &number(2, 13))].concat()
}

/// A vector as a file of NumPy's.
fn array(values: &[f32]) -> Vec<u8> {
    array_of("<f4", values.len(), values.iter().flat_map(|v| v.to_le_bytes()))
}

fn array_of(kind: &str, count: usize, data: impl Iterator<Item = u8>) -> Vec<u8> {
    let mut header = format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': ({count},), }}");
    header.push_str(&" ".repeat(117 - header.len()));
    header.push('\n');
    let mut array = b"\x93NUMPY\x01\x00".to_vec();
    array.extend((header.len() as u16).to_le_bytes());
    array.extend(header.as_bytes());
    array.extend(data);
    array
}

#[cfg(feature = "gpu")]
#[test]
fn an_onnx_model_on_a_device_says_which_steps_ran_where() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(path("relu.onnx"), relu_model(false)).expect("written");
    std::fs::write(path("x.npy"), array(&[-1.0, 0.5, 2.0])).expect("written");
    let (model, input) = (path("relu.onnx"), format!("x={}", path("x.npy")));
    let report =
        json(&["run", &model, "--input", &input, "--out", &path("out"), "--device", "gpu", "--json"]);
    let devices = report["nodes"]["devices"].as_object().expect("steps by device");
    assert!(devices.len() == 1 && devices.keys().all(|name| name.starts_with("gpu (")), "{report}");
    assert_eq!(report["nodes"]["moved"], serde_json::json!([]));
}

/// The report on an ONNX model names what keeps a device from running it.
#[cfg(feature = "gpu")]
#[test]
fn the_devices_of_an_onnx_model_are_told_with_what_they_lack() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = folder.path().join("relu.onnx").display().to_string();
    std::fs::write(&model, relu_of(11, true)).expect("written");
    let report = json(&["devices", &model, "--dim", "n=6", "--json"]);
    let row = |kind: &str| {
        let rows = report["devices"].as_array().expect("rows");
        rows.iter().find(|row| row["device"] == kind).expect("a row for each kind").clone()
    };
    assert_eq!((&row("cpu")["recommended"], &row("gpu")["supports_graph"]), (&true.into(), &false.into()));
    assert!(row("gpu")["blocker"].as_str().expect("what it lacks").contains("f64"), "{report}");
}

/// Mesa's driver computes on the processor where there is no card, so every machine of CI has the device.
#[cfg(feature = "gpu")]
#[test]
fn what_a_device_cannot_run_is_refused_by_name_or_goes_to_the_next_of_the_chain() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(path("relu.onnx"), relu_of(11, false)).expect("written");
    let data = [-1f64, 0.5, 2.0].into_iter().flat_map(f64::to_le_bytes);
    std::fs::write(path("x.npy"), array_of("<f8", 3, data)).expect("written");
    let (model, input, out) = (path("relu.onnx"), format!("x={}", path("x.npy")), path("out"));
    let arguments = ["run", &model, "--input", &input, "--out", &out];
    let alone = run(&[&arguments[..], &["--device", "gpu"]].concat());
    // The node, the op with its place, the dtype, and what to do.
    for part in ["status 1\n", "(Relu)", "does not run", "f64", "RLX_DEVICE_CHAIN"] {
        assert!(alone.contains(part), "{alone} should name {part:?}");
    }
    let mut chained = rlx(&[&arguments[..], &["--json"]].concat());
    let output = chained.env("RLX_DEVICE_CHAIN", "gpu,cpu").output().expect("the binary starts");
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(told.contains("(Relu): on cpu, for gpu (") && told.contains("cannot run it"), "{told}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    let devices = report["nodes"]["devices"].as_object().expect("steps by device");
    assert!(devices.keys().eq(["cpu"]), "{report}");
    assert_eq!(report["nodes"]["moved"].as_array().map(Vec::len), Some(1));
}

#[test]
fn an_onnx_model_runs_on_named_arrays() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(path("relu.onnx"), relu_model(false)).expect("written");
    std::fs::write(path("x.npy"), array(&[-1.0, 0.5, 2.0])).expect("written");
    let (model, out) = (path("relu.onnx"), path("out"));
    let input = format!("x={}", path("x.npy"));
    let report = json(&["run", &model, "--input", &input, "--out", &out, "--json"]);
    assert_eq!(report["outputs"][0]["value"], "f32[3]");
    assert_eq!(report["nodes"]["compiled"]["Relu"], 1);
    let written = std::fs::read(path("out/y.npy")).expect("an output");
    let values: Vec<u8> = [0f32, 0.5, 2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    assert!(written.ends_with(&values));
    let missing = failure(&["run", &model, "--out", &out]);
    assert!(missing.contains("input \"x\": is missing") && missing.contains("--input NAME"), "{missing}");
    let wrong = failure(&["run", &model, "--input", "x", "--out", &out]);
    assert!(wrong.contains("is not NAME=FILE"), "{wrong}");
}

#[test]
fn an_onnx_model_is_planned_explained_and_timed() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = folder.path().join("relu.onnx").display().to_string();
    std::fs::write(&model, relu_model(true)).expect("written");
    let plan = json(&["plan", &model, "--dim", "n=6", "--budget", "1GiB", "--json"]);
    assert_eq!(plan["inputs"]["x"], serde_json::json!([6, 4]));
    assert_eq!(plan["parts"]["inputs"], 96);
    assert_eq!((&plan["fits"], &plan["not_planned"]), (&true.into(), &0.into()));
    let explained = json(&["explain", &model, "--dim", "n=6", "--json"]);
    assert_eq!(explained["steps"][0]["op"], "activation");
    let bench = json(&["bench", &model, "--dim", "n=6", "--steps", "--json"]);
    assert!(bench["median_ms"].as_f64().expect("a time") > 0.0);
    assert_eq!(bench["steps"][0]["steps"], 1);
    let devices = json(&["devices", &model, "--dim", "n=6", "--json"]);
    let cpu = &devices["devices"][0];
    assert_eq!((&cpu["device"], &cpu["supports_graph"]), (&"cpu".into(), &true.into()), "{devices}");
    assert!(cpu["predicted_ms"].as_f64().expect("a time") > 0.0 && cpu["needed_bytes"].as_u64() > Some(0));
    assert!(failure(&["devices", &model]).contains("dim \"n\" has no size"));
    let open = failure(&["plan", &model]);
    assert!(open.contains("dim \"n\" has no size") && open.contains("--dim NAME=N"), "{open}");
    let unknown = failure(&["plan", &model, "--dim", "m=6"]);
    assert!(unknown.contains("no input has such a dim; the nearest name is \"n\""), "{unknown}");
    let batch = failure(&["plan", &model, "--dim", "n=6", "--batch", "2"]);
    assert!(batch.contains("--batch has no meaning for an ONNX file"), "{batch}");
    let text = failure(&["generate", &model, "--prompt", "Once"]);
    assert!(text.contains("format onnx") && text.contains("`rlx run`"), "{text}");
    let demo = failure(&["plan", "--dim", "n=6"]);
    assert!(demo.contains("this model is no ONNX file"), "{demo}");
}

#[test]
fn a_compiled_onnx_model_is_a_model_of_its_verbs() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(path("relu.onnx"), relu_model(true)).expect("written");
    let (model, compiled) = (path("relu.onnx"), path("relu.rlx"));
    let made = json(&["compile", &model, "-o", &compiled, "--json"]);
    assert_eq!(made["file_bytes"], std::fs::metadata(&compiled).expect("it is there").len());
    let plan = |model: &str| json(&["plan", model, "--dim", "n=6", "--json"]);
    assert_eq!(plan(&compiled)["inputs"]["x"], serde_json::json!([6, 4]));
    assert_eq!(plan(&compiled)["parts"], plan(&model)["parts"]);
    let explained = json(&["explain", &compiled, "--dim", "n=6", "--json"]);
    assert_eq!(explained["steps"][0]["op"], "activation");
    assert!(
        json(&["bench", &compiled, "--dim", "n=6", "--json"])["median_ms"].as_f64().expect("a time") > 0.0
    );
    std::fs::write(path("flat.onnx"), relu_model(false)).expect("written");
    let unranked = failure(&["compile", &path("flat.onnx"), "-o", &path("flat.rlx")]);
    assert!(unranked.contains("does not say its rank"), "{unranked}");
    let foreign = failure(&["generate", &compiled, "--prompt", "Once"]);
    assert!(foreign.contains("made for the kind onnx") && foreign.contains("rlx run"), "{foreign}");
    let text = path("demo.rlx");
    assert!(run(&["compile", "-o", &text]).starts_with("status 0\n"));
    let other = failure(&["run", &text, "--out", &path("out")]);
    assert!(other.contains("made for the kind model"), "{other}");
    let mut bytes = std::fs::read(&compiled).expect("it can be read");
    bytes[60] ^= 1;
    std::fs::write(&compiled, &bytes).expect("it can be written");
    for verb in [&["plan", &compiled][..], &["run", &compiled, "--out", &path("out")]] {
        let damaged = failure(verb);
        assert!(damaged.contains("damaged") && damaged.contains("rlx compile"), "{damaged}");
    }
}
