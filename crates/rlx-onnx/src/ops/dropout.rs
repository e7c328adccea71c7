//! Dropout: nothing in inference; in training, drops drawn from the Mersenne Twister (Matsumoto and Nishimura, 1998), so that a seed
//! gives the same drops everywhere.

use super::Row;
use crate::error::{Refusal, invalid};
use crate::lower::{Host, Lowering};
use crate::model::NodeDef;
use crate::value::{Value, from_floats};
use rlx_graph::ValueId;
use rlx_graph::eval::from_i64;
use rlx_tensor::{DType, Tensor};

/// The rows of this family.
pub const ROWS: &[Row] = &[Row::both("Dropout", dropout, dropping)];

fn ratio_of(node: &NodeDef, given: Option<f64>) -> Result<f64, Refusal> {
    let ratio = node.float_opt("ratio")?.or(given).unwrap_or(0.5);
    if (0.0..1.0).contains(&ratio) { Ok(ratio) } else { invalid(format!("ratio {ratio} is outside [0, 1)")) }
}

fn dropout(l: &mut Lowering<'_>) -> Result<Vec<ValueId>, Refusal> {
    if l.has(2) && l.known(2)?.truth()? {
        return Err(Refusal::Host);
    }
    let dims = l.dims(0)?;
    let x = l.value(0)?;
    let mut results = vec![x];
    if l.wants(1) {
        let kept = vec![1u8; dims.iter().product()];
        results.push(l.tensor(Tensor::from_bytes(&dims, DType::Bool, &kept)?));
    }
    Ok(results)
}

fn dropping(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let given = match h.optional(1) {
        Some(ratio) => ratio.floats()?.first().copied(),
        None => None,
    };
    let ratio = ratio_of(h.node, given)?;
    let training = match h.optional(2) {
        Some(training) => training.truth()?,
        None => false,
    };
    let (x, dims) = (h.floats(0)?, h.dims(0)?);
    if !training {
        return Err(Refusal::Host);
    }
    let mut random = Twister::seeded(h.node.int("seed", 0)? as u32);
    let keep: Vec<i64> = x.iter().map(|_| i64::from(ratio == 0.0 || random.unit() >= ratio)).collect();
    let values: Vec<f64> = x.iter().zip(&keep).map(|(v, &k)| v * k as f64 / (1.0 - ratio)).collect();
    Ok(vec![from_floats(h.element(0)?, dims, &values)?, from_i64(dims, DType::Bool, &keep)?.into()])
}

const STATE: usize = 624;
const SHIFT: usize = 397;

/// MT19937.
struct Twister {
    state: Vec<u32>,
    at: usize,
}

impl Twister {
    fn seeded(seed: u32) -> Self {
        let mut state = vec![seed; STATE];
        for i in 1..STATE {
            let before = state[i - 1];
            state[i] = (before ^ (before >> 30)).wrapping_mul(1_812_433_253).wrapping_add(i as u32);
        }
        Self { state, at: STATE }
    }

    fn turn(&mut self) {
        for i in 0..STATE {
            let joined = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % STATE] & 0x7fff_ffff);
            let twist = if joined & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + SHIFT) % STATE] ^ (joined >> 1) ^ twist;
        }
        self.at = 0;
    }

    fn next(&mut self) -> u32 {
        if self.at == STATE {
            self.turn();
        }
        let mut y = self.state[self.at];
        self.at += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// Uniform in [0, 1) with 53 bits.
    fn unit(&mut self) -> f64 {
        let (high, low) = (f64::from(self.next() >> 5), f64::from(self.next() >> 6));
        (high * 67_108_864.0 + low) / 9_007_199_254_740_992.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_that_of_the_paper() {
        let mut random = Twister::seeded(5489);
        assert_eq!(random.next(), 3_499_211_612);
        let all: Vec<u32> = (0..9_999).map(|_| random.next()).collect();
        assert_eq!(all[9_998], 4_123_659_995);
    }
}
