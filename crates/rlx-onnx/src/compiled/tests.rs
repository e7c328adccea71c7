//! Models written as one file and opened again: the same bits, or a refusal by name.

use crate::decode::ExternalData;
use crate::ops::contrib::tests::{WEIGHTS, cases, inputs};
use crate::proto::{DimProto, ModelProto, ShapeProto, TensorType, TypeProto};
use crate::runtime::Runtime;
use crate::tests::{floats, graph, model, node, symbolic};
use crate::{OnnxError, OnnxModel, Value, import};
use rlx::aot::AotCacheError;
use rlx::aot::container::{Container, LargeSection, OpenContainer, Section};
use rlx::devices::Device;
use rlx::{Session, SessionError};
use rlx_tensor::Tensor;
use std::path::{Path, PathBuf};

fn cpu() -> Session {
    Session::new(Device::Cpu).unwrap()
}

fn imported(model: &ModelProto, session: &Session) -> OnnxModel {
    let program = import::from_model(model, ExternalData::default()).unwrap();
    OnnxModel { program, runtime: Runtime::on(session) }
}

fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
    *state >> 33
}

/// Numbers of these extents.
fn numbers(dims: &[usize], seed: u64) -> Vec<f32> {
    let mut state = seed;
    (0..dims.iter().product()).map(|_| random(&mut state) as f32 / (1u64 << 30) as f32 - 1.0).collect()
}

fn value(dims: &[usize], seed: u64) -> Value {
    Value::Tensor(Tensor::from_slice(dims, &numbers(dims, seed)).unwrap())
}

/// Inputs `x` of `[n, 24]` and `z` of any vector; outputs a layer's result, the input once more, a constant, a sum.
fn layered(dim: DimProto) -> ModelProto {
    let nodes = vec![
        node("MatMul", &["x", "w"], &["h"]),
        node("Relu", &["h"], &["y"]),
        node("Identity", &["z"], &["again"]),
        node("Neg", &["c"], &["constant"]),
        node("Add", &["y", "y"], &["twice"]),
    ];
    let mut graph = graph(nodes, &["x", "z"], &["y", "again", "constant", "twice"]);
    let of = |dims: Vec<DimProto>| TypeProto {
        tensor: Some(TensorType { elem_type: 1, shape: Some(ShapeProto { dim: dims }) }),
        ..TypeProto::default()
    };
    let known = |value: i64| DimProto { value: Some(value), param: None };
    graph.input[0].value_type = Some(of(vec![dim, known(24)]));
    graph.input[1].value_type = Some(of(vec![known(3)]));
    let weights = floats("w", &[24, 40], &numbers(&[24, 40], 1));
    graph.initializer = vec![weights, floats("c", &[2], &[1.0, -0.5])];
    model(graph)
}

fn named() -> DimProto {
    DimProto { value: None, param: Some("n".to_owned()) }
}

struct Written {
    folder: tempfile::TempDir,
}

impl Written {
    fn of(model: &OnnxModel, sizes: &[(String, usize)]) -> Self {
        let written = Written { folder: tempfile::tempdir().unwrap() };
        model.write_compiled(sizes, &written.path(), 2).unwrap();
        written
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("model.rlx")
    }

    fn open(&self) -> Result<OnnxModel, OnnxError> {
        OnnxModel::open_on(self.path(), &cpu())
    }
}

fn same(a: &[(String, Value)], b: &[(String, Value)]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|((a, x), (b, y))| a == b && x.same(y))
}

#[test]
fn a_model_over_symbols_serves_every_size_from_its_file_with_the_bits_of_the_import() {
    for (model, sizes) in [(layered(named()), [1, 5, 33]), (layered(DimProto::default()), [2, 1, 70])] {
        let session = cpu();
        let imported = imported(&model, &session);
        let written = Written::of(&imported, &[]);
        let compiled = written.open().unwrap();
        for n in sizes {
            let given = [("x", value(&[n, 24], n as u64)), ("z", value(&[3], 9))];
            let (a, b) = (imported.run(&given).unwrap(), compiled.run(&given).unwrap());
            assert!(same(&a, &b), "{n} rows");
            assert_eq!(b[2].1.floats().unwrap(), [-1.0, 0.5]);
        }
        let report = compiled.report();
        assert_eq!((report.regions, report.template.as_deref()), (1, Some("")));
        assert!(report.compiled.is_empty() && report.steps.len() > 1, "{report:?}");
        let [name] = &compiled.open_dims()[..] else { panic!("one open dim") };
        let prepared = compiled.prepare(&[(name.clone(), 7)]).unwrap();
        assert!(prepared.lir().is_some() && prepared.estimate.peak_bytes() > 0);
    }
    let session = cpu();
    let imported = imported(&symbolic(), &session);
    let compiled = Written::of(&imported, &[("batch".to_owned(), 4)]).open().unwrap();
    for batch in [1, 6] {
        let given = [("x", value(&[batch, 4], 3))];
        assert!(same(&imported.run(&given).unwrap(), &compiled.run(&given).unwrap()));
    }
}

#[test]
fn every_op_with_known_weights_gives_its_bits_from_a_compiled_file() {
    let session = cpu();
    let mut compiled = 0;
    for case in cases(WEIGHTS) {
        let name = case.file_name().unwrap().to_string_lossy().into_owned();
        let model = OnnxModel::open_on(case.join("model.onnx"), &session).unwrap();
        let given = inputs(&case).unwrap();
        let given: Vec<(&str, Value)> = given.iter().map(|(name, value)| (&**name, value.clone())).collect();
        let wanted = model.run(&given).unwrap_or_else(|error| panic!("{name}: {error}"));
        let written = Written { folder: tempfile::tempdir().unwrap() };
        model.write_compiled(&[], &written.path(), 1).unwrap_or_else(|error| panic!("{name}: {error}"));
        let opened = written.open().unwrap_or_else(|error| panic!("{name}: {error}"));
        let found = opened.run(&given).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(same(&wanted, &found), "{name}");
        compiled += 1;
    }
    assert!(compiled >= 75, "{compiled} cases");
}

#[test]
fn extents_that_a_file_was_not_compiled_for_are_refused_by_the_inputs_name() {
    let session = cpu();
    let fixed = imported(&layered(DimProto { value: Some(2), param: None }), &session);
    let compiled = Written::of(&fixed, &[]).open().unwrap();
    let given = [("x", value(&[2, 24], 5)), ("z", value(&[3], 9))];
    assert!(same(&fixed.run(&given).unwrap(), &compiled.run(&given).unwrap()));
    let other = compiled.run(&[("x", value(&[3, 24], 5)), ("z", value(&[3], 9))]);
    assert!(matches!(&other, Err(OnnxError::Input { name, .. }) if name == "x"), "{other:?}");
    let missing = compiled.run(&given[..1]);
    assert!(matches!(&missing, Err(OnnxError::Input { name, .. }) if name == "z"), "{missing:?}");
    let again = compiled.write_compiled(&[], Path::new("never.rlx"), 1);
    assert!(matches!(again, Err(OnnxError::NotOneGraph { .. })), "{again:?}");
}

#[test]
fn a_model_that_is_not_one_graph_is_refused_with_its_nodes() {
    let session = cpu();
    let nodes =
        vec![node("Relu", &["x"], &["r"]), node("NonZero", &["r"], &["at"]), node("Neg", &["at"], &["y"])];
    let mut graph = graph(nodes, &["x"], &["y"]);
    let dim = vec![named()];
    let tensor = Some(TensorType { elem_type: 1, shape: Some(ShapeProto { dim }) });
    graph.input[0].value_type = Some(TypeProto { tensor, ..TypeProto::default() });
    let model = imported(&model(graph), &session);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.rlx");
    let error = model.write_compiled(&[("n".to_owned(), 4)], &path, 1).unwrap_err().to_string();
    assert!(error.contains("(NonZero)") && error.contains("on the host"), "{error}");
    let open = model.write_compiled(&[], &path, 1).unwrap_err();
    assert!(
        matches!(open, OnnxError::Input { .. }),
        "not one graph, so that its sizes are asked for: {open}"
    );
    assert!(!path.exists());
}

fn refused(error: OnnxError) -> AotCacheError {
    match error {
        OnnxError::Compiled(error) => error,
        OnnxError::Region { source, .. } => match *source {
            SessionError::Aot(error) => error,
            other => panic!("a refusal of the file, found {other}"),
        },
        other => panic!("a refusal of the file, found {other}"),
    }
}

#[test]
fn damaged_and_foreign_files_are_typed_errors() {
    let session = cpu();
    let written = Written::of(&imported(&layered(named()), &session), &[]);
    let (path, whole) = (written.path(), std::fs::read(written.path()).unwrap());
    let given = [("x", value(&[2, 24], 5)), ("z", value(&[3], 9))];
    let tried = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        written.open().and_then(|model| model.run(&given))
    };
    let wanted = tried(&whole).unwrap();
    let mut state = 11;
    for _ in 0..80 {
        let mut flipped = whole.clone();
        let at = random(&mut state) as usize % whole.len();
        flipped[at] ^= 1 << (random(&mut state) % 8);
        match tried(&flipped) {
            // Padding before the body is under no digest, and read by nobody.
            Ok(found) => assert!(same(&found, &wanted) && whole[at] == 0, "a flip at byte {at}"),
            Err(error) => drop(refused(error)),
        }
        let len = random(&mut state) as usize % whole.len();
        refused(tried(&whole[..len]).unwrap_err());
    }
    assert!(matches!(
        refused(tried(b"").unwrap_err()),
        AotCacheError::Foreign { .. } | AotCacheError::Map(_)
    ));
    assert!(matches!(refused(tried(&[7; 300]).unwrap_err()), AotCacheError::Foreign { .. }));
    std::fs::write(&path, &whole).unwrap();
    let isa = changed(&path, |stamp| stamp.isa = "none".to_owned(), |_, _| {});
    assert!(matches!(isa, Err(AotCacheError::Mismatch { what: "instruction set", .. })), "{isa:?}");
    std::fs::write(&path, &whole).unwrap();
    let version = changed(&path, |stamp| stamp.version = "0.0.0".to_owned(), |_, _| {});
    assert!(matches!(version, Err(AotCacheError::Mismatch { what: "version", .. })), "{version:?}");
    std::fs::write(&path, &whole).unwrap();
    let kind = changed(&path, |stamp| stamp.kind = "model".to_owned(), |_, _| {});
    assert!(matches!(kind, Err(AotCacheError::Mismatch { what: "the kind", .. })), "{kind:?}");
}

/// Writes a file anew with right checksums and something changed, and opens it.
fn changed(
    path: &Path,
    stamp: impl Fn(&mut rlx::aot::container::Stamp),
    change: impl Fn(&str, &mut Vec<u8>),
) -> Result<OnnxModelOpened, AotCacheError> {
    let opened = OpenContainer::open(path).unwrap();
    let mut made_for = opened.stamp().clone();
    stamp(&mut made_for);
    let mut small: Vec<(String, Vec<u8>)> =
        opened.small_names().map(|name| (name.to_owned(), opened.small(name).unwrap().to_vec())).collect();
    small.iter_mut().for_each(|(name, bytes)| change(name, bytes));
    let small: Vec<Section<'_>> =
        small.iter().map(|(name, bytes)| Section { name, about: &[], bytes }).collect();
    let large = opened.large().unwrap();
    let section = |section: &LargeSection<'_>| {
        (section.name.to_owned(), section.about.to_vec(), section.content.clone())
    };
    let held: Vec<_> = large.iter().map(section).collect();
    let large = held.iter().map(|(name, about, content)| Section { name, about, bytes: content.bytes() });
    let large: Vec<Section<'_>> = large.collect();
    let container = Container { stamp: &made_for, key: opened.key(), small: &small, large: &large };
    container.write(path, 1).unwrap();
    OnnxModel::open_on(path, &cpu()).map(OnnxModelOpened).map_err(refused)
}

struct OnnxModelOpened(OnnxModel);

impl std::fmt::Debug for OnnxModelOpened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.program().fmt(f)
    }
}

#[test]
fn a_forged_interface_with_right_checksums_is_an_error_and_never_a_panic() {
    let session = cpu();
    let written = Written::of(&imported(&layered(named()), &session), &[]);
    let (path, whole) = (written.path(), std::fs::read(written.path()).unwrap());
    let given = [("x", value(&[2, 24], 5)), ("z", value(&[3], 9))];
    let mut state = 5;
    let mut refusals = 0;
    for _ in 0..100 {
        std::fs::write(&path, &whole).unwrap();
        let (place, mask) = (random(&mut state) as usize, 1 << (random(&mut state) % 8));
        let opened = changed(
            &path,
            |_| {},
            |name, bytes| {
                if name == "file/interface" {
                    let at = place % bytes.len();
                    bytes[at] ^= mask;
                }
            },
        );
        match opened {
            Ok(model) => drop(model.0.run(&given)),
            Err(AotCacheError::Refused { .. }) => refusals += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert!(refusals > 30, "{refusals} refusals");
}
