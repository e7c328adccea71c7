//! What a session promises, a test for each promise.

use super::*;
use crate::aot::AotCache;
use crate::backend::fake::{FakeBackend, Fault, Script};
use crate::pipeline::ModelCompilePipeline;
use crate::plan::parse_lir;
use crate::weights::WeightKind;
use rlx_graph::attrs::Attrs;
use rlx_graph::hir::{AttentionOperands, CacheOperands};
use rlx_graph::op::{EvalError, InferCx, InferError, Props};
use rlx_graph::ops::attention::Attention;
use rlx_graph::{Op, OpDef};
use rlx_kernels::schedule::{RunControl, StepError};
use rlx_tensor::{DType, Dim, DimBinding, Shape, Tensor};
use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

const GRAPH: &str = r#"
graph "layers" {
  input @x : f32[rows, 32]
  param @w1 : f32[32, 48]
  param @w2 : f32[48, 32]
  param @bias : f32[48]
  %4 : f32[rows, 48] = matmul(@x, @w1) {transpose_a=false, transpose_b=false}
  %5 : f32[rows, 48] = binary(%4, @bias) {kind=add}
  %6 : f32[rows, 48] = softmax(%5) {axis=1}
  %7 : f32[rows, 32] = matmul(%6, @w2) {transpose_a=false, transpose_b=false}
  %8 : f32[rows, 32] = binary(%7, @x) {kind=add}
  return "y": %8
}
"#;

/// Two products with a softmax between.
pub(crate) fn graph() -> Graph {
    GRAPH.parse().unwrap()
}

/// Numbers that only depend on the seed.
pub(crate) fn values(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(next).collect()
}

/// The CPU.
pub(crate) fn cpu(threads: usize) -> Session {
    Session::with_backend(Arc::new(CpuBackend::new(Isa::detect(), threads)))
}

fn fill(compiled: &CompiledGraph) {
    for (name, count) in [("w1", 32 * 48), ("w2", 48 * 32), ("bias", 48)] {
        compiled.set_param(name, values(count, count as u32).as_slice()).unwrap();
    }
}

fn compiled(session: &Session) -> CompiledGraph {
    let compiled = session.compile(&graph()).unwrap();
    fill(&compiled);
    compiled
}

fn fake() -> (Session, Arc<Script>) {
    let script = Arc::new(Script::default());
    (Session::with_backend(Arc::new(FakeBackend::new("fake", Arc::clone(&script)))), script)
}

fn y(compiled: &CompiledGraph, rows: usize) -> Result<Tensor, SessionError> {
    let x = values(rows * 32, rows as u32);
    Ok(compiled.run(&[("x", TensorArg::typed(&[rows, 32], &x))])?.remove(0).1)
}

static PANICS_SEEN: AtomicUsize = AtomicUsize::new(0);

#[test]
fn a_backend_panic_is_contained_and_the_panic_hook_stays() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if info.payload().downcast_ref::<&str>() == Some(&"a driver bug") {
            PANICS_SEEN.fetch_add(1, Ordering::SeqCst);
        }
        before(info);
    }));
    let (session, script) = fake();
    let executable = compiled(&session);
    let mut context =
        executable.context(&executable.specialize(&DimBinding::new().with("rows", 4)).unwrap()).unwrap();
    script.fail_runs(Fault::Panic);
    let seen = PANICS_SEEN.load(Ordering::SeqCst);
    let error = y(&executable, 3).unwrap_err();
    assert!(error.is_device_fault() && error.to_string().contains("a driver bug"), "{error}");
    assert!(PANICS_SEEN.load(Ordering::SeqCst) > seen, "the hook that was set is the one that was called");
    script.fail_runs(Fault::None);
    let error = y(&executable, 3).unwrap_err();
    assert!(matches!(error, SessionError::Backend(BackendError::Discarded { .. })), "{error}");
    let x = values(4 * 32, 1);
    let error = context.run(&mut State::default(), &[("x", TensorArg::typed(&[4, 32], &x))]).unwrap_err();
    assert!(matches!(error, SessionError::Backend(BackendError::Discarded { .. })), "{error}");
    assert!(y(&session.compile(&graph()).unwrap(), 3).is_ok(), "the session and its weights stay usable");
}

#[test]
fn a_panic_while_loading_is_contained() {
    let (session, script) = fake();
    script.fail_loads(Fault::Panic);
    let error = y(&compiled(&session), 3).unwrap_err();
    assert!(matches!(error, SessionError::Backend(BackendError::Panicked { .. })), "{error}");
}

#[test]
fn a_cancelled_run_and_a_passed_deadline_are_errors_of_run_and_run_into() {
    for session in [cpu(2), fake().0] {
        let executable = compiled(&session);
        let x = values(5 * 32, 5);
        let inputs = [("x", TensorArg::typed(&[5, 32], &x))];
        let token = CancelToken::new();
        token.cancel();
        let flag = AtomicBool::new(false);
        let cancelled = token.control(None);
        let late = RunControl { cancel: Some(&flag), deadline: Some(Instant::now()), times: None };
        let lir = executable.specialize(&DimBinding::new().with("rows", 5)).unwrap();
        let mut context = executable.context(&lir).unwrap();
        let mut into = vec![0u8; 5 * 32 * 4];
        for (control, expected) in [(cancelled, StepError::Cancelled), (late, StepError::DeadlinePassed)] {
            let run = executable.run_controlled(&mut State::default(), &inputs, control).unwrap_err();
            let run_into = context
                .run_into(&mut State::default(), &inputs, &mut [("y", &mut into[..])], control)
                .unwrap_err();
            for error in [run, run_into] {
                assert!(!error.is_device_fault(), "{error}");
                let SessionError::Backend(BackendError::Step(step)) = error else { panic!("{error}") };
                assert_eq!(step, expected);
            }
        }
        context
            .run_into(&mut State::default(), &inputs, &mut [("y", &mut into[..])], RunControl::default())
            .unwrap();
        assert_eq!(y(&executable, 5).unwrap().bytes(), into);
    }
}

/// A running sum: `sum += x`, and the sum as output.
#[derive(Debug)]
struct Accumulate;

impl OpDef for Accumulate {
    fn name(&self) -> &'static str {
        "accumulate"
    }

    fn attrs(&self) -> Attrs {
        Attrs::default()
    }

    fn infer(&self, _cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        Ok(vec![inputs[0].clone()])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let pairs = inputs[0].as_slice::<f32>()?.iter().zip(inputs[1].as_slice::<f32>()?);
        let sum: Vec<f32> = pairs.map(|(a, b)| a + b).collect();
        let sum = Tensor::from_slice(inputs[0].dims(), &sum)?;
        Ok(vec![sum.clone(), sum])
    }

    fn props(&self) -> Props {
        Props { writes: vec![0], ..Props::default() }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[test]
fn a_failed_run_leaves_an_overwritten_state_as_it_was() {
    let mut graph = Graph::new("sum");
    let shape = Shape::new(&[3], DType::F32);
    let (x, sum) = (graph.input("x", shape.clone()).unwrap(), graph.state("sum", shape).unwrap());
    let total = graph.add_one(Op::Custom(Arc::new(Accumulate)), &[sum, x]).unwrap();
    graph.set_outputs(&[("total", total)]).unwrap();
    let (session, script) = fake();
    let executable = session.compile(&graph).unwrap();
    let mut state = State::default();
    let add = |state: &mut State, x: &[f32]| executable.run_with(state, &[("x", x.into())]);
    assert!({
        script.fail_runs(Fault::OutOfMemory);
        add(&mut state, &[1.0; 3]).is_err()
    });
    assert_eq!(state.bytes(), 0, "a state that the failed run had made is gone");
    script.fail_runs(Fault::None);
    add(&mut state, &[1.0, 2.0, 3.0]).unwrap();
    script.fail_runs(Fault::OutOfMemory);
    assert!(add(&mut state, &[10.0; 3]).is_err());
    assert_eq!(state.buffer(0).unwrap(), bytemuck::cast_slice::<f32, u8>(&[1.0, 2.0, 3.0]));
    script.fail_runs(Fault::None);
    let total = add(&mut state, &[1.0; 3]).unwrap().remove(0).1;
    assert_eq!(total.as_slice::<f32>().unwrap(), [2.0, 3.0, 4.0]);
    let lir = executable.specialize(&DimBinding::new()).unwrap();
    let estimate = executable.estimate(&DimBinding::new()).unwrap();
    let held = executable.context(&lir).unwrap().bytes().1;
    assert_eq!(estimate.workspace_bytes as usize, executable.backend().workspace_bytes(&lir).unwrap() + 12);
    assert_eq!(held, 12, "the copy is counted");
}

/// Attention over a cache, two heads of 8.
pub(crate) fn cached() -> Graph {
    let mut module = HirModule::new("cached");
    let mut hir = module.edit();
    let (rows, batch, blocks) = (Dim::symbol("rows"), Dim::symbol("batch"), Dim::symbol("blocks"));
    let q = hir.input("q", &[rows, Dim::Known(16)], DType::F32).unwrap();
    let seq_starts = hir.input("seq_starts", &[batch.clone() + Dim::Known(1)], DType::I32).unwrap();
    let past = hir.input("past", std::slice::from_ref(&batch), DType::I32).unwrap();
    let block_table = hir.input("block_table", &[batch, Dim::symbol("table")], DType::I32).unwrap();
    let k_dims = [blocks.clone(), Dim::Known(2), Dim::Known(8), Dim::Known(64)];
    let k_cache = hir.state("k", &k_dims, DType::F32).unwrap();
    let v_dims = [blocks, Dim::Known(2), Dim::Known(64), Dim::Known(8)];
    let v_cache = hir.state("v", &v_dims, DType::F32).unwrap();
    let cache = Some(CacheOperands { past, block_table, k_cache, v_cache });
    let op = Attention {
        heads: 2,
        kv_heads: 2,
        head_dim: 8,
        scale: 0.3,
        causal: true,
        window: None,
        softcap: None,
        mask: false,
        cache: false,
    };
    let operands = AttentionOperands { q, k: q, v: q, seq_starts, mask: None, cache };
    let out = hir.attention(op, &operands).unwrap();
    module.finish(&[("out", out)]).unwrap()
}

#[test]
fn a_failed_run_leaves_a_cache_as_if_it_had_not_run() {
    let (session, script) = fake();
    let executable = session.compile(&cached()).unwrap();
    let step = |state: &mut State, past: i32, seed: u32| {
        let q = values(3 * 16, seed);
        executable.run_with(
            state,
            &[
                ("q", TensorArg::typed(&[3, 16], &q)),
                ("seq_starts", TensorArg::typed(&[2], &[0i32, 3])),
                ("past", TensorArg::typed(&[1], &[past])),
                ("block_table", TensorArg::typed(&[1, 1], &[0i32])),
            ],
        )
    };
    let fresh = || executable.new_state(&DimBinding::new().with("blocks", 1)).unwrap();
    let (mut plain, mut failed) = (fresh(), fresh());
    for state in [&mut plain, &mut failed] {
        step(state, 0, 1).unwrap();
    }
    script.fail_runs(Fault::Lost);
    assert!(step(&mut failed, 3, 9).unwrap_err().is_device_fault());
    script.fail_runs(Fault::None);
    for (past, seed) in [(3, 2), (6, 3)] {
        let (a, b) = (step(&mut plain, past, seed).unwrap(), step(&mut failed, past, seed).unwrap());
        assert!(a[0].1.bits_eq(&b[0].1));
    }
    assert_eq!(plain.buffer(0).unwrap(), failed.buffer(0).unwrap());
}

#[test]
fn an_unset_param_is_an_error_that_names_it() {
    let executable = cpu(1).compile(&graph()).unwrap();
    executable.set_param("w1", values(32 * 48, 1).as_slice()).unwrap();
    let error = y(&executable, 2).unwrap_err().to_string();
    assert!(error.contains("w2: missing") && error.contains("bias: missing"), "{error}");
    assert!(!error.contains("w1"), "{error}");
}

#[test]
fn an_input_that_is_unknown_missing_of_wrong_dtype_or_length_is_an_error_that_names_it() {
    let executable = compiled(&cpu(1));
    let x = values(64, 1);
    let ints = [1i32; 64];
    let good = TensorArg::typed(&[2, 32], &x);
    let cases: [(&[(&str, TensorArg<'_>)], &str); 7] = [
        (&[("z", good)], "the graph has no input \"z\"; did you mean \"x\"?"),
        (&[], "input \"x\" was not given"),
        (&[("x", good), ("x", good)], "input \"x\" was given twice"),
        (&[("x", TensorArg::typed(&[2, 32], &ints))], "\"x\" must be f32, found i32"),
        (&[("x", TensorArg::typed(&[2, 32], &x[1..]))], "\"x\" must be f32[rows, 32]"),
        (&[("x", TensorArg::typed(&[2, 31], &x[..62]))], "\"x\" must be f32[rows, 32], found [2, 31]"),
        (&[("x", TensorArg::typed(&[64], &x))], "\"x\" must be f32[rows, 32], found [64]"),
    ];
    let lir = executable.specialize(&DimBinding::new().with("rows", 2)).unwrap();
    let mut context = executable.context(&lir).unwrap();
    for (inputs, expected) in cases {
        let error = executable.run(inputs).unwrap_err();
        assert!(error.to_string().starts_with(expected) && !error.is_device_fault(), "{error}");
        let error = context.run(&mut State::default(), inputs).unwrap_err();
        assert!(error.to_string().starts_with(expected), "{error}");
    }
    let error = executable.set_param("w3", values(4, 1).as_slice()).unwrap_err().to_string();
    assert!(error.contains("no param \"w3\"; did you mean \"w1\"?"), "{error}");
    let error = executable.set_param("w1", values(4, 1).as_slice()).unwrap_err().to_string();
    assert!(error.contains("\"w1\" must be f32[32, 48], found 16 bytes"), "{error}");
}

#[test]
fn compile_lists_all_missing_and_mismatched_weights_at_once() {
    let session = cpu(1);
    let floats = |count: usize| Arc::<[u8]>::from(vec![0u8; count * 4]);
    let base = WeightKind::Base;
    let register = |name: &str, dims: &[usize], dtype, bytes| {
        session.weights().register(name, Shape::new(dims, dtype), bytes, base.clone()).unwrap();
    };
    register("w1", &[48, 32], DType::F32, floats(48 * 32));
    register("bias", &[48], DType::I32, floats(48));
    register("spare", &[1], DType::F32, floats(1));
    let options = CompileOptions { weights_required: true, ..CompileOptions::default() };
    let error = session.compile_with(&graph(), &options).map(drop).unwrap_err();
    let SessionError::Weights { problems } = &error else { panic!("{error}") };
    assert_eq!(problems.len(), 3, "{error}");
    let text = error.to_string();
    for line in [
        "w1: expected f32[32, 48], found f32[48, 32]",
        "w2: missing, expected f32[48, 32]",
        "bias: expected f32[48], found i32[48]",
    ] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
}

#[test]
fn unexpected_weights_are_listed_in_the_report() {
    let session = cpu(1);
    let executable = compiled(&session);
    let shape = Shape::new(&[1], DType::F32);
    session.weights().register("spare", shape, vec![0u8; 4], WeightKind::Base).unwrap();
    assert_eq!(executable.report().unwrap().unused_weights, ["spare"]);
}

#[test]
fn integers_above_two_to_the_24_pass_through_exactly() {
    let text = r#"graph "ints" {
  input @x : i64[3]
  param @p : i64[3]
  %2 : i64[3] = binary(@x, @p) {kind=add}
  return "same": @x, "sum": %2
}
"#;
    let big = [(1i64 << 53) + 1, -(1 << 24) - 1, i64::MAX - 7];
    for session in [cpu(1), fake().0] {
        let executable = session.compile(&text.parse().unwrap()).unwrap();
        executable.set_param("p", &[1i64, -1, 7][..]).unwrap();
        let results = executable.run(&[("x", (&big[..]).into())]).unwrap();
        assert_eq!(results[0].1.as_slice::<i64>().unwrap(), big);
        assert_eq!(results[1].1.as_slice::<i64>().unwrap(), [big[0] + 1, big[1] - 1, i64::MAX]);
    }
}

#[test]
fn four_threads_run_one_executable_and_get_the_single_thread_bits() {
    let executable = compiled(&cpu(2));
    let wanted: Vec<Tensor> = (1..=16).map(|rows| y(&compiled(&cpu(1)), rows).unwrap()).collect();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (executable, wanted) = (&executable, &wanted);
            scope.spawn(move || {
                for i in 0..32 {
                    let rows = 1 + (thread * 5 + i * 3) % 16;
                    assert!(y(executable, rows).unwrap().bits_eq(&wanted[rows - 1]), "{rows} rows");
                }
            });
        }
    });
}

#[test]
fn a_new_param_value_is_seen_by_the_next_run_while_runs_in_flight_finish_on_the_old_one() {
    let executable = compiled(&cpu(2));
    let version = |i: u32| values(48, 100 + i);
    let results: Vec<Tensor> = (0..8)
        .map(|i| {
            executable.set_param("bias", version(i).as_slice()).unwrap();
            y(&executable, 3).unwrap()
        })
        .collect();
    let (lir, done) =
        (executable.specialize(&DimBinding::new().with("rows", 3)).unwrap(), AtomicBool::new(false));
    let mut pinned = executable.context(&lir).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let found = y(&executable, 3).unwrap();
                    assert!(results.iter().any(|r| r.bits_eq(&found)), "a mixture of two versions");
                }
            });
        }
        for i in (0..8).chain(0..8) {
            executable.set_param("bias", version(i).as_slice()).unwrap();
            let found = y(&executable, 3).unwrap();
            assert!(found.bits_eq(&results[i as usize]), "version {i} was set, another was seen");
        }
        done.store(true, Ordering::Relaxed);
    });
    let x = values(3 * 32, 3);
    let kept = pinned.run(&mut State::default(), &[("x", TensorArg::typed(&[3, 32], &x))]).unwrap();
    assert!(kept[0].1.bits_eq(&results[7]), "a context keeps the version it was made with");
}

#[test]
fn a_value_set_through_the_registry_is_seen_too() {
    let session = cpu(1);
    let (first, second) = (compiled(&session), session.compile(&graph()).unwrap());
    let before = y(&second, 2).unwrap();
    first.set_param("bias", values(48, 7).as_slice()).unwrap();
    let (a, b) = (y(&first, 2).unwrap(), y(&second, 2).unwrap());
    assert!(a.bits_eq(&b) && !b.bits_eq(&before));
}

#[test]
fn a_symbolic_graph_specialises_per_shape_in_a_bounded_least_recently_used_list() {
    let executable = compiled(&cpu(1));
    let shapes: Vec<usize> = (0..9).map(|i| 100 * (1 + 4 * i)).collect();
    for &rows in &shapes[..8] {
        y(&executable, rows).unwrap();
    }
    assert_eq!(executable.specialisations(), 8);
    y(&executable, shapes[0]).unwrap();
    assert_eq!(executable.specialisations(), 8, "a shape seen again is not specialised again");
    y(&executable, shapes[8]).unwrap();
    y(&executable, shapes[0]).unwrap();
    assert_eq!(executable.specialisations(), 9, "the one used last stays");
}

#[test]
fn every_entry_point_gives_the_same_bits_and_the_same_checks() {
    let session = cpu(2);
    let from_graph = compiled(&session);
    let lir = from_graph.specialize(&DimBinding::new().with("rows", 9)).unwrap();
    let options = CompileOptions { weights_required: true, ..CompileOptions::default() };
    let from_lir = session.compile_lir(&lir, &options).unwrap();
    let from_text = session.compile_lir(&parse_lir(&lir.to_string()).unwrap(), &options).unwrap();
    let mut module = HirModule::new("layers");
    let mut hir = module.edit();
    let x = hir.input("x", &[Dim::symbol("rows"), Dim::Known(32)], DType::F32).unwrap();
    let (w1, w2) =
        (hir.param("w1", &[32, 48], DType::F32).unwrap(), hir.param("w2", &[48, 32], DType::F32).unwrap());
    let bias = hir.param("bias", &[48], DType::F32).unwrap();
    let product = rlx_graph::ops::matmul::MatMul { transpose_a: false, transpose_b: false };
    let h = hir.op(product.clone(), &[x, w1]).unwrap();
    let h = hir.add(h, bias).unwrap();
    let h = hir.op(rlx_graph::ops::softmax::Softmax { axis: 1 }, &[h]).unwrap();
    let h = hir.op(product, &[h, w2]).unwrap();
    let out = hir.add(h, x).unwrap();
    let from_hir = session.compile_hir(module, &[("y", out)], &options).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let specialised = |plans_found| {
        let pipeline = ModelCompilePipeline::of_session(session.clone());
        let pipeline = pipeline.with_aot(AotCache::new(folder.path(), 1 << 30));
        let rows = DimBinding::new().with("rows", 9);
        let executable = pipeline.get_or_specialize_aot("layers", &graph(), &options, &rows).unwrap();
        assert_eq!(pipeline.plans_found(), plans_found);
        Arc::clone(executable.compiled())
    };
    let (from_pipeline, from_cache) = (specialised(0), specialised(1));
    let wanted = y(&from_graph, 7).unwrap();
    let entries = [
        ("HIR", &from_hir),
        ("LIR", &from_lir),
        ("text of a LIR", &from_text),
        ("pipeline", &*from_pipeline),
        ("cache", &*from_cache),
    ];
    for (entry, other) in entries {
        assert!(y(other, 7).unwrap().bits_eq(&wanted), "{entry}");
        let wrong = values(7 * 31, 1);
        let bad = [("x", TensorArg::typed(&[7, 31], &wrong))];
        let typed = [("x", TensorArg::typed(&[7, 32], &[1i32; 7 * 32]))];
        let good = values(7 * 32, 1);
        let misspelt = [("xx", TensorArg::typed(&[7, 32], &good))];
        for inputs in [&bad[..], &typed, &misspelt, &[]] {
            let (found, expected) = (other.run(inputs).unwrap_err(), from_graph.run(inputs).unwrap_err());
            assert_eq!(found.to_string(), expected.to_string(), "{entry}");
        }
        assert!(other.set_param("w9", 1.0f32.to_le_bytes().as_slice()).is_err(), "{entry}");
    }
    assert!(matches!(from_lir.tap(&[]), Err(SessionError::NoGraph { .. })));
    let bare = cpu(1).compile_lir(&lir, &options).map(drop).unwrap_err();
    assert!(matches!(bare, SessionError::Weights { ref problems } if problems.len() == 3), "{bare}");
}
