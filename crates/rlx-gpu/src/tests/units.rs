//! Products by matrix units, which no device is asked for yet: lowered, verified, and run by the interpreter.

use super::Runs;
use super::products::{LAYERS, Layer, numbers, results};
use crate::ir::interpret::Machine;
use crate::ir::{Kernel, Placement};
use crate::lower::{Extents, Home, LowerCx, is_weight};
use half::bf16;
use rlx::backend::Backend;
use rlx::backend::reference::ReferenceBackend;
use rlx::plan::{BufferId, BufferKind, Template};
use rlx_graph::passes::{PassOptions, compile_passes};
use rlx_tensor::{DType, Symbol, Tensor};
use std::collections::HashMap;
use std::sync::Arc;

fn buffer_of(home: &Home) -> Option<BufferId> {
    match home {
        Home::Buffer(buffer) => Some(*buffer),
        _ => None,
    }
}

fn template(layer: &Layer) -> Template {
    let (legal, _) = compile_passes(&layer.graph(), &Runs, &PassOptions::default()).unwrap();
    Template::build(&legal, &Runs).unwrap()
}

/// The layers whose weights matrix units take, but gated ones.
fn layers() -> impl Iterator<Item = &'static Layer> {
    LAYERS.iter().filter(|l| matches!(l.dtype, DType::F16 | DType::BF16) && !l.gated)
}

/// Their kernels.
pub(super) fn kernels() -> Vec<Arc<Kernel>> {
    let own = |layer: &Layer| {
        let template = template(layer);
        let mut cx = LowerCx::new(&template);
        cx.matrix_units = true;
        template.steps().iter().enumerate().for_each(|(at, step)| cx.lower(at, step).unwrap());
        cx.kernels()
    };
    layers().flat_map(own).collect()
}

fn rounded(x: f32, dtype: DType) -> f32 {
    if dtype == DType::F16 { half::f16::from_f32(x).to_f32() } else { bf16::from_f32(x).to_f32() }
}

fn words_of(tensor: &Tensor) -> Vec<u32> {
    match tensor.dtype() {
        DType::F32 => tensor.as_slice::<f32>().unwrap().iter().map(|x| x.to_bits()).collect(),
        _ => {
            let mut bytes = tensor.bytes().to_vec();
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes.as_chunks().0.iter().map(|&word| u32::from_le_bytes(word)).collect()
        }
    }
}

#[test]
fn a_product_by_matrix_units_is_that_of_rounded_operands() {
    const ROWS: usize = 70;
    for layer in layers() {
        let template = template(layer);
        let mut cx = LowerCx::new(&template);
        cx.matrix_units = true;
        template.steps().iter().enumerate().for_each(|(at, step)| cx.lower(at, step).unwrap());
        assert!(cx.launches.iter().any(|l| l.kernel.needs_mma()), "{} {}x{}", layer.dtype, layer.n, layer.k);
        let (x, r) = (numbers(ROWS * layer.k, 1), numbers(ROWS * layer.n, 2));
        let x: Vec<f32> = x.into_iter().map(|x| rounded(x, layer.dtype)).collect();
        let named = [
            ("x", Tensor::from_slice(&[ROWS, layer.k], &x).unwrap()),
            ("r", Tensor::from_slice(&[ROWS, layer.n], &r).unwrap()),
        ];
        let params: HashMap<String, Tensor> = layer.params().into_iter().collect();
        let (mut machine, mut next) = (Machine::new(1 << 18), 64);
        let mut places: HashMap<BufferId, usize> = HashMap::new();
        let mut weights: HashMap<BufferId, Vec<u32>> = HashMap::new();
        for (id, buffer) in template.buffer_ids() {
            let tensor = match &buffer.kind {
                BufferKind::Input(i) => {
                    Some(named.iter().find(|(n, _)| *n == template.inputs()[*i].name).unwrap().1.clone())
                }
                BufferKind::Param(i) => Some(params[&template.params()[*i].name].clone()),
                _ => None,
            };
            match tensor.map(|t| words_of(&t)) {
                Some(words) if is_weight(&template, id) => drop(weights.insert(id, words)),
                Some(words) => {
                    machine.write(next, &words);
                    places.insert(id, next);
                    next += words.len().next_multiple_of(64);
                }
                None => {
                    places.insert(id, next);
                    next += (ROWS * layer.n).next_multiple_of(64);
                }
            }
        }
        let mut sizes = Vec::new();
        template.sizes().eval(&[ROWS], &mut sizes).unwrap();
        let symbol = |_: &Symbol| Some(ROWS);
        let run = Extents { sizes: &sizes, symbol: &symbol };
        for launch in &cx.launches {
            let own: Vec<usize> = launch.sizes.iter().map(|a| a.eval(&run).unwrap()).collect();
            let placed: Vec<Placement> = launch
                .views
                .iter()
                .map(|v| Placement {
                    base: v.base.eval(&run).unwrap()
                        + buffer_of(&v.home).and_then(|b| places.get(&b)).copied().unwrap_or(0),
                    strides: v.strides.iter().map(|s| s.eval(&run).unwrap()).collect(),
                })
                .collect();
            let arguments = launch.kernel.arguments(&own, &placed).unwrap();
            let bound: Vec<&[u32]> =
                launch.weights.iter().map(|b| weights[&buffer_of(&b.home).unwrap()].as_slice()).collect();
            let programs = launch.programs.eval(&run).unwrap();
            machine.run(&launch.kernel, &arguments, &bound, &mut [], programs).unwrap();
        }
        let reference: Arc<dyn Backend> = Arc::new(ReferenceBackend::default());
        let inputs = named.iter().map(|(n, t)| (*n, t.clone())).collect();
        let expected = results(&reference, &layer.graph(), &layer.params(), &[inputs]);
        let found = machine.words(places[&template.outputs()[0].place.buffer], ROWS * layer.n);
        let tolerance = layer.k as f32 * f32::EPSILON;
        for (i, (a, b)) in found.iter().map(|&w| f32::from_bits(w)).zip(&expected[0]).enumerate() {
            assert!((a - b).abs() <= tolerance, "{}: element {i} is {a}, expected {b}", layer.dtype);
        }
    }
}
