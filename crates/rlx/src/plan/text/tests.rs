use crate::backend::Backend;
use crate::backend::cpu::CpuBackend;
use crate::plan::{BindingManifest, Lir, Template, parse_lir};
use proptest::prelude::*;
use rlx_graph::passes::{PassOptions, compile_passes};
use rlx_kernels::isa::Isa;
use rlx_tensor::DimBinding;
use std::sync::Arc;

const GRAPH: &str = r#"
graph "small" {
  input @ids : i32[rows]
  param @table : f32[16, 8]
  param @w1 : f32[8, 8]
  param @w2 : f32[8, 8]
  const %4 : f32[] = [0.5]
  const %5 : f32[20] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
  %6 : f32[rows, 8] = embedding(@ids, @table) {}
  %7 : f32[rows, 8] = matmul(%6, @w1) {transpose_a=false, transpose_b=false}
  %8 : f32[rows, 8] = matmul(%6, @w2) {transpose_a=false, transpose_b=false}
  %9 : f32[rows, 8] = binary(%7, %8) {kind=mul}
  %10 : f32[rows, 8] = softmax(%9) {axis=1}
  %11 : f32[rows, 8] = binary(%10, %4) {kind=mul}
  %12 : f32[20] = unary(%5) {kind=sqrt}
  return "out": %11, "again": %11, "roots": %12
}
"#;

/// A small plan with views, in-place steps, constants in the line and as a blob, and an output that is a copy.
pub(crate) fn small_lir() -> Lir {
    let graph = rlx_graph::text::parse(GRAPH).unwrap();
    let backend = CpuBackend::new(Isa::Scalar, 1);
    let options = PassOptions { fold_limit_bytes: 0, ..PassOptions::default() };
    let (legal, _) = compile_passes(&graph, backend.target(), &options).unwrap();
    let template = Arc::new(Template::build(&legal, backend.plan_target()).unwrap());
    template.specialize(&DimBinding::new().with("rows", 6)).unwrap()
}

#[test]
fn a_plan_reads_back_to_itself() {
    let lir = small_lir();
    let text = lir.to_string();
    let again = parse_lir(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    assert_eq!(again.to_string(), text);
    assert_eq!(again.capacities(), lir.capacities());
    assert_eq!(again.placed().collect::<Vec<_>>(), lir.placed().collect::<Vec<_>>());
    assert_eq!(BindingManifest::from_lir(&again), BindingManifest::from_lir(&lir));
    for part in ["symbol rows = 6", "blob 0", "arena, ", "output \"again\"", " from \""] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
}

#[test]
fn the_manifest_is_the_plans_layout() {
    let lir = small_lir();
    let manifest = BindingManifest::from_lir(&lir);
    let ids = &manifest.inputs[0];
    assert_eq!((ids.name.as_str(), ids.shape.as_slice(), ids.bytes, ids.alignment), ("ids", &[6][..], 24, 4));
    assert_eq!(manifest.outputs.iter().map(|o| o.bytes).collect::<Vec<_>>(), [192, 192, 80]);
    assert_eq!(manifest.params.len(), 3);
    assert_eq!(manifest.arena_bytes, lir.arena_bytes());
    assert!(manifest.inputs.iter().chain(&manifest.outputs).all(|e| e.arena_offset.is_none()));
}

/// Changes one piece of the text and gives the error.
fn refused(from: &str, to: &str) -> String {
    let text = small_lir().to_string();
    assert!(text.contains(from), "{from} is not in\n{text}");
    parse_lir(&text.replacen(from, to, 1)).expect_err("a broken plan was read").to_string()
}

#[test]
fn broken_plans_are_refused_with_the_place() {
    assert!(refused("symbol rows = 6", "symbol rows = 7").contains("the size is"));
    assert!(refused("  step ", "  stop ").contains("begins no line"));
    assert!(refused("  arena ", "  arena 1").contains("its buffers end at"));
    assert!(refused("b0 i32[rows]\n", "b0 i32[rows + 1]\n").contains("does not fill"));
    assert!(refused("lir \"", "lir ").starts_with("line 1, column"));
    assert!(refused("at 0\n", "at 8\n").contains("a multiple of 64"));
    assert!(refused("input 0", "input 1").contains("does not fill"));
}

#[test]
fn buffers_moved_onto_each_other_are_refused() {
    let text = small_lir().to_string();
    let mut refusals = 0;
    for (start, _) in text.match_indices(", at ") {
        let end = start + text[start..].find('\n').unwrap();
        let mut moved = text.clone();
        moved.replace_range(start..end, ", at 0");
        if moved != text {
            let error = parse_lir(&moved).expect_err("overlapping buffers were read").to_string();
            assert!(error.contains("overlap") || error.contains("end at"), "{error}");
            refusals += 1;
        }
    }
    assert!(refusals > 0, "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn mutated_plans_never_panic_and_hold_if_read(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0..4u8), 1..4)
    ) {
        let mut text = small_lir().to_string();
        let pieces = ["0", "9", "18446744073709551615", "rows", "b1", "arena", ",", "\n", "-", "+64", "/1", "\"", "}"];
        for (at, piece, action) in edits {
            let at = at.index(text.len());
            if !text.is_char_boundary(at) {
                continue;
            }
            match action {
                0 => text.truncate(at),
                1 => text.insert_str(at, pieces[piece.index(pieces.len())]),
                2 => drop(text.remove(at)),
                _ => {
                    let end = (at + 1).min(text.len());
                    text.replace_range(at..end, pieces[piece.index(pieces.len())]);
                }
            }
            if text.is_empty() {
                break;
            }
        }
        if let Ok(lir) = parse_lir(&text) {
            prop_assert_eq!(lir.verify(), Ok(()));
            let printed = lir.to_string();
            let again = parse_lir(&printed).map(|l| l.to_string());
            prop_assert_eq!(again, Ok(printed));
        }
    }
}
