use super::*;
use crate::backend::cpu::CpuBackend;
use crate::backend::reference::ReferenceBackend;
use crate::backend::{BackendError, Context, Io, KernelChoice, Program};
use crate::plan::{Lir, PlanTarget};
use rlx_graph::passes::{PASSES, Target};
use rlx_kernels::isa::Isa;
use rlx_tensor::DimBinding;

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

fn values(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(next).collect()
}

fn compiled() -> CompiledGraph {
    let graph = rlx_graph::text::parse(GRAPH).unwrap();
    let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(Isa::Scalar, 2));
    let compiled = Session::with_backend(backend).compile(&graph).unwrap();
    for (name, count) in [("w1", 32 * 48), ("w2", 48 * 32), ("bias", 48)] {
        compiled.set_param(name, values(count, count as u32).as_slice()).unwrap();
    }
    compiled
}

fn no_state() -> State {
    State::default()
}

#[test]
fn the_estimate_is_what_contexts_and_the_registry_hold() {
    let compiled = compiled();
    for rows in [1, 7, 130] {
        let binding = DimBinding::new().with("rows", rows);
        let estimate = compiled.estimate(&binding).unwrap();
        let context = compiled.context(&compiled.specialize(&binding).unwrap()).unwrap();
        let held = (estimate.activation_bytes as usize, estimate.workspace_bytes as usize);
        assert_eq!(held, context.bytes(), "{rows} rows");
        assert_eq!(estimate.weight_bytes, compiled.weights().total_bytes());
        let own = compiled.program().unwrap().own_bytes() as u64;
        assert_eq!((estimate.packed_bytes, own), (compiled.weights().packed_bytes() + own, 48 * 4));
        assert_eq!(estimate.input_bytes, (rows * 32 * 4) as u64);
        assert_eq!(estimate.output_bytes, (rows * 32 * 4) as u64);
        assert_eq!((estimate.state_bytes, estimate.mapped_bytes, estimate.adapter_bytes), (0, 0, 0));
    }
}

#[test]
fn the_estimate_needs_no_weights_but_every_symbol() {
    let graph = rlx_graph::text::parse(GRAPH).unwrap();
    let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(Isa::Scalar, 2));
    let bare = Session::with_backend(backend).compile(&graph).unwrap();
    let binding = DimBinding::new().with("rows", 5);
    assert_eq!(bare.estimate(&binding).unwrap(), compiled().estimate(&binding).unwrap());
    let error = bare.estimate(&DimBinding::new()).unwrap_err().to_string();
    assert!(error.contains("rows"), "{error}");
}

#[test]
fn the_report_counts_work_and_prints_a_table() {
    let report = compiled().report().unwrap();
    let binding = DimBinding::new().with("rows", 10);
    let work = report.work(&binding).unwrap();
    let linear: usize =
        report.steps.iter().zip(&work).filter(|(s, _)| s.op == "linear").map(|(_, w)| w.flops).sum();
    assert_eq!(linear, 2 * 2 * 10 * 32 * 48);
    assert!(report.fusions.iter().any(|f| f.times > 0));
    let table = report.table(&binding).unwrap().to_string();
    assert!(table.starts_with("layers on cpu\n"), "{table}");
    for part in ["linear", "softmax", "rewrite ", "MFLOP", &report.steps[0].kernel] {
        assert!(table.contains(part), "{part} is not in\n{table}");
    }
    assert!(report.work(&DimBinding::new()).is_err());
}

#[test]
fn a_trace_has_an_event_a_step_in_order() {
    let compiled = compiled();
    let binding = DimBinding::new().with("rows", 9);
    let mut context = compiled.context(&compiled.specialize(&binding).unwrap()).unwrap();
    let times = StepTimes::new(&compiled).unwrap();
    let (x, mut y) = (values(9 * 32, 1), vec![0u8; 9 * 32 * 4]);
    let inputs = [("x", TensorArg::typed(&[9, 32], &x))];
    context.run_into(&mut no_state(), &inputs, &mut [("y", &mut y[..])], times.control()).unwrap();
    assert!(times.steps().all(|(_, time)| time.as_nanos() > 0));
    let trace: serde_json::Value = serde_json::from_str(&times.chrome_trace()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    assert_eq!(events.len(), times.steps().len());
    let mut end = 0.0;
    for (event, (step, _)) in events.iter().zip(times.steps()) {
        assert_eq!(event["name"], step.op.as_str());
        let (start, length) = (event["ts"].as_f64().unwrap(), event["dur"].as_f64().unwrap());
        assert!((start - end).abs() < 1e-6 && length > 0.0);
        end = start + length;
    }
    times.reset();
    assert!(times.steps().all(|(_, time)| time.is_zero()));
}

#[test]
fn a_tapped_value_is_the_one_the_graph_works_with() {
    let compiled = compiled();
    let (last, _) = compiled.graph().nodes().next_back().unwrap();
    let value = compiled.graph().node(last).outputs[0];
    let x = values(3 * 32, 2);
    let found = compiled.tap(&[value]).unwrap().run(&[("x", TensorArg::typed(&[3, 32], &x))]).unwrap();
    let direct = compiled.run(&[("x", TensorArg::typed(&[3, 32], &x))]).unwrap();
    assert_eq!((found[0].0.as_str(), found[1].0.as_str()), ("y", tap_name(value).as_str()));
    assert!(found[0].1.bits_eq(&direct[0].1) && found[1].1.bits_eq(&direct[0].1));
}

#[test]
fn the_cpu_agrees_with_the_reference_step_by_step() {
    let compiled = compiled();
    let reference: Arc<dyn Backend> = Arc::new(ReferenceBackend::default());
    let x = values(6 * 32, 3);
    let comparison = compiled.compare(&reference, None, &[("x", TensorArg::typed(&[6, 32], &x))]).unwrap();
    assert_eq!(comparison.results.len(), compiled.graph().nodes().len());
    assert!(comparison.skipped.is_empty());
    assert!(comparison.first_disagreement().is_none(), "{comparison:?}");
    assert!(comparison.results.iter().all(|r| r.tolerance > 0.0 && r.tolerance < 1e-2));
}

#[test]
fn the_first_step_that_disagrees_is_named() {
    let wrong: Arc<dyn Backend> = Arc::new(Wrong { inner: ReferenceBackend::default(), op: "softmax" });
    let x = values(6 * 32, 3);
    let comparison = compiled().compare(&wrong, None, &[("x", TensorArg::typed(&[6, 32], &x))]).unwrap();
    let first = comparison.first_disagreement().unwrap();
    assert_eq!(first.op, "softmax");
    assert!(first.difference > first.tolerance);
    assert_eq!(comparison.results.iter().filter(|r| !r.agrees()).count(), 1);
}

/// The reference backend with one op's result off in its first element.
struct Wrong {
    inner: ReferenceBackend,
    op: &'static str,
}

#[derive(Debug)]
struct WrongProgram(Arc<dyn Program>, bool);

#[derive(Debug)]
struct WrongContext(Box<dyn Context>, bool);

impl Backend for Wrong {
    fn name(&self) -> &str {
        "wrong"
    }

    fn target(&self) -> &dyn Target {
        self.inner.target()
    }

    fn plan_target(&self) -> &dyn PlanTarget {
        self.inner.plan_target()
    }

    fn packed_bytes(&self, template: &Template) -> Result<usize, BackendError> {
        self.inner.packed_bytes(template)
    }

    fn own_bytes(&self, template: &Template) -> usize {
        self.inner.own_bytes(template)
    }

    fn workspace_bytes(&self, lir: &Lir) -> Result<usize, BackendError> {
        self.inner.workspace_bytes(lir)
    }

    fn load(
        &self,
        template: &Arc<Template>,
        weights: &WeightRegistry,
    ) -> Result<Arc<dyn Program>, BackendError> {
        let wrong = template.steps().iter().any(|s| s.op.def().name() == self.op);
        Ok(Arc::new(WrongProgram(self.inner.load(template, weights)?, wrong)))
    }
}

impl Program for WrongProgram {
    fn context(&self, lir: &Lir) -> Result<Box<dyn Context>, BackendError> {
        Ok(Box::new(WrongContext(self.0.context(lir)?, self.1)))
    }

    fn kernels(&self) -> Vec<KernelChoice> {
        self.0.kernels()
    }
}

impl Context for WrongContext {
    fn run(&mut self, io: Io<'_, '_>) -> Result<(), BackendError> {
        let Io { symbols, inputs, outputs, states, control } = io;
        self.0.run(Io { symbols, inputs, outputs: &mut *outputs, states, control })?;
        if self.1 {
            outputs[0][..4].copy_from_slice(&2.5f32.to_le_bytes());
        }
        Ok(())
    }

    fn bytes(&self) -> (usize, usize) {
        self.0.bytes()
    }
}

#[test]
fn a_device_without_a_backend_is_an_error_that_names_it() {
    assert!(Session::new(crate::devices::Device::Cpu).is_ok());
    let error = Session::new(crate::devices::DeviceId { kind: crate::devices::Device::Cuda, index: 1 })
        .map(drop)
        .unwrap_err();
    assert_eq!(error.to_string(), "this build has no backend for cuda:1; it has: cpu");
    assert!(Session::new(crate::devices::DeviceId { kind: crate::devices::Device::Cpu, index: 3 }).is_err());
}

/// Without `dce` a view that nothing reads may stand behind the last step.
#[test]
fn a_dead_view_behind_the_last_step_lives_within_the_plan() {
    let text = r#"graph "g" {
  input @x : f32[2, 3]
  %1 : f32[2, 3] = unary(@x) {kind=exp}
  %2 : f32[2, 3] = unary(%1) {kind=neg}
  %3 : f32[6] = reshape(%1) {dims=dims[6]}
  return "y": %2
}"#;
    let skip = PASSES.iter().map(|pass| pass.name).filter(|name| *name != "legalise");
    let passes = PassOptions { skip: skip.map(str::to_owned).collect(), ..PassOptions::default() };
    let options = CompileOptions { passes, ..CompileOptions::default() };
    let session = Session::with_backend(Arc::new(CpuBackend::new(Isa::Scalar, 1)));
    let graph = rlx_graph::text::parse(text).unwrap();
    let compiled = session.compile_with(&graph, &options).unwrap();
    let lir = compiled.specialize(&DimBinding::new()).unwrap();
    assert_eq!(lir.verify(), Ok(()));
}
