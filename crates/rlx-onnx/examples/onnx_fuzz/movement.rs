//! Steps that move elements.

use crate::generate::{Maker, broadcast};
use crate::graph::{Attr, Id, Info};
use rlx_tensor::DType;

fn any(m: &mut Maker) -> Option<Id> {
    m.pick(|_| true)
}

fn axis_of(m: &mut Maker, x: Id) -> Option<usize> {
    let rank = m.info(x).rank();
    (rank > 0).then(|| m.random.below(rank))
}

/// The axis as it is written: from the front or from the end.
fn spelled(m: &mut Maker, axis: usize, rank: usize) -> i64 {
    if m.random.once_in(2) { axis as i64 } else { axis as i64 - rank as i64 }
}

pub fn reshape(m: &mut Maker) -> Option<()> {
    let x = any(m)?;
    let info = m.info(x).clone();
    if m.random.once_in(4) && info.rank() > 0 {
        let axis = m.random.below(info.rank() + 1);
        let (rows, width) = (info.dims[..axis].iter().product(), info.dims[axis..].iter().product());
        let axis = ("axis", Attr::Int(axis as i64));
        m.emit("Flatten", &[x], vec![axis], Info { dims: vec![rows, width], ..info });
        return Some(());
    }
    let mut dims = info.dims.clone();
    match m.random.below(3) {
        0 if dims.len() >= 2 => {
            let at = m.random.below(dims.len() - 1);
            let next = dims.remove(at + 1);
            dims[at] *= next;
        }
        1 if !dims.is_empty() => {
            let at = m.random.below(dims.len());
            let factor = [2, 3, 4].into_iter().find(|f| dims[at].is_multiple_of(*f)).unwrap_or(1);
            dims[at] /= factor;
            dims.insert(at + m.random.below(2), factor);
        }
        _ => dims = vec![info.count()],
    }
    let mut written: Vec<i64> = dims.iter().map(|&d| d as i64).collect();
    if m.random.once_in(2) {
        let open = m.random.below(written.len());
        written[open] = -1;
    }
    let shape = m.ints(&written);
    m.emit("Reshape", &[x, shape], Vec::new(), Info { dims, ..info });
    Some(())
}

pub fn transpose(m: &mut Maker) -> Option<()> {
    let x = m.pick(|info| info.rank() >= 2)?;
    let info = m.info(x).clone();
    let mut perm: Vec<usize> = (0..info.rank()).collect();
    for i in (1..perm.len()).rev() {
        let other = m.random.below(i + 1);
        perm.swap(i, other);
    }
    let dims = perm.iter().map(|&axis| info.dims[axis]).collect();
    let attr = Attr::Ints(perm.iter().map(|&axis| axis as i64).collect());
    m.emit("Transpose", &[x], vec![("perm", attr)], Info { dims, ..info });
    Some(())
}

pub fn slice(m: &mut Maker) -> Option<()> {
    let x = any(m)?;
    let axis = axis_of(m, x)?;
    let mut info = m.info(x).clone();
    let extent = info.dims[axis] as i64;
    let step = *m.random.pick(&[1, 1, 2, -1, -2]);
    let from = m.random.between(0, extent - 1);
    let to = if step > 0 { m.random.between(from + 1, extent + 2) } else { -extent - 1 };
    let last = if step > 0 { to.min(extent) - 1 } else { 0 };
    info.dims[axis] = ((last - from) / step + 1) as usize;
    let axis = spelled(m, axis, info.rank());
    let operands = [x, m.ints(&[from]), m.ints(&[to]), m.ints(&[axis]), m.ints(&[step])];
    m.emit("Slice", &operands, Vec::new(), info);
    Some(())
}

pub fn concat(m: &mut Maker) -> Option<()> {
    let x = any(m)?;
    let axis = axis_of(m, x)?;
    let mut info = m.info(x).clone();
    let mut parts = vec![x];
    for _ in 0..m.random.between(1, 2) {
        let (dims, dtype) = (info.dims.clone(), info.dtype);
        let fits = |i: &Info| {
            i.dtype == dtype
                && i.rank() == dims.len()
                && (0..dims.len()).all(|a| a == axis || i.dims[a] == dims[a])
        };
        let y = m.pick(fits)?;
        let other = m.info(y).clone();
        info.dims[axis] += other.dims[axis];
        info = Info {
            low: info.low.min(other.low),
            high: info.high.max(other.high),
            error: info.error.max(other.error),
            ..info
        };
        parts.push(y);
    }
    let axis = spelled(m, axis, info.rank());
    m.emit("Concat", &parts, vec![("axis", Attr::Int(axis))], info);
    Some(())
}

pub fn split(m: &mut Maker) -> Option<()> {
    let x = m.pick(|info| info.dims.iter().any(|&d| d > 1))?;
    let info = m.info(x).clone();
    let axis = (0..info.rank()).rev().find(|&axis| info.dims[axis] > 1)?;
    let first = m.random.between(1, info.dims[axis] as i64 - 1);
    let sizes = [first, info.dims[axis] as i64 - first];
    let part = |size: i64| {
        let mut dims = info.dims.clone();
        dims[axis] = size as usize;
        Info { dims, ..info.clone() }
    };
    let parts = sizes.map(part).to_vec();
    let sizes = m.ints(&sizes);
    m.emit_all("Split", &[Some(x), Some(sizes)], vec![("axis", Attr::Int(axis as i64))], parts);
    Some(())
}

pub fn gather(m: &mut Maker) -> Option<()> {
    let x = any(m)?;
    let axis = axis_of(m, x)?;
    let mut info = m.info(x).clone();
    let extent = info.dims[axis] as i64;
    let attrs = vec![("axis", Attr::Int(axis as i64))];
    if m.random.once_in(2) {
        let at = m.random.between(-extent, extent - 1);
        let index = m.constant(rlx_tensor::Tensor::scalar(at), extent as f64);
        info.dims.remove(axis);
        m.emit("Gather", &[x, index], attrs, info);
        return Some(());
    }
    let count = m.random.between(1, 5);
    let at: Vec<i64> = (0..count).map(|_| m.random.between(-extent, extent - 1)).collect();
    info.dims[axis] = at.len();
    let index = m.ints(&at);
    m.emit("Gather", &[x, index], attrs, info);
    Some(())
}

pub fn gather_elements(m: &mut Maker) -> Option<()> {
    let x = m.pick(|info| info.rank() >= 1 && info.rank() <= 3)?;
    let axis = axis_of(m, x)?;
    let mut info = m.info(x).clone();
    let extent = info.dims[axis] as i64;
    info.dims[axis] = m.random.between(1, 4) as usize;
    let at: Vec<i64> = (0..info.count()).map(|_| m.random.between(-extent, extent - 1)).collect();
    let tensor = rlx_tensor::Tensor::from_slice(&info.dims, &at).ok()?;
    let index = m.constant(tensor, extent as f64);
    m.emit("GatherElements", &[x, index], vec![("axis", Attr::Int(axis as i64))], info);
    Some(())
}

pub fn pad(m: &mut Maker) -> Option<()> {
    let x = m.pick(|info| info.dtype == DType::F32 && info.rank() >= 1)?;
    let mut info = m.info(x).clone();
    let mode = *m.random.pick(&["constant", "constant", "edge", "reflect"]);
    let most = |extent: usize| if mode == "reflect" { extent as i64 - 1 } else { 2 };
    let (mut before, mut after) = (Vec::new(), Vec::new());
    for extent in &mut info.dims {
        let room = most(*extent).clamp(0, 2);
        before.push(m.random.between(0, room));
        after.push(m.random.between(0, room));
        *extent += (before[before.len() - 1] + after[after.len() - 1]) as usize;
    }
    before.extend(after);
    let pads = m.ints(&before);
    let mut operands = vec![x, pads];
    if mode == "constant" {
        let fill = m.scalar(0.5);
        operands.push(fill);
        (info.low, info.high) = (info.low.min(0.5), info.high.max(0.5));
    }
    m.emit("Pad", &operands, vec![("mode", Attr::Text(mode))], info);
    Some(())
}

pub fn expand(m: &mut Maker) -> Option<()> {
    let x = any(m)?;
    let info = m.info(x).clone();
    let mut target: Vec<usize> = info.dims.clone();
    for extent in &mut target {
        if *extent == 1 && m.random.once_in(2) {
            *extent = m.random.between(1, 4) as usize;
        }
    }
    if m.random.once_in(2) {
        target.insert(0, m.random.between(1, 3) as usize);
    }
    let dims = broadcast(&info.dims, &target)?;
    let shape = m.ints(&target.iter().map(|&d| d as i64).collect::<Vec<_>>());
    m.emit("Expand", &[x, shape], Vec::new(), Info { dims, ..info });
    Some(())
}

pub fn tile(m: &mut Maker) -> Option<()> {
    let x = m.pick(|info| info.rank() >= 1 && info.count() <= 512)?;
    let mut info = m.info(x).clone();
    let repeats: Vec<i64> = info.dims.iter().map(|_| m.random.between(1, 2)).collect();
    info.dims.iter_mut().zip(&repeats).for_each(|(d, &r)| *d *= r as usize);
    let repeats = m.ints(&repeats);
    m.emit("Tile", &[x, repeats], Vec::new(), info);
    Some(())
}

/// Axes of extent 1 come and go.
pub fn axes_of_one(m: &mut Maker) -> Option<()> {
    let x = any(m)?;
    let mut info = m.info(x).clone();
    let one = info.dims.iter().position(|&d| d == 1);
    match one {
        Some(axis) if m.random.once_in(2) => {
            info.dims.remove(axis);
            let axes = m.ints(&[axis as i64]);
            m.emit("Squeeze", &[x, axes], Vec::new(), info);
        }
        _ => {
            let axis = m.random.below(info.rank() + 1);
            info.dims.insert(axis, 1);
            let axes = m.ints(&[axis as i64]);
            m.emit("Unsqueeze", &[x, axes], Vec::new(), info);
        }
    }
    Some(())
}

pub fn depth(m: &mut Maker) -> Option<()> {
    if m.random.once_in(2) {
        let x = m.pick(|i| i.dtype == DType::F32 && i.rank() == 4 && i.dims[1].is_multiple_of(4))?;
        let mut info = m.info(x).clone();
        info.dims = vec![info.dims[0], info.dims[1] / 4, info.dims[2] * 2, info.dims[3] * 2];
        let mode = *m.random.pick(&["DCR", "CRD"]);
        let attrs = vec![("blocksize", Attr::Int(2)), ("mode", Attr::Text(mode))];
        m.emit("DepthToSpace", &[x], attrs, info);
        return Some(());
    }
    let even = |i: &Info| i.rank() == 4 && i.dims[2].is_multiple_of(2) && i.dims[3].is_multiple_of(2);
    let x = m.pick(|i| i.dtype == DType::F32 && even(i))?;
    let mut info = m.info(x).clone();
    info.dims = vec![info.dims[0], info.dims[1] * 4, info.dims[2] / 2, info.dims[3] / 2];
    m.emit("SpaceToDepth", &[x], vec![("blocksize", Attr::Int(2))], info);
    Some(())
}

pub fn triangle(m: &mut Maker) -> Option<()> {
    let x = m.pick(|info| info.dtype == DType::F32 && info.rank() >= 2)?;
    let info = m.info(x).clone();
    let k = m.random.between(-2, 2);
    let k = m.constant(rlx_tensor::Tensor::scalar(k), 2.0);
    let upper = Attr::Int(i64::from(m.random.once_in(2)));
    let limits = Info { low: info.low.min(0.0), high: info.high.max(0.0), ..info };
    m.emit("Trilu", &[x, k], vec![("upper", upper)], limits);
    Some(())
}

/// Updates written to, or added at, places that are known or computed.
pub fn scatter(m: &mut Maker) -> Option<()> {
    let x = m.pick(|info| info.dtype == DType::F32 && (1..=3).contains(&info.rank()))?;
    let info = m.info(x).clone();
    let by_slice = m.random.once_in(2);
    let axis = if by_slice { 0 } else { axis_of(m, x)? };
    let (extent, count) = (info.dims[axis] as i64, m.random.between(1, 4) as usize);
    let mut dims = info.dims.clone();
    dims[axis] = count;
    let places = if by_slice { vec![count, 1] } else { dims.clone() };
    let reduction = *m.random.pick(&["none", "add"]);
    let mut at: Vec<i64> =
        (0..places.iter().product()).map(|_| m.random.between(-extent, extent - 1)).collect();
    if reduction == "none" {
        // Of several updates of one place any may stay.
        let stride: usize = if by_slice { 1 } else { dims[axis + 1..].iter().product() };
        let count = (count as i64).min(extent) as usize;
        dims[axis] = count;
        let places: usize = if by_slice { count } else { dims.iter().product() };
        at = (0..places).map(|i| ((i / stride) % count) as i64).collect();
    }
    let places = if by_slice { vec![dims[axis], 1] } else { dims.clone() };
    let tensor = rlx_tensor::Tensor::from_slice(&places, &at).ok()?;
    let mut index = m.constant(tensor, extent as f64);
    if m.random.once_in(3) {
        // Not known before the run.
        let zero = m.pick(|i| i.dtype == DType::I64 && i.exact() && i.rank() >= 1)?;
        let zero = m.emit("ReduceMax", &[zero], vec![("keepdims", Attr::Int(0))], whole_number());
        let zero = m.emit("Sub", &[zero, zero], Vec::new(), whole_number());
        index = m.emit("Add", &[index, zero], Vec::new(), Info { dims: places, ..whole_number() });
    }
    let updates = m.weight(&dims, 2.0);
    let most = (info.size() + 2.0 * at.len() as f64).max(2.0);
    let error = info.error + at.len() as f64 * crate::generate::EPS * most;
    let written =
        Info { low: -most, high: most, error: if reduction == "add" { error } else { info.error }, ..info };
    let mut attrs = vec![("reduction", Attr::Text(reduction))];
    if !by_slice {
        attrs.push(("axis", Attr::Int(axis as i64)));
    }
    let op = if by_slice { "ScatterND" } else { "ScatterElements" };
    m.emit(op, &[x, index, updates], attrs, written);
    Some(())
}

/// What is known of a single I64.
fn whole_number() -> Info {
    Info { dims: Vec::new(), dtype: DType::I64, low: -1e6, high: 1e6, error: 0.0 }
}
