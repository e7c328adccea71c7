//! Small models, good and broken.

use crate::decode::ExternalData;
use crate::proto::{
    AttributeProto, DimProto, EntryProto, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetId,
    ShapeProto, TensorProto, TensorType, TypeProto, ValueInfoProto,
};
use crate::runtime::Runtime;
use crate::{OnnxError, OnnxModel, Value, import};
use prost::Message;
use rlx::Session;
use rlx::backend::reference::ReferenceBackend;
use rlx_tensor::Tensor;
use std::sync::Arc;

pub(crate) fn info(name: &str) -> ValueInfoProto {
    let tensor = Some(TensorType { elem_type: 1, shape: None });
    ValueInfoProto { name: name.into(), value_type: Some(TypeProto { tensor, ..TypeProto::default() }) }
}

pub(crate) fn node(op: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    let names = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
    NodeProto { op_type: op.into(), input: names(inputs), output: names(outputs), ..NodeProto::default() }
}

pub(crate) fn floats(name: &str, dims: &[i64], data: &[f32]) -> TensorProto {
    TensorProto {
        name: name.into(),
        dims: dims.to_vec(),
        data_type: 1,
        float_data: data.to_vec(),
        ..TensorProto::default()
    }
}

pub(crate) fn graph(nodes: Vec<NodeProto>, inputs: &[&str], outputs: &[&str]) -> GraphProto {
    GraphProto {
        name: "g".into(),
        node: nodes,
        input: inputs.iter().map(|n| info(n)).collect(),
        output: outputs.iter().map(|n| info(n)).collect(),
        ..GraphProto::default()
    }
}

pub(crate) fn model(graph: GraphProto) -> ModelProto {
    let opset = OperatorSetId { domain: String::new(), version: 22 };
    ModelProto { ir_version: Some(10), graph: Some(graph), opset_import: vec![opset], functions: Vec::new() }
}

fn open(model: &ModelProto) -> Result<OnnxModel, OnnxError> {
    let session = Session::with_backend(Arc::new(ReferenceBackend::default()));
    let program = import::from_model(model, ExternalData::default())?;
    Ok(OnnxModel { program, runtime: Runtime::on(&session) })
}

fn error(model: &ModelProto) -> String {
    match open(model) {
        Ok(_) => panic!("the model was accepted"),
        Err(error) => error.to_string(),
    }
}

fn vector(values: &[f32]) -> Value {
    Value::Tensor(Tensor::from_slice(&[values.len()], values).unwrap())
}

#[test]
fn a_node_between_regions_decides_the_extents_of_the_next() {
    let nodes = vec![
        node("Relu", &["x"], &["r"]),
        node("NonZero", &["r"], &["at"]),
        node("Shape", &["at"], &["size"]),
        node("Neg", &["at"], &["y"]),
    ];
    let model = open(&model(graph(nodes, &["x"], &["y", "size"]))).unwrap();
    for (given, count) in [(vec![1.0, -1.0, 2.0], 2), (vec![-1.0, 0.0, 0.0], 0), (vec![3.0, 2.0, 1.0], 3)] {
        let outputs = model.run(&[("x", vector(&given))]).unwrap();
        assert_eq!(outputs[0].1.dims(), Some(&[1, count][..]), "{given:?}");
        assert_eq!(outputs[1].1.ints().unwrap(), [1, count as i64]);
    }
    let report = model.report();
    assert_eq!(report.host.get("NonZero"), Some(&3));
    assert_eq!(report.compiled.get("Relu"), Some(&1), "the first region is compiled once");
}

#[test]
fn a_shape_computed_at_run_time_is_guarded() {
    let mut reshaped = graph(vec![node("Reshape", &["x", "s"], &["y"])], &["x", "s"], &["y"]);
    reshaped.input[1].value_type =
        Some(TypeProto { tensor: Some(TensorType { elem_type: 7, shape: None }), ..TypeProto::default() });
    let model = open(&model(reshaped)).unwrap();
    for dims in [[2i64, 3], [3, 2], [2, 3]] {
        let shape = Value::Tensor(Tensor::from_slice(&[2], &dims).unwrap());
        let x = vector(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let outputs = model.run(&[("x", x), ("s", shape)]).unwrap();
        assert_eq!(outputs[0].1.dims(), Some(&dims.map(|d| d as usize)[..]));
    }
}

#[test]
fn functions_are_written_out_and_attributes_handed_down() {
    let mut leaky = node("LeakyRelu", &["a"], &["b"]);
    leaky.attribute.push(AttributeProto {
        name: "alpha".into(),
        kind: 1,
        ref_attr_name: "slope".into(),
        ..AttributeProto::default()
    });
    let function = FunctionProto {
        name: "Twice".into(),
        domain: "mine".into(),
        input: vec!["a".into()],
        output: vec!["c".into()],
        attribute: vec!["slope".into()],
        node: vec![leaky, node("Add", &["b", "b"], &["c"])],
        opset_import: vec![OperatorSetId { domain: String::new(), version: 22 }],
        ..FunctionProto::default()
    };
    let mut call = node("Twice", &["x"], &["y"]);
    call.domain = "mine".into();
    call.attribute.push(AttributeProto {
        name: "slope".into(),
        kind: 1,
        f: 0.5,
        ..AttributeProto::default()
    });
    let mut whole = model(graph(vec![call], &["x"], &["y"]));
    whole.opset_import.push(OperatorSetId { domain: "mine".into(), version: 1 });
    whole.functions.push(function);
    let outputs = open(&whole).unwrap().run(&[("x", vector(&[2.0, -2.0]))]).unwrap();
    assert_eq!(outputs[0].1.floats().unwrap(), [4.0, -2.0]);
}

#[test]
fn broken_graphs_are_named() {
    let cycle = vec![node("Neg", &["b"], &["a"]), node("Neg", &["a"], &["b"])];
    assert!(error(&model(graph(cycle, &[], &["b"]))).contains("\"b\" is not defined before it"));
    let twice = vec![node("Neg", &["x"], &["y"]), node("Abs", &["x"], &["y"])];
    assert!(error(&model(graph(twice, &["x"], &["y"]))).contains("defined twice"));
    let absent = vec![node("Neg", &["x"], &["y"])];
    assert!(error(&model(graph(absent, &["x"], &["z"]))).contains("\"z\" is never produced"));
    let mut foreign = node("Neg", &["x"], &["y"]);
    foreign.domain = "elsewhere".into();
    assert!(error(&model(graph(vec![foreign], &["x"], &["y"]))).contains("\"elsewhere\" is not imported"));
    let unknown = open(&model(graph(vec![node("Frobnicate", &["x"], &["y"])], &["x"], &["y"]))).unwrap();
    let error = unknown.run(&[("x", vector(&[1.0]))]).unwrap_err();
    assert!(matches!(&error, OnnxError::Unsupported { op, .. } if op == "Frobnicate"), "{error}");
}

#[test]
fn broken_tensors_are_named() {
    let with = |tensor: TensorProto| {
        let mut graph = graph(vec![node("Neg", &["w"], &["y"])], &[], &["y"]);
        graph.initializer.push(tensor);
        error(&model(graph))
    };
    assert!(with(floats("w", &[-1], &[1.0])).contains("negative"));
    assert!(with(floats("w", &[1 << 40, 1 << 40], &[1.0])).contains("too large"));
    assert!(with(floats("w", &[3], &[1.0])).contains("12 bytes, found 4"));
    assert!(with(TensorProto { data_type: 99, ..floats("w", &[1], &[1.0]) }).contains("99 is unknown"));
}

#[test]
fn external_data_stays_in_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret"), [0u8; 8]).unwrap();
    std::fs::write(folder.path().join("w.bin"), [0u8; 8]).unwrap();
    #[cfg(unix)]
    std::os::unix::fs::symlink(outside.path().join("secret"), folder.path().join("link")).unwrap();
    let read = |location: &str, length: &str| {
        let entry = |key: &str, value: &str| EntryProto { key: key.into(), value: value.into() };
        let tensor = TensorProto {
            data_location: 1,
            external_data: vec![entry("location", location), entry("length", length)],
            ..TensorProto { float_data: Vec::new(), ..floats("w", &[2], &[]) }
        };
        let mut graph = graph(vec![node("Neg", &["w"], &["y"])], &[], &["y"]);
        graph.initializer.push(tensor);
        import::from_model(&model(graph), ExternalData::within(folder.path())).map(|_| ())
    };
    assert!(read("w.bin", "8").is_ok());
    let absolute = outside.path().join("secret");
    for location in ["../secret", "a/../../secret", absolute.to_str().unwrap(), "link", ".", ""] {
        assert!(matches!(read(location, "8"), Err(OnnxError::Tensor { .. })), "{location}");
    }
    assert!(read("w.bin", "16").is_err());
    assert!(read("w.bin", "x").is_err());
}

#[test]
fn a_function_that_calls_itself_ends_in_an_error() {
    let mut call = node("Loop_", &["a"], &["b"]);
    call.domain = "mine".into();
    let mine = OperatorSetId { domain: "mine".into(), version: 1 };
    let function = FunctionProto {
        name: "Loop_".into(),
        domain: "mine".into(),
        input: vec!["a".into()],
        output: vec!["b".into()],
        node: vec![call.clone()],
        opset_import: vec![mine.clone()],
        ..FunctionProto::default()
    };
    let mut outer = call;
    outer.input = vec!["x".into()];
    let mut whole = model(graph(vec![outer], &["x"], &["b"]));
    whole.opset_import.push(mine);
    whole.functions.push(function);
    assert!(error(&whole).contains("deeper"));
}

#[test]
fn deep_graphs_end_in_an_error() {
    let mut inner = graph(vec![node("Neg", &["x"], &["y"])], &[], &["y"]);
    for _ in 0..40 {
        let mut branch = node("If", &["c"], &["y"]);
        branch.attribute.push(AttributeProto {
            name: "then_branch".into(),
            kind: 5,
            g: Some(inner),
            ..AttributeProto::default()
        });
        inner = graph(vec![branch], &[], &["y"]);
    }
    inner.input = vec![info("x"), info("c")];
    let bytes = model(inner).encode_to_vec();
    let session = Session::with_backend(Arc::new(ReferenceBackend::default()));
    assert!(matches!(
        OnnxModel::from_bytes(&bytes, &session),
        Err(OnnxError::Malformed { .. } | OnnxError::Graph { .. })
    ));
}

#[test]
fn flipped_and_cut_files_never_panic() {
    let mut whole = graph(vec![node("Add", &["x", "w"], &["y"])], &["x"], &["y"]);
    whole.initializer.push(floats("w", &[2], &[1.0, 2.0]));
    let bytes = model(whole).encode_to_vec();
    let session = Session::with_backend(Arc::new(ReferenceBackend::default()));
    for at in 0..bytes.len() {
        let cut = OnnxModel::from_bytes(&bytes[..at], &session);
        drop(cut);
        for bit in [0x01, 0x10, 0x80] {
            let mut flipped = bytes.clone();
            flipped[at] ^= bit;
            if let Ok(model) = OnnxModel::from_bytes(&flipped, &session) {
                let _ = model.run(&[("x", vector(&[1.0, 2.0]))]);
            }
        }
    }
}

/// `y = Reshape(Relu(x), [batch, 2, -1])` with a batch that is a symbol.
pub(crate) fn symbolic() -> ModelProto {
    let int_list = |name: &str, values: &[i64]| TensorProto {
        name: name.into(),
        dims: vec![values.len() as i64],
        data_type: 7,
        int64_data: values.to_vec(),
        ..TensorProto::default()
    };
    let nodes = vec![
        node("Relu", &["x"], &["r"]),
        node("Shape", &["r"], &["shape"]),
        node("Gather", &["shape", "zero"], &["batch"]),
        node("Concat", &["batch", "rest"], &["wanted"]),
        node("Reshape", &["r", "wanted"], &["y"]),
    ];
    let mut graph = graph(nodes, &["x"], &["y"]);
    graph.node[3].attribute.push(AttributeProto {
        name: "axis".into(),
        kind: 2,
        ..AttributeProto::default()
    });
    graph.initializer = vec![int_list("zero", &[0]), int_list("rest", &[2, 2])];
    let dim = |value: Option<i64>, param: Option<&str>| DimProto { value, param: param.map(str::to_owned) };
    let shape = Some(ShapeProto { dim: vec![dim(None, Some("batch")), dim(Some(4), None)] });
    let tensor = Some(TensorType { elem_type: 1, shape });
    graph.input[0].value_type = Some(TypeProto { tensor, ..TypeProto::default() });
    model(graph)
}

#[test]
fn a_model_over_symbols_is_compiled_once() {
    let model = open(&symbolic()).unwrap();
    for batch in [1, 3, 2] {
        let x = Value::Tensor(Tensor::from_slice(&[batch, 4], &vec![-1f32; batch * 4]).unwrap());
        let outputs = model.run(&[("x", x)]).unwrap();
        assert_eq!(outputs[0].1.dims(), Some(&[batch, 2, 2][..]));
        assert_eq!(outputs[0].1.floats().unwrap(), vec![0.0; batch * 4]);
    }
    let report = model.report();
    assert_eq!((report.template.as_deref(), report.regions), (Some(""), 1));
}

#[test]
fn a_run_that_a_graph_over_symbols_does_not_fit_says_so() {
    let mut graph = graph(vec![node("Relu", &["x"], &["y"])], &["x"], &["y"]);
    let dim = || DimProto { value: None, param: Some("n".to_owned()) };
    let tensor = Some(TensorType { elem_type: 1, shape: Some(ShapeProto { dim: vec![dim(), dim()] }) });
    graph.input[0].value_type = Some(TypeProto { tensor, ..TypeProto::default() });
    let model = open(&model(graph)).unwrap();
    let x = |rows: usize| Value::Tensor(Tensor::from_slice(&[rows, 2], &vec![-1f32; rows * 2]).unwrap());
    model.run(&[("x", x(2))]).unwrap();
    assert_eq!(model.report().template.as_deref(), Some(""));
    let outputs = model.run(&[("x", x(3))]).unwrap();
    assert_eq!(outputs[0].1.dims(), Some(&[3, 2][..]));
    let reason = model.report().template.unwrap();
    assert!(reason.starts_with("the graph over symbols did not run: "), "{reason}");
}

#[test]
fn a_large_initialiser_is_a_weight_and_a_value() {
    let count = 20_000;
    let raw: Vec<u8> = (0..count).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let nodes = vec![
        node("Add", &["x", "w"], &["y"]),
        node("Atan", &["w"], &["z"]),
        node("Identity", &["w"], &["same"]),
    ];
    let mut whole = graph(nodes, &["x"], &["y", "z", "same"]);
    whole
        .initializer
        .push(TensorProto { raw_data: Some(raw.into()), ..floats("w", &[i64::from(count)], &[]) });
    let model = open(&model(whole)).unwrap();
    let outputs = model.run(&[("x", vector(&[1.0]))]).unwrap();
    assert_eq!(outputs[0].1.floats().unwrap()[19_999], 20_000.0);
    assert!((outputs[1].1.floats().unwrap()[1] - std::f64::consts::FRAC_PI_4).abs() < 1e-6);
    assert_eq!(outputs[2].1.floats().unwrap()[7], 7.0);
    assert_eq!(model.runtime.session().weights().len(), 1);
}

#[test]
fn inputs_are_checked() {
    let model = open(&model(graph(vec![node("Neg", &["image"], &["y"])], &["image"], &["y"]))).unwrap();
    let text = |inputs: &[(&str, Value)]| model.run(inputs).unwrap_err().to_string();
    assert!(text(&[("imagee", vector(&[1.0]))]).contains("nearest name is \"image\""));
    assert!(text(&[]).contains("missing"));
    assert!(text(&[("image", Value::Tensor(Tensor::scalar(1i64)))]).contains("expected f32"));
    assert!(text(&[("image", vector(&[1.0])), ("image", vector(&[1.0]))]).contains("twice"));
}

#[test]
fn every_op_has_one_row() {
    let mut names: Vec<(&str, &str)> = crate::ops::rows().map(|r| (r.domain, r.name)).collect();
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count);
    assert!(crate::ops::rows().all(|r| r.lower.is_some() || r.host.is_some()));
}

#[test]
fn a_model_is_planned_without_its_weights() {
    let mut product = graph(vec![node("MatMul", &["x", "w"], &["y"])], &["x"], &["y"]);
    product.initializer.push(floats("w", &[4, 300], &[0.5; 1200]));
    let dim = |value, param: Option<&str>| DimProto { value, param: param.map(str::to_owned) };
    let shape = Some(ShapeProto { dim: vec![dim(None, Some("n")), dim(Some(4), None)] });
    let tensor = Some(TensorType { elem_type: 1, shape });
    product.input[0].value_type = Some(TypeProto { tensor, ..TypeProto::default() });
    let model = open(&model(product)).unwrap();
    let prepared = model.prepare(&[("n".to_owned(), 3)]).unwrap();
    assert_eq!((prepared.estimate.input_bytes, prepared.estimate.output_bytes), (48, 3600));
    assert!(prepared.host.is_empty() && prepared.later.is_empty());
    assert!(!prepared.region().unwrap().graph().is_loaded(), "planning packs no weight");
    let error = model.prepare(&[]).err().unwrap().to_string();
    assert!(error.contains("dim \"n\" has no size"), "{error}");
}

/// Models that once gave another result optimised than not, cut down by `onnx-fuzz`; their inputs carry values.
#[test]
fn what_once_differed_is_the_same_on_every_way() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("data/differences");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        let graph = ModelProto::decode(bytes.as_slice()).unwrap().graph.unwrap();
        let named: Vec<&TensorProto> =
            graph.initializer.iter().filter(|t| graph.input.iter().any(|i| i.name == t.name)).collect();
        let value = |t: &&TensorProto| crate::decode::tensor(t, &mut ExternalData::default()).unwrap();
        let inputs: Vec<(&str, Value)> = named.iter().map(|t| (t.name.as_str(), value(t))).collect();
        let reference = Session::with_backend(Arc::new(ReferenceBackend::default()));
        let expected = OnnxModel::from_bytes(&bytes, &reference).unwrap().run(&inputs).unwrap();
        let cpu = Session::new(rlx::devices::Device::Cpu).unwrap();
        let found = OnnxModel::from_bytes(&bytes, &cpu).unwrap().run(&inputs).unwrap();
        for ((name, a), (_, b)) in expected.iter().zip(&found) {
            let reason = crate::suite::difference(a, b, 1e-5, 1e-5);
            assert_eq!(reason, None, "{}: {name}", path.display());
        }
        count += 1;
    }
    assert!(count >= 4, "{count} models");
}

/// `y = x + x` of 64-bit integers.
fn doubling() -> ModelProto {
    let mut doubled = graph(vec![node("Add", &["x", "x"], &["y"])], &["x"], &["y"]);
    let tensor = Some(TensorType { elem_type: 7, shape: None });
    let kind = Some(TypeProto { tensor, ..TypeProto::default() });
    doubled.input[0].value_type.clone_from(&kind);
    doubled.output[0].value_type = kind;
    model(doubled)
}

#[test]
fn integers_beyond_a_devices_words_are_refused_or_go_to_the_next_device() {
    let on = |session: &Session| {
        let program = import::from_model(&doubling(), ExternalData::default()).unwrap();
        OnnxModel { program, runtime: Runtime::on(session) }
    };
    let run = |model: &OnnxModel, x: [i64; 2]| {
        let x = Value::Tensor(Tensor::from_slice(&[2], &x).unwrap());
        model.run(&[("x", x)]).map(|outputs| outputs[0].1.ints().unwrap())
    };
    let device = Session::with_backend(rlx_gpu::emulated());
    let name = device.backend().name().to_owned();
    let alone = on(&device);
    assert_eq!(run(&alone, [-5, 1_000_000]).unwrap(), [-10, 2_000_000]);
    assert_eq!(alone.report().devices.into_iter().collect::<Vec<_>>(), [(name.clone(), 1)]);
    for beyond in [[1 << 30, 3], [1 << 40, 3]] {
        let error = run(&alone, beyond).unwrap_err().to_string();
        assert!(error.contains("Add") && error.contains("32 bits"), "{error}");
    }
    assert_eq!(run(&alone, [7, -7]).unwrap(), [14, -14], "a refused run leaves the model as it was");
    assert!(alone.report().moved.is_empty());

    let reference = Session::with_backend(Arc::new(ReferenceBackend::default()));
    let chained = on(&device).or_on(&[reference]);
    assert_eq!(run(&chained, [1, 2]).unwrap(), [2, 4]);
    assert!(chained.report().moved.is_empty());
    for beyond in [[1i64 << 30, 3], [1 << 40, 3]] {
        assert_eq!(run(&chained, beyond).unwrap(), beyond.map(|x| 2 * x));
    }
    let report = chained.report();
    let moved: Vec<_> =
        report.moved.iter().map(|m| (&*m.from, &*m.to, m.reason.contains("32 bits"))).collect();
    assert_eq!(moved, [(&*name, "reference", true)], "it stays where it went");
    assert_eq!(report.devices.into_iter().collect::<Vec<_>>(), [(name, 1), ("reference".to_owned(), 1)]);
}

/// Data and updates of F32, places of I64 that only a run knows.
fn scattered(op: &str, reduction: &str, axis: i64) -> ModelProto {
    let mut scatter = node(op, &["x", "at", "u"], &["y"]);
    let text = |name: &str, value: &str| AttributeProto {
        name: name.into(),
        kind: 3,
        s: value.to_owned().into(),
        ..AttributeProto::default()
    };
    scatter.attribute = vec![text("reduction", reduction)];
    if axis > 0 {
        let axis = AttributeProto { name: "axis".into(), kind: 2, i: axis, ..AttributeProto::default() };
        scatter.attribute.push(axis);
    }
    let mut graph = graph(vec![scatter], &["x", "at", "u"], &["y"]);
    graph.input[1].value_type =
        Some(TypeProto { tensor: Some(TensorType { elem_type: 7, shape: None }), ..TypeProto::default() });
    model(graph)
}

#[test]
fn scattering_to_places_of_a_run_is_part_of_a_region_and_refuses_places_that_are_not_there() {
    let numbers = |count: usize, scale: f32| (0..count).map(|i| (i as f32 - 3.0) * scale).collect::<Vec<_>>();
    let cases: [(&str, &str, i64, [&[usize]; 3]); 6] = [
        ("ScatterND", "none", 0, [&[6, 4], &[3, 1], &[3, 4]]),
        ("ScatterND", "none", 0, [&[5, 7, 2], &[20, 2], &[20, 2]]),
        ("ScatterND", "add", 0, [&[6, 4], &[2, 2, 2], &[2, 2]]),
        ("ScatterElements", "none", 1, [&[3, 9], &[3, 4], &[3, 4]]),
        ("ScatterElements", "mul", 1, [&[2, 5, 3], &[2, 3, 3], &[2, 3, 3]]),
        ("ScatterElements", "add", 0, [&[4], &[5], &[5]]),
    ];
    for (op, reduction, axis, [dims, places, updates]) in cases {
        let model = open(&scattered(op, reduction, axis)).unwrap();
        let count = |dims: &[usize]| dims.iter().product::<usize>();
        let extent = if op == "ScatterND" { 4 } else { dims[axis as usize] as i64 }.min(5);
        let at: Vec<i64> =
            (0..count(places) as i64).map(|i| (i * 7 + i / 3) % extent - extent * (i % 2)).collect();
        let (x, u) = (numbers(count(dims), 0.5), numbers(count(updates), -0.25));
        let wanted = {
            let own = rlx_graph::eval::strides(dims);
            let mut y = x.clone();
            let mut put = |to: usize, from: usize| match reduction {
                "add" => y[to] += u[from],
                "mul" => y[to] *= u[from],
                _ => y[to] = u[from],
            };
            let wrap =
                |index: i64, axis: usize| if index < 0 { index + dims[axis] as i64 } else { index } as usize;
            if op == "ScatterND" {
                let depth = places[places.len() - 1];
                let slice = count(&dims[depth..]);
                for row in 0..count(places) / depth {
                    let start: usize = (0..depth).map(|j| wrap(at[row * depth + j], j) * own[j]).sum();
                    (0..slice).for_each(|i| put(start + i, row * slice + i));
                }
            } else {
                let (axis, source) = (axis as usize, rlx_graph::eval::strides(places));
                for (from, &index) in at.iter().enumerate() {
                    let along =
                        |a: usize| if a == axis { wrap(index, a) } else { from / source[a] % places[a] };
                    put((0..dims.len()).map(|a| along(a) * own[a]).sum(), from);
                }
            }
            y
        };
        let float = |dims: &[usize], data: &[f32]| Value::Tensor(Tensor::from_slice(dims, data).unwrap());
        let place = |at: &[i64]| Value::Tensor(Tensor::from_slice(places, at).unwrap());
        let given = [("x", float(dims, &x)), ("at", place(&at)), ("u", float(updates, &u))];
        let outputs = model.run(&given).unwrap();
        assert!(outputs[0].1.same(&float(dims, &wanted)), "{op} {reduction} {dims:?}: {:?}", outputs[0].1);
        assert!(model.report().host.is_empty(), "{op} {reduction}: {:?}", model.report().host);
        let mut beyond = at.clone();
        beyond[0] = dims[axis as usize] as i64;
        let refused = model.run(&[("x", float(dims, &x)), ("at", place(&beyond)), ("u", float(updates, &u))]);
        assert!(refused.is_err(), "{op} {reduction} {dims:?}");
    }
}
