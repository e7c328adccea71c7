//! Products large enough for tiles: every form of kernel gives a row the same bits, and what the reference gives.

use crate::emulated;
use crate::lower::blocks::is_packed;
use rlx::backend::Backend;
use rlx::backend::reference::ReferenceBackend;
use rlx::{Session, TensorArg};
use rlx_graph::Graph;
use rlx_tensor::{DType, Tensor};
use std::sync::Arc;

/// A linear layer with everything around it: `[rows, k]` times weights of this dtype.
pub(super) struct Layer {
    pub dtype: DType,
    pub n: usize,
    pub k: usize,
    pub gated: bool,
    pub transposed: bool,
}

const fn layer(dtype: DType, n: usize, k: usize) -> Layer {
    Layer { dtype, n, k, gated: false, transposed: false }
}

/// Each storage of weights, each schedule, a k of several chunks and one that fills no group.
pub(super) const LAYERS: &[Layer] = &[
    layer(DType::F32, 70, 304),
    layer(DType::BF16, 33, 1200),
    layer(DType::F16, 24, 160),
    layer(DType::BF16, 9, 35),
    layer(DType::Q8_0, 70, 160),
    layer(DType::Q4_0, 33, 1184),
    layer(DType::Q4_K, 66, 512),
    layer(DType::Q6_K, 20, 256),
    layer(DType::Q5_0, 40, 64),
    Layer { gated: true, ..layer(DType::Q4_K, 68, 256) },
    Layer { gated: true, ..layer(DType::BF16, 68, 136) },
    Layer { transposed: true, ..layer(DType::F32, 40, 144) },
    layer(DType::Q2_K, 20, 256),
    layer(DType::Q3_K, 33, 256),
    Layer { gated: true, ..layer(DType::Q5_K, 68, 256) },
    layer(DType::Q5_K, 20, 256),
    layer(DType::IQ4_XS, 20, 256),
];

impl Layer {
    fn weight_dims(&self) -> [usize; 2] {
        if self.transposed { [self.k, self.n] } else { [self.n, self.k] }
    }

    pub fn graph(&self) -> Graph {
        let Layer { dtype, n, k, gated, transposed } = self;
        let [a, b] = self.weight_dims();
        let parts = if *gated { 2 } else { 1 };
        let next = 2 + 2 * parts;
        let up = if *gated {
            format!("\n  param @w1 : {dtype}[{a}, {b}]\n  param @b1 : f32[{n}]")
        } else {
            String::new()
        };
        let (weights, biases) = if *gated { ("@w0, @w1", "@b0, @b1") } else { ("@w0", "@b0") };
        let text = format!(
            "graph \"layer\" {{
  input @x : f32[rows, {k}]
  input @r : f32[rows, {n}]
  param @w0 : {dtype}[{a}, {b}]
  param @b0 : f32[{n}]{up}
  %{next} : f32[rows, {n}] = linear(@x, {weights}, {biases}, @r) {{parts={parts}, transposed={transposed}, bias=true, activation=silu, gated={gated}, residual=true}}
  return \"y\": %{next}
}}"
        );
        text.parse().unwrap_or_else(|e| panic!("{e}\n{text}"))
    }

    pub fn inputs(&self, rows: usize) -> Vec<(&'static str, Tensor)> {
        let some = |columns: usize, seed| {
            Tensor::from_slice(&[rows, columns], &numbers(rows * columns, seed)).unwrap()
        };
        vec![("x", some(self.k, 1)), ("r", some(self.n, 2))]
    }

    pub fn params(&self) -> Vec<(String, Tensor)> {
        let mut params = Vec::new();
        for part in 0..if self.gated { 2 } else { 1 } {
            let weight = weight(&self.weight_dims(), self.dtype, 7 + part);
            let bias = Tensor::from_slice(&[self.n], &numbers(self.n, 99 + part)).unwrap();
            params.extend([(format!("w{part}"), weight), (format!("b{part}"), bias)]);
        }
        params
    }
}

/// Numbers between -0.5 and 0.5.
pub(super) fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count).map(|_| next()).collect()
}

/// A weight of such numbers; of types that nothing here encodes, blocks of any codes whose elements are as large.
pub(super) fn weight(dims: &[usize], dtype: DType, seed: u32) -> Tensor {
    let values = numbers(dims.iter().product(), seed);
    let mut bytes = vec![0; dtype.bytes_for(values.len()).unwrap()];
    if rlx_tensor::quant::has_encoder(dtype) {
        rlx_tensor::quant::encode(dtype, &values, &mut bytes).unwrap();
        return Tensor::from_bytes(dims, dtype, &bytes).unwrap();
    }
    let (halves, scale): (&[usize], f32) = match dtype {
        DType::Q2_K => (&[80, 82], 0.5 / 45.0),
        DType::Q3_K => (&[108], 0.5 / 128.0),
        DType::IQ4_NL => (&[0], 0.5 / 128.0),
        DType::IQ4_XS => (&[0], 0.5 / 4096.0),
        other => panic!("no blocks of {other}"),
    };
    bytes.iter_mut().zip(values.iter().cycle()).for_each(|(byte, x)| *byte = (x * 4096.0) as i32 as u8);
    for (block, x) in bytes.chunks_mut(dtype.block().1).zip(&values) {
        for &at in halves {
            let half = half::f16::from_f32(scale * (0.75 + x / 2.0));
            block[at..at + 2].copy_from_slice(&half.to_le_bytes());
        }
    }
    Tensor::from_bytes(dims, dtype, &bytes).unwrap()
}

/// The results of a graph with its params set.
pub(super) fn results(
    backend: &Arc<dyn Backend>,
    graph: &Graph,
    params: &[(String, Tensor)],
    inputs: &[Vec<(&str, Tensor)>],
) -> Vec<Vec<f32>> {
    let compiled = Session::with_backend(Arc::clone(backend)).compile(graph).unwrap();
    params.iter().for_each(|(name, value)| compiled.set_param(name, value).unwrap());
    let run = |named: &Vec<(&str, Tensor)>| {
        let named: Vec<(&str, TensorArg<'_>)> = named.iter().map(|(n, t)| (*n, t.into())).collect();
        compiled.run(&named).unwrap()[0].1.as_slice::<f32>().unwrap().to_vec()
    };
    inputs.iter().map(run).collect()
}

/// Rows as they are after they were quantised: a scale for each 32 elements.
pub(super) fn quantised(x: &[f32]) -> Vec<f32> {
    let cell = |cell: &[f32]| {
        let most = cell.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        let (scale, inverse) = (most / 127.0, 127.0 / most);
        cell.iter().map(|x| (x * inverse).round_ties_even() * scale).collect::<Vec<_>>()
    };
    x.chunks(32).flat_map(cell).collect()
}

/// Holds a layer to the reference; a device that multiplies bytes to that of its quantised rows.
pub(super) fn check(layer: &Layer, backend: &Arc<dyn Backend>) {
    check_as(layer, backend, is_packed(layer.dtype));
}

pub(super) fn check_as(layer: &Layer, backend: &Arc<dyn Backend>, by_bytes: bool) {
    held(layer, backend, &[40, 1, 2, 3, 8, 9], &|x| if by_bytes { quantised(x) } else { x.to_vec() }, |x| x);
}

/// As [`check`], of these numbers of rows, by floats unless bytes are multiplied.
pub(super) fn check_counts(layer: &Layer, backend: &Arc<dyn Backend>, counts: &[usize]) {
    let by_bytes = is_packed(layer.dtype);
    held(layer, backend, counts, &|x| if by_bytes { quantised(x) } else { x.to_vec() }, |x| x);
}

/// As [`check`], of a backend that rounds the operands of products to bf16.
pub(super) fn check_rounded(layer: &Layer, backend: &Arc<dyn Backend>, counts: &[usize]) {
    let rounded = |x: f32| half::bf16::from_f32(x).to_f32();
    held(layer, backend, counts, &|x| x.iter().map(|&x| rounded(x)).collect(), rounded);
}

/// The most rows are held to the reference of operands as the device takes them, the others to those.
fn held(
    layer: &Layer,
    backend: &Arc<dyn Backend>,
    counts: &[usize],
    rows_taken: &dyn Fn(&[f32]) -> Vec<f32>,
    taken: fn(f32) -> f32,
) {
    let most = counts[0];
    let (x, r) = (numbers(most * layer.k, 1), numbers(most * layer.n, 2));
    let some = |rows: usize| {
        let x = Tensor::from_slice(&[rows, layer.k], &x[..rows * layer.k]).unwrap();
        vec![("x", x), ("r", Tensor::from_slice(&[rows, layer.n], &r[..rows * layer.n]).unwrap())]
    };
    let inputs: Vec<_> = counts.iter().map(|&rows| some(rows)).collect();
    let (graph, params) = (layer.graph(), layer.params());
    let found = results(backend, &graph, &params, &inputs);
    let reference: Arc<dyn Backend> = Arc::new(ReferenceBackend::default());
    let mut own = some(most);
    own[0].1 = Tensor::from_slice(&[most, layer.k], &rows_taken(&x)).unwrap();
    let of_reference: Vec<(String, Tensor)> =
        params.iter().map(|(name, weight)| (name.clone(), as_taken(weight, name, taken))).collect();
    let expected = results(&reference, &graph, &of_reference, &[own]);
    let name = format!("{} {}x{} on {}", layer.dtype, layer.n, layer.k, backend.name());
    let tolerance = layer.k as f32 * f32::EPSILON;
    for (i, (a, b)) in found[0].iter().zip(&expected[0]).enumerate() {
        assert!((a - b).abs() <= tolerance, "{name}: element {i} is {a}, expected {b} within {tolerance}");
    }
    for (rows, own) in counts.iter().zip(&found) {
        let same = own.iter().zip(&found[0]).position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(same, None, "{name}: {rows} rows give other bits than {most}");
    }
}

/// A weight with its elements as the device multiplies them, which its dtype must hold.
fn as_taken(weight: &Tensor, name: &str, taken: fn(f32) -> f32) -> Tensor {
    if !name.starts_with('w') || weight.dtype().block().0 > 1 {
        return weight.clone();
    }
    let mut values = vec![0.0; weight.len()];
    rlx_tensor::quant::decode(weight.dtype(), weight.bytes(), &mut values).unwrap();
    values.iter_mut().for_each(|x| *x = taken(*x));
    let mut bytes = vec![0; weight.bytes().len()];
    rlx_tensor::quant::encode(weight.dtype(), &values, &mut bytes).unwrap();
    Tensor::from_bytes(weight.dims(), weight.dtype(), &bytes).unwrap()
}

/// Rows of a quantised table are gathered as they decode.
fn check_table(dtype: DType, backend: &Arc<dyn Backend>) {
    let text = format!(
        "graph \"table\" {{
  input @ids : i32[rows]
  param @w : {dtype}[9, 512]
  %2 : f32[rows, 512] = embedding(@ids, @w) {{}}
  return \"y\": %2
}}"
    );
    let weight = weight(&[9, 512], dtype, 5);
    let mut expected = vec![0.0; weight.len()];
    rlx_tensor::quant::decode(dtype, weight.bytes(), &mut expected).unwrap();
    let params = [("w".to_owned(), weight)];
    let ids = Tensor::from_slice(&[3], &[8, 0, 5]).unwrap();
    let found = results(backend, &text.parse().unwrap(), &params, &[vec![("ids", ids)]]);
    for (row, of) in found[0].chunks(512).zip([8, 0, 5]) {
        let expected = &expected[of * 512..][..512];
        let same =
            row.iter().zip(expected).position(|(a, b)| (a - b).abs() > b.abs().max(0.5) * f32::EPSILON);
        assert_eq!(same, None, "{dtype}, row {of} on {}", backend.name());
    }
}

const BLOCKS: [DType; 12] = [
    DType::Q8_0,
    DType::Q4_0,
    DType::Q4_1,
    DType::Q5_0,
    DType::Q5_1,
    DType::Q2_K,
    DType::Q3_K,
    DType::Q4_K,
    DType::Q5_K,
    DType::Q6_K,
    DType::IQ4_NL,
    DType::IQ4_XS,
];

#[test]
fn rows_of_quantised_tables_by_the_interpreter() {
    BLOCKS.iter().for_each(|&dtype| check_table(dtype, &emulated()));
}

#[test]
fn a_row_has_the_same_bits_among_any_number_of_rows_by_the_interpreter() {
    LAYERS.iter().for_each(|layer| check(layer, &emulated()));
}

#[cfg(feature = "wgpu")]
#[test]
fn a_row_has_the_same_bits_among_any_number_of_rows_on_the_first_adapter() {
    let backend = crate::provider().unwrap().open(0, &rlx::config::Config::default()).unwrap();
    LAYERS.iter().for_each(|layer| check(layer, &backend));
    BLOCKS.iter().for_each(|&dtype| check_table(dtype, &backend));
}
