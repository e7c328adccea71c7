use super::{GatedMlp, HirModule};
use crate::graph::GraphError;
use crate::ops::activation::ActivationKind;
use crate::ops::rope::RopeStyle;
use crate::verify::{Stage, verify};
use rlx_tensor::{DType, Dim};

#[test]
fn tied_weights_are_one_value() {
    let mut module = HirModule::new("tied");
    let mut hir = module.edit();
    let a = hir.param("w", &[4, 2], DType::F32).unwrap();
    assert_eq!(hir.param("w", &[4, 2], DType::F32).unwrap(), a);
    let other = hir.param("w", &[2, 4], DType::F32).unwrap_err();
    assert!(matches!(other, GraphError::Shape { .. }), "{other}");
    hir.input("x", &[Dim::symbol("rows")], DType::F32).unwrap();
    assert!(matches!(hir.param("x", &[2], DType::F32), Err(GraphError::DuplicateName { .. })));
}

#[test]
fn errors_show_the_callers_line() {
    let mut module = HirModule::new("lines");
    let mut hir = module.edit();
    let x = hir.input("x", &[Dim::symbol("rows"), Dim::Known(3)], DType::F32).unwrap();
    let line = line!() + 1;
    let error = hir.linear(x, "w", (2, 4), None, DType::F32).unwrap_err();
    assert!(error.to_string().contains(&format!("{}:{line}", file!())), "{error}");
    let line = line!() + 1;
    let error = hir.rope(x, x, 1, 4, RopeStyle::Neox).unwrap_err();
    assert!(error.to_string().contains(&format!("{}:{line}", file!())), "{error}");
}

#[test]
fn blocks_build_a_sound_graph() {
    let mut module = HirModule::new("block");
    let mut hir = module.edit();
    let ids = hir.input("ids", &[Dim::symbol("rows")], DType::I32).unwrap();
    let x = hir.embedding(ids, "table", 10, 4, DType::BF16).unwrap();
    let normed = hir.layer_norm(x, "ln.w", Some("ln.b"), 4, 1e-5, DType::F32).unwrap();
    let mlp = GatedMlp {
        gate: "gate".into(),
        up: "up".into(),
        down: "down".into(),
        width: 4,
        inner: 8,
        activation: ActivationKind::Silu,
        dtype: DType::F32,
    };
    let y = hir.gated_mlp(normed, &mlp).unwrap();
    let sum = hir.add(x, y).unwrap();
    let logits = hir.linear(sum, "table", (10, 4), None, DType::BF16).unwrap();
    let graph = module.finish(&[("logits", logits)]).unwrap();
    verify(&graph, Stage::Mir).unwrap();
    assert_eq!(graph.params().count(), 6);
    assert_eq!(graph.shape(logits).to_string(), "f32[rows, 10]");
}
