//! Random numbers: a stream of its own for each node and run, or the same in each run where a node has a seed.

use super::Row;
use crate::error::{Refusal, invalid};
use crate::lower::Host;
use crate::value::{ElementType, Value, from_floats};
use rlx_graph::eval::from_f64;
use rlx_tensor::DType;
use std::f64::consts::TAU;
use std::sync::atomic::{AtomicU64, Ordering};

type Evaluated = Result<Vec<Value>, Refusal>;

/// The rows of this family.
pub const ROWS: &[Row] = &[
    Row::host("RandomNormal", |h| fill(h, false, Kind::Normal)).changing(),
    Row::host("RandomNormalLike", |h| fill(h, true, Kind::Normal)).changing(),
    Row::host("RandomUniform", |h| fill(h, false, Kind::Uniform)).changing(),
    Row::host("RandomUniformLike", |h| fill(h, true, Kind::Uniform)).changing(),
    Row::host("Bernoulli", bernoulli).changing(),
    Row::host("Multinomial", multinomial).changing(),
];

#[derive(Clone, Copy)]
enum Kind {
    Normal,
    Uniform,
}

/// Runs of nodes without a seed so far.
static UNSEEDED: AtomicU64 = AtomicU64::new(1);

/// SplitMix64 (Steele, Lea and Flood, 2014).
struct Stream(u64);

impl Stream {
    fn of(h: &Host<'_>) -> Result<Self, Refusal> {
        let seed = match h.node.float_opt("seed")? {
            Some(seed) => seed.to_bits(),
            None => UNSEEDED.fetch_add(1, Ordering::Relaxed).wrapping_mul(0xd134_2543_de82_ef95),
        };
        Ok(Self(seed))
    }

    /// Uniform in [0, 1).
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal (Box and Muller, 1958).
    fn normal(&mut self) -> f64 {
        let (radius, angle) = (1.0 - self.next(), self.next());
        (-2.0 * radius.ln()).sqrt() * (TAU * angle).cos()
    }
}

fn fill(h: &Host<'_>, like: bool, kind: Kind) -> Evaluated {
    let dims: Vec<usize> = match like {
        true => h.dims(0)?.to_vec(),
        false => {
            let shape = h.node.ints_opt("shape")?.unwrap_or_default();
            let dims: Option<Vec<usize>> = shape.iter().map(|&d| usize::try_from(d).ok()).collect();
            let count = dims.as_ref().and_then(|d| d.iter().try_fold(1usize, |n, &d| n.checked_mul(d)));
            match (dims, count) {
                (Some(dims), Some(count)) if count < 1 << 32 => dims,
                _ => return invalid(format!("shape {shape:?}")),
            }
        }
    };
    let element = match h.node.element_opt("dtype")? {
        Some(element) => element,
        None if like => h.element(0)?,
        None => ElementType::Plain(DType::F32),
    };
    let mut stream = Stream::of(h)?;
    let count: usize = dims.iter().product();
    let values: Vec<f64> = match kind {
        Kind::Normal => {
            let (mean, scale) = (h.node.float("mean", 0.0)?, h.node.float("scale", 1.0)?);
            (0..count).map(|_| mean + scale * stream.normal()).collect()
        }
        Kind::Uniform => {
            let (low, high) = (h.node.float("low", 0.0)?, h.node.float("high", 1.0)?);
            (0..count).map(|_| low + (high - low) * stream.next()).collect()
        }
    };
    Ok(vec![from_floats(element, &dims, &values)?])
}

fn bernoulli(h: &Host<'_>) -> Evaluated {
    let element = match h.node.element_opt("dtype")? {
        Some(element) => element,
        None => h.element(0)?,
    };
    let mut stream = Stream::of(h)?;
    let drawn: Vec<f64> = h.floats(0)?.iter().map(|&p| f64::from(u8::from(stream.next() < p))).collect();
    Ok(vec![from_floats(element, h.dims(0)?, &drawn)?])
}

fn multinomial(h: &Host<'_>) -> Evaluated {
    let &[batch, classes] = h.dims(0)? else { return invalid("log-probabilities must have rank 2") };
    let draws = usize::try_from(h.node.int("sample_size", 1)?).unwrap_or(0);
    let dtype = match h.node.element_opt("dtype")? {
        Some(ElementType::Plain(dtype)) => dtype,
        _ => DType::I32,
    };
    let mut stream = Stream::of(h)?;
    let logits = h.floats(0)?;
    let mut drawn = Vec::with_capacity(batch * draws);
    for row in logits.chunks_exact(classes.max(1)).take(batch) {
        let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = row.iter().map(|v| (v - most).exp()).collect();
        let total: f64 = weights.iter().sum();
        for _ in 0..draws {
            let mut left = stream.next() * total;
            let mut class = 0;
            while class + 1 < classes && left >= weights[class] {
                left -= weights[class];
                class += 1;
            }
            drawn.push(class as f64);
        }
    }
    Ok(vec![from_f64(&[batch, draws], dtype, &drawn)?.into()])
}
