//! Weights beyond what one binding holds: bound in bands of lines, with the results of the whole.

use super::faults::narrow;
use super::products::{numbers, results};
use crate::emulated;
use rlx::{Session, TensorArg};
use rlx_graph::Graph;
use rlx_tensor::{DType, Tensor};

const LINES: usize = 300;
const WIDTH: usize = 256;
/// Words of a binding: 32 lines of floats.
const BINDING: usize = 32 * WIDTH;

/// Lines of a table, then gate and up with the table as one of them.
fn graph(dtype: DType) -> Graph {
    let text = format!(
        "graph \"bands\" {{
  input @ids : i32[rows]
  param @e : {dtype}[{LINES}, {WIDTH}]
  param @u : {dtype}[{LINES}, {WIDTH}]
  param @b : f32[{LINES}]
  param @c : f32[{LINES}]
  %5 : f32[rows, {WIDTH}] = embedding(@ids, @e) {{}}
  %6 : f32[rows, {LINES}] = linear(%5, @e, @u, @b, @c) {{parts=2, transposed=false, bias=true, activation=silu, gated=true, residual=false}}
  %7 : f32[rows, {LINES}] = linear(%5, @u, @b) {{parts=1, transposed=false, bias=true, activation=identity, gated=false, residual=false}}
  %8 : f32[rows, {LINES}] = binary(%6, %7) {{kind=add}}
  return \"y\": %8
}}"
    );
    text.parse().unwrap_or_else(|e| panic!("{e}\n{text}"))
}

fn params(dtype: DType) -> Vec<(String, Tensor)> {
    let weight = |seed: u32| {
        let mut bytes = vec![0; dtype.bytes_for(LINES * WIDTH).unwrap()];
        rlx_tensor::quant::encode(dtype, &numbers(LINES * WIDTH, seed), &mut bytes).unwrap();
        Tensor::from_bytes(&[LINES, WIDTH], dtype, &bytes).unwrap()
    };
    let bias = |seed: u32| Tensor::from_slice(&[LINES], &numbers(LINES, seed)).unwrap();
    let named = [("e", weight(1)), ("u", weight(2)), ("b", bias(3)), ("c", bias(4))];
    named.map(|(name, tensor)| (name.to_owned(), tensor)).into()
}

#[test]
fn a_weight_beyond_one_binding_gives_what_it_gives_in_one() {
    let (whole, narrow) = (emulated(), narrow(BINDING));
    for (dtype, bands) in [(DType::F32, 10), (DType::BF16, 5), (DType::Q8_0, 4), (DType::Q6_K, 3)] {
        let (graph, params) = (graph(dtype), params(dtype));
        let ids = [0i32, 299, 31, 32, 150, 298, 1, 64, 255];
        let inputs: Vec<Vec<(&str, Tensor)>> =
            [1, 9].map(|rows| vec![("ids", Tensor::from_slice(&[rows], &ids[..rows]).unwrap())]).into();
        let (found, expected) =
            (results(&narrow, &graph, &params, &inputs), results(&whole, &graph, &params, &inputs));
        let bits = |all: &[Vec<f32>]| all.iter().flatten().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&found), bits(&expected), "{dtype}");
        let compiled = Session::with_backend(narrow.clone()).compile(&graph).unwrap();
        params.iter().for_each(|(name, value)| compiled.set_param(name, value).unwrap());
        let gathers = compiled.program().unwrap().kernels()[0].kernel.matches("gather").count();
        assert_eq!(gathers, bands, "{dtype}");
        for id in [-1, LINES as i32] {
            let error = compiled.run(&[("ids", TensorArg::typed(&[1], &[id]))]).unwrap_err();
            assert!(error.to_string().contains("an index is outside the axis"), "{error}");
        }
    }
}
