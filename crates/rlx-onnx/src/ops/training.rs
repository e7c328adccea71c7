//! One step of an optimiser.

use super::Row;
use crate::error::{Refusal, invalid};
use crate::lower::Host;
use crate::value::{Value, from_floats};

const TRAINING: &str = "ai.onnx.preview.training";

/// The rows of this family.
pub const ROWS: &[Row] = &[
    Row::host("Adam", adam).of(TRAINING),
    Row::host("Adagrad", adagrad).of(TRAINING),
    Row::host("Momentum", momentum).of(TRAINING),
];

/// Operands in groups, one of each kind (values, gradients, moments) for every tensor; results in the same groups.
fn step(
    h: &Host<'_>,
    kinds: usize,
    results: usize,
    rule: impl Fn(&[f64]) -> Vec<f64>,
) -> Result<Vec<Value>, Refusal> {
    let tensors = h.inputs.len().saturating_sub(2) / kinds;
    if h.inputs.len() != 2 + tensors * kinds || tensors == 0 {
        return invalid(format!("{} operands are no groups of {kinds}", h.inputs.len()));
    }
    let mut out: Vec<Vec<Value>> = vec![Vec::new(); results];
    for t in 0..tensors {
        let own = (0..kinds).map(|k| h.floats(2 + k * tensors + t)).collect::<Result<Vec<_>, _>>()?;
        let count = own[0].len();
        if own.iter().any(|v| v.len() != count) {
            return invalid("the operands of a tensor differ in size");
        }
        let mut values = vec![Vec::with_capacity(count); results];
        for i in 0..count {
            let element: Vec<f64> = own.iter().map(|v| v[i]).collect();
            values.iter_mut().zip(rule(&element)).for_each(|(all, v)| all.push(v));
        }
        for (all, v) in out.iter_mut().zip(values) {
            all.push(from_floats(h.element(2 + t)?, h.dims(2 + t)?, &v)?);
        }
    }
    Ok(out.into_iter().flatten().collect())
}

fn rate_and_count(h: &Host<'_>) -> Result<(f64, f64), Refusal> {
    match (h.floats(0)?.first(), h.floats(1)?.first()) {
        (Some(&rate), Some(&count)) => Ok((rate, count)),
        _ => invalid("rate or count is empty"),
    }
}

fn adam(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let (rate, count) = rate_and_count(h)?;
    let n = h.node;
    let (alpha, beta) = (n.float("alpha", 0.9)?, n.float("beta", 0.999)?);
    let (norm, post) = (n.float("norm_coefficient", 0.0)?, n.float("norm_coefficient_post", 0.0)?);
    let eps = n.float("epsilon", 1e-6)?;
    let adjusted = match count > 0.0 {
        true => rate * (1.0 - beta.powf(count)).sqrt() / (1.0 - alpha.powf(count)),
        false => rate,
    };
    step(h, 4, 3, |e| {
        let [x, g, v, s] = e[..] else { return Vec::new() };
        let g = norm * x + g;
        let v = alpha * v + (1.0 - alpha) * g;
        let s = beta * s + (1.0 - beta) * g * g;
        let moved = x - adjusted * v / (s.sqrt() + eps);
        vec![(1.0 - post) * moved, v, s]
    })
}

fn adagrad(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let (rate, count) = rate_and_count(h)?;
    let n = h.node;
    let (norm, decay, eps) =
        (n.float("norm_coefficient", 0.0)?, n.float("decay_factor", 0.0)?, n.float("epsilon", 1e-6)?);
    let rate = rate / (1.0 + count * decay);
    step(h, 3, 2, |e| {
        let [x, g, s] = e[..] else { return Vec::new() };
        let g = norm * x + g;
        let s = s + g * g;
        vec![x - rate * g / (s.sqrt() + eps), s]
    })
}

fn momentum(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let (rate, count) = rate_and_count(h)?;
    let n = h.node;
    let (alpha, beta, norm) =
        (n.float("alpha", 0.0)?, n.float("beta", 1.0)?, n.float("norm_coefficient", 0.0)?);
    let beta = if count > 0.0 { beta } else { 1.0 };
    let nesterov = match n.text("mode", "standard")? {
        "standard" => false,
        "nesterov" => true,
        other => return invalid(format!("mode {other:?} is unknown")),
    };
    step(h, 3, 2, |e| {
        let [x, g, v] = e[..] else { return Vec::new() };
        let g = norm * x + g;
        let v = alpha * v + beta * g;
        let towards = if nesterov { g + alpha * v } else { v };
        vec![x - rate * towards, v]
    })
}
