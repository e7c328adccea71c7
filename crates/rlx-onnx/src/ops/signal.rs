//! Fourier transforms and windows.

use super::Row;
use crate::error::{Refusal, invalid};
use crate::lower::Host;
use crate::model::axis_of;
use crate::value::{ElementType, Value, from_floats};
use rlx_graph::eval::strides;
use rlx_tensor::DType;
use std::f64::consts::TAU;

type Evaluated = Result<Vec<Value>, Refusal>;

/// The rows of this family.
pub const ROWS: &[Row] = &[
    Row::host("DFT", dft),
    Row::host("STFT", stft),
    Row::host("HannWindow", |h| window(h, &[0.5, 0.5])),
    Row::host("HammingWindow", |h| window(h, &[25.0 / 46.0, 21.0 / 46.0])),
    Row::host("BlackmanWindow", |h| window(h, &[0.42, 0.5, 0.08])),
];

/// `sum x[t] e^(-2 pi i k t / n)` for the first `count` k, or its inverse.
fn transform(x: &[(f64, f64)], n: usize, count: usize, inverse: bool) -> Vec<(f64, f64)> {
    let sign = if inverse { 1.0 } else { -1.0 };
    let scale = if inverse { 1.0 / n as f64 } else { 1.0 };
    let turn: Vec<(f64, f64)> = (0..n)
        .map(|j| {
            let (sin, cos) = (TAU * j as f64 / n as f64).sin_cos();
            (cos, sign * sin)
        })
        .collect();
    let one = |k: usize| {
        let (mut re, mut im) = (0.0, 0.0);
        for (t, &(a, b)) in x.iter().enumerate().take(n) {
            let (c, s) = turn[k * t % n];
            re += a * c - b * s;
            im += a * s + b * c;
        }
        (re * scale, im * scale)
    };
    (0..count).map(one).collect()
}

/// A whole signal from the first half of a transform whose input was real.
fn mirrored(half: &[(f64, f64)], n: usize) -> Vec<(f64, f64)> {
    let at = |k: usize| match half.get(k) {
        Some(&value) => value,
        None => half.get(n - k).map_or((0.0, 0.0), |&(re, im)| (re, -im)),
    };
    (0..n).map(at).collect()
}

fn dft(h: &Host<'_>) -> Evaluated {
    let dims = h.dims(0)?.to_vec();
    let rank = dims.len();
    let Some(&parts) = dims.last().filter(|_| rank >= 2) else { return invalid("a signal must have rank 2") };
    let axis = match h.optional(2) {
        Some(axis) => axis.int()?,
        None if h.node.opset < 20 => h.node.int("axis", 1)?,
        None => -2,
    };
    let axis = axis_of(axis, rank)?;
    let (inverse, onesided) = (h.node.flag("inverse", false)?, h.node.flag("onesided", false)?);
    let wanted = h.optional(1).map(Value::int).transpose()?;
    let n = match wanted {
        Some(n) if n > 0 => n as usize,
        Some(n) => return invalid(format!("a length of {n}")),
        None if onesided && inverse => 2 * (dims[axis].max(1) - 1),
        None => dims[axis],
    };
    if axis + 1 == rank || !matches!(parts, 1 | 2) || n == 0 {
        return invalid(format!("no transform along axis {axis} of {dims:?}"));
    }
    let half = onesided && inverse;
    let count = if onesided && !inverse { n / 2 + 1 } else { n };
    let own = strides(&dims);
    let x = h.floats(0)?;
    let mut result_dims = dims.clone();
    result_dims[axis] = count;
    result_dims[rank - 1] = if half { 1 } else { 2 };
    let target = strides(&result_dims);
    let mut y = vec![0.0; result_dims.iter().product()];
    let others: Vec<usize> = (0..rank - 1).filter(|&a| a != axis).collect();
    let signals: usize = others.iter().map(|&a| dims[a]).product();
    for mut index in 0..signals {
        let (mut from, mut to) = (0, 0);
        for &a in others.iter().rev() {
            let i = index % dims[a];
            index /= dims[a];
            from += i * own[a];
            to += i * target[a];
        }
        let at = |t: usize| {
            let place = from + t * own[axis];
            (x[place], if parts == 2 { x[place + 1] } else { 0.0 })
        };
        let mut signal: Vec<(f64, f64)> = (0..dims[axis].min(n)).map(at).collect();
        if half {
            signal = mirrored(&signal, n);
        }
        for (k, (re, im)) in transform(&signal, n, count, inverse).into_iter().enumerate() {
            let place = to + k * target[axis];
            y[place] = re;
            if !half {
                y[place + 1] = im;
            }
        }
    }
    Ok(vec![from_floats(h.element(0)?, &result_dims, &y)?])
}

fn stft(h: &Host<'_>) -> Evaluated {
    let dims = h.dims(0)?.to_vec();
    let (batch, len, parts) = match *dims.as_slice() {
        [batch, len] => (batch, len, 1),
        [batch, len, parts @ (1 | 2)] => (batch, len, parts),
        _ => return invalid(format!("a signal of {dims:?}")),
    };
    let step = h.value(1)?.int()?;
    let window = h.optional(2).map(Value::floats).transpose()?;
    let frame = match (h.optional(3), &window) {
        (Some(length), _) => length.int()?,
        (None, Some(window)) => window.len() as i64,
        (None, None) => len as i64,
    };
    let sizes = usize::try_from(step).ok().zip(usize::try_from(frame).ok());
    let Some((step, frame)) = sizes.filter(|&(step, frame)| step > 0 && frame > 0 && frame <= len) else {
        return invalid(format!("frames of {frame}, {step} apart, of {len}"));
    };
    let onesided = h.node.flag("onesided", true)? && parts == 1;
    let (frames, bins) = ((len - frame) / step + 1, if onesided { frame / 2 + 1 } else { frame });
    let x = h.floats(0)?;
    let mut y = Vec::with_capacity(batch * frames * bins * 2);
    for image in 0..batch {
        for index in 0..frames {
            let at = |t: usize| {
                let place = (image * len + index * step + t) * parts;
                let weight = window.as_ref().map_or(1.0, |w| w.get(t).copied().unwrap_or(0.0));
                (x[place] * weight, if parts == 2 { x[place + 1] * weight } else { 0.0 })
            };
            let signal: Vec<(f64, f64)> = (0..frame).map(at).collect();
            y.extend(transform(&signal, frame, bins, false).into_iter().flat_map(|(re, im)| [re, im]));
        }
    }
    Ok(vec![from_floats(h.element(0)?, &[batch, frames, bins, 2], &y)?])
}

fn out_element(h: &Host<'_>, name: &str) -> Result<ElementType, Refusal> {
    Ok(h.node.element_opt(name)?.unwrap_or(ElementType::Plain(DType::F32)))
}

/// `a0 - a1 cos(x) + a2 cos(2x)`
fn window(h: &Host<'_>, weights: &[f64]) -> Evaluated {
    let size = usize::try_from(h.value(0)?.int()?).ok().filter(|&n| n < 1 << 32);
    let Some(size) = size else { return invalid("the size of a window") };
    let periodic = h.node.flag("periodic", true)?;
    let period = if periodic { size } else { size.max(1) - 1 } as f64;
    let at = |i: usize| {
        let angle = if period == 0.0 { 0.0 } else { TAU * i as f64 / period };
        let term = |(k, a): (usize, &f64)| if k % 2 == 1 { -a } else { *a } * (k as f64 * angle).cos();
        weights.iter().enumerate().map(term).sum::<f64>()
    };
    let values: Vec<f64> = match size {
        1 => vec![1.0],
        size => (0..size).map(at).collect(),
    };
    Ok(vec![from_floats(out_element(h, "output_datatype")?, &[size], &values)?])
}
