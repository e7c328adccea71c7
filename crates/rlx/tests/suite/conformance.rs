//! Every op case on the reference and on the CPU, for each instruction set and number of threads: with all operands as inputs,
//! with weights as params (which is what packed kernels take), and decomposed.

use crate::backends::cpu;
use rlx::backend::reference::ReferenceBackend;
use rlx::{CompileOptions, CompiledGraph, Session, TensorArg};
use rlx_conformance::{Case, cases, decomposed};
use rlx_graph::Graph;
use rlx_graph::passes::PassOptions;
use rlx_kernels::isa::Isa;
use rlx_tensor::{DimBinding, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Roundings of an engine that rounds after each of an op's functions, as [`Case::compare`] counts them.
const ROUNDINGS: usize = 8;

/// Ops that have a kernel for some forms only, and what the other forms are.
const WITHOUT_KERNEL: &[(&str, &str)] = &[
    ("unary", "integers and f64"),
    ("binary", "f64, powers of integers and remainders of floats"),
    ("reduce", "axes that are not neighbours, f16, bf16, f64"),
    ("cumsum", "an axis other than the last"),
    ("topk", "integers"),
    ("cast", "integers other than i32, i64, i8 and u8"),
    ("conv", "weights that are operands, integers, three axes, channels in front"),
    ("conv_transpose", "every form"),
    ("integer_linear", "weights that are operands"),
    ("integer_conv", "weights that are operands"),
    ("pool_window", "integers, lp, indices, other than two axes, channels in front"),
];

/// The passes left out where a decomposition is to stay one.
const FUSIONS: &[&str] = &[
    "fuse_activation",
    "fuse_norm",
    "fuse_attention",
    "fuse_gated",
    "fuse_linear",
    "fuse_conv",
    "fuse_shared_input",
    "fuse_norm_residual",
    "fuse_elementwise",
    "fuse_integer",
];

/// The operands that are weights wherever the op is used.
fn weights(case: &Case) -> Vec<usize> {
    let count = case.inputs.len();
    let flag = |name: &str| case.attrs.contains(&format!("{name}=true"));
    match case.op.as_str() {
        "linear" => (1..count - usize::from(flag("residual"))).collect(),
        "lora_linear" => {
            let places = |name: &str| {
                case.attrs.split_once(name).map_or(0, |(_, rest)| {
                    rest.split(|c: char| !c.is_ascii_digit()).next().and_then(|n| n.parse().ok()).unwrap_or(0)
                })
            };
            (1..count - 2 - places("slots=") - usize::from(flag("residual"))).collect()
        }
        "moe" => (2..count).collect(),
        "layer_norm" | "rms_norm" => (1..count - usize::from(flag("residual"))).collect(),
        "embedding" | "rope_angles" | "integer_linear" | "integer_conv" => vec![1],
        "conv" => (1..count - usize::from(flag("addend"))).collect(),
        _ => Vec::new(),
    }
}

fn compile(session: &Session, case: &Case, graph: &Graph, params: &[usize], plain: bool) -> CompiledGraph {
    let skip = if plain { FUSIONS.iter().map(|name| (*name).to_owned()).collect() } else { Vec::new() };
    let passes = PassOptions { skip, ..PassOptions::default() };
    let options = CompileOptions { passes, ..CompileOptions::default() };
    let compiled = session.compile_with(graph, &options);
    let compiled = compiled.unwrap_or_else(|e| panic!("{:?} of {}: {e}\n{graph}", case.name, case.op));
    for &i in params {
        compiled.set_param(&format!("x{i}"), &case.inputs[i]).unwrap();
    }
    compiled
}

fn run(compiled: &CompiledGraph, case: &Case, params: &[usize], roundings: usize) {
    let named: Vec<(String, Tensor)> = case.named_inputs();
    let is_param = |name: &str| params.iter().any(|i| name == format!("x{i}"));
    let inputs: Vec<(&str, TensorArg<'_>)> = named
        .iter()
        .filter(|(name, _)| !is_param(name))
        .map(|(name, tensor)| (name.as_str(), TensorArg::from(tensor)))
        .collect();
    let mut state = compiled.new_state(&DimBinding::new()).unwrap();
    for (index, &operand) in case.states.iter().enumerate() {
        state.buffer_mut(index).unwrap().copy_from_slice(case.inputs[operand].bytes());
    }
    let context = |e: &dyn std::fmt::Display| {
        format!("{e}\n{:?} of {} on {}\n{}", case.name, case.op, compiled.backend().name(), compiled.graph())
    };
    let results = compiled.run_with(&mut state, &inputs).unwrap_or_else(|e| panic!("{}", context(&e)));
    let states: BTreeMap<String, Tensor> = case
        .states
        .iter()
        .enumerate()
        .map(|(index, &operand)| {
            let shape = &case.inputs[operand];
            let bytes = state.buffer(index).unwrap();
            (format!("x{operand}"), Tensor::from_bytes(shape.dims(), shape.dtype(), bytes).unwrap())
        })
        .collect();
    case.compare(&results, &states, roundings).unwrap_or_else(|e| panic!("{}", context(&e)));
}

/// What the backend says of memory is what a context holds.
fn check_memory(session: &Session, compiled: &CompiledGraph) {
    let lir = compiled.specialize(&DimBinding::new()).unwrap();
    let (arena, scratch) = compiled.context(&lir).unwrap().bytes();
    assert_eq!(arena, lir.arena_bytes(), "{}", compiled.graph());
    assert_eq!(scratch, compiled.backend().workspace_bytes(&lir).unwrap(), "{}", compiled.graph());
    let packed = compiled.backend().packed_bytes(compiled.template()).unwrap();
    assert_eq!(packed as u64, session.weights().packed_bytes(), "{}", compiled.graph());
    let own = compiled.backend().own_bytes(compiled.template());
    assert_eq!(own, compiled.program().unwrap().own_bytes(), "{}", compiled.graph());
}

#[test]
fn every_case_on_the_reference_backend() {
    let session = || Session::with_backend(Arc::new(ReferenceBackend::default()));
    for case in cases().unwrap() {
        let params = weights(&case);
        let graph = case.graph_with_params(&params).unwrap();
        run(&compile(&session(), &case, &graph, &params, false), &case, &params, ROUNDINGS);
        if let Some(primitive) = decomposed(&graph, true).unwrap() {
            run(&compile(&session(), &case, &primitive, &params, true), &case, &params, ROUNDINGS);
            run(&compile(&session(), &case, &primitive, &params, false), &case, &params, ROUNDINGS);
        }
    }
}

fn every_case_on(isa: Isa) {
    let mut by_reference = BTreeSet::new();
    for case in cases().unwrap() {
        let params = weights(&case);
        for threads in [1, 2] {
            let session = || cpu(isa, threads);
            let graph = case.graph_with_params(&params).unwrap();
            let own = session();
            let compiled = compile(&own, &case, &graph, &params, false);
            run(&compiled, &case, &params, ROUNDINGS);
            check_memory(&own, &compiled);
            for step in compiled.report().unwrap().steps {
                if !step.native {
                    by_reference.insert((step.op, case.op.clone(), case.name.clone()));
                }
            }
            if !params.is_empty() {
                run(&compile(&session(), &case, &case.graph().unwrap(), &[], false), &case, &[], ROUNDINGS);
            }
            if let Some(primitive) = decomposed(&graph, true).unwrap() {
                run(&compile(&session(), &case, &primitive, &params, true), &case, &params, ROUNDINGS);
                run(&compile(&session(), &case, &primitive, &params, false), &case, &params, ROUNDINGS);
            }
        }
    }
    let excused = |op: &str| WITHOUT_KERNEL.iter().any(|(name, _)| *name == op);
    let unexpected: Vec<_> = by_reference.iter().filter(|(op, ..)| !excused(op)).collect();
    println!("{isa}: by the reference evaluation: {by_reference:#?}");
    assert!(unexpected.is_empty(), "{isa}: without kernel: {unexpected:#?}");
}

#[test]
fn every_case_on_scalar_kernels() {
    every_case_on(Isa::Scalar);
}

/// The instruction sets beyond scalar that this machine has; those it lacks are printed.
#[test]
fn every_case_on_vector_kernels() {
    let available = Isa::available();
    for isa in Isa::ALL.into_iter().filter(|isa| *isa != Isa::Scalar) {
        if available.contains(&isa) {
            every_case_on(isa);
        } else {
            println!("{isa}: skipped, this machine does not have it");
        }
    }
}
