//! Measuring what a device reaches: small graphs run through its own backend.

use super::cost::DeviceRates;
use crate::backend::Backend;
use crate::session::{CompileOptions, RunContext, Session, SessionError, State, TensorArg};
use rlx_graph::eval::from_f64;
use rlx_graph::ops::activation::{Activation, ActivationKind};
use rlx_graph::ops::linear::Linear;
use rlx_graph::ops::softmax::Softmax;
use rlx_graph::{Graph, GraphError};
use rlx_kernels::schedule::RunControl;
use rlx_tensor::time::Instant;
use rlx_tensor::{DType, DimBinding, Shape};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// What one measurement may take, unless a single run takes longer.
const BUDGET: Duration = Duration::from_millis(40);
/// Runs of one measurement at most.
const RUNS: usize = 12;

/// Rows, inner dim and columns of the product that the rate of arithmetic is taken from.
const PRODUCT: (usize, usize, usize) = (64, 384, 384);
/// Rows and columns of the matrix that a single row is multiplied with: more bytes than a core's own cache holds.
const STREAM: usize = 1536;
/// Elements of the operand of an elementwise op.
const VECTOR: [usize; 2] = [64, 512];
/// Steps that do nothing to speak of, one after the other.
const CHAIN: usize = 8;

/// Dtypes of weights that rates are measured for.
const WEIGHTS: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// Measures a device: well under a second on a CPU with vector units. A dtype of weights that it does not run has no rate.
///
/// # Errors
/// What the device says to plain f32 graphs.
pub fn calibrate(backend: &Arc<dyn Backend>) -> Result<DeviceRates, SessionError> {
    let (rows, k, n) = PRODUCT;
    let mut matrix_flops = BTreeMap::new();
    for dtype in WEIGHTS {
        match seconds(backend, &linear([rows, k], [n, k], dtype)?, &[rows, k]) {
            Ok(time) => drop(matrix_flops.insert(dtype.to_string(), (2 * rows * k * n) as f64 / time)),
            Err(error) if dtype == DType::F32 => return Err(error),
            Err(_) => {}
        }
    }
    let chain = seconds(backend, &chain()?, &[1, 16])?;
    let dispatch_s = chain / CHAIN as f64;
    let stream = seconds(backend, &linear([1, STREAM], [STREAM, STREAM], DType::F32)?, &[1, STREAM])?;
    let stream_bytes = (STREAM * STREAM + 2 * STREAM) * 4;
    let (vector, operations) = elementwise()?;
    let vector = seconds(backend, &vector, &VECTOR)?;
    let beyond_dispatch = |time: f64| (time - dispatch_s).max(time / 2.0);
    Ok(DeviceRates {
        matrix_flops,
        vector_flops: operations as f64 / beyond_dispatch(vector),
        bytes_per_s: stream_bytes as f64 / beyond_dispatch(stream),
        dispatch_s,
    })
}

fn linear(x: [usize; 2], w: [usize; 2], dtype: DType) -> Result<Graph, GraphError> {
    let mut graph = Graph::new("calibrate product");
    let x = graph.input("x", Shape::new(&x, DType::F32))?;
    let w = graph.param("w", Shape::new(&w, dtype))?;
    let y = graph.add_one(Linear::plain(), &[x, w])?;
    graph.set_outputs(&[("y", y)])?;
    Ok(graph)
}

fn chain() -> Result<Graph, GraphError> {
    let mut graph = Graph::new("calibrate dispatch");
    let mut x = graph.input("x", Shape::new(&[1, 16], DType::F32))?;
    for _ in 0..CHAIN {
        x = graph.add_one(Softmax { axis: 1 }, &[x])?;
    }
    graph.set_outputs(&[("y", x)])?;
    Ok(graph)
}

/// The graph, and its operations as the op itself counts them.
fn elementwise() -> Result<(Graph, usize), GraphError> {
    let mut graph = Graph::new("calibrate elementwise");
    let shape = Shape::new(&VECTOR, DType::F32);
    let x = graph.input("x", shape)?;
    let y = graph.add_one(Activation { kind: ActivationKind::Silu }, &[x])?;
    graph.set_outputs(&[("y", y)])?;
    let (_, node) = graph.nodes().next_back().ok_or_else(|| GraphError::Shape {
        op: "activation".to_owned(),
        reason: "no node".to_owned(),
        location: String::new(),
    })?;
    let cost = node.op.def().cost(&[graph.shape(x)], &[graph.shape(y)]);
    let operations = cost.flops.known().unwrap_or(VECTOR.iter().product());
    Ok((graph, operations.max(1)))
}

/// The time of the fastest of several runs: what the device does when nothing disturbs it.
fn seconds(backend: &Arc<dyn Backend>, graph: &Graph, dims: &[usize]) -> Result<f64, SessionError> {
    let session = Session::with_backend(Arc::clone(backend));
    let compiled = session.compile_with(graph, &CompileOptions::default())?;
    for param in compiled.params() {
        let dims = param.shape.known_dims().unwrap_or_default();
        let values: Vec<f64> =
            (0..dims.iter().product()).map(|i: usize| (i % 7) as f64 * 0.25 - 0.75).collect();
        let tensor = from_f64(&dims, param.shape.dtype(), &values).map_err(|cause| {
            crate::backend::BackendError::Eval { op: "a calibration weight".to_owned(), cause }
        })?;
        compiled.set_param(&param.name, &tensor)?;
    }
    let lir = compiled.specialize(&DimBinding::new())?;
    let mut context = compiled.context(&lir)?;
    let x: Vec<f32> = (0..dims.iter().product()).map(|i: usize| (i % 5) as f32 * 0.5 - 1.0).collect();
    let mut y = vec![0u8; lir.buffer_bytes(compiled.outputs()[0].place.buffer)];
    once(&mut context, dims, &x, &mut y)?;
    let (started, mut fastest) = (Instant::now(), f64::INFINITY);
    for _ in 0..RUNS {
        fastest = fastest.min(once(&mut context, dims, &x, &mut y)?);
        if started.elapsed() >= BUDGET {
            break;
        }
    }
    // A clock that does not resolve a run would make an infinite rate.
    Ok(fastest.max(1e-9))
}

fn once(context: &mut RunContext, dims: &[usize], x: &[f32], y: &mut [u8]) -> Result<f64, SessionError> {
    let started = Instant::now();
    let inputs = [("x", TensorArg::typed(dims, x))];
    context.run_into(&mut State::default(), &inputs, &mut [("y", y)], RunControl::default())?;
    Ok(started.elapsed().as_secs_f64())
}

/// The processor's name, which measured rates are kept by.
pub fn cpu_model() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field =
        |line: &str| line.strip_prefix("model name")?.split_once(':').map(|(_, v)| v.trim().to_owned());
    text.lines().find_map(field).unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

/// What rates of a backend are kept under: another machine, setting or version measures anew.
pub(super) fn rates_key(backend: &dyn Backend) -> String {
    let capabilities = backend.capabilities().join(", ");
    format!("{} | {} | {} | {}", env!("CARGO_PKG_VERSION"), cpu_model(), backend.fingerprint(), capabilities)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::fake::{FakeBackend, Fault, Script};
    use crate::backend::reference::ReferenceBackend;
    use crate::session::contract::cpu;

    #[test]
    fn every_device_gets_finite_rates_and_the_slow_one_is_slower() {
        let fast = calibrate(cpu(1).backend()).unwrap();
        let slow: Arc<dyn Backend> = Arc::new(ReferenceBackend::default());
        let slow = calibrate(&slow).unwrap();
        for rates in [&fast, &slow] {
            let all = rates.matrix_flops.values().chain([
                &rates.vector_flops,
                &rates.bytes_per_s,
                &rates.dispatch_s,
            ]);
            assert!(all.into_iter().all(|v| v.is_finite() && *v > 0.0), "{rates:?}");
        }
        assert_eq!(fast.matrix_flops.len(), 3);
        assert!(fast.matrix_rate(DType::F32) > slow.matrix_rate(DType::F32));
        assert_eq!(fast.matrix_rate(DType::I8), fast.matrix_rate(DType::F32), "unmeasured: as f32");
        assert!(!cpu_model().is_empty());
    }

    #[test]
    fn a_device_that_fails_is_not_calibrated() {
        let script = Arc::new(Script::default());
        let broken: Arc<dyn Backend> = Arc::new(FakeBackend::new("fake", Arc::clone(&script)));
        script.fail_runs(Fault::Panic);
        assert!(calibrate(&broken).unwrap_err().is_device_fault());
    }
}
