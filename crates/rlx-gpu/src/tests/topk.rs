//! The largest elements of long lines: what a decode loop asks for to choose a token on the device.

use crate::emulated;
use rlx::backend::Backend;
use rlx::{Session, TensorArg};
use rlx_tensor::Tensor;
use std::sync::Arc;

/// Elements of a line that one program seeks in, and of one that several share, the last with fewer than the rest.
const LENGTHS: [usize; 2] = [700, 8_192 + 33];

/// Two lines with equal elements, both zeros, infinities, and NaNs in one of them.
fn lines(n: usize) -> Vec<f32> {
    let mut x: Vec<f32> = (0..2 * n).map(|i| ((i * 7919) % 331) as f32 - 300.0).collect();
    (x[3], x[650], x[651]) = (0.0, -0.0, f32::INFINITY);
    (x[n + 5], x[n + 400], x[n + 401]) = (f32::NAN, f32::NEG_INFINITY, -f32::NAN);
    x[n - 1] = f32::INFINITY;
    x
}

/// Positions in the order of the op: NaN before all numbers, then from the largest, and the first of equal ones first.
fn expected(line: &[f32], k: usize) -> Vec<i32> {
    let mut order: Vec<usize> = (0..line.len()).collect();
    order.sort_by(|&a, &b| {
        let (a, b) = (line[a], line[b]);
        b.is_nan().cmp(&a.is_nan()).then(b.partial_cmp(&a).unwrap_or(std::cmp::Ordering::Equal))
    });
    order[..k].iter().map(|&i| i as i32).collect()
}

fn check(backend: &Arc<dyn Backend>) {
    for (n, k) in LENGTHS.into_iter().flat_map(|n| [(n, 1), (n, 40)]) {
        let x = lines(n);
        let text = format!(
            "graph \"g\" {{
  input @x : f32[rows, {n}]
  %1 : f32[rows, {k}], %2 : i32[rows, {k}] = topk(@x) {{k={k}}}
  return \"y\": %1, \"i\": %2
}}"
        );
        let graph = text.parse().unwrap_or_else(|e| panic!("{e}\n{text}"));
        let compiled = Session::with_backend(Arc::clone(backend)).compile(&graph).unwrap();
        let input = Tensor::from_slice(&[2, n], &x).unwrap();
        let results = compiled.run(&[("x", TensorArg::from(&input))]).unwrap();
        let (values, places) =
            (results[0].1.as_slice::<f32>().unwrap(), results[1].1.as_slice::<i32>().unwrap());
        for (row, line) in x.chunks(n).enumerate() {
            let own = row * k..(row + 1) * k;
            assert_eq!(places[own.clone()], expected(line, k), "line {row} on {}", backend.name());
            for (&value, &place) in values[own.clone()].iter().zip(&places[own]) {
                let element = line[place as usize];
                assert!(value == element || (value.is_nan() && element.is_nan()), "{value} at {place}");
            }
        }
    }
}

#[test]
fn the_largest_of_long_lines_by_the_interpreter() {
    check(&emulated());
}

#[cfg(feature = "wgpu")]
#[test]
fn the_largest_of_long_lines_on_the_first_adapter() {
    check(&crate::provider().unwrap().open(0, &rlx::config::Config::default()).unwrap());
}
