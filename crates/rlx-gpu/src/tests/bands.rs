//! Weights beyond what one binding holds: bound in bands of lines, with the results of the whole.

use super::faults::narrow;
use super::products::{numbers, results, weight};
use crate::emulated;
use rlx::backend::Backend;
use rlx::{Session, TensorArg};
use rlx_graph::Graph;
use rlx_tensor::{DType, Tensor};
use std::sync::Arc;

const LINES: usize = 300;
const WIDTH: usize = 256;
/// Words of a binding: 32 lines of floats, and room for an arena of nine rows.
const BINDING: usize = 36 * WIDTH;

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
    let weight = |seed: u32| weight(&[LINES, WIDTH], dtype, seed);
    let bias = |seed: u32| Tensor::from_slice(&[LINES], &numbers(LINES, seed)).unwrap();
    let named = [("e", weight(1)), ("u", weight(2)), ("b", bias(3)), ("c", bias(4))];
    named.map(|(name, tensor)| (name.to_owned(), tensor)).into()
}

#[test]
fn a_weight_beyond_one_binding_gives_what_it_gives_in_one() {
    let (whole, narrow) = (emulated(), narrow(BINDING));
    for (dtype, bands) in [(DType::F32, 10), (DType::BF16, 5), (DType::Q8_0, 3), (DType::Q5_K, 2)] {
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

/// Lines and products of smaller weights.
const N: usize = 80;
const K: usize = 64;

/// Weights that are multiplied in every place they may stand in.
fn products() -> Graph {
    let text = format!(
        "graph \"products\" {{
  input @x : f32[rows, {K}]
  input @image : f32[1, 16, 3, 3]
  param @t : f32[{K}, {N}]
  param @u : bf16[{K}, {N}]
  param @l : f32[{N}, {K}]
  param @b : f32[{N}]
  param @k : f32[{N}, 16, 2, 2]
  %8 : f32[rows, {N}] = linear(@x, @t, @b) {{parts=1, transposed=true, bias=true, activation=relu, gated=false, residual=false}}
  %9 : f32[rows, {N}] = linear(@x, @u) {{parts=1, transposed=true, bias=false, activation=identity, gated=false, residual=false}}
  %10 : f32[rows, {N}] = matmul(@x, @t) {{transpose_a=false, transpose_b=false}}
  %11 : f32[rows, {N}] = matmul(@x, @l) {{transpose_a=false, transpose_b=true}}
  %12 : f32[{N}, rows] = matmul(@l, @x) {{transpose_a=false, transpose_b=true}}
  %13 : f32[{N}, rows] = matmul(@t, @x) {{transpose_a=true, transpose_b=true}}
  %14 : f32[1, {N}, 2, 2] = conv(@image, @k, @b) {{strides=[1, 1], dilations=[1, 1], before=dims[0, 0], after=dims[0, 0], groups=1, bias=true, addend=false, activation=identity, channels_last=false}}
  return \"a\": %8, \"b\": %9, \"c\": %10, \"d\": %11, \"e\": %12, \"f\": %13, \"g\": %14
}}"
    );
    text.parse().unwrap_or_else(|e| panic!("{e}\n{text}"))
}

#[test]
fn matrices_and_windows_beyond_one_binding_give_what_they_give_in_one() {
    let graph = products();
    let run = |backend: Arc<dyn Backend>| {
        let compiled = Session::with_backend(backend).compile(&graph).unwrap();
        compiled.set_param("t", &weight(&[K, N], DType::F32, 1)).unwrap();
        compiled.set_param("u", &weight(&[K, N], DType::BF16, 2)).unwrap();
        compiled.set_param("l", &weight(&[N, K], DType::F32, 3)).unwrap();
        compiled.set_param("b", &weight(&[N], DType::F32, 4)).unwrap();
        compiled.set_param("k", &weight(&[N, 16, 2, 2], DType::F32, 5)).unwrap();
        let (x, image) = (numbers(9 * K, 6), numbers(16 * 9, 7));
        let inputs =
            [("x", TensorArg::typed(&[9, K], &x)), ("image", TensorArg::typed(&[1, 16, 3, 3], &image))];
        let found = compiled.run(&inputs).unwrap();
        let bits =
            |(_, y): &(String, Tensor)| y.as_slice::<f32>().unwrap().iter().map(|x| x.to_bits()).collect();
        let kernels = compiled.program().unwrap().kernels();
        let count = kernels.iter().map(|kernel| kernel.kernel.matches(" + ").count() + 1).sum::<usize>();
        (found.iter().map(bits).collect::<Vec<Vec<u32>>>(), count)
    };
    let ((found, banded), (expected, whole)) = (run(narrow(32 * K)), run(emulated()));
    assert_eq!(found, expected);
    assert!(banded > 2 * whole, "{banded} launches, {whole} of whole weights");
}

/// What is read in no bands is refused when the graph is compiled: op, node, weight, bytes, limit.
#[test]
fn a_weight_that_must_be_whole_is_refused_by_name() {
    let text = format!(
        "graph \"whole\" {{\n  input @x : f32[{WIDTH}]\n  param @w : f32[{LINES}, {WIDTH}]\n  %2 : f32[{LINES}, {WIDTH}] = binary(@w, @x) {{kind=add}}\n  return \"y\": %2\n}}"
    );
    let compiled = Session::with_backend(narrow(BINDING)).compile(&text.parse::<Graph>().unwrap()).unwrap();
    let w = Tensor::from_slice(&[LINES, WIDTH], &numbers(LINES * WIDTH, 1)).unwrap();
    compiled.set_param("w", &w).unwrap();
    let error = compiled.run(&[("x", TensorArg::typed(&[WIDTH], &numbers(WIDTH, 2)))]).unwrap_err();
    let text = error.to_string();
    let limit = format!("at most {} bytes", BINDING * 4);
    let parts = ["weight w takes 307200 bytes", &limit, "another device"];
    assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    assert!(error.is_device_fault(), "{text}");
}
