//! Functions of one element that are computed in place of a driver's.

use crate::emulated;
use rlx::backend::Backend;
use rlx::{Session, TensorArg};
use rlx_graph::Graph;
use std::sync::Arc;

/// Roundings of an element's logarithm: of s, the sum's last terms and the two that add the exponent.
const ROUNDINGS: f64 = 4.0;

fn check_log(backend: &Arc<dyn Backend>) {
    let mut x: Vec<f32> = (1..128).map(|e| 1.37f32 * 2f32.powi(e - 64)).collect();
    x.extend((0..400).map(|i| 0.5 + i as f32 / 256.0));
    x.extend((0..24).flat_map(|e| [1.0 + 2f32.powi(-e), 1.0 - 2f32.powi(-e - 1)]));
    x.extend([1.0, f32::MIN_POSITIVE, f32::MAX]);
    let numbers = x.len();
    x.extend([0.0, -0.0, -1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
    let n = x.len();
    let text = format!(
        "graph \"g\" {{\n  input @x : f32[{n}]\n  %1 : f32[{n}] = unary(@x) {{kind=log}}\n  return \"y\": %1\n}}"
    );
    let compiled =
        Session::with_backend(Arc::clone(backend)).compile(&text.parse::<Graph>().unwrap()).unwrap();
    let results = compiled.run(&[("x", TensorArg::typed(&[n], &x))]).unwrap();
    let y = results[0].1.as_slice::<f32>().unwrap();
    let name = backend.name();
    for (&x, &y) in x.iter().zip(y).take(numbers) {
        let expected = f64::from(x).ln();
        // With an exponent, what is left of a rounding of half a power of two is at most half of one of the result.
        let most = ROUNDINGS * f64::from(f32::EPSILON) * expected.abs();
        let off = (f64::from(y) - expected).abs();
        assert!(off <= most, "log {x:e} on {name} is {y:e}, expected {expected:e} within {most:e}");
    }
    let special = &y[numbers..];
    assert_eq!(special[..2], [f32::NEG_INFINITY; 2], "{name}");
    assert!(special[2].is_nan() && special[3].is_nan() && special[5].is_nan(), "{special:?} on {name}");
    assert_eq!(special[4], f32::INFINITY, "{name}");
}

#[test]
fn logarithms_by_the_interpreter() {
    check_log(&emulated());
}

#[cfg(feature = "wgpu")]
#[test]
fn logarithms_on_the_first_adapter() {
    check_log(&crate::provider().unwrap().open(0, &rlx::config::Config::default()).unwrap());
}
