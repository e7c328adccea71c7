//! The kernel description itself: what the verifier refuses, what the interpreter finds, what is printed.

use super::kernels_of;
use crate::ir::build::Builder;
use crate::ir::interpret::Machine;
use crate::ir::verify::verify;
use crate::ir::{Access, Binding, Element, Kernel, Placement, Storage, UnaryFn};
use crate::print::{cuda, wgsl};
use std::sync::Arc;

const WORD: Storage = Storage::Word(Element::F32);

/// `out[i] = -x[i + shift]`, masked where `i` is below the extent unless told otherwise.
fn shifted(shift: i32, masked: bool) -> Kernel {
    let mut b = Builder::new("shifted", 8);
    let count = b.size(0);
    let x = b.view(Binding::Arena, WORD, Access::Read, &[count]);
    let out = b.view(Binding::Arena, WORD, Access::Write, &[count]);
    let (program, lanes, lane) = (b.program(), b.int(8), b.lane());
    let first = b.mul(program, lanes);
    let i = b.add(first, lane);
    let by = b.int(shift);
    let from = b.add(i, by);
    let limit = b.arg(count);
    let (inside, there) = (b.less(i, limit), b.less(from, limit));
    let mask = b.and(inside, there);
    let value = b.load(x, &[from], masked.then_some(mask));
    let y = b.unary(UnaryFn::Neg, value);
    b.store(out, &[i], y, Some(inside));
    b.finish()
}

fn placed(x: usize, out: usize) -> [Placement; 2] {
    [x, out].map(|base| Placement { base, strides: vec![1] })
}

#[test]
fn a_coordinate_that_may_be_beyond_its_extent_is_refused() {
    verify(&shifted(1, true)).unwrap();
    let error = verify(&shifted(1, false)).unwrap_err();
    assert!(error.reason.contains("is not known to be below"), "{error}");
    // A coordinate that may be negative is none either.
    assert!(verify(&shifted(-1, true)).is_err());
}

#[test]
fn a_loop_that_lanes_may_leave_apart_is_refused() {
    let mut b = Builder::new("apart", 8);
    let (zero, lane) = (b.int(0), b.lane());
    let (index, _) = b.open_loop(&[]);
    b.close_loop([zero, lane], 1, index, &[], &[], &[]);
    let error = verify(&b.finish()).unwrap_err();
    assert!(error.reason.contains("may run differently in each lane"), "{error}");
}

#[test]
fn a_weight_that_is_written_is_refused() {
    let mut b = Builder::new("weight", 8);
    let one = b.known(1);
    let weight = b.view(Binding::Weight(0), WORD, Access::Write, &[one]);
    let (zero, value) = (b.int(0), b.float(1.0));
    b.store(weight, &[zero], value, None);
    assert!(verify(&b.finish()).is_err());
}

#[test]
fn the_interpreter_computes_and_finds_what_must_not_be() {
    let kernel = shifted(1, true);
    let run = |x: usize, out: usize, written: usize| {
        let mut machine = Machine::new(64);
        machine.write(0, &(0..written as u32).map(|i| (i as f32).to_bits()).collect::<Vec<_>>());
        let arguments = kernel.arguments(&[10], &placed(x, out)).unwrap();
        machine.run(&kernel, &arguments, &[], &mut [], 2).map(|()| machine.words(out, 10).to_vec())
    };
    let negated: Vec<f32> = run(0, 32, 10).unwrap().into_iter().map(f32::from_bits).collect();
    assert_eq!(negated, [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0, -9.0, 0.0]);
    let what = |x, out, written| run(x, out, written).unwrap_err().what;
    assert_eq!(what(0, 32, 4), "read before anything was written");
    assert_eq!(what(0, 60, 10), "outside the binding");
    assert!(what(0, 2, 12).contains("another lane"), "{}", what(0, 2, 12));
}

#[test]
fn a_view_reaches_as_far_as_its_strides_carry_it() {
    let kernel = shifted(0, true);
    let reach = |count: usize, base: usize| {
        let arguments = kernel.arguments(&[count], &placed(base, 0)).unwrap();
        kernel.reach(&kernel.views[0], &arguments)
    };
    assert_eq!((reach(10, 5), reach(0, 5)), (15, 0));
    assert!(kernel.arguments(&[usize::MAX], &placed(0, 0)).is_none());
}

#[test]
fn kernels_that_do_the_same_have_one_hash() {
    assert_eq!(shifted(1, true).hash(), shifted(1, true).hash());
    assert_ne!(shifted(1, true).hash(), shifted(2, true).hash());
}

fn of(text: &str) -> Arc<Kernel> {
    kernels_of(&text.parse().unwrap()).unwrap().remove(0)
}

#[test]
fn an_elementwise_region_as_text_and_as_wgsl() {
    let kernel = of(r#"graph "g" {
  input @x : f32[rows, 4]
  input @b : f32[4]
  %2 : f32[rows, 4] = fused_elementwise(@x, @b) {program="t0=add i0 i1; t1=relu t0"}
  return "y": %2
}"#);
    insta::assert_snapshot!(*kernel);
    insta::assert_snapshot!(wgsl::print(&kernel));
}

#[test]
fn a_softmax_as_wgsl() {
    let kernel = of(r#"graph "g" {
  input @x : f32[rows, n]
  %1 : f32[rows, n] = softmax(@x) {axis=1}
  return "y": %1
}"#);
    insta::assert_snapshot!(wgsl::print(&kernel));
}

#[test]
fn a_softmax_as_cuda() {
    let kernel = of(r#"graph "g" {
  input @x : f32[rows, n]
  %1 : f32[rows, n] = softmax(@x) {axis=1}
  return "y": %1
}"#);
    insta::assert_snapshot!(cuda::print(&kernel));
}

/// For `scripts/gpu/nvrtc.py`, which compiles what this writes.
#[test]
#[ignore = "writes the CUDA text of every kernel to target/cuda, for cargo xtask nvrtc"]
fn every_kernel_as_cuda() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/cuda");
    std::fs::create_dir_all(&folder).unwrap();
    for kernel in super::zoo().into_iter().chain(super::units::kernels()).chain(super::library::kernels()) {
        let name = format!("{}_{}.cu", kernel.name, &kernel.hash()[..8]);
        std::fs::write(folder.join(name), cuda::print(&kernel)).unwrap();
    }
}
