//! Arenas beyond what one binding holds: in several segments, with the results of one.

use super::faults::narrow;
use super::products::{numbers, results};
use crate::emulated;
use rlx::backend::Backend;
use rlx::{Session, TensorArg};
use rlx_graph::Graph;
use rlx_tensor::Tensor;
use std::sync::Arc;

/// Words of an operand of so many rows.
const WIDTH: usize = 64;

/// Many values that live at once, a check of indices, attention and words between two launches of a product.
fn graph() -> Graph {
    let text = format!(
        "graph \"segments\" {{
  input @x : f32[rows, {WIDTH}]
  input @ids : i32[rows]
  param @w : f32[{WIDTH}, {WIDTH}]
  %3 : f32[rows, {WIDTH}] = linear(@x, @w) {{parts=1, transposed=false, bias=false, activation=silu, gated=false, residual=false}}
  %4 : f32[rows, {WIDTH}] = gather(%3, @ids) {{axis=0}}
  %5 : f32[rows, {WIDTH}] = softmax(%4) {{axis=1}}
  %6 : f32[rows, {WIDTH}] = binary(%3, %5) {{kind=mul}}
  %7 : f32[rows, rows] = matmul(%4, %6) {{transpose_a=false, transpose_b=true}}
  %8 : f32[rows, {WIDTH}] = matmul(%7, %5) {{transpose_a=false, transpose_b=false}}
  %9 : f32[rows, {four}] = concat(%3, %5, %6, %8) {{axis=1}}
  return \"y\": %9, \"z\": %7
}}",
        four = 4 * WIDTH
    );
    text.parse().unwrap_or_else(|e| panic!("{e}\n{text}"))
}

fn all(backend: &Arc<dyn Backend>) -> Vec<u32> {
    let params = [("w".to_owned(), Tensor::from_slice(&[WIDTH, WIDTH], &numbers(WIDTH * WIDTH, 1)).unwrap())];
    let inputs: Vec<Vec<(&str, Tensor)>> = [16usize, 3, 15]
        .map(|rows| {
            let ids: Vec<i32> = (0..rows as i32).rev().collect();
            let x = Tensor::from_slice(&[rows, WIDTH], &numbers(rows * WIDTH, 2)).unwrap();
            vec![("x", x), ("ids", Tensor::from_slice(&[rows], &ids).unwrap())]
        })
        .into();
    let found = results(backend, &graph(), &params, &inputs);
    found.iter().flatten().map(|x| x.to_bits()).collect()
}

/// A binding that holds one result and little more.
const BINDING: usize = 16 * 4 * WIDTH + 64;

#[test]
fn an_arena_of_several_bindings_gives_what_one_gives() {
    let expected = all(&emulated());
    for binding in [BINDING, BINDING * 3 / 2] {
        assert_eq!(all(&narrow(binding)), expected, "{binding} words");
    }
    let small = Session::with_backend(narrow(BINDING)).compile(&graph()).unwrap();
    small.set_param("w", &Tensor::from_slice(&[WIDTH, WIDTH], &numbers(WIDTH * WIDTH, 1)).unwrap()).unwrap();
    let run = |rows: usize, id: i32| {
        let (x, ids) = (numbers(rows * WIDTH, 2), vec![id; rows]);
        let dims = [rows, WIDTH];
        let inputs = [("x", TensorArg::typed(&dims, &x)), ("ids", TensorArg::typed(&dims[..1], &ids))];
        small.run(&inputs).map(drop).map_err(|e| e.to_string())
    };
    assert_eq!(run(16, 15), Ok(()));
    // A check's word is found whatever segment the kernel's operands stand in.
    let error = run(16, 16).unwrap_err();
    assert!(error.contains("an index is outside the axis"), "{error}");
    let error = run(17, 0).unwrap_err();
    assert!(error.contains("the result of concat") && error.contains("in one binding"), "{error}");
}

/// An operand for each binding there is, and one more.
#[test]
fn a_kernel_that_reaches_more_segments_than_it_may_bind_is_refused_by_name() {
    let names = |count: usize| (0..count).map(|i| format!("@x{i}")).collect::<Vec<_>>();
    let graph = |count: usize| -> Graph {
        let inputs: String = names(count).iter().map(|x| format!("  input {x} : f32[{WIDTH}]\n")).collect();
        let mut text = format!("graph \"g\" {{\n{inputs}");
        let mut last = "@x0".to_owned();
        for i in 1..count {
            text += &format!("  %{} : f32[{WIDTH}] = binary({last}, @x{i}) {{kind=add}}\n", count + i - 1);
            last = format!("%{}", count + i - 1);
        }
        (text + &format!("  return \"y\": {last}\n}}")).parse().unwrap()
    };
    let run = |count: usize| {
        let compiled = Session::with_backend(narrow(WIDTH)).compile(&graph(count)).unwrap();
        let x = [1.0f32; WIDTH];
        let names = names(count);
        let inputs: Vec<_> = names.iter().map(|n| (&n[1..], TensorArg::typed(&[WIDTH], &x))).collect();
        compiled.run(&inputs).map_err(|e| e.to_string())
    };
    assert_eq!(run(4).unwrap()[0].1.as_slice::<f32>().unwrap(), [4.0; WIDTH]);
    let error = run(20).unwrap_err();
    assert!(error.contains("its kernel would bind") && error.contains("of at most 6"), "{error}");
}

/// 142 MB where Mesa's driver binds 128 MiB.
#[cfg(feature = "wgpu")]
#[test]
fn an_arena_beyond_the_first_adapters_binding() {
    let backend = crate::provider().unwrap().open(0, &rlx::config::Config::default()).unwrap();
    let count = 17usize << 20;
    let text = format!(
        "graph \"large\" {{\n  input @x : f32[{count}]\n  %1 : f32[{count}] = binary(@x, @x) {{kind=add}}\n  return \"y\": %1\n}}"
    );
    let x: Vec<f32> = (0..count).map(|i| (i % 4099) as f32).collect();
    let compiled = Session::with_backend(backend).compile(&text.parse::<Graph>().unwrap()).unwrap();
    let y = compiled.run(&[("x", TensorArg::typed(&[count], &x))]).unwrap();
    let y = y[0].1.as_slice::<f32>().unwrap();
    assert!(y.len() == count && y.iter().zip(&x).all(|(y, x)| *y == 2.0 * x));
}
