//! Products that are left to a library: what it would be called for is what its kernel computes, and what is not taken runs as before.

use super::conformance::cases_on;
use super::faults::{Failing, Fault, NAME, Script, contains, lock};
use super::products::{LAYERS, check_counts, check_rounded, numbers, results};
use super::units::kernels_as;
use crate::device::DeviceBackend;
use crate::emulate::Emulator;
use crate::emulated_by_library;
use crate::ir::Kernel;
use crate::lower::library::Library;
use crate::lower::operands::Operands;
use crate::lower::schedules::Choices;
use rlx::backend::Backend;
use rlx::backend::cpu::Precision;
use rlx::{CompiledGraph, Session, TensorArg};
use rlx_graph::Graph;
use rlx_tensor::{DType, Tensor};
use std::sync::Arc;

const LIBRARY: Library = Library { rows: 4, width: 8, workspace: 70, version: 130_002 };

fn floats() -> Choices {
    Choices { library: Some(LIBRARY), ..Choices::default() }
}

fn brains() -> Choices {
    Choices { operands: Operands::Units { wave: 1 }, ..floats() }
}

/// Kernels beside a library's products: those that pack rows and those that finish sums.
pub(super) fn kernels() -> Vec<Arc<Kernel>> {
    let choices = [floats(), brains()];
    let under = choices
        .iter()
        .flat_map(|choices| LAYERS.iter().flat_map(|layer| kernels_as(&layer.graph(), choices.clone())));
    let beside = |kernel: &Kernel| kernel.name.starts_with("pack_rows") || kernel.name.ends_with("_finish");
    under.filter(|kernel| beside(kernel)).collect()
}

/// A layer of so many rows known only to a run, with or without what a library adds.
fn layer(dtype: DType, [n, k]: [usize; 2], activation: &str, added: bool) -> Graph {
    let (operands, more, next) = match added {
        true => ("@x, @w, @b, @r", format!("  input @r : f32[rows, {n}]\n  param @b : f32[{n}]\n"), 4),
        false => ("@x, @w", String::new(), 2),
    };
    let text = format!(
        "graph \"a layer\" {{
  input @x : f32[rows, {k}]
{more}  param @w : {dtype}[{n}, {k}]
  %{next} : f32[rows, {n}] = linear({operands}) {{parts=1, transposed=false, bias={added}, activation={activation}, gated=false, residual={added}}}
  return \"y\": %{next}
}}"
    );
    text.parse().unwrap_or_else(|e| panic!("{e}\n{text}"))
}

fn names(graph: &Graph, choices: Choices) -> Vec<String> {
    kernels_as(graph, choices).iter().map(|kernel| kernel.name.clone()).collect()
}

#[test]
fn what_is_left_to_a_library_and_what_is_not() {
    let alone = |dtype, dims, choices| names(&layer(dtype, dims, "identity", false), choices);
    let few = ["linear_few4", "linear_few2", "linear_few1"];
    let found = alone(DType::F32, [64, 64], floats());
    assert_eq!(found.iter().filter(|name| name.contains("cublaslt")).count(), 1, "{found:?}");
    assert_eq!(found.last().unwrap(), "cublaslt_f32", "no launch finishes what a library stores");
    // No row is left to a form for many.
    assert!(
        found.iter().all(|name| !name.contains("tiled"))
            && few.iter().any(|few| found.contains(&(*few).to_owned()))
    );
    let bent = names(&layer(DType::F32, [64, 64], "silu", false), floats());
    assert_eq!(bent[bent.len() - 2..], ["cublaslt_f32", "linear_finish"]);
    let added = names(&layer(DType::BF16, [64, 64], "identity", true), brains());
    assert_eq!((added[0].as_str(), added.last().unwrap().as_str()), ("pack_rows_bf16", "cublaslt_bf16"));
    let own = |dtype, dims, choices| {
        let found = alone(dtype, dims, choices);
        assert!(found.iter().all(|name| !name.contains("cublaslt") && !name.contains("pack")), "{found:?}");
    };
    // Narrow, of rows that begin within a word, of weights that would have to be packed, of packed blocks, without a library.
    own(DType::F32, [7, 64], floats());
    own(DType::BF16, [64, 68], brains());
    own(DType::F32, [64, 64], brains());
    own(DType::F16, [64, 64], brains());
    own(DType::BF16, [64, 64], floats());
    own(DType::BF16, [64, 64], Choices { operands: Operands::Rounded, ..floats() });
    own(DType::Q8_0, [64, 64], floats());
    own(DType::F32, [64, 64], Choices::default());
}

#[test]
fn layers_by_a_library_are_held_to_the_reference() {
    let (wide, narrow) = (emulated_by_library(Precision::F32), emulated_by_library(Precision::Bf16));
    for layer in LAYERS {
        check_counts(layer, &wide, &[9]);
        if matches!(layer.dtype, DType::F32 | DType::F16 | DType::BF16) {
            check_rounded(layer, &narrow, &[9]);
        }
    }
}

/// Products of two activations with each operand turned, several at once; layers and adapters.
#[test]
fn cases_of_products_by_a_library() {
    let products = |op: &str| matches!(op, "linear" | "matmul" | "lora_linear");
    let library = Library { rows: 1, width: 1, ..LIBRARY };
    let emulator = Emulator { library: Some(Ok(library)), ..Emulator::default() };
    let backend: Arc<dyn Backend> = Arc::new(DeviceBackend::set_up(emulator, None, Precision::F32).unwrap());
    cases_on(&backend, &products);
}

/// Of what several axes in front count a library takes one product where they follow each other, and none where they do not.
#[test]
fn products_at_once_are_one_call() {
    let graph = |b: &str, swap: bool| -> Graph {
        let text = format!(
            "graph \"g\" {{
  input @a : f32[2, 3, rows, 16]
  input @b : f32[{b}]
  %2 : f32[2, 3, rows, 24] = matmul(@a, @b) {{transpose_a=false, transpose_b={swap}}}
  return \"y\": %2
}}"
        );
        text.parse().unwrap_or_else(|e| panic!("{e}\n{text}"))
    };
    let backend = emulated_by_library(Precision::F32);
    let reference: Arc<dyn Backend> = Arc::new(rlx::backend::reference::ReferenceBackend::default());
    let forms = [
        ("2, 3, 16, 24", [2, 3, 16, 24].as_slice(), false, true),
        ("2, 3, 24, 16", &[2, 3, 24, 16], true, true),
        ("16, 24", &[16, 24], false, true),
        ("2, 1, 24, 16", &[2, 1, 24, 16], true, false),
    ];
    for (text, dims, swap, taken) in forms {
        let graph = graph(text, swap);
        let by_library = names(&graph, floats()).iter().any(|name| name == "cublaslt_f32");
        assert_eq!(by_library, taken, "{text}");
        let count: usize = dims.iter().product();
        let (a, b) = (numbers(2 * 3 * 5 * 16, 3), numbers(count, 4));
        let a = Tensor::from_slice(&[2, 3, 5, 16], &a).unwrap();
        let inputs = [vec![("a", a), ("b", Tensor::from_slice(dims, &b).unwrap())]];
        let found = results(&backend, &graph, &[], &inputs);
        let expected = results(&reference, &graph, &[], &inputs);
        for (a, b) in found[0].iter().zip(&expected[0]) {
            assert!((a - b).abs() <= 16.0 * f32::EPSILON, "{text}: {a} {b}");
        }
    }
}

/// Weights in bands and an arena in segments.
#[test]
fn small_bindings_give_a_library_what_large_ones_do() {
    let graph = layer(DType::F32, [96, 64], "silu", true);
    let params = [
        ("w".to_owned(), Tensor::from_slice(&[96, 64], &numbers(96 * 64, 1)).unwrap()),
        ("b".to_owned(), Tensor::from_slice(&[96], &numbers(96, 2)).unwrap()),
    ];
    let rows = 20;
    let x = Tensor::from_slice(&[rows, 64], &numbers(rows * 64, 3)).unwrap();
    let r = Tensor::from_slice(&[rows, 96], &numbers(rows * 96, 4)).unwrap();
    let inputs = [vec![("x", x), ("r", r)]];
    let on = |binding_words: usize| {
        let emulator = Emulator { binding_words, library: Some(Ok(LIBRARY)), ..Emulator::default() };
        let backend: Arc<dyn Backend> =
            Arc::new(DeviceBackend::set_up(emulator, None, Precision::F32).unwrap());
        let compiled = Session::with_backend(Arc::clone(&backend)).compile(&graph).unwrap();
        params.iter().for_each(|(name, value)| compiled.set_param(name, value).unwrap());
        let report = compiled.report().unwrap().steps[0].kernel.clone();
        (report.matches("cublaslt_f32").count(), results(&backend, &graph, &params, &inputs))
    };
    let (whole, small) = (on(usize::MAX), on(33 * 64));
    assert_eq!((whole.0, small.0), (1, 3));
    assert_eq!(whole.1, small.1);
}

fn compiled(emulator: Emulator, script: &Arc<Script>) -> CompiledGraph {
    let backend = DeviceBackend::set_up(Failing(emulator, Arc::clone(script)), None, Precision::F32).unwrap();
    let compiled = Session::with_backend(Arc::new(backend))
        .compile(&layer(DType::F32, [16, 16], "identity", false))
        .unwrap();
    compiled.set_param("w", &Tensor::from_slice(&[16, 16], &numbers(256, 1)).unwrap()).unwrap();
    compiled
}

const WITH: fn() -> Emulator = || Emulator { library: Some(Ok(LIBRARY)), ..Emulator::default() };

#[test]
fn a_library_that_is_missing_or_wrong_is_not_used_and_the_device_says_so() {
    let script = Arc::new(Script::default());
    let open = |emulator: Emulator| {
        DeviceBackend::set_up(Failing(emulator, Arc::clone(&script)), None, Precision::F32)
    };
    let told = |emulator: Emulator| open(emulator).unwrap().capabilities().join(", ");
    assert_eq!(told(Emulator::default()), "f32");
    assert_eq!(told(WITH()), "f32, products of 4 rows and more by cuBLASLt 130002");
    let plain = open(Emulator::default()).unwrap().fingerprint();
    assert_eq!(
        open(WITH()).unwrap().fingerprint(),
        format!("{plain}, products of 4 rows and more by cuBLASLt 130002")
    );
    let missing = Emulator { library: Some(Err("libcublasLt is not found")), ..Emulator::default() };
    assert_eq!(told(missing), "f32, no cuBLASLt: libcublasLt is not found");
    assert_eq!(open(missing).unwrap().fingerprint(), plain);
    // Four batches are the device's own self-test; then a layer and products at once.
    for (fault, after, cause) in [
        (Fault::Wrong, 4, "its test failed: element 5 of a layer is"),
        (Fault::Wrong, 5, "its test failed: element 5 of a batch is"),
        (Fault::Library, 0, "its test failed: no algorithm"),
        (Fault::Library, 1, "its test failed: no algorithm"),
    ] {
        script.fail(fault, after);
        contains(&told(WITH()), &["f32, no cuBLASLt: ", cause]);
        script.heal();
    }
    script.fail(Fault::MidRun, 4);
    contains(&open(WITH()).map(drop).unwrap_err(), &["fell off the bus"]);
}

#[test]
fn a_product_that_a_library_refuses_names_device_kernel_and_cause() {
    let script = Arc::new(Script::default());
    let compiled = compiled(WITH(), &script);
    let x = numbers(9 * 16, 2);
    let run = |rows: usize| compiled.run(&[("x", TensorArg::typed(&[rows, 16], &x[..rows * 16]))]);
    let expected = run(9).unwrap();
    script.fail(Fault::Library, 0);
    let error = run(9).unwrap_err();
    contains(&error, &[NAME, "running a layer, kernel cublaslt_f32", "no algorithm"]);
    assert!(error.is_device_fault());
    // Few rows are none of a library's.
    run(3).unwrap();
    script.heal();
    let values = |found: &[(String, Tensor)]| found[0].1.as_slice::<f32>().unwrap().to_vec();
    assert_eq!(values(&run(9).unwrap()), values(&expected));
}

/// A recording of launches holds what the host told a library, so other rows are another recording; a kernel reads its arguments.
#[test]
fn runs_of_other_rows_are_recorded_apart_where_a_library_multiplies() {
    let x = numbers(10 * 16, 2);
    for (emulator, apart) in [(WITH(), true), (Emulator::default(), false)] {
        let script = Arc::new(Script::default());
        let compiled = compiled(emulator, &script);
        let lir = compiled.specialize(&rlx_tensor::DimBinding::new().with("rows", 10)).unwrap();
        let mut context = compiled.context(&lir).unwrap();
        let mut signature = |rows: usize| {
            let mut y = vec![0.0f32; rows * 16];
            let dims = [rows, 16];
            let inputs = [("x", TensorArg::typed(&dims, &x[..rows * 16]))];
            let mut outputs = [("y", bytemuck::cast_slice_mut(y.as_mut_slice()))];
            let control = rlx_kernels::schedule::RunControl::default();
            let mut state = rlx::State::default();
            context.run_into(&mut state, &inputs, &mut outputs, control).unwrap();
            std::mem::take(&mut *lock(&script.signature))
        };
        // As many programs.
        let (nine, again, ten) = (signature(9), signature(9), signature(10));
        assert_eq!(nine, again);
        assert_eq!(nine != ten, apart);
    }
}
