//! `run_into` allocates nothing in steady state. A process of its own, for its allocator counts.
#![expect(unsafe_code, reason = "a global allocator that counts")]

#[path = "suite/backends.rs"]
mod backends;
#[path = "suite/models.rs"]
mod models;

use backends::cpu;
use models::{HEAD_DIM, KV_HEADS, POSITIONS, VOCAB, WIDTH, compile, decoder, encoder};
use rlx::{CompiledGraph, TensorArg};
use rlx_kernels::isa::Isa;
use rlx_kernels::schedule::RunControl;
use rlx_tensor::DimBinding;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: as the caller guarantees.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller guarantees.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
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

#[test]
fn a_steady_run_allocates_nothing() {
    for threads in [1, 2] {
        assert_eq!(encoder_allocations(threads), 0, "encoder, {threads} threads");
        assert_eq!(decoder_allocations(threads), 0, "decoder, {threads} threads");
    }
}
