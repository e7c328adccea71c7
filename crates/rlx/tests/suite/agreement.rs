//! The CPU against the reference evaluation on whole models and on graphs with views, and what both say to wrong values.

use crate::backends::{cpu, numbers};
use crate::models::{POSITIONS, VOCAB, compile, decoder, encoder};
use rlx::backend::reference::ReferenceBackend;
use rlx::{CompiledGraph, Session, TensorArg};
use rlx_graph::eval::to_f64;
use rlx_graph::ops::activation::ActivationKind;
use rlx_graph::ops::binary::BinaryOp;
use rlx_graph::ops::conv::Conv;
use rlx_graph::ops::fused_elementwise::FusedElementwise;
use rlx_graph::ops::pool_window::{PoolWindow, WindowPool};
use rlx_graph::ops::reduce::ReduceOp;
use rlx_graph::{Graph, HirModule, HirMut, ValueId};
use rlx_kernels::isa::Isa;
use rlx_tensor::{DType, Dim, DimBinding, Tensor};
use std::sync::Arc;

fn reference() -> Session {
    Session::with_backend(Arc::new(ReferenceBackend::default()))
}

fn ints(values: &[i32]) -> Tensor {
    Tensor::from_slice(&[values.len()], values).unwrap()
}

/// The largest difference of two floats' elements.
fn difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!((a.dims(), a.dtype()), (b.dims(), b.dtype()));
    let (a, b) = (to_f64(a).unwrap(), to_f64(b).unwrap());
    a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

fn check(graph: &Graph, inputs: &[(&str, Tensor)], tolerance: f64) {
    let args: Vec<(&str, TensorArg<'_>)> = inputs.iter().map(|(n, t)| (*n, TensorArg::from(t))).collect();
    let wanted = compile(&reference(), graph).run(&args).unwrap();
    for isa in Isa::available() {
        let model = compile(&cpu(isa, 2), graph);
        let slow: Vec<_> = model.report().unwrap().steps.into_iter().filter(|s| !s.native).collect();
        assert!(slow.is_empty(), "{isa}: {slow:#?}");
        for ((name, found), (_, wanted)) in model.run(&args).unwrap().iter().zip(&wanted) {
            let difference = difference(found, wanted);
            assert!(difference <= tolerance, "{isa}: {name} differs by {difference:e}\n{}", model.graph());
        }
    }
}

fn encoder_inputs() -> Vec<(&'static str, Tensor)> {
    let ids: Vec<i32> = (0..23).map(|i| i * 7 % VOCAB as i32).collect();
    let positions: Vec<i32> = (0..23).map(|i| i % POSITIONS as i32).collect();
    vec![("ids", ints(&ids)), ("positions", ints(&positions)), ("seq_starts", ints(&[0, 5, 5, 22, 23]))]
}

/// Two layers of sums over at most 72 terms of magnitude 1, then norms that scale by at most a few.
#[test]
fn the_encoder_agrees_with_the_reference() {
    check(&encoder().unwrap(), &encoder_inputs(), 72.0 * 8.0 * f64::from(f32::EPSILON));
}

#[test]
fn the_decoder_agrees_with_the_reference() {
    let graph = decoder().unwrap();
    let ids: Vec<i32> = (0..70).map(|i| i * 11 % VOCAB as i32).collect();
    let positions: Vec<i32> = (0..66).chain(0..4).collect();
    let table = Tensor::from_slice(&[2, 2], &[2i32, 0, 1, 3]).unwrap();
    let inputs = [
        ("ids", ints(&ids)),
        ("positions", ints(&positions)),
        ("seq_starts", ints(&[0, 66, 70])),
        ("past", ints(&[0, 0])),
        ("block_table", table),
    ];
    let args: Vec<(&str, TensorArg<'_>)> = inputs.iter().map(|(n, t)| (*n, TensorArg::from(t))).collect();
    let run = |model: &CompiledGraph| {
        let mut state = model.new_state(&DimBinding::new().with("blocks", 4)).unwrap();
        model.run_with(&mut state, &args).unwrap().remove(0).1
    };
    let wanted = run(&compile(&reference(), &graph));
    for isa in Isa::available() {
        let found = run(&compile(&cpu(isa, 2), &graph));
        // Keys and values are rounded to f16 on both sides, where a last bit of f32 may become one of f16.
        let difference = difference(&found, &wanted);
        assert!(difference <= 16.0 / 2048.0, "{isa}: {difference:e}");
    }
}

/// Columns of one buffer as gate and up, as operands of chains, joins, gathers and products; sizes that no vector divides.
#[test]
fn views_and_broadcasts_agree_with_the_reference() {
    let mut module = HirModule::new("views");
    let mut hir = module.edit();
    let rows = Dim::symbol("rows");
    let x = hir.input("x", &[rows.clone(), Dim::Known(53)], DType::F32).unwrap();
    let ids = hir.input("ids", &[Dim::Known(5)], DType::I32).unwrap();
    let row = hir.param("row", &[17], DType::F32).unwrap();
    let gate = hir.slice(x, 1, 1, 17).unwrap();
    let up = hir.slice(x, 1, 20, 17).unwrap();
    let gated = hir.gated(gate, up, ActivationKind::GeluTanh).unwrap();
    let shifted = hir.add(gated, row).unwrap();
    let big = hir.scalar(BinaryOp::Greater, shifted, 0.25).unwrap();
    let picked = hir.select(big, up, shifted).unwrap();
    let joined = hir.concat(&[gate, picked, up], 1).unwrap();
    let turned = hir.transpose(joined, &[1, 0]).unwrap();
    let sums = hir.reduce(ReduceOp::Sum, joined, &[1], true).unwrap();
    let means = hir.reduce(ReduceOp::Mean, joined, &[0], false).unwrap();
    let scaled = hir.div(joined, sums).unwrap();
    let taken = hir.gather(joined, ids, 0).unwrap();
    let product = rlx_graph::ops::matmul::MatMul { transpose_a: false, transpose_b: true };
    let product = hir.op(product, &[gate, up]).unwrap();
    let half = hir.cast(joined, DType::F16).unwrap();
    let half = hir.activation(half, ActivationKind::Silu).unwrap();
    let outputs = [
        ("gated", gated),
        ("picked", picked),
        ("turned", turned),
        ("means", means),
        ("scaled", scaled),
        ("taken", taken),
        ("product", product),
        ("half", half),
    ];
    let graph = module.finish(&outputs).unwrap();
    for rows in [1, 7, 50] {
        let x: Vec<f32> = numbers(rows * 53, 9).into_iter().map(|v| v + 1.5).collect();
        let x = Tensor::from_slice(&[rows, 53], &x).unwrap();
        let last = rows as i32 - 1;
        // Results are at most 100 in size; f16 results, of size 4, may differ in their last bit.
        check(&graph, &[("x", x), ("ids", ints(&[last, 0, 0, last, last / 2]))], 4.0 / 1024.0);
    }
}

/// Codes over codes of the other sign, and over truth values: a result takes over the bytes of an operand, not its type.
#[test]
fn bytes_written_over_bytes_of_another_type_agree_with_the_reference() {
    let mut module = HirModule::new("bytes");
    let mut hir = module.edit();
    let x = hir.input("x", &[Dim::symbol("rows"), Dim::Known(40)], DType::F32).unwrap();
    let chain = |hir: &mut HirMut<'_>, x: ValueId, program: &str| {
        hir.op(FusedElementwise { program: program.to_owned() }, &[x]).unwrap()
    };
    let codes = chain(&mut hir, x, "t0=mul i0 100.0; t1=round t0; t2=add t1 128.0; t3=u8 t2");
    let signed = chain(&mut hir, codes, "t0=sub i0 128.0; t1=i8 t0");
    let signed = chain(&mut hir, signed, "t0=mul i0 0.5");
    let large = hir.scalar(BinaryOp::Greater, x, 0.25).unwrap();
    let picked = chain(&mut hir, large, "t0=select i0 3.0 200.0; t1=u8 t0");
    let picked = chain(&mut hir, picked, "t0=mul i0 0.25");
    let graph = module.finish(&[("signed", signed), ("picked", picked)]).unwrap();
    for rows in [1, 9] {
        let x = Tensor::from_slice(&[rows, 40], &numbers(rows * 40, 3)).unwrap();
        check(&graph, &[("x", x)], 0.0);
    }
}

/// A block of a detector: halves of one layer, what follows from them and a pooled value joined, lines picked and joined again.
fn joins() -> Graph {
    let mut module = HirModule::new("joins");
    let mut hir = module.edit();
    let dims = [Dim::symbol("batch"), Dim::Known(24), Dim::Known(6), Dim::Known(7)];
    let x = hir.input("x", &dims, DType::F32).unwrap();
    let lines = hir.input("lines", &[Dim::Known(9)], DType::I32).unwrap();
    let layer = |hir: &mut HirMut<'_>, x: ValueId, name: &str, dims: [usize; 4]| {
        let w = hir.param(name, &dims, DType::F32).unwrap();
        let ends = vec![Dim::Known(dims[2] / 2); 2];
        let conv = Conv { before: ends.clone(), after: ends, ..Conv::plain(2) };
        let y = hir.op(conv, &[x, w]).unwrap();
        hir.activation(y, ActivationKind::Silu).unwrap()
    };
    let first = layer(&mut hir, x, "first", [40, 24, 1, 1]);
    let left = hir.slice(first, 1, 0, 20).unwrap();
    let right = hir.slice(first, 1, 20, 20).unwrap();
    let inner = layer(&mut hir, right, "inner", [20, 20, 3, 3]);
    let sum = hir.add(right, inner).unwrap();
    let ends = vec![Dim::Known(1); 2];
    let pool =
        PoolWindow { before: ends.clone(), after: ends, ..PoolWindow::plain(WindowPool::Max, &[3, 3]) };
    let pooled = hir.op(pool, &[sum]).unwrap();
    let joined = hir.concat(&[left, right, sum, pooled], 1).unwrap();
    let last = layer(&mut hir, joined, "last", [16, 80, 1, 1]);
    let picked = hir.gather(last, lines, 2).unwrap();
    let beside = hir.gather(x, lines, 2).unwrap();
    let beside = layer(&mut hir, beside, "beside", [12, 24, 3, 3]);
    let again = hir.concat(&[picked, beside], 1).unwrap();
    let y = layer(&mut hir, again, "again", [8, 28, 1, 1]);
    module.finish(&[("y", y)]).unwrap()
}

/// Sums of at most 216 terms through five layers, of results below 16.
#[test]
fn values_written_into_what_they_are_joined_into_agree_with_the_reference() {
    let graph = joins();
    for batch in [1, 3] {
        let x = Tensor::from_slice(&[batch, 24, 6, 7], &numbers(batch * 24 * 42, 5)).unwrap();
        let inputs = [("x", x), ("lines", ints(&[0, 0, 1, 2, 2, 3, 4, 5, 5]))];
        check(&graph, &inputs, 5.0 * 216.0 * 16.0 * f64::from(f32::EPSILON));
    }
    let report = compile(&cpu(Isa::detect(), 2), &graph).report().unwrap();
    assert!(report.steps.iter().all(|step| step.op != "concat"), "{report:#?}");
}

/// A run that a value stops returns an error that names it, and the next run is not touched by it.
#[test]
fn wrong_values_are_errors() {
    for isa in Isa::available() {
        let model = compile(&cpu(isa, 2), &encoder().unwrap());
        let good = encoder_inputs();
        let run = |changed: usize, to: &[i32]| {
            let mut inputs = encoder_inputs();
            inputs[changed].1 = ints(to);
            let args: Vec<_> = inputs.iter().map(|(n, t)| (*n, TensorArg::from(t))).collect();
            model.run(&args).map_err(|e| e.to_string())
        };
        let mut ids = good[0].1.as_slice::<i32>().unwrap().to_vec();
        let before = run(0, &ids).unwrap();
        ids[9] = VOCAB as i32;
        assert!(run(0, &ids).unwrap_err().contains("token id 61 at position 9 is outside 0..61"));
        ids[9] = -1;
        assert!(run(0, &ids).unwrap_err().contains("-1"));
        assert!(run(2, &[0, 6, 5, 22, 23]).unwrap_err().contains("ascend"));
        assert!(run(2, &[0, 5, 5, 22, 24]).unwrap_err().contains("ascend"));
        ids[9] = 9 * 7 % VOCAB as i32;
        let after = run(0, &ids).unwrap();
        assert!(before.iter().zip(&after).all(|((_, a), (_, b))| a.bits_eq(b)), "{isa}");
    }
}
