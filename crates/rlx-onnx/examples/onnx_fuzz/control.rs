//! Graphs within graphs, and extents that data decides.

use crate::generate::{EPS, Maker};
use crate::graph::{Attr, Body, Id, Info, Node};
use rlx_tensor::{DType, Tensor};

fn truth(dims: Vec<usize>) -> Info {
    Info { dims, dtype: DType::Bool, low: 0.0, high: 1.0, error: 0.0 }
}

/// A value that only a graph within has.
fn inner(m: &mut Maker, info: Info) -> Id {
    m.model.values.push(info);
    m.model.values.len() - 1
}

fn node(op: &'static str, inputs: &[Id], output: Id) -> Node {
    Node { op, inputs: inputs.iter().map(|&id| Some(id)).collect(), outputs: vec![output], attrs: Vec::new() }
}

/// Whether the largest element along all axes but the kept one is above a number, of values that are the same for all.
fn above(m: &mut Maker, x: Id, kept: Option<usize>) -> Id {
    let info = m.info(x).clone();
    let axes: Vec<i64> = (0..info.rank()).filter(|&a| Some(a) != kept).map(|a| a as i64).collect();
    let dims: Vec<usize> = kept.iter().map(|&axis| info.dims[axis]).collect();
    let mut most = x;
    if !axes.is_empty() {
        let axes = m.ints(&axes);
        let keep = vec![("keepdims", Attr::Int(0))];
        most = m.emit("ReduceMax", &[x, axes], keep, Info { dims: dims.clone(), ..info.clone() });
    }
    let limit = info.low + (info.high - info.low) * m.random.below(8) as f64 / 8.0;
    let limit = m.scalar(limit);
    m.emit("Greater", &[most, limit], Vec::new(), truth(dims))
}

fn exact(m: &mut Maker) -> Option<Id> {
    m.pick(|i| i.dtype == DType::F32 && i.exact() && i.rank() >= 1)
}

/// One of two graphs.
pub fn branch(m: &mut Maker) -> Option<()> {
    let (x, by) = (m.floats()?, exact(m)?);
    let by = above(m, by, None);
    let info = m.info(x).clone();
    let (c, d) = (m.scalar(1.5), m.scalar(0.5));
    let (sum, scaled) = (inner(m, info.clone()), inner(m, info.clone()));
    let then = Body { inputs: Vec::new(), nodes: vec![node("Add", &[x, c], sum)], outputs: vec![sum] };
    let otherwise =
        Body { inputs: Vec::new(), nodes: vec![node("Mul", &[x, d], scaled)], outputs: vec![scaled] };
    let size = info.size() + 1.5;
    let attrs = vec![("then_branch", Attr::Graph(then)), ("else_branch", Attr::Graph(otherwise))];
    m.emit("If", &[by], attrs, Info { low: -size, high: size, error: info.error + EPS * size, ..info });
    Some(())
}

/// A graph that runs some times over, with its results behind each other.
pub fn repeated(m: &mut Maker) -> Option<()> {
    let x = m.pick(|i| i.dtype == DType::F32 && i.rank() <= 3 && i.count() <= 512)?;
    let info = m.info(x).clone();
    let times = m.random.between(1, 4);
    let turns = m.constant(Tensor::scalar(times), 4.0);
    let half = m.scalar(0.5);
    let more = m.weight(&info.dims[info.rank().min(1)..], 2.0);
    let size = info.size().max(4.0);
    let next = Info { low: -size, high: size, error: info.error + 4.0 * EPS * size, ..info.clone() };
    let whole = Info { dims: Vec::new(), dtype: DType::I64, low: 0.0, high: 4.0, error: 0.0 };
    let (turn, go, state) = (inner(m, whole), inner(m, truth(Vec::new())), inner(m, next.clone()));
    let (halved, after, goes) = (inner(m, next.clone()), inner(m, next.clone()), inner(m, truth(Vec::new())));
    let nodes = vec![
        node("Mul", &[state, half], halved),
        node("Add", &[halved, more], after),
        node("Identity", &[go], goes),
    ];
    let collected = m.random.once_in(2);
    let mut outputs = vec![goes, after];
    let mut results = vec![next.clone()];
    if collected {
        outputs.push(halved);
        results.push(Info { dims: [&[times as usize][..], &info.dims].concat(), ..next });
    }
    let body = Body { inputs: vec![turn, go, state], nodes, outputs };
    m.emit_all("Loop", &[Some(turns), None, Some(x)], vec![("body", Attr::Graph(body))], results);
    Some(())
}

/// Slices that a condition keeps: how many there are, only a run tells. Their sum has known extents again.
pub fn kept(m: &mut Maker) -> Option<()> {
    let x = exact(m)?;
    let info = m.info(x).clone();
    let axis = m.random.below(info.rank());
    let keep = above(m, x, Some(axis));
    // Its extents are not known here, so that nothing else may use it.
    let open = Info { error: f64::MAX, ..info.clone() };
    let slices = m.emit("Compress", &[x, keep], vec![("axis", Attr::Int(axis as i64))], open);
    let n = info.dims[axis] as f64;
    let size = n * info.size();
    let mut dims = info.dims.clone();
    dims[axis] = 1;
    let axes = m.ints(&[axis as i64]);
    let sum = Info { dims, dtype: DType::F32, low: -size, high: size, error: (n + 4.0) * EPS * size };
    m.emit("ReduceSum", &[slices, axes], Vec::new(), sum);
    Some(())
}
