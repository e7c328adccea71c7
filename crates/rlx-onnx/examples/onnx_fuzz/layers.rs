//! Steps that sum: reductions, products, windows, norms.

use crate::generate::{EPS, FUNCTION, Maker};
use crate::graph::{Attr, Id, Info};
use rlx_tensor::DType;

/// A sum of `terms` products of numbers up to `x` and `w`, each with its error.
fn summed(x: &Info, w: f64, terms: usize) -> (f64, f64) {
    let n = terms as f64;
    let size = n * x.size() * w;
    (size, n * w * x.error + (n + 4.0) * EPS * size)
}

fn tensor_of(m: &mut Maker, ranks: std::ops::RangeInclusive<usize>) -> Option<Id> {
    m.pick(|info| info.dtype == DType::F32 && ranks.contains(&info.rank()))
}

pub fn reduce(m: &mut Maker) -> Option<()> {
    let x = tensor_of(m, 1..=4)?;
    let info = m.info(x).clone();
    let op =
        *m.random.pick(&["ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceSumSquare", "ReduceL1"]);
    let mut axes: Vec<usize> = (0..info.rank()).filter(|_| m.random.once_in(2)).collect();
    if axes.is_empty() {
        axes.push(info.rank() - 1);
    }
    if m.random.once_in(4) {
        axes.reverse();
    }
    let n: usize = axes.iter().map(|&axis| info.dims[axis]).product();
    let keep = m.random.once_in(2);
    let dim = |axis: usize| match (axes.contains(&axis), keep) {
        (false, _) => Some(info.dims[axis]),
        (true, true) => Some(1),
        (true, false) => None,
    };
    let dims: Vec<usize> = (0..info.rank()).filter_map(dim).collect();
    let (size, error) = summed(&info, 1.0, n);
    let (low, high, error) = match op {
        "ReduceMax" | "ReduceMin" => (info.low, info.high, info.error),
        "ReduceMean" => (info.low, info.high, error / n as f64 + EPS * info.size()),
        "ReduceL1" => (0.0, size, error),
        "ReduceSumSquare" => {
            let (size, _) = summed(&info, info.size(), n);
            (0.0, size, 2.0 * info.size() * info.error * n as f64 + (n as f64 + 4.0) * EPS * size)
        }
        _ => (-size, size, error),
    };
    let rank = info.rank() as i64;
    let from_end = |axis: i64| if m.random.once_in(4) { axis - rank } else { axis };
    let axes: Vec<i64> = axes.iter().map(|&axis| axis as i64).map(from_end).collect();
    let axes = m.ints(&axes);
    let keep = ("keepdims", Attr::Int(i64::from(keep)));
    m.emit(op, &[x, axes], vec![keep], Info { dims, dtype: DType::F32, low, high, error });
    Some(())
}

pub fn running_sum(m: &mut Maker) -> Option<()> {
    let x = tensor_of(m, 1..=3)?;
    let info = m.info(x).clone();
    let axis = m.random.below(info.rank());
    let (size, error) = summed(&info, 1.0, info.dims[axis]);
    let at = m.constant(rlx_tensor::Tensor::scalar(axis as i64), axis as f64);
    let flags = ["exclusive", "reverse"].map(|flag| (flag, Attr::Int(i64::from(m.random.once_in(3)))));
    m.emit("CumSum", &[x, at], flags.to_vec(), Info { low: -size, high: size, error, ..info });
    Some(())
}

pub fn softmax(m: &mut Maker) -> Option<()> {
    let x = tensor_of(m, 1..=4)?;
    let info = m.info(x).clone();
    if info.size() > 64.0 {
        return None;
    }
    let axis = m.random.below(info.rank());
    let written = if m.random.once_in(2) { axis as i64 } else { axis as i64 - info.rank() as i64 };
    let n = info.dims[axis] as f64;
    let axis = vec![("axis", Attr::Int(written))];
    let error = 2.0 * info.error + FUNCTION + (n + 8.0) * EPS;
    if m.random.once_in(4) {
        let low = info.low - info.high - n.ln() - 1.0;
        let error = error + EPS * low.abs();
        m.emit("LogSoftmax", &[x], axis, Info { low, high: 0.0, error, ..info });
    } else {
        m.emit("Softmax", &[x], axis, Info { low: 0.0, high: 1.0, error, ..info });
    }
    Some(())
}

/// `x w` with weights that keep the numbers in bounds.
pub fn product_with_weights(m: &mut Maker, x: Id, width: usize) -> Id {
    let info = m.info(x).clone();
    let k = info.dims[info.rank() - 1];
    let bound = 2.0 / k as f64;
    let w = m.weight(&[k, width], bound);
    let (size, error) = summed(&info, bound, k);
    let mut dims = info.dims;
    let last = dims.len() - 1;
    dims[last] = width;
    m.emit("MatMul", &[x, w], Vec::new(), Info { dims, dtype: DType::F32, low: -size, high: size, error })
}

/// `a b` over batches; the last two dims must fit.
pub fn product(m: &mut Maker, a: Id, b: Id, dims: Vec<usize>) -> Id {
    let (x, y) = (m.info(a).clone(), m.info(b).clone());
    let k = x.dims[x.rank() - 1] as f64;
    let size = k * x.size() * y.size();
    let error = k * (x.size() * y.error + y.size() * x.error + x.error * y.error) + (k + 4.0) * EPS * size;
    m.emit("MatMul", &[a, b], Vec::new(), Info { dims, dtype: DType::F32, low: -size, high: size, error })
}

pub fn matmul(m: &mut Maker) -> Option<()> {
    let a = tensor_of(m, 2..=4)?;
    let dims = m.info(a).dims.clone();
    let rank = dims.len();
    if m.random.once_in(2) {
        let width = *m.random.pick(&[1, 3, 8, 16, 33]);
        product_with_weights(m, a, width);
        return Some(());
    }
    let fits = |i: &Info| {
        let same = i.rank() == rank && i.dims[..rank - 2] == dims[..rank - 2];
        i.dtype == DType::F32
            && (same || i.rank() == 2)
            && i.rank() >= 2
            && i.dims[i.rank() - 2] == dims[rank - 1]
    };
    let b = m.pick(fits)?;
    let mut result = dims.clone();
    result[rank - 1] = *m.info(b).dims.last()?;
    product(m, a, b, result);
    Some(())
}

pub fn gemm(m: &mut Maker) -> Option<()> {
    let a = tensor_of(m, 2..=2)?;
    let info = m.info(a).clone();
    let (trans_a, trans_b) = (m.random.once_in(3), m.random.once_in(2));
    let (rows, k) = if trans_a { (info.dims[1], info.dims[0]) } else { (info.dims[0], info.dims[1]) };
    let width = *m.random.pick(&[1, 4, 16, 19]);
    let bound = 2.0 / k as f64;
    let w = m.weight(&if trans_b { [width, k] } else { [k, width] }, bound);
    let mut operands = vec![a, w];
    let alpha = *m.random.pick(&[1.0f32, 1.0, 0.5]);
    let (size, error) = summed(&info, bound, k);
    let mut size = size * f64::from(alpha);
    if m.random.once_in(2) {
        let dims = m.random.pick(&[vec![width], vec![1, width], vec![rows, 1], vec![1]]).clone();
        operands.push(m.weight(&dims, 1.0));
        size += 1.0;
    }
    let flag = |on: bool| Attr::Int(i64::from(on));
    let attrs = vec![("alpha", Attr::Float(alpha)), ("transA", flag(trans_a)), ("transB", flag(trans_b))];
    let (low, high, error) = (-size, size, error + EPS * size);
    m.emit("Gemm", &operands, attrs, Info { dims: vec![rows, width], dtype: DType::F32, low, high, error });
    Some(())
}

/// A window's attributes over spatial extents, and the extents of its positions.
struct Window {
    attrs: Vec<(&'static str, Attr)>,
    kernel: Vec<usize>,
    positions: Vec<usize>,
}

fn window(m: &mut Maker, extents: &[usize], dilate: bool) -> Option<Window> {
    let (mut kernel, mut strides, mut dilations) = (Vec::new(), Vec::new(), Vec::new());
    let (mut before, mut after, mut positions) = (Vec::new(), Vec::new(), Vec::new());
    for &extent in extents {
        let k = m.random.between(1, 3);
        let d = if dilate && m.random.once_in(4) { 2 } else { 1 };
        let s = m.random.between(1, 2);
        let pads = [m.random.between(0, (k - 1).min(1)), m.random.between(0, (k - 1).min(1))];
        let room = extent as i64 + pads[0] + pads[1] - d * (k - 1) - 1;
        if room < 0 {
            return None;
        }
        positions.push((room / s + 1) as usize);
        kernel.push(k);
        strides.push(s);
        dilations.push(d);
        before.push(pads[0]);
        after.push(pads[1]);
    }
    before.extend(after);
    let mut attrs = vec![
        ("kernel_shape", Attr::Ints(kernel.clone())),
        ("strides", Attr::Ints(strides)),
        ("pads", Attr::Ints(before)),
    ];
    if dilate {
        attrs.push(("dilations", Attr::Ints(dilations)));
    }
    Some(Window { attrs, kernel: kernel.iter().map(|&k| k as usize).collect(), positions })
}

/// A convolution of an image; gives its result.
pub fn conv_of(m: &mut Maker, x: Id) -> Option<Id> {
    let info = m.info(x).clone();
    let channels = info.dims[1];
    let mut window = window(m, &info.dims[2..], true)?;
    let groups = match m.random.below(3) {
        0 if channels <= 16 => channels,
        1 if channels.is_multiple_of(2) => 2,
        _ => 1,
    };
    let outputs = groups * m.random.between(1, 4) as usize;
    let mut dims = vec![outputs, channels / groups];
    dims.extend(&window.kernel);
    let terms: usize = dims[1..].iter().product();
    let bound = 2.0 / terms as f64;
    let w = m.weight(&dims, bound);
    let mut operands = vec![x, w];
    let (mut size, error) = summed(&info, bound, terms);
    if m.random.once_in(2) {
        operands.push(m.weight(&[outputs], 1.0));
        size += 1.0;
    }
    window.attrs.push(("group", Attr::Int(groups as i64)));
    let mut dims = vec![info.dims[0], outputs];
    dims.extend(window.positions);
    let error = error + EPS * size;
    Some(m.emit(
        "Conv",
        &operands,
        window.attrs,
        Info { dims, dtype: DType::F32, low: -size, high: size, error },
    ))
}

pub fn conv(m: &mut Maker) -> Option<()> {
    let x = tensor_of(m, 3..=5)?;
    conv_of(m, x).map(drop)
}

pub fn pool(m: &mut Maker) -> Option<()> {
    let x = tensor_of(m, 3..=4)?;
    let info = m.info(x).clone();
    if m.random.once_in(4) {
        let op = *m.random.pick(&["GlobalAveragePool", "GlobalMaxPool"]);
        let n: usize = info.dims[2..].iter().product();
        let mut dims = info.dims.clone();
        dims[2..].fill(1);
        let error =
            info.error + if op == "GlobalMaxPool" { 0.0 } else { (n as f64 + 4.0) * EPS * info.size() };
        m.emit(op, &[x], Vec::new(), Info { dims, error, ..info });
        return Some(());
    }
    let mut window = window(m, &info.dims[2..], false)?;
    let mut dims = info.dims[..2].to_vec();
    dims.extend(&window.positions);
    if m.random.once_in(2) {
        m.emit("MaxPool", &[x], window.attrs, Info { dims, ..info });
        return Some(());
    }
    let n: usize = window.kernel.iter().product();
    let count = Attr::Int(i64::from(m.random.once_in(2)));
    window.attrs.push(("count_include_pad", count));
    let error = info.error + (n as f64 + 4.0) * EPS * info.size();
    let (low, high) = (info.low.min(0.0), info.high.max(0.0));
    m.emit("AveragePool", &[x], window.attrs, Info { dims, low, high, error, ..info });
    Some(())
}

/// Scale and shift of each channel, from moments.
pub fn batch_norm_of(m: &mut Maker, x: Id) -> Id {
    let info = m.info(x).clone();
    let channels = [info.dims[1]];
    let operands = [
        x,
        m.positive(&channels, 0.5, 1.5),
        m.weight(&channels, 1.0),
        m.weight(&channels, 1.0),
        m.positive(&channels, 0.5, 2.0),
    ];
    let size = 2.2 * (info.size() + 1.0) + 1.0;
    let error = 2.2 * info.error + 8.0 * EPS * size;
    m.emit("BatchNormalization", &operands, Vec::new(), Info { low: -size, high: size, error, ..info })
}

pub fn batch_norm(m: &mut Maker) -> Option<()> {
    let x = tensor_of(m, 2..=5)?;
    batch_norm_of(m, x);
    Some(())
}

pub fn layer_norm(m: &mut Maker) -> Option<()> {
    let x = tensor_of(m, 2..=4)?;
    let info = m.info(x).clone();
    let axis = if m.random.once_in(3) { info.rank() - 2 } else { info.rank() - 1 };
    let dims = info.dims[axis..].to_vec();
    let n = dims.iter().product::<usize>() as f64;
    let eps = *m.random.pick(&[0.1f32, 0.5, 1.0]);
    let mut operands = vec![x, m.positive(&dims, 0.5, 1.5)];
    if m.random.once_in(2) {
        operands.push(m.weight(&dims, 1.0));
    }
    let size = 1.5 * n.sqrt() + 1.0;
    let noise = info.error + (n + 4.0) * EPS * info.size();
    let error = 6.0 * noise * (1.0 + n.sqrt()) / f64::from(eps).sqrt() + 8.0 * EPS * size;
    let attrs = vec![("axis", Attr::Int(axis as i64 - info.rank() as i64)), ("epsilon", Attr::Float(eps))];
    m.emit("LayerNormalization", &operands, attrs, Info { low: -size, high: size, error, ..info });
    Some(())
}

pub fn resize(m: &mut Maker) -> Option<()> {
    let x = m.pick(|i| i.dtype == DType::F32 && i.rank() == 4 && i.count() <= 256)?;
    let mut info = m.info(x).clone();
    info.dims[2] *= 2;
    info.dims[3] *= 2;
    let scales = rlx_tensor::Tensor::from_slice(&[4], &[1f32, 1.0, 2.0, 2.0]).ok()?;
    let scales = m.constant(scales, 2.0);
    let mode = *m.random.pick(&["nearest", "linear", "cubic"]);
    let mut attrs = vec![("mode", Attr::Text(mode))];
    if mode != "nearest" {
        let placed = *m.random.pick(&["half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel"]);
        attrs.push(("coordinate_transformation_mode", Attr::Text(placed)));
    }
    if mode == "nearest" {
        attrs.push(("coordinate_transformation_mode", Attr::Text("asymmetric")));
        attrs.push(("nearest_mode", Attr::Text("floor")));
    } else {
        // Weights of a cubic sum up to less than 1.6 along an axis, rounded positions move them by some units in the last place.
        let stretch = if mode == "cubic" { 2.6 } else { 1.0 };
        info.error = stretch * info.error + 64.0 * EPS * stretch * info.size();
        (info.low, info.high) = (-stretch * info.size(), stretch * info.size());
    }
    m.emit_all("Resize", &[Some(x), None, Some(scales)], attrs, vec![info]);
    Some(())
}

/// Positions and values of extremes, of values that are the same for all.
pub fn extremes(m: &mut Maker) -> Option<()> {
    let x = m.pick(|i| i.dtype == DType::F32 && i.exact() && i.rank() >= 1)?;
    let mut info = m.info(x).clone();
    let axis = m.random.below(info.rank());
    let extent = info.dims[axis];
    let whole =
        |dims: Vec<usize>| Info { dims, dtype: DType::I64, low: 0.0, high: extent as f64, error: 0.0 };
    if m.random.once_in(2) {
        let op = *m.random.pick(&["ArgMax", "ArgMin"]);
        let keep = m.random.once_in(2);
        if keep {
            info.dims[axis] = 1;
        } else {
            info.dims.remove(axis);
        }
        let attrs = vec![("axis", Attr::Int(axis as i64)), ("keepdims", Attr::Int(i64::from(keep)))];
        m.emit(op, &[x], attrs, whole(info.dims));
        return Some(());
    }
    let count = m.random.between(1, extent as i64);
    info.dims[axis] = count as usize;
    let count = m.ints(&[count]);
    let attrs =
        vec![("axis", Attr::Int(axis as i64)), ("largest", Attr::Int(i64::from(m.random.once_in(2))))];
    let positions = whole(info.dims.clone());
    m.emit_all("TopK", &[Some(x), Some(count)], attrs, vec![info, positions]);
    Some(())
}

/// A transposed convolution with weights.
pub fn conv_transpose(m: &mut Maker) -> Option<()> {
    let x = m.pick(|i| i.dtype == DType::F32 && (3..=4).contains(&i.rank()) && i.count() <= 512)?;
    let info = m.info(x).clone();
    let axes = info.rank() - 2;
    let outputs = m.random.between(1, 4) as usize;
    let mut dims = vec![info.dims[0], outputs];
    let (mut window, mut strides, mut pads, mut extra) =
        (Vec::new(), Vec::new(), vec![0; 2 * axes], Vec::new());
    for axis in 0..axes {
        let (size, stride) = (m.random.between(1, 4), m.random.between(1, 3));
        let whole = stride * (info.dims[2 + axis] as i64 - 1) + size;
        pads[axis] = m.random.between(0, 1).min((whole - 1).max(0));
        pads[axes + axis] = m.random.between(0, 1).min((whole - 1 - pads[axis]).max(0));
        extra.push(m.random.between(0, stride - 1));
        dims.push((whole - pads[axis] - pads[axes + axis] + extra[axis]) as usize);
        window.push(size as usize);
        strides.push(stride);
    }
    let channels = info.dims[1];
    let taps = channels * window.iter().product::<usize>();
    let bound = 2.0 / taps as f64;
    let w = m.weight(&[&[channels, outputs][..], &window].concat(), bound);
    let (size, error) = summed(&info, bound, taps);
    let attrs = [("strides", strides), ("pads", pads), ("output_padding", extra)];
    let attrs = attrs.into_iter().map(|(name, values)| (name, Attr::Ints(values))).collect();
    m.emit("ConvTranspose", &[x, w], attrs, Info { dims, dtype: DType::F32, low: -size, high: size, error });
    Some(())
}

/// A recurrent layer of a few steps. With weights up to a quarter and two units, a step hands on at most 2.2 times the error of its state.
pub fn recurrent(m: &mut Maker) -> Option<()> {
    let x = m.pick(|i| i.dtype == DType::F32 && i.rank() == 3 && i.dims[0] <= 3 && i.size() < 64.0)?;
    let info = m.info(x).clone();
    let (op, gates) = *m.random.pick(&[("LSTM", 4), ("GRU", 3), ("RNN", 1)]);
    let (direction, directions) = *m.random.pick(&[("forward", 1), ("reverse", 1), ("bidirectional", 2)]);
    let (inputs, hidden) = (info.dims[2], 2);
    let operands = [
        Some(x),
        Some(m.weight(&[directions, gates * hidden, inputs], 0.25)),
        Some(m.weight(&[directions, gates * hidden, hidden], 0.25)),
        Some(m.weight(&[directions, 2 * gates * hidden], 0.5)),
    ];
    let mut attrs = vec![("hidden_size", Attr::Int(hidden as i64)), ("direction", Attr::Text(direction))];
    if op == "GRU" {
        attrs.push(("linear_before_reset", Attr::Int(i64::from(m.random.once_in(2)))));
    }
    let (_, of_sums) = summed(&info, 0.25, inputs);
    let error = 12.0 * (2.0 * of_sums + 8.0 * FUNCTION);
    let of = |dims: Vec<usize>, bound: f64| Info { dims, dtype: DType::F32, low: -bound, high: bound, error };
    let state = vec![directions, info.dims[1], hidden];
    let mut results =
        vec![of(vec![info.dims[0], directions, info.dims[1], hidden], 1.0), of(state.clone(), 1.0)];
    if op == "LSTM" {
        results.push(of(state, 3.0));
    }
    m.emit_all(op, &operands, attrs, results);
    Some(())
}
