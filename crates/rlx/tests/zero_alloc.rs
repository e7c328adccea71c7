//! `run_into` allocates nothing in steady state, and the estimate is what is allocated. A process of its own, for its allocator counts.
#![expect(unsafe_code, reason = "a global allocator that counts")]

#[path = "suite/backends.rs"]
mod backends;
#[path = "suite/models.rs"]
mod models;

use backends::{cpu, numbers};
use models::{HEAD_DIM, KV_HEADS, POSITIONS, VOCAB, WIDTH, compile, decoder, encoder};
use rlx::{CompiledGraph, TensorArg};
use rlx_graph::expand::Expand;
use rlx_graph::ops::activation::{Activation, ActivationKind};
use rlx_graph::ops::binary::BinaryOp;
use rlx_graph::ops::conv::Conv;
use rlx_graph::ops::integer_linear::IntegerLinear;
use rlx_graph::ops::layer_norm::LayerNorm;
use rlx_graph::ops::matmul::MatMul;
use rlx_graph::ops::softmax::Softmax;
use rlx_graph::{Graph, ValueId};
use rlx_kernels::isa::Isa;
use rlx_kernels::schedule::RunControl;
use rlx_tensor::{DType, Dim, DimBinding, Shape, Tensor};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
static LIVE_BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        LIVE_BYTES.fetch_add(layout.size(), Ordering::SeqCst);
        // SAFETY: as the caller guarantees.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE_BYTES.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: as the caller guarantees.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        LIVE_BYTES.fetch_add(size, Ordering::SeqCst);
        LIVE_BYTES.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: as the caller guarantees.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Steps without a kernel run by the reference evaluation, which allocates: there must be none.
fn check_native(model: &CompiledGraph) {
    let steps = model.report().unwrap().steps;
    let slow: Vec<_> = steps.iter().filter(|s| !s.native).collect();
    assert!(slow.is_empty(), "{slow:#?}");
}

/// The allocations of `run`, once it has run a few times.
fn steady(mut run: impl FnMut()) -> usize {
    (0..3).for_each(|_| run());
    let before = ALLOCATIONS.load(Ordering::SeqCst);
    (0..5).for_each(|_| run());
    ALLOCATIONS.load(Ordering::SeqCst) - before
}

fn encoder_allocations(threads: usize) -> usize {
    let session = cpu(Isa::detect(), threads);
    let model = compile(&session, &encoder().unwrap());
    check_native(&model);
    let capacities = DimBinding::new().with("rows", 40).with("batch", 5);
    let mut context = model.context(&model.specialize(&capacities).unwrap()).unwrap();
    let mut state = model.new_state(&capacities).unwrap();
    let ids: Vec<i32> = (0..30).map(|i| i % VOCAB as i32).collect();
    let positions: Vec<i32> = (0..30).map(|i| i % POSITIONS as i32).collect();
    let starts = [0, 4, 4, 21, 30];
    let (rows, batch) = ([30], [5]);
    let inputs = [
        ("ids", TensorArg::typed(&rows, &ids)),
        ("positions", TensorArg::typed(&rows, &positions)),
        ("seq_starts", TensorArg::typed(&batch, &starts)),
    ];
    let (mut hidden, mut pooled) = (vec![0; 30 * WIDTH * 4], vec![0; 4 * WIDTH * 4]);
    let count = steady(|| {
        let mut outputs = [("hidden", hidden.as_mut_slice()), ("pooled", pooled.as_mut_slice())];
        context.run_into(&mut state, &inputs, &mut outputs, RunControl::default()).unwrap();
    });
    assert!(pooled.iter().any(|&b| b != 0));
    count
}

fn decoder_allocations(threads: usize) -> usize {
    let session = cpu(Isa::detect(), threads);
    let model = compile(&session, &decoder().unwrap());
    check_native(&model);
    let capacities = DimBinding::new().with("rows", 8).with("batch", 2).with("table", 2).with("blocks", 4);
    let mut context = model.context(&model.specialize(&capacities).unwrap()).unwrap();
    let mut state = model.new_state(&capacities).unwrap();
    assert_eq!(state.bytes(), 4 * 4 * KV_HEADS * HEAD_DIM * 64 * 2);
    let mut past = [0, 0];
    let mut logits = vec![0; 2 * VOCAB * 4];
    let count = steady(|| {
        let inputs = [
            ("ids", TensorArg::typed(&[2], &[1i32, 2])),
            ("positions", TensorArg::typed(&[2], &past)),
            ("seq_starts", TensorArg::typed(&[3], &[0i32, 1, 2])),
            ("past", TensorArg::typed(&[2], &past)),
            ("block_table", TensorArg::typed(&[2, 2], &[0i32, 1, 2, 3])),
        ];
        let mut outputs = [("logits", logits.as_mut_slice())];
        context.run_into(&mut state, &inputs, &mut outputs, RunControl::default()).unwrap();
        past = past.map(|p: i32| p + 1);
    });
    assert!(logits.iter().any(|&b| b != 0));
    count
}

/// A constant of the graph, as folding makes them.
fn constant(graph: &mut Graph, dims: &[usize], seed: u64) -> ValueId {
    let values = numbers(dims.iter().product(), seed);
    graph.constant(Tensor::from_slice(dims, &values).unwrap())
}

/// Two convolutions of constants, one of each channel by itself, and a product of codes with constant codes.
fn image_net() -> Graph {
    let mut graph = Graph::new("images");
    let dims = vec![Dim::symbol("batch"), Dim::Known(48), Dim::Known(14), Dim::Known(14)];
    let mut x = graph.input("x", Shape::from_dims(dims, DType::F32)).unwrap();
    for (groups, each) in [(1, 48), (48, 1), (1, 48)] {
        let (w, b) = (constant(&mut graph, &[48, each, 3, 3], 3), constant(&mut graph, &[48], 4));
        let ends = vec![Dim::Known(1); 2];
        let op = Conv { before: ends.clone(), after: ends, groups, bias: true, ..Conv::plain(2) };
        x = graph.add_one(op, &[x, w, b]).unwrap();
        x = graph.add_one(Activation { kind: ActivationKind::Relu }, &[x]).unwrap();
    }
    let codes =
        graph.input("codes", Shape::from_dims(vec![Dim::symbol("batch"), Dim::Known(512)], DType::U8));
    let w = Tensor::from_bytes(&[300, 512], DType::I8, &[7; 300 * 512]).unwrap();
    let (w, zero) = (graph.constant(w), graph.constant(Tensor::from_bytes(&[], DType::U8, &[3]).unwrap()));
    let sums = graph.add_one(IntegerLinear::sums(), &[codes.unwrap(), w, zero]).unwrap();
    graph.set_outputs(&[("y", x), ("sums", sums)]).unwrap();
    graph
}

/// A block of a transformer whose weights are constants.
fn transformer_block() -> Graph {
    const N: usize = 160;
    let mut graph = Graph::new("block");
    let x = graph.input("x", Shape::from_dims(vec![Dim::symbol("rows"), Dim::Known(N)], DType::F32)).unwrap();
    let (w, b) = (constant(&mut graph, &[N], 1), constant(&mut graph, &[N], 2));
    let normed = graph.add_one(LayerNorm { eps: 1e-5, bias: true, residual: false }, &[x, w, b]).unwrap();
    let linear = |graph: &mut Graph, x: ValueId, seed: u64| {
        let (w, b) = (constant(graph, &[N, N], seed), constant(graph, &[N], seed + 9));
        let y = graph.add_one(MatMul::plain(), &[x, w]).unwrap();
        Expand { graph }.binary(BinaryOp::Add, y, b).unwrap()
    };
    let [q, k, v] = [11, 12, 13].map(|seed| linear(&mut graph, normed, seed));
    let scores = graph.add_one(MatMul { transpose_a: false, transpose_b: true }, &[q, k]).unwrap();
    let weights = graph.add_one(Softmax { axis: 1 }, &[scores]).unwrap();
    let mixed = graph.add_one(MatMul::plain(), &[weights, v]).unwrap();
    let y = linear(&mut graph, mixed, 14);
    let y = Expand { graph: &mut graph }.binary(BinaryOp::Add, y, x).unwrap();
    graph.set_outputs(&[("y", y)]).unwrap();
    graph
}

/// Bytes that graphs, plans and steps take beside tensors, at most.
const DESCRIPTION_BYTES: usize = 96 << 10;

fn check_estimate(graph: fn() -> Graph, symbol: &str, size: usize) {
    let session = cpu(Isa::detect(), 2);
    let before = LIVE_BYTES.load(Ordering::SeqCst);
    let compiled = session.compile(&graph()).unwrap();
    let binding = DimBinding::new().with(symbol, size);
    let estimate = compiled.estimate(&binding).unwrap();
    let context = compiled.context(&compiled.specialize(&binding).unwrap()).unwrap();
    let held = LIVE_BYTES.load(Ordering::SeqCst) - before;
    drop(context);
    // The caller's buffers are not there yet.
    let wanted = (estimate.total_bytes() - estimate.input_bytes - estimate.output_bytes) as usize;
    let few = held.checked_sub(wanted).is_some_and(|more| more <= DESCRIPTION_BYTES);
    assert!(few, "{symbol}: {held} bytes are held, {wanted} were estimated: {estimate:?}");
    assert!(estimate.packed_bytes as usize > 2 * DESCRIPTION_BYTES, "{estimate:?}");
}

/// One test, for a second thread of tests would be counted too.
#[test]
fn a_steady_run_allocates_nothing_and_the_estimate_is_what_is_allocated() {
    for threads in [1, 2] {
        assert_eq!(encoder_allocations(threads), 0, "encoder, {threads} threads");
        assert_eq!(decoder_allocations(threads), 0, "decoder, {threads} threads");
    }
    check_estimate(image_net, "batch", 2);
    check_estimate(transformer_block, "rows", 77);
}
