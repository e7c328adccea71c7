use super::*;
use crate::ids::ValueId;
use crate::ops::Op;
use crate::ops::activation::{Activation, ActivationKind};
use crate::ops::attention::Attention;
use crate::ops::binary::{Binary, BinaryOp};
use crate::ops::cast::Cast;
use crate::ops::gated::Gated;
use crate::ops::layer_norm::LayerNorm;
use crate::ops::linear::Linear;
use crate::ops::matmul::MatMul;
use crate::ops::reshape::Reshape;
use crate::ops::rms_norm::RmsNorm;
use crate::ops::transpose::Transpose;
use crate::ops::unary::{Unary, UnaryOp};
use crate::passes::OpSet;
use crate::rewrite::testing::{assert_same_numbers, evaluate};
use proptest::prelude::*;
use rlx_tensor::{DType, Dim, Shape, Tensor};

const PRIMITIVES: &[&str] = &[
    "unary",
    "binary",
    "cast",
    "matmul",
    "reduce",
    "concat",
    "reshape",
    "transpose",
    "broadcast",
    "slice",
    "select",
    "iota",
];

fn targets() -> [OpSet; 3] {
    [
        OpSet::every_op("reference"),
        OpSet::every_op("no chains").without(&["fused_elementwise", "gated"]),
        OpSet::new("primitives", PRIMITIVES),
    ]
}

/// A graph over values `[rows, 8]`, grown one choice at a time.
struct Growing {
    graph: Graph,
    values: Vec<ValueId>,
    norms: usize,
}

impl Growing {
    fn new() -> Self {
        let mut graph = Graph::new("random");
        let shape = Shape::new(&[Dim::symbol("rows"), Dim::Known(8)], DType::F32);
        let values = ["x", "z"].map(|name| graph.input(name, shape.clone()).unwrap()).to_vec();
        Self { graph, values, norms: 0 }
    }

    fn param(&mut self, dims: &[usize]) -> ValueId {
        let name = format!("p{}", self.graph.params().count());
        self.graph.param(&name, Shape::new(dims, DType::F32)).unwrap()
    }

    fn one(&mut self, op: impl Into<Op>, inputs: &[ValueId]) -> ValueId {
        self.graph.add_one(op, inputs).unwrap()
    }

    /// The op, or what it decomposes into.
    fn either(&mut self, op: impl Into<Op>, inputs: &[ValueId], apart: bool) -> ValueId {
        let op = op.into();
        match op.def().decompose(&mut self.graph, inputs) {
            Some(results) if apart => results.unwrap()[0],
            _ => self.graph.add(op, inputs).unwrap()[0],
        }
    }

    fn norm(&mut self, x: ValueId, choice: u8) -> ValueId {
        self.norms += 1;
        let (weight, bias) = (self.param(&[8]), choice & 2 == 0);
        let apart = choice & 1 == 0;
        if choice & 4 == 0 {
            let op = RmsNorm { eps: 0.01, unit_offset: bias, groups: 1, residual: false };
            return self.either(op, &[x, weight], apart);
        }
        let mut inputs = vec![x, weight];
        if bias {
            inputs.push(self.param(&[8]));
        }
        self.either(LayerNorm { eps: 0.01, bias, residual: false }, &inputs, apart)
    }

    /// Products are taken with bounded factors, and norms are few, so that rounding is not amplified without limit.
    fn grow(&mut self, (what, a, b): (u8, u8, u8)) {
        let pick = |values: &[ValueId], i: u8| values[usize::from(i) % values.len()];
        let (x, y) = (pick(&self.values, a), pick(&self.values, b.rotate_left(3)));
        let whole = vec![Dim::symbol("rows"), Dim::Known(8)];
        let value = match what % 11 {
            0 => {
                let kinds = [UnaryOp::Tanh, UnaryOp::Sigmoid, UnaryOp::Neg, UnaryOp::Abs, UnaryOp::Sin];
                self.one(Unary { kind: kinds[usize::from(b) % kinds.len()] }, &[x])
            }
            1 => {
                let kinds = [BinaryOp::Add, BinaryOp::Sub, BinaryOp::Max];
                self.one(Binary { kind: kinds[usize::from(b) % kinds.len()] }, &[x, y])
            }
            2 => {
                let bounded = self.one(Unary { kind: UnaryOp::Sigmoid }, &[y]);
                self.one(Binary { kind: BinaryOp::Mul }, &[x, bounded])
            }
            3 => {
                let numbers = [1.0f32, 2.0, 0.5, -1.0, 3.0];
                let number = self.graph.constant(Tensor::scalar(numbers[usize::from(b) % numbers.len()]));
                let kinds = [BinaryOp::Add, BinaryOp::Mul, BinaryOp::Div, BinaryOp::Sub];
                let kind = kinds[usize::from(a) % kinds.len()];
                let turned = kind == BinaryOp::Mul && b & 1 == 0;
                self.one(Binary { kind }, &if turned { [number, x] } else { [x, number] })
            }
            4 => {
                let row = self.param(&[8]);
                let kind = if b & 1 == 0 { BinaryOp::Add } else { BinaryOp::Mul };
                self.one(Binary { kind }, &[x, row])
            }
            5 | 6 => {
                let weight = self.param(&[8, 8]);
                let product = self.one(MatMul { transpose_a: false, transpose_b: b & 1 == 0 }, &[x, weight]);
                self.one(Unary { kind: UnaryOp::Tanh }, &[product]);
                product
            }
            7 => {
                let kind = ActivationKind::ALL[usize::from(b) % ActivationKind::ALL.len()];
                self.either(Activation { kind }, &[x], a & 1 == 0)
            }
            8 => {
                let bounded = self.one(Unary { kind: UnaryOp::Tanh }, &[y]);
                self.either(Gated { activation: ActivationKind::Silu }, &[x, bounded], b & 1 == 0)
            }
            9 if self.norms < 2 => self.norm(x, b),
            9 => x,
            _ if b & 1 == 0 => {
                let turned = self.one(Transpose { perm: vec![1, 0] }, &[x]);
                self.one(Transpose { perm: vec![1, 0] }, &[turned])
            }
            _ => {
                let flat = self.one(Reshape { dims: vec![Dim::symbol("rows") * 8] }, &[x]);
                let wide = self.one(Cast { to: DType::F64 }, &[flat]);
                let back = self.one(Cast { to: DType::F32 }, &[wide]);
                self.one(Reshape { dims: whole }, &[back])
            }
        };
        self.values.push(value);
    }

    fn finish(mut self, middle: u8) -> Graph {
        let last = self.values[self.values.len() - 1];
        let middle = self.values[usize::from(middle) % self.values.len()];
        self.graph.set_outputs(&[("y", last), ("m", middle)]).unwrap();
        self.graph
    }
}

/// The largest magnitude that any value of a run has.
fn largest_value(graph: &Graph) -> f64 {
    let mut all = graph.clone();
    let of_nodes = graph.nodes().flat_map(|(_, n)| n.outputs.clone());
    let floats: Vec<ValueId> = of_nodes.filter(|&v| graph.shape(v).dtype().is_float()).collect();
    let names: Vec<String> = floats.iter().map(|v| v.to_string()).collect();
    let outputs: Vec<(&str, ValueId)> = names.iter().map(String::as_str).zip(floats).collect();
    all.set_outputs(&outputs).unwrap();
    let values = evaluate(&all);
    let values = values.iter().flat_map(|(_, t)| crate::eval::to_f64(t).unwrap());
    values.fold(1.0, |m: f64, v| m.max(v.abs()))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    /// Rounding unit x roundings x largest intermediate x slope of the norms: each is at most 1 / sqrt(eps) = 10, and there are two at most.
    #[test]
    fn optimised_equals_plain_on_random_graphs(
        choices in prop::collection::vec(any::<(u8, u8, u8)>(), 1..24),
        middle in any::<u8>(),
    ) {
        let mut growing = Growing::new();
        choices.into_iter().for_each(|choice| growing.grow(choice));
        let graph = growing.finish(middle);
        let expected = evaluate(&graph);
        let roundings = (16 * graph.nodes().len()) as f64;
        let tolerance = 100.0 * roundings * f64::from(f32::EPSILON) * largest_value(&graph);
        for target in targets() {
            let (after, report) = compile_passes(&graph, &target, &PassOptions::default()).unwrap();
            prop_assert!(report.trace.refused.is_empty(), "{:?}", report.trace.refused);
            for ((name, a), (_, b)) in expected.iter().zip(evaluate(&after)) {
                let (a, b) = (crate::eval::to_f64(a).unwrap(), crate::eval::to_f64(&b).unwrap());
                for (x, y) in a.iter().zip(&b) {
                    prop_assert!((x - y).abs() <= tolerance, "{name}: {x} and {y}\n{graph}\n{after}");
                }
            }
        }
    }
}

/// A decoder written in simple ops: norms and gates apart, one product per weight.
fn decoder(layers: usize) -> Graph {
    let mut g = Growing::new();
    let mut x = g.values[0];
    let starts = g.graph.input("seq_starts", Shape::new(&[Dim::symbol("batch") + 1], DType::I32)).unwrap();
    for _ in 0..layers {
        let weight = g.param(&[8]);
        let norm = || RmsNorm { eps: 1e-5, unit_offset: false, groups: 1, residual: false };
        let h = written_out_norm(&mut g, x, weight);
        let [q, k, v] = [8, 8, 8].map(|n| {
            let w = g.param(&[n, 8]);
            g.one(MatMul { transpose_a: false, transpose_b: true }, &[h, w])
        });
        let attention = Attention {
            heads: 2,
            kv_heads: 2,
            head_dim: 4,
            scale: 0.5,
            causal: true,
            window: None,
            softcap: None,
            mask: false,
            cache: false,
        };
        let mixed = g.one(attention, &[q, k, v, starts]);
        let w = g.param(&[8, 8]);
        let out = g.one(MatMul { transpose_a: false, transpose_b: true }, &[mixed, w]);
        x = g.one(Binary { kind: BinaryOp::Add }, &[x, out]);
        let weight = g.param(&[8]);
        let h = g.one(norm(), &[x, weight]);
        let [gate, up] = [16, 16].map(|n| {
            let w = g.param(&[n, 8]);
            g.one(MatMul { transpose_a: false, transpose_b: true }, &[h, w])
        });
        let opened = g.one(Unary { kind: UnaryOp::Sigmoid }, &[gate]);
        let silu = g.one(Binary { kind: BinaryOp::Mul }, &[gate, opened]);
        let product = g.one(Binary { kind: BinaryOp::Mul }, &[silu, up]);
        let w = g.param(&[8, 16]);
        let down = g.one(MatMul { transpose_a: false, transpose_b: true }, &[product, w]);
        x = g.one(Binary { kind: BinaryOp::Add }, &[x, down]);
    }
    g.values.push(x);
    g.finish(1)
}

fn written_out_norm(g: &mut Growing, x: ValueId, weight: ValueId) -> ValueId {
    use crate::ops::reduce::{Reduce, ReduceOp};
    let square = g.one(Binary { kind: BinaryOp::Mul }, &[x, x]);
    let mean = g.one(Reduce { kind: ReduceOp::Mean, axes: vec![1], keep_dims: true }, &[square]);
    let eps = g.graph.constant(Tensor::scalar(1e-5f32));
    let shifted = g.one(Binary { kind: BinaryOp::Add }, &[mean, eps]);
    let scale = g.one(Unary { kind: UnaryOp::Rsqrt }, &[shifted]);
    let normed = g.one(Binary { kind: BinaryOp::Mul }, &[x, scale]);
    g.one(Binary { kind: BinaryOp::Mul }, &[normed, weight])
}

#[test]
fn a_decoder_layer_becomes_ten_nodes() {
    let options = PassOptions { verify: false, ..PassOptions::default() };
    let (graph, report) = compile_passes(&decoder(30), &OpSet::every_op("reference"), &options).unwrap();
    let counts: Vec<(&str, usize)> = report.dispatch.native.iter().map(|(k, v)| (*k, *v)).collect();
    assert_eq!(counts, [("attention", 30), ("linear", 120), ("rms_norm", 60), ("slice", 90)]);
    assert_eq!(graph.nodes().len(), 300);
    let linear = |n: &crate::Node| n.op.downcast::<Linear>().cloned();
    let layers: Vec<Linear> = graph.nodes().filter_map(|(_, n)| linear(n)).take(4).collect();
    assert_eq!(
        layers.iter().map(|l| (l.parts, l.gated, l.residual)).collect::<Vec<_>>(),
        [(3, false, false), (1, false, true), (2, true, false), (1, false, true)]
    );
    for stat in &report.passes {
        println!(
            "{:20} {:5} -> {:5} nodes, {:4} fired, {:6} us",
            stat.pass, stat.nodes_before, stat.nodes_after, stat.fired, stat.micros
        );
    }
}

#[test]
fn work_grows_with_the_graph_not_with_its_square() {
    let options = PassOptions { verify: false, ..PassOptions::default() };
    let tried = |layers: usize| {
        let graph = decoder(layers);
        let start = Instant::now();
        let (_, report) = compile_passes(&graph, &OpSet::every_op("reference"), &options).unwrap();
        println!(
            "{} nodes: {} patterns tried, {:?}",
            graph.nodes().len(),
            report.trace.tried,
            start.elapsed()
        );
        report.trace.tried
    };
    let (few, more, many) = (tried(8), tried(16), tried(64));
    assert_eq!(many - more, 6 * (more - few));
}

const CACHE: &str = r#"graph "g" {
  state @k : f32[2, 1, 4, 64]
  state @v : f32[2, 1, 64, 4]
  input @x : f32[3, 4]
  input @z : f32[3, 4]
  const %4 : i32[3] = [0, 1, 3]
  const %5 : i32[2] = [0, 2]
  const %6 : i32[2, 1] = [0, 1]
  %7 : f32[3, 4] = attention(@x, @x, @x, %4, %5, %6, @k, @v) {heads=1, kv_heads=1, head_dim=4, scale=0.5, causal=true, window=none, softcap=none, mask=false, cache=true}
  %8 : f32[3, 4] = attention(@x, @z, @z, %4, %5, %6, @k, @v) {heads=1, kv_heads=1, head_dim=4, scale=0.5, causal=true, window=none, softcap=none, mask=false, cache=true}
  %9 : f32[3, 4] = attention(@x, @x, @x, %4, %5, %6, @k, @v) {heads=1, kv_heads=1, head_dim=4, scale=0.5, causal=true, window=none, softcap=none, mask=false, cache=true}
  %10 : f32[3, 4] = binary(%7, %9) {kind=sub}
  return "y": %10
}"#;

#[test]
fn nodes_that_write_a_state_keep_their_order_and_are_never_merged_or_dropped() {
    let before: Graph = CACHE.parse().unwrap();
    let (after, _) = compile_passes(&before, &OpSet::every_op("reference"), &PassOptions::default()).unwrap();
    assert_eq!(after.to_string(), before.to_string());
    assert_same_numbers(&before, &after);
}

#[test]
fn a_pass_can_be_left_out_and_an_unknown_one_is_an_error() {
    let target = OpSet::every_op("reference");
    let skip = |name: &str| PassOptions { skip: vec![name.to_owned()], ..PassOptions::default() };
    let (_, report) = compile_passes(&decoder(1), &target, &skip("fuse_shared_input")).unwrap();
    assert!(report.passes.iter().all(|p| p.pass != "fuse_shared_input"));
    assert_eq!(report.dispatch.native["linear"], 7);
    let error = compile_passes(&decoder(1), &target, &skip("fuse_sharde")).unwrap_err();
    assert!(matches!(error, PassError::UnknownPass { ref name, .. } if name == "fuse_sharde"), "{error}");
}
