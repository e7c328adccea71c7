//! Ops that ONNX Runtime adds and exporters write.

use super::{Row, attention, integer};
use crate::error::{Refusal, invalid, unsupported};
use crate::lower::Lowering;
use rlx_graph::ValueId;
use rlx_graph::ops::activation::{Activation, ActivationKind};
use rlx_graph::ops::binary::BinaryOp;
use rlx_graph::ops::concat::Concat;
use rlx_graph::ops::gather::Gather;
use rlx_graph::ops::iota::Iota;
use rlx_graph::ops::layer_norm::LayerNorm;
use rlx_graph::ops::matmul::MatMul;
use rlx_graph::ops::rms_norm::RmsNorm;
use rlx_graph::ops::softmax::Softmax;
use rlx_graph::ops::unary::UnaryOp;
use rlx_tensor::{DType, Dim, Tensor};

mod nbits;

type Lowered = Result<Vec<ValueId>, Refusal>;

const MICROSOFT: &str = "com.microsoft";

/// The rows of this family.
pub const ROWS: &[Row] = &[
    Row::lower("Gelu", |l| {
        let x = l.value(0)?;
        Ok(vec![l.add(Activation { kind: ActivationKind::Gelu }, &[x])?])
    })
    .of(MICROSOFT),
    Row::lower("BiasGelu", |l| biased(l, ActivationKind::Gelu)).of(MICROSOFT),
    Row::lower("FastGelu", |l| biased(l, ActivationKind::GeluTanh)).of(MICROSOFT),
    Row::lower("QuickGelu", quick_gelu).of(MICROSOFT),
    Row::lower("FusedMatMul", fused_matmul).of(MICROSOFT),
    Row::lower("SkipLayerNormalization", skip_layer_norm).of(MICROSOFT),
    Row::lower("SkipSimplifiedLayerNormalization", skip_rms_norm).of(MICROSOFT),
    Row::lower("Attention", attention_of_weights).of(MICROSOFT),
    Row::lower("QAttention", quantized_attention).of(MICROSOFT),
    Row::lower("MultiHeadAttention", multi_head).of(MICROSOFT),
    Row::lower("GroupQueryAttention", group_query).of(MICROSOFT),
    Row::lower("RotaryEmbedding", rotary).of(MICROSOFT),
    Row::lower("MatMulNBits", nbits::matmul_n_bits).of(MICROSOFT),
];

fn biased(l: &mut Lowering<'_>, kind: ActivationKind) -> Lowered {
    let mut x = l.value(0)?;
    if let Some(bias) = l.optional(1)? {
        x = l.expand().binary(BinaryOp::Add, x, bias)?;
    }
    Ok(vec![l.add(Activation { kind }, &[x])?])
}

fn quick_gelu(l: &mut Lowering<'_>) -> Lowered {
    let alpha = l.node.float("alpha", 1.702)?;
    let x = l.value(0)?;
    let mut e = l.expand();
    let scaled = e.scalar(BinaryOp::Mul, x, alpha)?;
    let gate = e.unary(UnaryOp::Sigmoid, scaled)?;
    Ok(vec![e.binary(BinaryOp::Mul, x, gate)?])
}

fn fused_matmul(l: &mut Lowering<'_>) -> Lowered {
    if l.node.flag("transBatchA", false)? || l.node.flag("transBatchB", false)? {
        return unsupported("transposed batches");
    }
    let op =
        MatMul { transpose_a: l.node.flag("transA", false)?, transpose_b: l.node.flag("transB", false)? };
    let (a, b) = (l.value(0)?, l.value(1)?);
    let y = l.add(op, &[a, b])?;
    let alpha = l.node.float("alpha", 1.0)?;
    Ok(vec![if alpha == 1.0 { y } else { l.expand().scalar(BinaryOp::Mul, y, alpha)? }])
}

/// `x + skip + bias`
fn skip_sum(l: &mut Lowering<'_>, bias: usize) -> Result<ValueId, Refusal> {
    let (x, skip) = (l.value(0)?, l.value(1)?);
    let mut sum = l.expand().binary(BinaryOp::Add, x, skip)?;
    if let Some(bias) = l.optional(bias)? {
        sum = l.expand().binary(BinaryOp::Add, sum, bias)?;
    }
    Ok(sum)
}

/// The normalised value; mean and deviation, which inference leaves out; the sum.
fn norm_results(l: &mut Lowering<'_>, y: ValueId, sum: ValueId) -> Lowered {
    if l.wants(1) || l.wants(2) {
        return unsupported("mean and deviation as results");
    }
    Ok(vec![y, sum, sum, sum])
}

fn skip_layer_norm(l: &mut Lowering<'_>) -> Lowered {
    let eps = l.node.float("epsilon", 1e-12)?;
    let sum = skip_sum(l, 4)?;
    let (weight, bias) = (l.value(2)?, l.optional(3)?);
    let op = LayerNorm { eps, bias: bias.is_some(), residual: false };
    let operands: Vec<ValueId> = [sum, weight].into_iter().chain(bias).collect();
    let y = l.add(op, &operands)?;
    norm_results(l, y, sum)
}

fn skip_rms_norm(l: &mut Lowering<'_>) -> Lowered {
    let eps = l.node.float("epsilon", 1e-12)?;
    let sum = skip_sum(l, 3)?;
    let weight = l.value(2)?;
    let y = l.add(RmsNorm { eps, unit_offset: false, groups: 1, residual: false }, &[sum, weight])?;
    norm_results(l, y, sum)
}

fn heads_of(l: &Lowering<'_>, name: &str) -> Result<usize, Refusal> {
    match usize::try_from(l.node.int(name, 0)?) {
        Ok(heads) if heads > 0 => Ok(heads),
        _ => invalid(format!("attribute {name:?} must be at least 1")),
    }
}

/// `softmax(q k^T * scale + bias) v` on heads of rank 4, joined again.
fn attend(
    l: &mut Lowering<'_>,
    heads: [ValueId; 3],
    scale: Option<f64>,
    bias: Option<ValueId>,
) -> Result<ValueId, Refusal> {
    attend_capped(l, heads, scale, bias, 0.0)
}

/// As [`attend`]; scores become `cap * tanh(score / cap)` before the bias, unless the cap is 0.
fn attend_capped(
    l: &mut Lowering<'_>,
    [q, k, v]: [ValueId; 3],
    scale: Option<f64>,
    bias: Option<ValueId>,
    cap: f64,
) -> Result<ValueId, Refusal> {
    let width = l.dims_of(q)?[3];
    let scale = scale.filter(|&s| s != 0.0).unwrap_or(1.0 / (width as f64).sqrt());
    let heads = l.dims_of(q)?[1];
    let (k, v) = (attention::repeat_heads(l, k, heads)?, attention::repeat_heads(l, v, heads)?);
    let scaled = l.expand().scalar(BinaryOp::Mul, q, scale)?;
    let mut scores = l.add(MatMul { transpose_a: false, transpose_b: true }, &[scaled, k])?;
    if cap != 0.0 {
        let mut e = l.expand();
        let part = e.scalar(BinaryOp::Div, scores, cap)?;
        let bent = e.unary(UnaryOp::Tanh, part)?;
        scores = e.scalar(BinaryOp::Mul, bent, cap)?;
    }
    if let Some(bias) = bias {
        scores = l.expand().binary(BinaryOp::Add, scores, bias)?;
    }
    let weights = l.add(Softmax { axis: 3 }, &[scores])?;
    let y = l.add(MatMul::plain(), &[weights, v])?;
    attention::join_heads(l, y)
}

/// A mask of keys (1 keeps) as a bias of rank 4: by length, by key, or by query and key.
fn key_mask(
    l: &mut Lowering<'_>,
    operand: usize,
    batch: usize,
    keys: usize,
    dtype: DType,
) -> Result<Option<ValueId>, Refusal> {
    let Some(mask) = l.optional(operand)? else { return Ok(None) };
    let dims = l.dims(operand)?;
    let keep = match dims.len() {
        1 if dims[0] == batch => {
            let lengths = l.reshape(mask, &[batch, 1, 1, 1])?;
            let op = Iota { dims: [1, 1, 1, keys].map(Dim::Known).to_vec(), axis: 3, dtype: DType::I32 };
            let key = l.add(op, &[])?;
            let lengths = l.cast(lengths, DType::I32)?;
            l.expand().binary(BinaryOp::Less, key, lengths)?
        }
        2 => {
            let wide = l.reshape(mask, &[dims[0], 1, 1, dims[1]])?;
            l.cast(wide, DType::Bool)?
        }
        3 => {
            let wide = l.reshape(mask, &[dims[0], 1, dims[1], dims[2]])?;
            l.cast(wide, DType::Bool)?
        }
        _ => return unsupported(format!("a mask of dims {dims:?}")),
    };
    Ok(Some(attention::bias_of(l, keep, dtype)?))
}

fn sum_of(l: &mut Lowering<'_>, a: Option<ValueId>, b: Option<ValueId>) -> Result<Option<ValueId>, Refusal> {
    Ok(match (a, b) {
        (Some(a), Some(b)) => Some(l.expand().binary(BinaryOp::Add, a, b)?),
        (a, b) => a.or(b),
    })
}

fn attention_of_weights(l: &mut Lowering<'_>) -> Lowered {
    if l.has(6) || l.node.flag("do_rotary", false)? {
        return unsupported("a past of a length of its own, or rotary embeddings within attention");
    }
    let (x, weight) = (l.value(0)?, l.value(1)?);
    let (past, more) = (l.optional(4)?, l.optional(5)?);
    self_attention(l, [x, weight], 3, past, more)
}

/// `(q - zero) * scale` of an operand of bytes; a vector of scales goes along the last axis.
fn dequantized(l: &mut Lowering<'_>, operand: usize, scale: usize, zero: usize) -> Result<ValueId, Refusal> {
    let (x, scale) = (l.value(operand)?, l.value(scale)?);
    let dtype = l.shape_of(scale).dtype();
    let mut y = l.cast(x, dtype)?;
    if let Some(zero) = l.optional(zero)? {
        let zero = l.cast(zero, dtype)?;
        y = l.expand().binary(BinaryOp::Sub, y, zero)?;
    }
    Ok(l.expand().binary(BinaryOp::Mul, y, scale)?)
}

fn quantized_attention(l: &mut Lowering<'_>) -> Lowered {
    if l.has(8) || l.node.flag("do_rotary", false)? {
        return unsupported("a past, or rotary embeddings within attention");
    }
    if let Some(all) = integer::scaled_product(l, [0, 6, 1, 7], [3, 4], 2)? {
        return attention_of(l, all, 5, None, None);
    }
    let (x, weight) = (dequantized(l, 0, 3, 6)?, dequantized(l, 1, 4, 7)?);
    self_attention(l, [x, weight], 5, None, None)
}

/// Attention of `x` to itself by one matrix of query, key and value weights; operand 2 is their bias. The past is keys and values of
/// `[2, batch, heads, tokens, width]`; the second result is the past with what was added.
fn self_attention(
    l: &mut Lowering<'_>,
    [x, weight]: [ValueId; 2],
    mask: usize,
    past: Option<ValueId>,
    more: Option<ValueId>,
) -> Lowered {
    let mut all = l.add(MatMul::plain(), &[x, weight])?;
    if let Some(bias) = l.optional(2)? {
        all = l.expand().binary(BinaryOp::Add, all, bias)?;
    }
    attention_of(l, all, mask, past, more)
}

/// The same of queries, keys and values side by side.
fn attention_of(
    l: &mut Lowering<'_>,
    all: ValueId,
    mask: usize,
    past: Option<ValueId>,
    more: Option<ValueId>,
) -> Lowered {
    let heads = heads_of(l, "num_heads")?;
    let dims = l.dims_of(all)?;
    let [batch, tokens, total] = dims[..] else { return invalid("operand 0 must have rank 3") };
    let sizes = match l.node.ints_opt("qkv_hidden_sizes")? {
        Some(sizes) if sizes.len() == 3 => sizes.iter().map(|&s| s.max(0) as usize).collect(),
        _ => vec![total / 3; 3],
    };
    let mut start = 0;
    let mut parts = Vec::new();
    for size in sizes {
        let part = l.expand().slice(all, 2, start, size)?;
        parts.push(attention::split_heads(l, part, heads)?);
        start += size;
    }
    let (mut k, mut v, mut before) = (parts[1], parts[2], 0);
    if let Some(past) = past {
        let dims = l.dims_of(past)?;
        let [_, _, _, length, _] = dims[..] else { return invalid("the past must have rank 5") };
        before = length;
        for (at, part) in [&mut k, &mut v].into_iter().enumerate() {
            let earlier = l.expand().slice(past, 0, at, 1usize)?;
            let earlier = l.reshape(earlier, &dims[1..])?;
            *part = l.add(Concat { axis: 2 }, &[earlier, *part])?;
        }
    }
    let keys = before + tokens;
    let dtype = l.shape_of(all).dtype();
    let mask = key_mask(l, mask, batch, keys, dtype)?;
    let mut bias = sum_of(l, mask, more)?;
    if l.node.flag("unidirectional", false)? {
        let keep = attention::causal_keep(l, tokens, keys, before as i64)?;
        let causal = attention::bias_of(l, keep, dtype)?;
        bias = sum_of(l, bias, Some(causal))?;
    }
    let scale = l.node.float_opt("scale")?;
    let y = attend(l, [parts[0], k, v], scale, bias)?;
    if !l.wants(1) {
        return Ok(vec![y]);
    }
    let mut whole = vec![1];
    whole.extend(l.dims_of(k)?);
    let (k, v) = (l.reshape(k, &whole)?, l.reshape(v, &whole)?);
    Ok(vec![y, l.add(Concat { axis: 0 }, &[k, v])?])
}

/// Values that stand side by side in `[batch, tokens, heads, parts, width]`, each as `[batch, tokens, heads * width]`.
fn unpacked(l: &mut Lowering<'_>, operand: usize, parts: usize) -> Result<Vec<ValueId>, Refusal> {
    let dims = l.dims(operand)?;
    let [batch, tokens, heads, found, width] = dims[..] else {
        return invalid(format!("packed values of dims {dims:?}"));
    };
    if found != parts {
        return invalid(format!("{parts} values were to stand side by side, found {found}"));
    }
    let all = l.value(operand)?;
    (0..parts)
        .map(|at| {
            let part = l.expand().slice(all, 3, at, 1usize)?;
            l.reshape(part, &[batch, tokens, heads * width])
        })
        .collect()
}

/// Query, key and value operands; keys and values may be heads already.
fn operands_of_heads(l: &mut Lowering<'_>) -> Result<[ValueId; 3], Refusal> {
    if l.rank(0)? == 5 {
        let parts = unpacked(l, 0, 3)?;
        return Ok([parts[0], parts[1], parts[2]]);
    }
    let q = l.value(0)?;
    if l.has(1) && l.rank(1)? == 5 {
        let parts = unpacked(l, 1, 2)?;
        return Ok([q, parts[0], parts[1]]);
    }
    Ok([q, l.value(1)?, l.value(2)?])
}

fn with_bias(l: &mut Lowering<'_>, x: ValueId, start: usize, width: usize) -> Result<ValueId, Refusal> {
    let Some(bias) = l.optional(3)? else { return Ok(x) };
    let part = l.expand().slice(bias, 0, start, width)?;
    Ok(l.expand().binary(BinaryOp::Add, x, part)?)
}

fn multi_head(l: &mut Lowering<'_>) -> Lowered {
    let heads = heads_of(l, "num_heads")?;
    let [q, mut k, mut v] = operands_of_heads(l)?;
    let dims = l.dims_of(q)?;
    let [batch, tokens, width] = dims[..] else { return invalid("queries must have rank 3") };
    let dtype = l.dtype(0)?;
    let q = with_bias(l, q, 0, width)?;
    let q = attention::split_heads(l, q, heads)?;
    if l.dims_of(k)?.len() == 3 {
        let [_, _, value_width] = l.dims_of(v)?[..] else {
            return invalid("values must have the rank of keys");
        };
        k = with_bias(l, k, width, width)?;
        v = with_bias(l, v, 2 * width, value_width)?;
        (k, v) = (attention::split_heads(l, k, heads)?, attention::split_heads(l, v, heads)?);
    }
    if let (Some(past_k), Some(past_v)) = (l.optional(6)?, l.optional(7)?) {
        k = l.add(Concat { axis: 2 }, &[past_k, k])?;
        v = l.add(Concat { axis: 2 }, &[past_v, v])?;
    }
    let [_, _, keys, _] = l.dims_of(k)?[..] else { return invalid("keys must have rank 3 or 4") };
    if l.dims_of(v)?.len() != 4 {
        return invalid("values must have rank 3 or 4");
    }
    let mask = key_mask(l, 4, batch, keys, dtype)?;
    let more = l.optional(5)?;
    let mut bias = sum_of(l, mask, more)?;
    if l.node.flag("unidirectional", false)? {
        let keep = attention::causal_keep(l, tokens, keys, (keys - tokens.min(keys)) as i64)?;
        let causal = attention::bias_of(l, keep, dtype)?;
        bias = sum_of(l, bias, Some(causal))?;
    }
    let scale = l.node.float_opt("scale")?;
    Ok(vec![attend(l, [q, k, v], scale, bias)?, k, v])
}

fn rotary_of(
    l: &mut Lowering<'_>,
    x: ValueId,
    positions: ValueId,
    caches: [ValueId; 2],
    interleaved: bool,
) -> Result<ValueId, Refusal> {
    let dims = l.dims_of(x)?;
    let [cosines, sines] = [l.dims_of(caches[0])?, l.dims_of(caches[1])?];
    let (4, &[_, half]) = (dims.len(), &cosines[..]) else {
        return invalid("a table of cosines has two axes");
    };
    if sines != cosines {
        return invalid("tables of cosines and sines must have the same dims");
    }
    let mut rows = Vec::new();
    for cache in caches {
        let rows_of = l.add(Gather { axis: 0 }, &[cache, positions])?;
        rows.push(l.reshape(rows_of, &[dims[0], 1, dims[2], half])?);
    }
    attention::rotate(l, x, rows[0], rows[1], half, interleaved)
}

/// `start + 0, start + 1, ..` for every sequence: `[batch, tokens]`.
fn positions_from(l: &mut Lowering<'_>, start: ValueId, tokens: usize) -> Result<ValueId, Refusal> {
    let op = Iota { dims: vec![Dim::Known(1), Dim::Known(tokens)], axis: 1, dtype: DType::I64 };
    let count = l.add(op, &[])?;
    let start = l.cast(start, DType::I64)?;
    Ok(l.expand().binary(BinaryOp::Add, start, count)?)
}

fn group_query(l: &mut Lowering<'_>) -> Lowered {
    let (heads, kv_heads) = (heads_of(l, "num_heads")?, heads_of(l, "kv_num_heads")?);
    if l.has(10) || l.has(11) || l.node.flag("smooth_softmax", false)? {
        return unsupported("an attention bias, or a sink of the softmax");
    }
    let dims = l.dims(0)?;
    let [batch, tokens, width] = dims[..] else { return invalid("operand 0 must have rank 3") };
    let x = l.value(0)?;
    let (q, k, v) = if l.has(1) {
        (x, l.value(1)?, l.value(2)?)
    } else {
        let head = width / (heads + 2 * kv_heads);
        let mut e = l.expand();
        let q = e.slice(x, 2, 0usize, heads * head)?;
        let k = e.slice(x, 2, heads * head, kv_heads * head)?;
        (q, k, e.slice(x, 2, (heads + kv_heads) * head, kv_heads * head)?)
    };
    let mut q = attention::split_heads(l, q, heads)?;
    let mut k = attention::split_heads(l, k, kv_heads)?;
    let mut v = attention::split_heads(l, v, kv_heads)?;
    let last: Vec<i64> = l.ints(5)?;
    let Some(&first) = last.first().filter(|&&f| last.iter().all(|&v| v == f)) else {
        return unsupported("sequences of different lengths in one batch");
    };
    let past = first + 1 - tokens as i64;
    let Ok(past) = usize::try_from(past) else {
        return invalid("seqlens_k are shorter than the tokens given");
    };
    if l.node.flag("do_rotary", false)? {
        let start = l.tensor(Tensor::from_slice(&[batch, 1], &vec![past as i64; batch])?);
        let positions = positions_from(l, start, tokens)?;
        let caches = [l.value(7)?, l.value(8)?];
        let interleaved = l.node.flag("rotary_interleaved", false)?;
        q = rotary_of(l, q, positions, caches, interleaved)?;
        k = rotary_of(l, k, positions, caches, interleaved)?;
    }
    if past > 0 {
        let (past_k, past_v) = (l.value(3)?, l.value(4)?);
        let before_k = l.expand().slice(past_k, 2, 0usize, past)?;
        let before_v = l.expand().slice(past_v, 2, 0usize, past)?;
        k = l.add(Concat { axis: 2 }, &[before_k, k])?;
        v = l.add(Concat { axis: 2 }, &[before_v, v])?;
    }
    let dtype = l.dtype(0)?;
    let keys = past + tokens;
    let mut keep = attention::causal_keep(l, tokens, keys, past as i64)?;
    if let Ok(window) = usize::try_from(l.node.int("local_window_size", -1)?) {
        let before = attention::causal_keep(l, tokens, keys, past as i64 - window as i64)?;
        let recent = l.expand().unary(UnaryOp::Not, before)?;
        keep = l.expand().binary(BinaryOp::And, keep, recent)?;
    }
    let bias = attention::bias_of(l, keep, dtype)?;
    let (scale, cap) = (l.node.float_opt("scale")?, l.node.float("softcap", 0.0)?);
    Ok(vec![attend_capped(l, [q, k, v], scale, Some(bias), cap)?, k, v])
}

fn rotary(l: &mut Lowering<'_>) -> Lowered {
    let dims = l.dims(0)?;
    let x = l.value(0)?;
    let caches = [l.value(2)?, l.value(3)?];
    let &[_, half] = l.dims(2)?.as_slice() else { return invalid("a table of cosines has two axes") };
    if !matches!(dims.len(), 3 | 4) {
        return invalid("what is rotated must have rank 3 or 4");
    }
    let heads = match (dims.len(), l.node.int("num_heads", 0)?) {
        (3, 0) => dims[2] / (2 * half).max(1),
        (_, heads) => heads.max(0) as usize,
    };
    let four = if dims.len() == 4 { x } else { attention::split_heads(l, x, heads)? };
    let (batch, tokens) = (l.dims_of(four)?[0], l.dims_of(four)?[2]);
    let given = l.value(1)?;
    let positions = if l.dims(1)?.iter().product::<usize>() == 1 && batch * tokens != 1 {
        let start = l.reshape(given, &[1, 1])?;
        let row = positions_from(l, start, tokens)?;
        l.broadcast(row, &[batch, tokens])?
    } else {
        l.reshape(given, &[batch, tokens])?
    };
    let y = rotary_of(l, four, positions, caches, l.node.flag("interleaved", false)?)?;
    Ok(vec![if dims.len() == 4 { y } else { attention::join_heads(l, y)? }])
}

#[cfg(test)]
pub(crate) mod tests;
