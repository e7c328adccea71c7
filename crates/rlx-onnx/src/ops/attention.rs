//! Attention and what surrounds it: rotary embeddings, caches, linear attention.

use super::{Row, interpret_lowering};
use crate::error::{Refusal, invalid};
use crate::lower::{Host, Lowering};
use crate::model::{NodeDef, axis_of};
use crate::value::{ElementType, Value, from_floats};
use rlx_graph::ValueId;
use rlx_graph::ops::binary::BinaryOp;
use rlx_graph::ops::concat::Concat;
use rlx_graph::ops::gather::Gather;
use rlx_graph::ops::iota::Iota;
use rlx_graph::ops::matmul::MatMul;
use rlx_graph::ops::pad::Pad;
use rlx_graph::ops::softmax::Softmax;
use rlx_graph::ops::transpose::Transpose;
use rlx_graph::ops::unary::UnaryOp;
use rlx_tensor::{DType, Dim, Tensor};

type Lowered = Result<Vec<ValueId>, Refusal>;

const PREVIEW: &str = "ai.onnx.preview";

/// The rows of this family.
pub const ROWS: &[Row] = &[
    Row::lower("Attention", attention),
    Row::lower("RotaryEmbedding", rotary_embedding),
    Row::host("FlexAttention", flex_attention).of(PREVIEW),
    Row::host("LinearAttention", linear_attention),
    Row::lower("CausalConvWithState", causal_conv),
    Row::host("TensorScatter", tensor_scatter),
];

/// `[batch, tokens, heads * d]` as `[batch, heads, tokens, d]`.
pub fn split_heads(l: &mut Lowering<'_>, x: ValueId, heads: usize) -> Result<ValueId, Refusal> {
    let dims = l.dims_of(x)?;
    let [batch, tokens, width] = dims[..] else { return Ok(x) };
    if heads == 0 || width % heads != 0 {
        return invalid(format!("{width} columns are no {heads} heads"));
    }
    let x = l.reshape(x, &[batch, tokens, heads, width / heads])?;
    l.add(Transpose { perm: vec![0, 2, 1, 3] }, &[x])
}

/// `[batch, heads, tokens, d]` as `[batch, tokens, heads * d]`.
pub fn join_heads(l: &mut Lowering<'_>, x: ValueId) -> Result<ValueId, Refusal> {
    let dims = l.dims_of(x)?;
    let [batch, heads, tokens, d] = dims[..] else { return invalid("heads must have rank 4") };
    let x = l.add(Transpose { perm: vec![0, 2, 1, 3] }, &[x])?;
    l.reshape(x, &[batch, tokens, heads * d])
}

/// Each of `heads` repeated so that there are `wanted`.
pub fn repeat_heads(l: &mut Lowering<'_>, x: ValueId, wanted: usize) -> Result<ValueId, Refusal> {
    let dims = l.dims_of(x)?;
    let [batch, heads, tokens, d] = dims[..] else { return invalid("heads must have rank 4") };
    if heads == wanted {
        return Ok(x);
    }
    if heads == 0 || !wanted.is_multiple_of(heads) {
        return invalid(format!("{wanted} query heads do not share {heads} heads"));
    }
    let split = l.reshape(x, &[batch, heads, 1, tokens, d])?;
    let wide = l.broadcast(split, &[batch, heads, wanted / heads, tokens, d])?;
    l.reshape(wide, &[batch, wanted, tokens, d])
}

fn heads_attr(node: &NodeDef, name: &str) -> Result<usize, Refusal> {
    Ok(usize::try_from(node.int(name, 0)?).unwrap_or(0))
}

/// 0 where `keep`, -inf elsewhere.
pub fn bias_of(l: &mut Lowering<'_>, keep: ValueId, dtype: DType) -> Result<ValueId, Refusal> {
    let mut e = l.expand();
    let (zero, never) = (e.number(0.0, dtype)?, e.number(f64::NEG_INFINITY, dtype)?);
    Ok(e.select(keep, zero, never)?)
}

/// `[rows, columns]`: whether column <= row + past.
pub fn causal_keep(l: &mut Lowering<'_>, rows: usize, columns: usize, past: i64) -> Result<ValueId, Refusal> {
    let dims = vec![Dim::Known(rows), Dim::Known(columns)];
    let row = l.add(Iota { dims: dims.clone(), axis: 0, dtype: DType::I64 }, &[])?;
    let column = l.add(Iota { dims, axis: 1, dtype: DType::I64 }, &[])?;
    let past = l.tensor(Tensor::scalar(past));
    let mut e = l.expand();
    let last = e.binary(BinaryOp::Add, row, past)?;
    Ok(e.binary(BinaryOp::LessEqual, column, last)?)
}

fn with_past(l: &mut Lowering<'_>, x: ValueId, past: usize) -> Result<(ValueId, usize), Refusal> {
    let Some(before) = l.optional(past)? else { return Ok((x, 0)) };
    let length = l.dims_of(before)?.get(2).copied().unwrap_or(0);
    Ok((l.add(Concat { axis: 2 }, &[before, x])?, length))
}

/// The mask operand as a bias that covers all keys.
fn mask_bias(l: &mut Lowering<'_>, keys: usize, dtype: DType) -> Result<Option<ValueId>, Refusal> {
    let Some(mask) = l.optional(3)? else { return Ok(None) };
    let truth = l.shape_of(mask).dtype() == DType::Bool;
    let mut bias = if truth { bias_of(l, mask, dtype)? } else { l.cast(mask, dtype)? };
    let dims = l.dims_of(bias)?;
    let short = keys.saturating_sub(dims.last().copied().unwrap_or(keys));
    if short > 0 && dims.last() != Some(&1) {
        let before = vec![Dim::Known(0); dims.len()];
        let mut after = before.clone();
        after[dims.len() - 1] = Dim::Known(short);
        bias = l.add(Pad { before, after, value: f64::NEG_INFINITY }, &[bias])?;
    }
    Ok(Some(bias))
}

fn attention(l: &mut Lowering<'_>) -> Lowered {
    let (q_heads, kv_heads) = (heads_attr(l.node, "q_num_heads")?, heads_attr(l.node, "kv_num_heads")?);
    let (q, k, v) = (l.value(0)?, l.value(1)?, l.value(2)?);
    let packed = l.rank(0)? == 3;
    let dtype = l.dtype(0)?;
    let (q, k, v) = (split_heads(l, q, q_heads)?, split_heads(l, k, kv_heads)?, split_heads(l, v, kv_heads)?);
    let (k, past) = with_past(l, k, 4)?;
    let (v, _) = with_past(l, v, 5)?;
    let dims = l.dims_of(q)?;
    let [batch, heads, rows, width] = dims[..] else { return invalid("queries must have rank 3 or 4") };
    let keys = l.dims_of(k)?[2];
    let mut bias = mask_bias(l, keys, dtype)?;
    let mut add = |l: &mut Lowering<'_>, more: ValueId| -> Result<(), Refusal> {
        bias = Some(match bias {
            Some(bias) => l.expand().binary(BinaryOp::Add, bias, more)?,
            None => more,
        });
        Ok(())
    };
    if l.node.flag("is_causal", false)? {
        let keep = causal_keep(l, rows, keys, past as i64)?;
        let more = bias_of(l, keep, dtype)?;
        add(l, more)?;
    }
    if let Some(lengths) = l.optional(6)? {
        let lengths = l.reshape(lengths, &[batch, 1, 1, 1])?;
        let key = Iota { dims: [1, 1, 1, keys].map(Dim::Known).to_vec(), axis: 3, dtype: DType::I64 };
        let key = l.add(key, &[])?;
        let keep = l.expand().binary(BinaryOp::Less, key, lengths)?;
        let more = bias_of(l, keep, dtype)?;
        add(l, more)?;
    }
    let scale = l.node.float_opt("scale")?.unwrap_or(1.0 / (width as f64).sqrt());
    let (all_k, all_v) = (repeat_heads(l, k, heads)?, repeat_heads(l, v, heads)?);
    let scaled = l.expand().scalar(BinaryOp::Mul, q, scale)?;
    let product = l.add(MatMul { transpose_a: false, transpose_b: true }, &[scaled, all_k])?;
    let capped = softcap(l, product)?;
    let biased = match bias {
        Some(bias) => l.expand().binary(BinaryOp::Add, capped, bias)?,
        None => capped,
    };
    let precision = match l.node.element_opt("softmax_precision")? {
        Some(ElementType::Plain(precision)) => precision,
        _ => dtype,
    };
    let wide = l.cast(biased, precision)?;
    let weights = l.add(Softmax { axis: 3 }, &[wide])?;
    let weights = l.cast(weights, dtype)?;
    let mut y = l.add(MatMul::plain(), &[weights, all_v])?;
    if packed {
        y = join_heads(l, y)?;
    }
    let seen = match l.node.int("qk_matmul_output_mode", 0)? {
        0 => product,
        1 => capped,
        2 => biased,
        3 => weights,
        other => return invalid(format!("qk_matmul_output_mode {other} is unknown")),
    };
    Ok(vec![y, k, v, seen])
}

fn softcap(l: &mut Lowering<'_>, x: ValueId) -> Result<ValueId, Refusal> {
    let cap = l.node.float("softcap", 0.0)?;
    if cap <= 0.0 {
        return Ok(x);
    }
    let mut e = l.expand();
    let small = e.scalar(BinaryOp::Div, x, cap)?;
    let bent = e.unary(UnaryOp::Tanh, small)?;
    Ok(e.scalar(BinaryOp::Mul, bent, cap)?)
}

/// Pairs of the first `2 * half` of x's last axis turned by angles of the given cosines and sines.
pub fn rotate(
    l: &mut Lowering<'_>,
    x: ValueId,
    cos: ValueId,
    sin: ValueId,
    half: usize,
    interleaved: bool,
) -> Result<ValueId, Refusal> {
    let dims = l.dims_of(x)?;
    let axis = dims.len() - 1;
    let width = dims[axis];
    if half > width / 2 {
        return invalid(format!("{half} angles for heads of {width} numbers"));
    }
    let (turned, rest) = match 2 * half == width {
        true => (x, None),
        false => {
            let rest = l.expand().slice(x, axis, 2 * half, width - 2 * half)?;
            (l.expand().slice(x, axis, 0usize, 2 * half)?, Some(rest))
        }
    };
    let mut pairs = dims[..axis].to_vec();
    pairs.extend(if interleaved { [half, 2] } else { [2, half] });
    let pair_axis = if interleaved { axis + 1 } else { axis };
    let split = l.reshape(turned, &pairs)?;
    let mut flat = dims[..axis].to_vec();
    flat.push(half);
    let part = |l: &mut Lowering<'_>, at: usize| -> Result<ValueId, Refusal> {
        let one = l.expand().slice(split, pair_axis, at, 1usize)?;
        l.reshape(one, &flat)
    };
    let (a, b) = (part(l, 0)?, part(l, 1)?);
    let mut e = l.expand();
    let (ac, bs) = (e.binary(BinaryOp::Mul, a, cos)?, e.binary(BinaryOp::Mul, b, sin)?);
    let (s, c) = (e.binary(BinaryOp::Mul, a, sin)?, e.binary(BinaryOp::Mul, b, cos)?);
    let (real, imaginary) = (e.binary(BinaryOp::Sub, ac, bs)?, e.binary(BinaryOp::Add, s, c)?);
    let mut single = pairs.clone();
    single[pair_axis] = 1;
    let (real, imaginary) = (l.reshape(real, &single)?, l.reshape(imaginary, &single)?);
    let joined = l.add(Concat { axis: pair_axis }, &[real, imaginary])?;
    let mut whole = dims[..axis].to_vec();
    whole.push(2 * half);
    let joined = l.reshape(joined, &whole)?;
    match rest {
        Some(rest) => l.add(Concat { axis }, &[joined, rest]),
        None => Ok(joined),
    }
}

fn rotary_embedding(l: &mut Lowering<'_>) -> Lowered {
    let (x, cos, sin) = (l.value(0)?, l.value(1)?, l.value(2)?);
    let dims = l.dims(0)?;
    let heads = heads_attr(l.node, "num_heads")?;
    let four = if dims.len() == 4 { x } else { split_heads(l, x, heads)? };
    let own = l.dims_of(four)?;
    let [batch, _, tokens, width] = own[..] else { return invalid("operand 0 must have rank 3 or 4") };
    let turned = match heads_attr(l.node, "rotary_embedding_dim")? {
        0 => width,
        turned => turned,
    };
    let half = turned / 2;
    let positions = l.optional(3)?;
    let table = |l: &mut Lowering<'_>, table: ValueId| -> Result<ValueId, Refusal> {
        let rows = match positions {
            Some(at) => l.add(Gather { axis: 0 }, &[table, at])?,
            None => table,
        };
        let dims = l.dims_of(rows)?;
        if dims.iter().product::<usize>() != batch * tokens * half {
            return invalid(format!("caches {dims:?} do not fit {half} pairs of {batch} x {tokens} tokens"));
        }
        l.reshape(rows, &[batch, 1, tokens, half])
    };
    let (cos, sin) = (table(l, cos)?, table(l, sin)?);
    let y = rotate(l, four, cos, sin, half, l.node.flag("interleaved", false)?)?;
    Ok(vec![if dims.len() == 4 { y } else { join_heads(l, y)? }])
}

fn causal_conv(l: &mut Lowering<'_>) -> Lowered {
    let dims = l.dims(0)?;
    let kernel = l.dims(1)?;
    let ([batch, channels, length], [_, 1, k]) = (&dims[..], &kernel[..]) else {
        return invalid("input and weight must have rank 3");
    };
    let (batch, channels, length, k) = (*batch, *channels, *length, *k);
    let dtype = l.dtype(0)?;
    let (x, weight) = (l.value(0)?, l.value(1)?);
    let past = match l.optional(3)? {
        Some(past) => past,
        None => {
            let zeros = Tensor::zeros(&[batch, channels, k.saturating_sub(1)], dtype)?;
            l.tensor(zeros)
        }
    };
    let all = if k > 1 { l.add(Concat { axis: 2 }, &[past, x])? } else { x };
    let work = if matches!(dtype, DType::F16 | DType::BF16) { DType::F32 } else { dtype };
    let (wide, weight) = (l.cast(all, work)?, l.cast(weight, work)?);
    let weight = l.reshape(weight, &[channels, k])?;
    let mut sum = None;
    for tap in 0..k {
        let window = l.expand().slice(wide, 2, tap, length)?;
        let factor = l.expand().slice(weight, 1, tap, 1usize)?;
        let factor = l.reshape(factor, &[channels, 1])?;
        let term = l.expand().binary(BinaryOp::Mul, window, factor)?;
        sum = Some(match sum {
            Some(sum) => l.expand().binary(BinaryOp::Add, sum, term)?,
            None => term,
        });
    }
    let Some(mut y) = sum else { return invalid("the kernel has no taps") };
    if let Some(bias) = l.optional(2)? {
        let bias = l.cast(bias, work)?;
        let bias = l.reshape(bias, &[channels, 1])?;
        y = l.expand().binary(BinaryOp::Add, y, bias)?;
    }
    if matches!(l.node.text("activation", "none")?, "silu" | "swish") {
        let gate = l.expand().unary(UnaryOp::Sigmoid, y)?;
        y = l.expand().binary(BinaryOp::Mul, y, gate)?;
    }
    let y = l.cast(y, dtype)?;
    let state = l.expand().slice(all, 2, length, k - 1)?;
    Ok(vec![y, state])
}

fn flex_scores(l: &mut Lowering<'_>) -> Lowered {
    let (q, k) = (l.value(0)?, l.value(1)?);
    let dims = l.dims(0)?;
    let [_, heads, _, width] = dims[..] else { return invalid("queries must have rank 4") };
    let dtype = flex_precision(l.node, l.dtype(0)?)?;
    let scale = l.node.float_opt("scale")?.unwrap_or(1.0 / (width as f64).sqrt());
    let k = repeat_heads(l, k, heads)?;
    let product = l.add(MatMul { transpose_a: false, transpose_b: true }, &[q, k])?;
    let scaled = l.expand().scalar(BinaryOp::Mul, product, scale)?;
    Ok(vec![l.cast(scaled, dtype)?])
}

fn flex_precision(node: &NodeDef, dtype: DType) -> Result<DType, Refusal> {
    Ok(match node.element_opt("softmax_precision")? {
        Some(ElementType::Plain(precision)) => precision,
        _ if dtype == DType::F64 => dtype,
        _ => DType::F32,
    })
}

fn flex_weights(l: &mut Lowering<'_>) -> Lowered {
    let x = l.value(0)?;
    Ok(vec![l.add(Softmax { axis: 3 }, &[x])?])
}

fn flex_result(l: &mut Lowering<'_>) -> Lowered {
    let (weights, v) = (l.value(0)?, l.value(1)?);
    let (heads, dtype) = (l.dims(0)?[1], l.dtype(1)?);
    let weights = l.cast(weights, dtype)?;
    let v = repeat_heads(l, v, heads)?;
    Ok(vec![l.add(MatMul::plain(), &[weights, v])?])
}

fn flex_attention(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let apply = |name: &str, x: Value| -> Result<Value, Refusal> {
        if !h.node.attrs.contains_key(name) {
            return Ok(x);
        }
        let results = super::control::run_graph(h, name, vec![Some(x)])?;
        results.into_iter().next().ok_or_else(|| Refusal::Invalid(format!("{name} has no output")))
    };
    let first = |mut values: Vec<Value>| values.swap_remove(0);
    let operands = vec![Some(h.value(0)?.clone()), Some(h.value(1)?.clone())];
    let scores = apply("score_mod", first(interpret_lowering(h.node, flex_scores, operands)?))?;
    let weights = first(interpret_lowering(h.node, flex_weights, vec![Some(scores)])?);
    let weights = apply("prob_mod", weights)?;
    interpret_lowering(h.node, flex_result, vec![Some(weights), Some(h.value(2)?.clone())])
}

/// One head's recurrence over the tokens; the state is `[d_k, d_v]`.
struct Recurrence<'a> {
    d_k: usize,
    d_v: usize,
    decay: &'a dyn Fn(usize, usize) -> f64,
    beta: &'a dyn Fn(usize) -> Option<f64>,
}

impl Recurrence<'_> {
    fn step(&self, t: usize, state: &mut [f64], key: &[f64], value: &[f64]) {
        for (i, row) in state.chunks_mut(self.d_v).enumerate() {
            let factor = (self.decay)(t, i);
            row.iter_mut().for_each(|s| *s *= factor);
        }
        let mut update = value.to_vec();
        if let Some(beta) = (self.beta)(t) {
            for (j, u) in update.iter_mut().enumerate() {
                let seen: f64 = (0..self.d_k).map(|i| state[i * self.d_v + j] * key[i]).sum();
                *u = beta * (*u - seen);
            }
        }
        for (row, k) in state.chunks_mut(self.d_v).zip(key) {
            row.iter_mut().zip(&update).for_each(|(s, u)| *s += k * u);
        }
    }
}

fn linear_attention(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let (q_heads, kv_heads) = (heads_attr(h.node, "q_num_heads")?, heads_attr(h.node, "kv_num_heads")?);
    let (q, k, v) = (h.floats(0)?, h.floats(1)?, h.floats(2)?);
    let [batch, tokens, width] = h.dims(0)?[..] else { return invalid("queries must have rank 3") };
    if kv_heads == 0 || q_heads % kv_heads != 0 || width % q_heads.max(1) != 0 {
        return invalid(format!("{q_heads} query heads do not share {kv_heads} heads"));
    }
    let rule = h.node.text("update_rule", "gated_delta")?;
    let (gated, delta) = match rule {
        "linear" => (false, false),
        "gated" => (true, false),
        "delta" => (false, true),
        "gated_delta" => (true, true),
        other => return invalid(format!("update_rule {other:?} is unknown")),
    };
    if gated != h.optional(4).is_some() || delta != h.optional(5).is_some() {
        return invalid(format!("decay or beta do not fit update_rule {rule:?}"));
    }
    let d_k = width / q_heads;
    let d_v = h.dims(2)?.last().copied().unwrap_or(0) / kv_heads;
    let decay = h.optional(4).map(Value::floats).transpose()?.unwrap_or_default();
    let beta = h.optional(5).map(Value::floats).transpose()?.unwrap_or_default();
    let per = |all: &[f64]| all.len() / (batch * tokens).max(1);
    let (decay_width, beta_width) = (per(&decay), per(&beta));
    let mut state = match h.optional(3) {
        Some(past) => past.floats()?,
        None => vec![0.0; batch * kv_heads * d_k * d_v],
    };
    let scale = match h.node.float("scale", 0.0)? {
        0.0 => 1.0 / (d_k as f64).sqrt(),
        scale => scale,
    };
    let group = q_heads / kv_heads;
    let mut out = vec![0.0; batch * tokens * q_heads * d_v];
    for b in 0..batch {
        for head in 0..kv_heads {
            let row = |t: usize| b * tokens + t;
            let decay_at = |t: usize, i: usize| match decay_width {
                0 => 1.0,
                n if n == kv_heads => decay[row(t) * n + head].exp(),
                n => decay[row(t) * n + head * d_k + i].exp(),
            };
            let beta_at = |t: usize| match beta_width {
                0 => None,
                1 => Some(beta[row(t)]),
                n => Some(beta[row(t) * n + head]),
            };
            let rule = Recurrence { d_k, d_v, decay: &decay_at, beta: &beta_at };
            let own = &mut state[(b * kv_heads + head) * d_k * d_v..][..d_k * d_v];
            for t in 0..tokens {
                let key = &k[row(t) * kv_heads * d_k + head * d_k..][..d_k];
                let value = &v[row(t) * kv_heads * d_v + head * d_v..][..d_v];
                rule.step(t, own, key, value);
                for g in head * group..(head + 1) * group {
                    let query = &q[row(t) * width + g * d_k..][..d_k];
                    for j in 0..d_v {
                        let sum: f64 = (0..d_k).map(|i| query[i] * own[i * d_v + j]).sum();
                        out[row(t) * q_heads * d_v + g * d_v + j] = scale * sum;
                    }
                }
            }
        }
    }
    let element = h.element(0)?;
    let state_element = h.optional(3).and_then(Value::element).unwrap_or(element);
    Ok(vec![
        from_floats(element, &[batch, tokens, q_heads * d_v], &out)?,
        from_floats(state_element, &[batch, kv_heads, d_k, d_v], &state)?,
    ])
}

fn tensor_scatter(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let (cache, update) = (h.tensor(0)?, h.tensor(1)?);
    let dims = cache.dims().to_vec();
    let axis = axis_of(h.node.int("axis", -2)?, dims.len())?;
    let circular = h.node.text("mode", "linear")? == "circular";
    let starts = match h.optional(2) {
        Some(starts) => starts.ints()?,
        None => vec![0; dims[0]],
    };
    let element = cache.dtype().element_bytes().unwrap_or(1);
    let run = dims[axis + 1..].iter().product::<usize>() * element;
    let (room, steps) = (dims[axis], update.dims().get(axis).copied().unwrap_or(0));
    let outer: usize = dims[..axis].iter().product();
    if axis == 0 || update.len() * room != cache.len() * steps || starts.len() != dims[0] {
        return invalid(format!("an update {:?} does not fit the cache {dims:?}", update.dims()));
    }
    let mut result = cache.clone();
    for row in 0..outer {
        let start = starts[row / (outer / dims[0])];
        for step in 0..steps {
            let at = start + step as i64;
            let at = if circular { at.rem_euclid(room as i64) } else { at };
            let Some(at) = usize::try_from(at).ok().filter(|&a| a < room) else {
                return invalid(format!("write index {at} is outside 0..{room}"));
            };
            result.bytes_mut()[(row * room + at) * run..][..run]
                .copy_from_slice(&update.bytes()[(row * steps + step) * run..][..run]);
        }
    }
    Ok(vec![result.into()])
}
