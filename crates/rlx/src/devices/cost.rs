//! How long a device would take: for each step the longer of arithmetic and memory traffic, and the dispatch.

use crate::plan::{BufferKind, PlanError, StepSpec, Template};
use rlx_tensor::{DType, DimBinding, Shape};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a device reaches, as measured on the machine at hand by [`super::calibrate`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceRates {
    /// Floating-point operations per second in products of matrices, by the dtype of the weights as it is spelled in texts.
    pub matrix_flops: BTreeMap<String, f64>,
    /// Operations per second in ops that do a few for each element.
    pub vector_flops: f64,
    /// Bytes per second from memory.
    pub bytes_per_s: f64,
    /// Seconds of a step that has nothing to do.
    pub dispatch_s: f64,
}

/// Operations for each element of the result from which on an op counts as a product of matrices.
const MATRIX_OPERATIONS: usize = 16;

impl DeviceRates {
    /// Operations per second in products with weights of this dtype: as measured, else as for f32.
    pub fn matrix_rate(&self, dtype: DType) -> f64 {
        let of = |dtype: DType| self.matrix_flops.get(&dtype.to_string()).copied();
        of(dtype).or_else(|| of(DType::F32)).unwrap_or(self.vector_flops)
    }
}

/// A step's share of a prediction.
#[derive(Debug, Clone, PartialEq)]
pub struct StepPrediction {
    /// The op.
    pub op: &'static str,
    /// The dtype whose rate counts: that of the weights, else of the first operand.
    pub dtype: DType,
    /// Floating-point operations.
    pub flops: usize,
    /// Bytes read and written.
    pub bytes: usize,
    /// Predicted time, dispatch included.
    pub seconds: f64,
}

/// How long a run would take.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Prediction {
    /// Each step, in order.
    pub steps: Vec<StepPrediction>,
}

impl Prediction {
    /// The sum over all steps, in seconds.
    pub fn seconds(&self) -> f64 {
        self.steps.iter().map(|step| step.seconds).sum()
    }
}

/// Predicts a run of a template at these sizes: for each step `max(flops / rate, bytes / bandwidth) + dispatch`.
///
/// The length of a KV cache counts through the sizes: attention reads as many keys as its block table may hold.
///
/// # Errors
/// [`PlanError::Dim`] for a symbol without a value.
pub fn predict(
    template: &Template,
    binding: &DimBinding,
    rates: &DeviceRates,
) -> Result<Prediction, PlanError> {
    let steps = template.steps().iter().map(|step| predict_step(template, step, binding, rates));
    Ok(Prediction { steps: steps.collect::<Result<_, _>>()? })
}

fn predict_step(
    template: &Template,
    step: &StepSpec,
    binding: &DimBinding,
    rates: &DeviceRates,
) -> Result<StepPrediction, PlanError> {
    let inputs: Vec<Shape> = step.inputs.iter().map(|p| template.shape(p)).collect();
    let outputs: Vec<Shape> = step.outputs.iter().map(|p| template.shape(p)).collect();
    let (inputs, outputs): (Vec<&Shape>, Vec<&Shape>) = (inputs.iter().collect(), outputs.iter().collect());
    let op = step.op.def();
    let cost = op.cost(&inputs, &outputs);
    let (flops, bytes) = (cost.flops.eval(binding)?, cost.bytes.eval(binding)?);
    let elements = outputs.first().map_or(Ok(1), |shape| shape.elements().eval(binding))?;
    let is_param = |i: &usize| {
        matches!(template.buffers()[step.inputs[*i].buffer.index()].kind, BufferKind::Param(_))
            && inputs[*i].rank() > 1
    };
    let weight = (0..inputs.len()).find(is_param);
    let dtype = weight.or(Some(0)).and_then(|i| inputs.get(i)).map_or(DType::F32, |shape| shape.dtype());
    let rate = match flops > elements.saturating_mul(MATRIX_OPERATIONS) {
        true => rates.matrix_rate(dtype),
        false => rates.vector_flops,
    };
    let seconds = (flops as f64 / rate).max(bytes as f64 / rates.bytes_per_s) + rates.dispatch_s;
    Ok(StepPrediction { op: op.name(), dtype, flops, bytes, seconds })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::contract::{cached, cpu};
    use rlx_graph::ops::activation::ActivationKind;
    use rlx_graph::{Graph, HirModule, ops::linear::Linear};
    use rlx_tensor::Dim;

    fn rates() -> DeviceRates {
        let matrix_flops = [("f32".to_owned(), 1e9), ("bf16".to_owned(), 4e9)].into_iter().collect();
        DeviceRates { matrix_flops, vector_flops: 1e8, bytes_per_s: 1e9, dispatch_s: 1e-6 }
    }

    fn prediction(graph: &Graph, binding: &DimBinding) -> Prediction {
        let compiled = cpu(1).compile(graph).unwrap();
        predict(compiled.template(), binding, &rates()).unwrap()
    }

    fn linear(dtype: DType) -> Graph {
        let mut graph = Graph::new("linear");
        let x = Shape::from_dims(vec![Dim::symbol("rows"), Dim::Known(64)], DType::F32);
        let x = graph.input("x", x).unwrap();
        let w = graph.param("w", Shape::new(&[32, 64], dtype)).unwrap();
        let y = graph.add_one(Linear::plain(), &[x, w]).unwrap();
        graph.set_outputs(&[("y", y)]).unwrap();
        graph
    }

    #[test]
    fn a_step_costs_the_longer_of_arithmetic_and_traffic_and_its_dispatch() {
        let at = |rows| prediction(&linear(DType::F32), &DimBinding::new().with("rows", rows));
        let (one, many) = (at(1), at(1000));
        assert_eq!(one.steps.len(), 1);
        let step = &many.steps[0];
        assert_eq!((step.flops, step.bytes), (2 * 1000 * 64 * 32, 4 * (1000 * 64 + 64 * 32 + 1000 * 32)));
        assert!((step.seconds - (step.flops as f64 / 1e9 + 1e-6)).abs() < 1e-12, "bound by arithmetic");
        let step = &one.steps[0];
        assert!((step.seconds - (step.bytes as f64 / 1e9 + 1e-6)).abs() < 1e-12, "bound by traffic");
    }

    #[test]
    fn the_dtype_of_the_weights_decides_rate_and_bytes() {
        let binding = DimBinding::new().with("rows", 1000);
        let (f32, bf16) =
            (prediction(&linear(DType::F32), &binding), prediction(&linear(DType::BF16), &binding));
        assert_eq!((f32.steps[0].dtype, bf16.steps[0].dtype), (DType::F32, DType::BF16));
        assert_eq!(f32.steps[0].bytes - bf16.steps[0].bytes, 64 * 32 * 2);
        assert!(bf16.seconds() < f32.seconds());
    }

    #[test]
    fn the_length_of_the_cache_counts_in_attention() {
        let at = |table| {
            let sizes = [("rows", 1), ("batch", 1), ("blocks", table), ("table", table)];
            let binding = sizes.into_iter().fold(DimBinding::new(), |b, (name, v)| b.with(name, v));
            prediction(&cached(), &binding)
        };
        let (short, long) = (at(1), at(16));
        let of = |p: &Prediction| p.steps.iter().find(|s| s.op == "attention").map(|s| (s.flops, s.bytes));
        let ((short_flops, short_bytes), (long_flops, long_bytes)) =
            (of(&short).unwrap(), of(&long).unwrap());
        assert_eq!(long_flops, 16 * short_flops);
        assert!(long_bytes > 10 * short_bytes && long.seconds() > 5.0 * short.seconds());
    }

    #[test]
    fn a_symbol_without_a_value_is_an_error() {
        let compiled = cpu(1).compile(&linear(DType::F32)).unwrap();
        let error = predict(compiled.template(), &DimBinding::new(), &rates()).unwrap_err();
        assert!(error.to_string().contains("rows"), "{error}");
    }

    /// Layers of `examples/rank_devices`: norm, a product up, GELU, a product down, added to what came in.
    fn layers(width: usize, depth: usize, dtype: DType) -> Graph {
        let mut module = HirModule::new("layers");
        let mut hir = module.edit();
        let mut x = hir.input("x", &[Dim::symbol("rows"), Dim::Known(width)], DType::F32).unwrap();
        for layer in 0..depth {
            let h = hir.layer_norm(x, &format!("{layer}.norm"), None, width, 1e-5, DType::F32).unwrap();
            let h = hir.linear(h, &format!("{layer}.up"), (2 * width, width), None, dtype).unwrap();
            let h = hir.activation(h, ActivationKind::Gelu).unwrap();
            let h = hir.linear(h, &format!("{layer}.down"), (width, 2 * width), None, dtype).unwrap();
            x = hir.add(x, h).unwrap();
        }
        module.finish(&[("y", x)]).unwrap()
    }

    /// Width, layers, dtype of weights, rows.
    const GRAPHS: [(usize, usize, DType, usize); 6] = [
        (64, 2, DType::F32, 1),
        (256, 2, DType::F32, 1),
        (256, 2, DType::F32, 32),
        (512, 3, DType::F32, 1),
        (512, 3, DType::BF16, 1),
        (384, 4, DType::F32, 64),
    ];

    /// Rates as calibrated (f32, bf16, elementwise, bytes, dispatch) and medians of the graphs in microseconds, by `examples/rank_devices` on
    /// an Emerald Rapids processor with two cores: scalar kernels, AVX-512 on one thread and on two, the reference evaluation, which was not
    /// given the last graph.
    const RECORDED: [([f64; 5], &[f64]); 4] = [
        (
            [6.32e8, 6.19e8, 3.56e7, 1.27e9, 5.12e-7],
            &[119.6, 1807.0, 64_912.3, 11_535.8, 10_751.0, 626_379.5],
        ),
        ([1.721e11, 1.586e11, 2.188e9, 3.011e10, 9.59e-8], &[2.7, 41.7, 221.2, 425.3, 214.2, 2048.2]),
        ([1.075e11, 1.007e11, 8.23e8, 2.782e10, 4.02e-5], &[251.8, 294.3, 504.9, 757.0, 530.9, 2674.3]),
        ([2.75e9, 2.76e9, 1.339e8, 1.07e9, 8.1e-7], &[58.4, 1032.8, 13_210.8, 8917.8, 14_644.7]),
    ];

    #[test]
    fn the_order_agrees_with_recorded_measurements() {
        let compiled = GRAPHS.map(|(width, depth, dtype, rows)| {
            let sizes = DimBinding::new().with("rows", rows);
            (cpu(1).compile(&layers(width, depth, dtype)).unwrap(), sizes)
        });
        let mut pairs = Vec::new();
        for ([f32, bf16, vector_flops, bytes_per_s, dispatch_s], measured) in RECORDED {
            let matrix_flops = [("f32".to_owned(), f32), ("bf16".to_owned(), bf16)].into_iter().collect();
            let rates = DeviceRates { matrix_flops, vector_flops, bytes_per_s, dispatch_s };
            for ((compiled, sizes), micros) in compiled.iter().zip(measured) {
                pairs.push((predict(compiled.template(), sizes, &rates).unwrap().seconds(), micros * 1e-6));
            }
        }
        let (mut agree, mut clear) = (0, 0);
        for (i, a) in pairs.iter().enumerate() {
            for b in &pairs[i + 1..] {
                // Measurements within a quarter of each other have no order to agree with.
                if (a.1 / b.1).ln().abs() > 0.25f64.ln_1p() {
                    clear += 1;
                    agree += usize::from((a.0 < b.0) == (a.1 < b.1));
                }
            }
        }
        assert!(clear > 200, "{clear} pairs");
        assert!(agree * 100 >= clear * 95, "the order of {agree} of {clear} pairs agrees");
    }
}
