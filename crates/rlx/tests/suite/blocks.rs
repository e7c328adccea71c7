//! Weights in quantised blocks: run by kernels of their own, near the reference evaluation, with equal bits whatever the rows
//! and threads.

use crate::backends::cpu;
use crate::models::compile;
use rlx::backend::reference::ReferenceBackend;
use rlx::{CompiledGraph, Session, TensorArg};
use rlx_graph::eval::to_f64;
use rlx_graph::hir::GatedMlp;
use rlx_graph::ops::activation::ActivationKind;
use rlx_graph::ops::moe::Moe;
use rlx_graph::ops::rms_norm::RmsNorm;
use rlx_graph::{Graph, GraphError, HirModule};
use rlx_kernels::isa::Isa;
use rlx_tensor::{DType, Dim, Tensor};
use std::sync::Arc;

const WIDTH: usize = 256;
const INNER: usize = 512;
const VOCAB: usize = 100;

fn mlp(name: &str, gate: DType) -> GatedMlp {
    GatedMlp {
        gate: format!("{name}.gate"),
        up: format!("{name}.up"),
        down: format!("{name}.down"),
        width: WIDTH,
        inner: INNER,
        activation: ActivationKind::Silu,
        dtype: gate,
    }
}

/// An embedding tied to the head, three layers of one input in two types, a gated layer and experts.
fn model() -> Result<Graph, GraphError> {
    let mut module = HirModule::new("blocks");
    let mut hir = module.edit();
    let ids = hir.input("ids", &[Dim::symbol("rows")], DType::I32)?;
    let norm = RmsNorm { eps: 1e-6, unit_offset: false, groups: 1, residual: false };
    let table = DType::Q8_0;
    let mut x = hir.embedding(ids, "words", VOCAB, WIDTH, table)?;
    let h = hir.rms_norm(norm.clone(), x, "norm0", WIDTH, DType::F32)?;
    // Routed by rows that no quantised product has touched, so that every backend chooses the same experts.
    let routes = hir.linear(h, "router", (4, WIDTH), None, DType::F32)?;
    let q = hir.linear(h, "q", (WIDTH, WIDTH), None, DType::Q4_K)?;
    let k = hir.linear(h, "k", (WIDTH, WIDTH), None, DType::Q4_K)?;
    let v = hir.linear(h, "v", (WIDTH, WIDTH), None, DType::Q6_K)?;
    for part in [q, k, v] {
        x = hir.add(x, part)?;
    }
    let h = hir.rms_norm(norm.clone(), x, "norm1", WIDTH, DType::F32)?;
    let y = hir.gated_mlp(h, &mlp("mlp", DType::Q4_0))?;
    x = hir.add(x, y)?;
    let h = hir.rms_norm(norm.clone(), x, "norm2", WIDTH, DType::F32)?;
    let experts: Vec<GatedMlp> = (0..4).map(|e| mlp(&format!("expert{e}"), DType::Q5_K)).collect();
    let op = Moe { experts: 4, top_k: 2, renormalize: true, activation: ActivationKind::Silu };
    let y = hir.moe(op, h, routes, &experts)?;
    x = hir.add(x, y)?;
    let h = hir.rms_norm(norm, x, "norm3", WIDTH, DType::F32)?;
    let logits = hir.linear(h, "words", (VOCAB, WIDTH), None, table)?;
    module.finish(&[("logits", logits)])
}

fn run(model: &CompiledGraph, ids: &[i32]) -> Tensor {
    let ids = Tensor::from_slice(&[ids.len()], ids).unwrap();
    model.run(&[("ids", TensorArg::from(&ids))]).unwrap().remove(0).1
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.as_slice::<f32>().unwrap().iter().map(|v| v.to_bits()).collect()
}

/// Rows are quantised to seven bits and a sign per 32 values, so layers agree to some thousandths of their norm.
#[test]
fn kernels_of_blocks_agree_with_the_reference_and_with_themselves() {
    let graph = model().unwrap();
    let ids: Vec<i32> = (0..70).map(|i| i * 11 % VOCAB as i32).collect();
    let reference = Session::with_backend(Arc::new(ReferenceBackend::default()));
    let wanted = to_f64(&run(&compile(&reference, &graph), &ids)).unwrap();
    for isa in Isa::available() {
        for threads in [1, 2] {
            let model = compile(&cpu(isa, threads), &graph);
            let report = model.report().unwrap();
            assert!(report.steps.iter().all(|s| s.native), "{isa}: {report:#?}");
            let found = run(&model, &ids);
            let values = to_f64(&found).unwrap();
            let norm: f64 = wanted.iter().map(|v| v * v).sum();
            let error: f64 = values.iter().zip(&wanted).map(|(a, b)| (a - b) * (a - b)).sum();
            assert!(error <= norm * 0.02 * 0.02, "{isa}: relative error {}", (error / norm).sqrt());
            for row in [0, 1, 33, 69] {
                let alone = bits(&run(&model, &ids[row..row + 1]));
                assert!(alone == bits(&found)[row * VOCAB..(row + 1) * VOCAB], "{isa}: row {row}");
            }
            let few = bits(&run(&model, &ids[..3]));
            assert!(few == bits(&found)[..3 * VOCAB], "{isa}, {threads} threads: three rows");
        }
    }
}

#[test]
fn packed_blocks_have_the_bytes_of_their_source() {
    let model = compile(&cpu(Isa::detect(), 1), &model().unwrap());
    let ids: Vec<i32> = (0..3).collect();
    run(&model, &ids);
    let weights = model.weights();
    let (packed, stored) = (weights.packed_bytes(), weights.total_bytes());
    // All weights but the norms' are packed; rows are padded to whole panels.
    assert!(packed <= stored + stored / 8, "{packed} packed of {stored}");
}
