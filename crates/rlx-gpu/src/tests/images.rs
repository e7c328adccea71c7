//! Convolutions large enough to be matrix products.

use super::products::{numbers, results};
use crate::emulated;
use rlx::backend::Backend;
use rlx::backend::reference::ReferenceBackend;
use rlx_graph::Graph;
use rlx_tensor::Tensor;
use std::sync::Arc;

/// Two groups, a stride and zeros around; and channels last, with an addend. Results are `[batch, 24, 4, 4]` in the image's layout.
fn graphs() -> [(Graph, Vec<usize>); 2] {
    let graph = |x: &str, y: &str, w: &str, more: &str| {
        let text = format!(
            "graph \"image\" {{
  input @x : f32[{x}]
  input @r : f32[{y}]
  param @w : f32[{w}]
  param @b : f32[24]
  %4 : f32[{y}] = conv(@x, @w, @b, @r) {{{more}}}
  return \"y\": %4
}}"
        );
        text.parse().unwrap_or_else(|e| panic!("{e}\n{text}"))
    };
    let strided = "strides=[2, 2], dilations=[1, 1], before=dims[1, 1], after=dims[1, 1], groups=2, bias=true, addend=true, activation=relu, channels_last=false";
    let last = "strides=[1, 1], dilations=[1, 1], before=dims[0, 1], after=dims[0, 1], groups=1, bias=true, addend=true, activation=relu, channels_last=true";
    [
        (graph("batch, 16, 8, 8", "batch, 24, 4, 4", "24, 8, 3, 3", strided), vec![16, 8, 8]),
        (graph("batch, 4, 4, 16", "batch, 4, 4, 24", "24, 16, 1, 3", last), vec![4, 4, 16]),
    ]
}

pub(super) fn kernels() -> Vec<Arc<crate::ir::Kernel>> {
    graphs().iter().flat_map(|(graph, _)| super::kernels_of(graph).unwrap()).collect()
}

fn check(backend: &Arc<dyn Backend>) {
    const BATCH: usize = 3;
    for (graph, image) in graphs() {
        let k = if image[0] == 16 { vec![24, 8, 3, 3] } else { vec![24, 16, 1, 3] };
        let tensor = |dims: &[usize], seed: u32| {
            Tensor::from_slice(dims, &numbers(dims.iter().product(), seed)).unwrap()
        };
        let y = if image[0] == 16 { vec![BATCH, 24, 4, 4] } else { vec![BATCH, 4, 4, 24] };
        let params = [("w".to_owned(), tensor(&k, 1)), ("b".to_owned(), tensor(&[24], 2))];
        let x = tensor(&[&[BATCH], image.as_slice()].concat(), 3);
        let inputs = [vec![("x", x), ("r", tensor(&y, 4))]];
        let found = results(backend, &graph, &params, &inputs);
        let reference: Arc<dyn Backend> = Arc::new(ReferenceBackend::default());
        let expected = results(&reference, &graph, &params, &inputs);
        for (i, (a, b)) in found[0].iter().zip(&expected[0]).enumerate() {
            assert!(
                (a - b).abs() <= 72.0 * f32::EPSILON,
                "element {i} is {a}, expected {b} on {}",
                backend.name()
            );
        }
    }
}

#[test]
fn a_convolution_as_a_product_by_the_interpreter() {
    check(&emulated());
}

#[cfg(feature = "wgpu")]
#[test]
fn a_convolution_as_a_product_on_the_first_adapter() {
    check(&crate::provider().unwrap().open(0, &rlx::config::Config::default()).unwrap());
}
