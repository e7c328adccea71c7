//! Functions of one element that are computed in place of a driver's.

use crate::emulated;
use rlx::backend::Backend;
use rlx::{Session, TensorArg};
use rlx_graph::Graph;
use std::sync::Arc;

/// Roundings of an element's logarithm: of s, the sum's last terms and the two that add the exponent.
const ROUNDINGS: f64 = 4.0;

/// The function of each element.
fn of(kind: &str, x: &[f32], backend: &Arc<dyn Backend>) -> Vec<f32> {
    let n = x.len();
    let text = format!(
        "graph \"g\" {{\n  input @x : f32[{n}]\n  %1 : f32[{n}] = unary(@x) {{kind={kind}}}\n  return \"y\": %1\n}}"
    );
    let compiled =
        Session::with_backend(Arc::clone(backend)).compile(&text.parse::<Graph>().unwrap()).unwrap();
    let results = compiled.run(&[("x", TensorArg::typed(&[n], x))]).unwrap();
    results[0].1.as_slice::<f32>().unwrap().to_vec()
}

/// Each value within so many roundings of itself.
fn near(kind: &str, exact: fn(f64) -> f64, roundings: f64, x: &[f32], y: &[f32], name: &str) {
    for (&x, &y) in x.iter().zip(y) {
        let expected = exact(f64::from(x));
        let most = roundings * f64::from(f32::EPSILON) * expected.abs();
        let off = (f64::from(y) - expected).abs();
        assert!(off <= most, "{kind} {x:e} on {name} is {y:e}, expected {expected:e} within {most:e}");
    }
}

fn check_log(backend: &Arc<dyn Backend>) {
    let mut x: Vec<f32> = (1..128).map(|e| 1.37f32 * 2f32.powi(e - 64)).collect();
    x.extend((0..400).map(|i| 0.5 + i as f32 / 256.0));
    x.extend((0..24).flat_map(|e| [1.0 + 2f32.powi(-e), 1.0 - 2f32.powi(-e - 1)]));
    x.extend([1.0, f32::MIN_POSITIVE, f32::MAX]);
    x.extend([1, 2, 3, 0x0012_3456, 0x007f_ffff].map(f32::from_bits));
    let numbers = x.len();
    x.extend([0.0, -0.0, -1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::from_bits(1)]);
    let (y, name) = (of("log", &x, backend), backend.name());
    near("log", f64::ln, ROUNDINGS, &x[..numbers], &y, name);
    let special = &y[numbers..];
    assert_eq!(special[..2], [f32::NEG_INFINITY; 2], "{name}");
    assert!([2, 3, 5, 6].iter().all(|&at: &usize| special[at].is_nan()), "{special:?} on {name}");
    assert_eq!(special[4], f32::INFINITY, "{name}");
}

/// From 1/4 on `1 - e^(-2 x)` is at least 0.39, of which the power's roundings, WGSL's (3 + 1) half units, are 6.
fn check_tanh(backend: &Arc<dyn Backend>) {
    let mut x: Vec<f32> = (0..120).map(|e| 1.37f32 * 2f32.powi(3 - e)).collect();
    x.extend((0..256).flat_map(|i| [i as f32 / 256.0, -(i as f32) / 64.0]));
    x.extend([9.5, 30.0, 100.0, f32::MAX, f32::INFINITY, f32::NEG_INFINITY]);
    let (y, name) = (of("tanh", &x, backend), backend.name());
    near("tanh", f64::tanh, 8.0, &x, &y, name);
    assert!(of("tanh", &[f32::NAN], backend)[0].is_nan(), "{name}");
}

#[test]
fn functions_by_the_interpreter() {
    check_log(&emulated());
    check_tanh(&emulated());
}

#[cfg(feature = "wgpu")]
#[test]
fn functions_on_the_first_adapter() {
    let backend = crate::provider().unwrap().open(0, &rlx::config::Config::default()).unwrap();
    check_log(&backend);
    check_tanh(&backend);
}
