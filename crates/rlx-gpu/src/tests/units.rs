//! Products in bf16: operands rounded in every form, by matrix units or without.

use super::Runs;
use super::products::{LAYERS, Layer, check_rounded, results};
use crate::emulate::emulated_in;
use crate::emulated;
use crate::ir::Kernel;
use crate::lower::LowerCx;
use crate::lower::blocks::is_packed;
use crate::lower::operands::Operands;
use crate::lower::schedules::Choices;
use rlx::backend::cpu::Precision;
use rlx::plan::Template;
use rlx_graph::Graph;
use rlx_graph::passes::{PassOptions, compile_passes};
use rlx_tensor::DType;
use std::sync::Arc;

/// Wide enough for the large form of one matrix.
pub(super) const WIDE: Layer = Layer { dtype: DType::BF16, n: 136, k: 200, gated: false, transposed: false };

/// Layers of every storage that is rounded.
fn rounded() -> impl Iterator<Item = &'static Layer> {
    let floats = |l: &&Layer| matches!(l.dtype, DType::F32 | DType::F16 | DType::BF16);
    LAYERS.iter().filter(floats).chain([&WIDE])
}

/// Whether enough rows take programs of the large form.
fn is_wide(layer: &Layer) -> bool {
    layer.n >= if layer.gated { 64 } else { 128 }
}

/// Wide enough for the large form of packed weights: scales of 32 and 16 elements, with minima and without.
const WIDE_PACKED: [Layer; 4] = [
    Layer { dtype: DType::Q8_0, k: 64, ..WIDE },
    Layer { dtype: DType::Q5_K, k: 256, ..WIDE },
    Layer { dtype: DType::Q6_K, k: 256, ..WIDE },
    Layer { dtype: DType::Q2_K, k: 256, ..WIDE },
];

/// Layers of every storage that stays packed.
fn packed() -> impl Iterator<Item = &'static Layer> {
    LAYERS.iter().filter(|layer| is_packed(layer.dtype)).chain(&WIDE_PACKED)
}

/// The kernels of a graph under these operands.
fn kernels_under(graph: &Graph, operands: Operands) -> Vec<Arc<Kernel>> {
    kernels_as(graph, Choices { operands, ..Choices::default() })
}

/// The kernels of a graph whose packed weights are multiplied by matrix units.
fn kernels_of_bytes(graph: &Graph) -> Vec<Arc<Kernel>> {
    kernels_as(graph, Choices { byte_units: Some(1), ..Choices::default() })
}

/// The kernels of a graph under these choices.
pub(super) fn kernels_as(graph: &Graph, choices: Choices) -> Vec<Arc<Kernel>> {
    let (legal, _) = compile_passes(graph, &Runs, &PassOptions::default()).unwrap();
    let template = Template::build(&legal, &Runs).unwrap();
    let mut cx = LowerCx::new(&template);
    cx.choices = choices;
    template.steps().iter().enumerate().for_each(|(at, step)| cx.lower(at, step).unwrap());
    cx.kernels()
}

/// Kernels in bf16 of layers and experts, by matrix units and without, and those of packed weights by units.
pub(super) fn kernels() -> Vec<Arc<Kernel>> {
    let graphs = || rounded().map(Layer::graph).chain(super::grouped::graphs());
    let under = |operands| graphs().flat_map(move |graph| kernels_under(&graph, operands));
    let bytes = packed().map(Layer::graph).chain(super::grouped::graphs());
    let bytes = bytes.flat_map(|graph| kernels_of_bytes(&graph)).filter(|kernel| kernel.needs_mma());
    under(Operands::Units { wave: 1 }).chain(under(Operands::Rounded)).chain(bytes).collect()
}

#[test]
fn products_of_weights_have_a_form_for_matrix_units_and_others_none() {
    for layer in LAYERS.iter().chain([&WIDE]) {
        let kernels = kernels_under(&layer.graph(), Operands::Units { wave: 1 });
        let by_units = kernels.iter().filter(|kernel| kernel.needs_mma()).count();
        let floats = matches!(layer.dtype, DType::F32 | DType::F16 | DType::BF16);
        let forms = 3 + usize::from(is_wide(layer));
        assert_eq!(by_units, if floats { forms } else { 0 }, "{} {}x{}", layer.dtype, layer.n, layer.k);
        let without = kernels_under(&layer.graph(), Operands::Rounded);
        assert!(without.iter().all(|kernel| !kernel.needs_mma()));
    }
}

#[test]
fn many_rows_of_packed_weights_have_a_form_for_matrix_units() {
    for layer in packed() {
        let kernels = kernels_of_bytes(&layer.graph());
        let names: Vec<&str> = kernels.iter().map(|kernel| kernel.name.as_str()).collect();
        let by_units = kernels.iter().filter(|kernel| kernel.needs_mma()).count();
        assert_eq!(by_units, 1 + usize::from(is_wide(layer)), "{} {}: {names:?}", layer.dtype, layer.n);
        assert!(names.iter().all(|name| !name.contains("tiled")), "{names:?}");
    }
}

/// Sums of integers are exact, so the form for units has the bits of the one without, whatever stands around it.
#[test]
fn packed_weights_have_the_same_bits_by_matrix_units() {
    let (with, without) = (emulated_in(Precision::F32, true), emulated());
    for layer in packed().filter(|layer| layer.gated || layer.dtype == DType::Q2_K) {
        let inputs: Vec<_> = [if is_wide(layer) { 130 } else { 40 }, 9].map(|rows| layer.inputs(rows)).into();
        let run = |backend| -> Vec<u32> {
            let found = results(backend, &layer.graph(), &layer.params(), &inputs);
            found.iter().flatten().map(|x| x.to_bits()).collect()
        };
        assert_eq!(run(&with), run(&without), "{} {}x{}", layer.dtype, layer.n, layer.k);
    }
}

#[test]
fn a_row_by_matrix_units_has_the_same_bits_among_any_number_of_rows() {
    let backend = emulated_in(Precision::Bf16, true);
    for layer in rounded() {
        check_rounded(
            layer,
            &backend,
            if is_wide(layer) { &[130, 1, 4, 5, 16, 17] } else { &[40, 1, 4, 5, 16, 17] },
        );
    }
}

#[test]
fn a_row_of_rounded_operands_has_the_same_bits_among_any_number_of_rows() {
    let backend = emulated_in(Precision::Bf16, false);
    rounded().for_each(|layer| check_rounded(layer, &backend, &[40, 1, 2, 3, 8, 9]));
}

#[cfg(feature = "wgpu")]
#[test]
fn a_row_of_rounded_operands_has_the_same_bits_on_the_first_adapter() {
    let mut config = rlx::config::Config::default();
    config.precision = Some(Precision::Bf16);
    let backend = crate::provider().unwrap().open(0, &config).unwrap();
    rounded().for_each(|layer| check_rounded(layer, &backend, &[40, 1, 2, 3, 8, 9]));
}
