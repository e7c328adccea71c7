//! What exporters write for layers that the optimiser takes together.

use crate::generate::{EPS, FUNCTION, Maker};
use crate::graph::{Attr, Id, Info};
use crate::layers;
use rlx_tensor::DType;

fn rows(m: &mut Maker) -> Option<Id> {
    m.pick(|i| i.dtype == DType::F32 && (2..=4).contains(&i.rank()) && i.size() < 64.0)
}

fn reshape(m: &mut Maker, x: Id, dims: &[usize]) -> Id {
    let shape = m.ints(&dims.iter().map(|&d| d as i64).collect::<Vec<_>>());
    let info = Info { dims: dims.to_vec(), ..m.info(x).clone() };
    m.emit("Reshape", &[x, shape], Vec::new(), info)
}

fn transpose(m: &mut Maker, x: Id, perm: &[usize]) -> Id {
    let info = m.info(x).clone();
    let dims = perm.iter().map(|&axis| info.dims[axis]).collect();
    let attr = Attr::Ints(perm.iter().map(|&axis| axis as i64).collect());
    m.emit("Transpose", &[x], vec![("perm", attr)], Info { dims, ..info })
}

fn scaled(m: &mut Maker, x: Id, factor: f64) -> Id {
    let factor_at = m.scalar(factor.abs());
    let info = m.info(x).clone();
    let factor = f64::from(factor as f32);
    let (low, high) = (info.low * factor, info.high * factor);
    let error = info.error * factor + EPS * info.size() * factor;
    m.emit("Mul", &[x, factor_at], Vec::new(), Info { low, high, error, ..info })
}

fn softmax(m: &mut Maker, x: Id) -> Id {
    let info = m.info(x).clone();
    let n = info.dims[info.rank() - 1] as f64;
    let error = 2.0 * info.error + FUNCTION + (n + 8.0) * EPS;
    m.emit("Softmax", &[x], vec![("axis", Attr::Int(-1))], Info { low: 0.0, high: 1.0, error, ..info })
}

/// The queries, keys and values of `x`: three products, or one that is cut.
fn projections(m: &mut Maker, x: Id, width: usize, [batch, seq, heads]: [usize; 3]) -> Option<[Id; 3]> {
    let dim = width / heads;
    let split = [batch, seq, heads, dim];
    if m.random.once_in(2) {
        let parts = [(); 3].map(|()| layers::product_with_weights(m, x, width));
        return Some(parts.map(|part| {
            let part = reshape(m, part, &split);
            transpose(m, part, &[0, 2, 1, 3])
        }));
    }
    let all = layers::product_with_weights(m, x, 3 * width);
    let all = reshape(m, all, &[batch, seq, 3, heads, dim]);
    let all = transpose(m, all, &[2, 0, 3, 1, 4]);
    let part = |m: &mut Maker, at: i64| {
        let index = m.constant(rlx_tensor::Tensor::scalar(at), 2.0);
        let info = m.info(all).clone();
        let dims = info.dims[1..].to_vec();
        m.emit("Gather", &[all, index], vec![("axis", Attr::Int(0))], Info { dims, ..info })
    };
    Some([part(m, 0), part(m, 1), part(m, 2)])
}

pub fn attention(m: &mut Maker) -> Option<()> {
    let x = m.pick(|i| i.dtype == DType::F32 && i.rank() == 3 && i.size() < 8.0)?;
    let [batch, seq, _] = m.info(x).dims[..] else { return None };
    let heads = m.random.between(1, 3) as usize;
    let dim = *m.random.pick(&[4, 8]);
    let [q, k, v] = projections(m, x, heads * dim, [batch, seq, heads])?;
    let scale = 1.0 / (dim as f64).sqrt();
    let places = m.random.below(3);
    let (q, k) = match places {
        0 => (scaled(m, q, scale), k),
        1 => (scaled(m, q, scale.sqrt()), scaled(m, k, scale.sqrt())),
        _ => (q, k),
    };
    let k = transpose(m, k, &[0, 1, 3, 2]);
    let mut scores = layers::product(m, q, k, vec![batch, heads, seq, seq]);
    if places == 2 {
        scores = scaled(m, scores, scale);
    }
    if m.random.once_in(2) {
        let dims = m.random.pick(&[vec![1, 1, seq, seq], vec![batch, 1, 1, seq], vec![seq, seq]]).clone();
        let mask = m.weight(&dims, 4.0);
        scores = m.arithmetic("Add", scores, mask)?;
    }
    let weights = softmax(m, scores);
    let y = layers::product(m, weights, v, vec![batch, heads, seq, dim]);
    // Rows of weights sum to one.
    let most = m.info(v).size();
    (m.model.values[y].low, m.model.values[y].high) = (-most, most);
    let y = transpose(m, y, &[0, 2, 1, 3]);
    let y = reshape(m, y, &[batch, seq, heads * dim]);
    if m.random.once_in(2) {
        let width = m.info(x).dims[2];
        let y = layers::product_with_weights(m, y, width);
        m.arithmetic("Add", x, y)?;
    }
    Some(())
}

pub fn gelu(m: &mut Maker) -> Option<()> {
    let x = rows(m)?;
    let size = m.info(x).size();
    let root = m.scalar(std::f64::consts::SQRT_2);
    let info = m.info(x).clone();
    let divided = m.emit("Div", &[x, root], Vec::new(), Info { error: info.error + EPS * size, ..info });
    let bent = m.function("Erf", divided, Vec::new(), (-1.0, 1.0), 1.13);
    let one = m.scalar(1.0);
    let sum = m.arithmetic("Add", bent, one)?;
    let half = m.scalar(0.5);
    match m.random.below(3) {
        0 => {
            let y = m.arithmetic("Mul", x, sum)?;
            m.arithmetic("Mul", y, half)?;
        }
        1 => {
            let y = m.arithmetic("Mul", x, half)?;
            m.arithmetic("Mul", y, sum)?;
        }
        _ => {
            let y = m.arithmetic("Mul", sum, half)?;
            m.arithmetic("Mul", x, y)?;
        }
    }
    Some(())
}

/// `silu(x a) * (x b)`, or a gate of the value itself.
pub fn gated(m: &mut Maker) -> Option<()> {
    let x = rows(m)?;
    let width = *m.random.pick(&[4, 16, 24]);
    let a = layers::product_with_weights(m, x, width);
    let gate = m.function("Sigmoid", a, Vec::new(), (0.0, 1.0), 0.25);
    let a = m.arithmetic("Mul", a, gate)?;
    let b = layers::product_with_weights(m, x, width);
    m.arithmetic("Mul", a, b).map(drop)
}

/// A layer norm or a root-mean-square norm written out.
pub fn written_norm(m: &mut Maker) -> Option<()> {
    let x = rows(m)?;
    let info = m.info(x).clone();
    let last = info.rank() - 1;
    let n = info.dims[last] as f64;
    let mut kept = info.dims.clone();
    kept[last] = 1;
    let mean = |m: &mut Maker, of: Id| {
        let from = m.info(of).clone();
        let axes = m.ints(&[-1]);
        let error = from.error + (n + 4.0) * EPS * from.size();
        let keep = vec![("keepdims", Attr::Int(1))];
        m.emit("ReduceMean", &[of, axes], keep, Info { dims: kept.clone(), error, ..from })
    };
    let centred = match m.random.once_in(2) {
        true => {
            let middle = mean(m, x);
            m.arithmetic("Sub", x, middle)?
        }
        false => x,
    };
    let square = match m.random.once_in(2) {
        true => {
            let two = m.scalar(2.0);
            let from = m.info(centred).clone();
            let size = from.size() * from.size();
            let error = 2.0 * from.size() * from.error + 4.0 * EPS * size;
            m.emit("Pow", &[centred, two], Vec::new(), Info { low: 0.0, high: size, error, ..from })
        }
        false => {
            let square = m.arithmetic("Mul", centred, centred)?;
            m.model.values[square].low = 0.0;
            square
        }
    };
    let variance = mean(m, square);
    let eps = *m.random.pick(&[0.25, 1.0]);
    let shift = m.scalar(eps);
    let shifted = m.arithmetic("Add", variance, shift)?;
    (m.model.values[shifted].low, m.model.values[shift].low) = (eps, eps);
    let high = m.info(shifted).high.sqrt();
    let root = m.function("Sqrt", shifted, Vec::new(), (0.5, high), 1.0);
    let from = m.info(centred).clone();
    let error = 2.0 * from.error + 4.0 * from.size() * m.info(root).error + 4.0 * EPS * from.size();
    let (low, high) = (-2.0 * from.size(), 2.0 * from.size());
    let y = m.emit("Div", &[centred, root], Vec::new(), Info { low, high, error, ..from });
    let w = m.positive(&[info.dims[last]], 0.5, 1.5);
    let y = m.arithmetic("Mul", y, w)?;
    if m.random.once_in(2) {
        let b = m.weight(&[info.dims[last]], 1.0);
        m.arithmetic("Add", y, b)?;
    }
    Some(())
}

/// Convolution, batch norm, activation, and sometimes a sum with what went in.
pub fn residual_block(m: &mut Maker) -> Option<()> {
    let x = m.pick(|i| i.dtype == DType::F32 && (3..=4).contains(&i.rank()) && i.size() < 64.0)?;
    let mut y = layers::conv_of(m, x)?;
    if m.random.once_in(2) {
        y = layers::batch_norm_of(m, y);
    }
    if m.info(y).dims == m.info(x).dims {
        y = m.arithmetic("Add", y, x)?;
    }
    let high = m.info(y).high.max(0.0);
    match m.random.below(3) {
        0 => {
            let info = m.info(y).clone();
            m.emit("Relu", &[y], Vec::new(), Info { low: 0.0, high, ..info });
        }
        1 => {
            let gate = m.function("Sigmoid", y, Vec::new(), (0.0, 1.0), 0.25);
            m.arithmetic("Mul", y, gate)?;
        }
        _ => {
            let (least, most) = (m.scalar(0.0), m.scalar(6.0));
            let info = m.info(y).clone();
            m.emit("Clip", &[y, least, most], Vec::new(), Info { low: 0.0, high: high.min(6.0), ..info });
        }
    }
    Some(())
}

/// `residual + act(x w + b)`.
pub fn linear(m: &mut Maker) -> Option<()> {
    let x = rows(m)?;
    let info = m.info(x).clone();
    let width = if m.random.once_in(2) { *info.dims.last()? } else { 12 };
    let y = layers::product_with_weights(m, x, width);
    let bias = m.weight(&[width], 1.0);
    let mut y = m.arithmetic("Add", y, bias)?;
    match m.random.below(3) {
        0 => y = m.function("Tanh", y, Vec::new(), (-1.0, 1.0), 1.0),
        1 => {
            let from = m.info(y).clone();
            y = m.emit("Relu", &[y], Vec::new(), Info { low: 0.0, high: from.high.max(0.0), ..from });
        }
        _ => {}
    }
    if width == *info.dims.last()? {
        m.arithmetic("Add", x, y)?;
    }
    Some(())
}
