//! Two small models with every kind of step of the real ones.

use crate::backends::numbers;
use rlx::{CompiledGraph, Session};
use rlx_graph::hir::{AttentionOperands, CacheOperands, GatedMlp};
use rlx_graph::ops::activation::ActivationKind;
use rlx_graph::ops::attention::Attention;
use rlx_graph::ops::moe::Moe;
use rlx_graph::ops::pool::PoolKind;
use rlx_graph::ops::rms_norm::RmsNorm;
use rlx_graph::ops::rope::RopeStyle;
use rlx_graph::{Graph, GraphError, HirModule, HirMut, ValueId};
use rlx_tensor::{DType, DTypeClass, Dim, quant};

/// Rows of the embedding tables of words.
pub const VOCAB: usize = 61;
/// Elements of a row.
pub const WIDTH: usize = 48;
/// Positions the encoder knows.
pub const POSITIONS: usize = 64;
/// Key heads of the decoder.
pub const KV_HEADS: usize = 1;
/// Elements of a head.
pub const HEAD_DIM: usize = 16;
const HEADS: usize = 3;
const INNER: usize = 72;

fn attention(causal: bool, kv_heads: usize) -> Attention {
    Attention {
        heads: HEADS,
        kv_heads,
        head_dim: HEAD_DIM,
        scale: 0.25,
        causal,
        window: None,
        softcap: None,
        mask: false,
        cache: false,
    }
}

fn inputs(hir: &mut HirMut<'_>) -> Result<[ValueId; 3], GraphError> {
    let (rows, starts) = (Dim::symbol("rows"), Dim::symbol("batch") + Dim::Known(1));
    Ok([
        hir.input("ids", std::slice::from_ref(&rows), DType::I32)?,
        hir.input("positions", &[rows], DType::I32)?,
        hir.input("seq_starts", &[starts], DType::I32)?,
    ])
}

/// A BERT-like encoder of two layers: outputs `hidden [rows, WIDTH]` and `pooled [batch, WIDTH]`.
pub fn encoder() -> Result<Graph, GraphError> {
    let mut module = HirModule::new("encoder");
    let mut hir = module.edit();
    let [ids, positions, seq_starts] = inputs(&mut hir)?;
    let (f32, square) = (DType::F32, (WIDTH, WIDTH));
    let words = hir.embedding(ids, "words", VOCAB, WIDTH, DType::F16)?;
    let places = hir.embedding(positions, "places", POSITIONS, WIDTH, f32)?;
    let sum = hir.add(words, places)?;
    let mut x = hir.layer_norm(sum, "norm.weight", Some("norm.bias"), WIDTH, 1e-5, f32)?;
    for layer in 0..2 {
        let name = |part: &str| format!("{layer}.{part}");
        let q = hir.linear(x, &name("q"), square, Some(&name("q.bias")), f32)?;
        let k = hir.linear(x, &name("k"), square, Some(&name("k.bias")), f32)?;
        let v = hir.linear(x, &name("v"), square, Some(&name("v.bias")), f32)?;
        let operands = AttentionOperands { q, k, v, seq_starts, mask: None, cache: None };
        let y = hir.attention(attention(false, HEADS), &operands)?;
        let y = hir.linear(y, &name("o"), square, Some(&name("o.bias")), f32)?;
        let y = hir.add(y, x)?;
        let (weight, bias) = (name("norm1.weight"), name("norm1.bias"));
        let x1 = hir.layer_norm(y, &weight, Some(&bias), WIDTH, 1e-5, f32)?;
        let y = hir.linear(x1, &name("up"), (INNER, WIDTH), Some(&name("up.bias")), f32)?;
        let y = hir.activation(y, ActivationKind::Gelu)?;
        let y = hir.linear(y, &name("down"), (WIDTH, INNER), Some(&name("down.bias")), f32)?;
        let y = hir.add(y, x1)?;
        x = hir.layer_norm(y, &name("norm2.weight"), Some(&name("norm2.bias")), WIDTH, 1e-5, f32)?;
    }
    let pooled = hir.pool(x, seq_starts, PoolKind::Mean)?;
    let pooled = hir.l2_normalize(pooled, 1e-12)?;
    module.finish(&[("hidden", x), ("pooled", pooled)])
}

fn mlp(name: String) -> GatedMlp {
    GatedMlp {
        gate: format!("{name}.gate"),
        up: format!("{name}.up"),
        down: format!("{name}.down"),
        width: WIDTH,
        inner: INNER,
        activation: ActivationKind::Silu,
        dtype: DType::BF16,
    }
}

/// A decoder of two layers over a KV cache, the second with experts; the head is the embedding table. Output `logits
/// [rows, VOCAB]`; states of `blocks` blocks; table rows of `table` blocks.
pub fn decoder() -> Result<Graph, GraphError> {
    let mut module = HirModule::new("decoder");
    let mut hir = module.edit();
    let [ids, positions, seq_starts] = inputs(&mut hir)?;
    let past = hir.input("past", &[Dim::symbol("batch")], DType::I32)?;
    let block_table = hir.input("block_table", &[Dim::symbol("batch"), Dim::symbol("table")], DType::I32)?;
    let (f32, kv_width) = (DType::F32, KV_HEADS * HEAD_DIM);
    let frequencies: Vec<f32> = (0..HEAD_DIM / 2).map(|i| 0.5f32.powi(i as i32)).collect();
    let angles = hir.rope_angles(positions, &frequencies, 1.0)?;
    let norm = RmsNorm { eps: 1e-6, unit_offset: false, groups: 1, residual: false };
    let mut x = hir.embedding(ids, "words", VOCAB, WIDTH, f32)?;
    for layer in 0..2 {
        let name = |part: &str| format!("{layer}.{part}");
        let (blocks, kv, d) = (Dim::symbol("blocks"), Dim::Known(KV_HEADS), Dim::Known(HEAD_DIM));
        let k_dims = [blocks.clone(), kv.clone(), d.clone(), Dim::Known(64)];
        let k_cache = hir.state(&name("k_cache"), &k_dims, DType::F16)?;
        let v_cache = hir.state(&name("v_cache"), &[blocks, kv, Dim::Known(64), d], DType::F16)?;
        let h = hir.rms_norm(norm.clone(), x, &name("norm1"), WIDTH, f32)?;
        let q = hir.linear(h, &name("q"), (WIDTH, WIDTH), None, f32)?;
        let k = hir.linear(h, &name("k"), (kv_width, WIDTH), None, f32)?;
        let v = hir.linear(h, &name("v"), (kv_width, WIDTH), None, f32)?;
        let q = hir.rope(q, angles, HEADS, HEAD_DIM, RopeStyle::Neox)?;
        let k = hir.rope(k, angles, KV_HEADS, HEAD_DIM, RopeStyle::Neox)?;
        let cache = Some(CacheOperands { past, block_table, k_cache, v_cache });
        let operands = AttentionOperands { q, k, v, seq_starts, mask: None, cache };
        let y = hir.attention(attention(true, KV_HEADS), &operands)?;
        let y = hir.linear(y, &name("o"), (WIDTH, WIDTH), None, f32)?;
        x = hir.add(x, y)?;
        let h = hir.rms_norm(norm.clone(), x, &name("norm2"), WIDTH, f32)?;
        let y = if layer == 0 {
            hir.gated_mlp(h, &mlp(name("mlp")))?
        } else {
            let logits = hir.linear(h, &name("router"), (4, WIDTH), None, f32)?;
            let experts: Vec<GatedMlp> = (0..4).map(|e| mlp(name(&format!("expert{e}")))).collect();
            let op = Moe { experts: 4, top_k: 2, renormalize: true, activation: ActivationKind::Silu };
            hir.moe(op, h, logits, &experts)?
        };
        x = hir.add(x, y)?;
    }
    let h = hir.rms_norm(norm, x, "norm", WIDTH, f32)?;
    let logits = hir.linear(h, "words", (VOCAB, WIDTH), None, f32)?;
    module.finish(&[("logits", logits)])
}

/// Compiles a graph and gives its params numbers that only depend on their names' order.
pub fn compile(session: &Session, graph: &Graph) -> CompiledGraph {
    let compiled = session.compile(graph).unwrap();
    let mut params: Vec<_> = compiled.params().iter().map(|p| (p.name.clone(), p.shape.clone())).collect();
    params.sort_by(|a, b| a.0.cmp(&b.0));
    for (seed, (name, shape)) in params.into_iter().enumerate() {
        let dims = shape.known_dims().unwrap();
        let values = numbers(dims.iter().product(), seed as u64 + 1);
        let values: Vec<f64> = values.into_iter().map(|v| f64::from(v) * 0.4).collect();
        if shape.dtype().class() == DTypeClass::Quant {
            let values: Vec<f32> = values.into_iter().map(|v| v as f32).collect();
            let mut blocks = vec![0; shape.dtype().bytes_for(values.len()).unwrap()];
            quant::encode(shape.dtype(), &values, &mut blocks).unwrap();
            compiled.set_param_typed(&name, &blocks, shape.dtype()).unwrap();
            continue;
        }
        let tensor = rlx_graph::eval::from_f64(&dims, shape.dtype(), &values).unwrap();
        compiled.set_param_typed(&name, tensor.bytes(), shape.dtype()).unwrap();
    }
    compiled
}
