//! Products of quantised rows with packed weights: the host's bits, where a device divides and multiplies as the host does.

use super::products::{Layer, numbers, results};
use crate::emulate::emulated_in;
use crate::emulated;
use crate::ir::build::Builder;
use crate::ir::interpret::Machine;
use crate::ir::{Access, Binding, Element, Storage};
use crate::print::{cuda, wgsl};
use rlx::Session;
use rlx::backend::Backend;
use rlx::backend::cpu::Precision;
use rlx::session::cpu_backend;
use rlx_graph::Graph;
use rlx_tensor::{DType, Tensor};
use std::sync::Arc;

/// A layer with nothing around its products.
fn bare(layer: &Layer) -> Graph {
    let Layer { dtype, n, k, .. } = layer;
    let text = format!(
        "graph \"bare\" {{
  input @x : f32[rows, {k}]
  param @w0 : {dtype}[{n}, {k}]
  %2 : f32[rows, {n}] = linear(@x, @w0) {{parts=1, transposed=false, bias=false, activation=identity, gated=false, residual=false}}
  return \"y\": %2
}}"
    );
    text.parse().unwrap_or_else(|e| panic!("{e}\n{text}"))
}

const fn layer(dtype: DType, n: usize, k: usize) -> Layer {
    Layer { dtype, n, k, gated: false, transposed: false }
}

fn bits(all: &[Vec<f32>]) -> Vec<Vec<u32>> {
    all.iter().map(|values| values.iter().map(|x| x.to_bits()).collect()).collect()
}

/// Rows with a cell of zeros, one of tiny numbers and one of large ones among them.
fn rows(count: usize, k: usize) -> Tensor {
    let mut x = numbers(count * k, 3);
    x[..32].fill(0.0);
    x[32..64].iter_mut().for_each(|x| *x *= 1e-34);
    x[k - 32..k].iter_mut().for_each(|x| *x *= 1e5);
    Tensor::from_slice(&[count, k], &x).unwrap()
}

#[test]
fn every_form_has_the_bits_of_the_host_by_the_interpreter() {
    let host: Arc<dyn Backend> = Arc::new(cpu_backend(None, Some(1)).unwrap());
    for (dtype, n, k) in [
        (DType::Q8_0, 37, 96),
        (DType::Q4_0, 70, 1184),
        (DType::Q4_1, 9, 96),
        (DType::Q5_0, 9, 96),
        (DType::Q5_1, 9, 96),
        (DType::Q2_K, 20, 768),
        (DType::Q3_K, 20, 256),
        (DType::Q4_K, 66, 512),
        (DType::Q5_K, 20, 512),
        (DType::Q6_K, 20, 768),
        (DType::IQ4_NL, 9, 96),
        (DType::IQ4_XS, 9, 512),
    ] {
        let layer = layer(dtype, n, k);
        let graph = bare(&layer);
        let params = &layer.params()[..1];
        let inputs: Vec<_> = [1, 3, 9, 35].map(|count| vec![("x", rows(count, k))]).into();
        let expected = bits(&results(&host, &graph, params, &inputs));
        for backend in [emulated(), emulated_in(Precision::F32, true)] {
            let found = results(&backend, &graph, params, &inputs);
            assert_eq!(bits(&found), expected, "{dtype} {n}x{k}");
        }
    }
}

#[test]
fn a_cell_that_is_not_finite_spoils_its_row_alone() {
    let layer = layer(DType::Q4_0, 9, 64);
    for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = numbers(2 * 64, 3);
        x[40] = odd;
        let inputs = [vec![("x", Tensor::from_slice(&[2, 64], &x).unwrap())]];
        let found = results(&emulated(), &bare(&layer), &layer.params()[..1], &inputs);
        assert!(found[0][..9].iter().all(|y| y.is_nan()) && found[0][9..].iter().all(|y| y.is_finite()));
    }
}

/// Parts of one step share the quantised row.
#[test]
fn an_input_is_quantised_once_for_all_parts() {
    let text = "graph \"parts\" {
  input @x : f32[rows, 256]
  param @q : q4_K[40, 256]
  param @k : q6_K[8, 256]
  param @v : f32[8, 256]
  %4 : f32[rows, 56] = linear(@x, @q, @k, @v) {parts=3, transposed=false, bias=false, activation=identity, gated=false, residual=false}
  return \"y\": %4
}";
    let text = text.replace("q4_K", &DType::Q4_K.to_string()).replace("q6_K", &DType::Q6_K.to_string());
    let graph: Graph = text.parse().unwrap_or_else(|e| panic!("{e}\n{text}"));
    let params: Vec<(String, Tensor)> = [("q", DType::Q4_K, 40), ("k", DType::Q6_K, 8), ("v", DType::F32, 8)]
        .into_iter()
        .map(|(name, dtype, n)| {
            let layer = Layer { n, ..self::layer(dtype, n, 256) };
            (name.to_owned(), layer.params().remove(0).1)
        })
        .collect();
    let compiled = Session::with_backend(emulated()).compile(&graph).unwrap();
    params.iter().for_each(|(name, value)| compiled.set_param(name, value).unwrap());
    let kernels = compiled.program().unwrap().kernels();
    let kernels: Vec<&str> = kernels.iter().flat_map(|k| k.kernel.split(['+', ',', ' '])).collect();
    let count = |part: &str| kernels.iter().filter(|name| name.contains(part)).count();
    assert_eq!((count("quantise_rows"), count("_q8")), (1, 6), "{kernels:?}");
    assert!(kernels.contains(&"linear_tiled") && kernels.contains(&"linear_few8"), "{kernels:?}");
    let x = numbers(3 * 256, 1);
    let inputs = [vec![("x", Tensor::from_slice(&[3, 256], &x).unwrap())]];
    let host: Arc<dyn Backend> = Arc::new(cpu_backend(None, Some(1)).unwrap());
    let (found, expected) =
        (results(&emulated(), &graph, &params, &inputs), results(&host, &graph, &params, &inputs));
    for (i, (a, b)) in found[0].iter().zip(&expected[0]).enumerate() {
        assert!((a - b).abs() <= 256.0 * f32::EPSILON, "element {i}: {a}, expected {b}");
    }
}

#[test]
fn bytes_of_a_word_name_entries_of_a_table() {
    let mut b = Builder::new("entries", 4);
    let count = b.known(4);
    let [x, out] = [Access::Read, Access::Write]
        .map(|access| b.view(Binding::Arena, Storage::Word(Element::I32), access, &[count]));
    let lane = b.lane();
    let inside = b.within(lane, count);
    let word = b.load(x, &[lane], Some(inside));
    let table = std::array::from_fn(|i| (7 - 9 * i as i32) as i8);
    let entries = b.lookup(word, table);
    b.store(out, &[lane], entries, Some(inside));
    let kernel = b.finish();
    crate::ir::verify::verify(&kernel).unwrap();
    let mut machine = Machine::new(8);
    machine.write(0, &[0x0302_0100, 0x0706_0504, 0x0b0a_0908, 0xff0e_0d0c]);
    let places = [0, 4].map(|base| crate::ir::Placement { base, strides: vec![1] });
    machine.run(&kernel, &kernel.arguments(&[], &places).unwrap(), &[], &mut [], 1).unwrap();
    let found: Vec<u8> = machine.words(4, 4).iter().flat_map(|word| word.to_le_bytes()).collect();
    assert_eq!(found, table.map(|entry| entry as u8));
    assert!(cuda::print(&kernel).contains("__byte_perm("));
    assert!(wgsl::print(&kernel).contains("& 3u) * 8u") && kernel.to_string().contains("lookup %"));
}

#[test]
fn four_bytes_are_multiplied_as_signed_numbers() {
    let mut b = Builder::new("bytes", 4);
    let count = b.known(4);
    let word = Storage::Word(Element::I32);
    let view = |b: &mut Builder, access| b.view(Binding::Arena, word, access, &[count]);
    let (x, y, z, out) = (
        view(&mut b, Access::Read),
        view(&mut b, Access::Read),
        view(&mut b, Access::Read),
        view(&mut b, Access::Write),
    );
    let lane = b.lane();
    let inside = b.within(lane, count);
    let [x, y, z] = [x, y, z].map(|view| b.load(view, &[lane], Some(inside)));
    let sum = b.dot4(x, y, z);
    b.store(out, &[lane], sum, Some(inside));
    let kernel = b.finish();
    crate::ir::verify::verify(&kernel).unwrap();
    let words = |all: [[i8; 4]; 4]| all.map(|bytes| u32::from_le_bytes(bytes.map(|byte| byte as u8)));
    let mut machine = Machine::new(16);
    machine.write(0, &words([[-128; 4], [127, -127, 1, 0], [1, 2, 3, 4], [0; 4]]));
    machine.write(4, &words([[-128; 4], [127, 127, -1, 9], [-5, 6, -7, 8], [1; 4]]));
    machine.write(8, &[0, 5, 100, 7]);
    let places = [0, 4, 8, 12].map(|base| crate::ir::Placement { base, strides: vec![1] });
    let arguments = kernel.arguments(&[], &places).unwrap();
    machine.run(&kernel, &arguments, &[], &mut [], 1).unwrap();
    let found: Vec<i32> = machine.words(12, 4).iter().map(|&word| word as i32).collect();
    assert_eq!(found, [65_536, 4, 118, 7]);
    assert!(wgsl::print(&kernel).contains("dot4I8Packed("));
    assert!(cuda::print(&kernel).contains("__dp4a("));
    assert!(kernel.to_string().contains("dot4 "));
}
