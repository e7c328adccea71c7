//! Random valid models. Every value keeps bounds of its numbers and of the rounding of whoever computes it: ops that jump (comparisons,
//! rounding, positions of extremes) are applied to values only that all engines give to the bit.

use crate::graph::{Attr, Id, Info, Model, Node};
use crate::random::Random;
use crate::{coded, control, layers, motifs, movement};
use rlx_tensor::{DType, Tensor};

/// Relative rounding of one operation, with room for another order.
pub const EPS: f64 = 2.4e-7;
/// Absolute error of transcendental functions near 1.
pub const FUNCTION: f64 = 2e-6;
/// Values with more elements are not used further.
const MOST: usize = 4096;

/// Writes a model.
pub struct Maker {
    pub random: Random,
    pub model: Model,
    usable: Vec<Id>,
}

type Step = fn(&mut Maker) -> Option<()>;

/// What is added, each with its weight.
const STEPS: &[(usize, Step)] = &[
    (4, unary),
    (4, binary),
    (1, choose),
    (1, compare),
    (1, jumps),
    (1, whole_numbers),
    (1, casts),
    (1, clip),
    (2, movement::reshape),
    (2, movement::transpose),
    (1, movement::slice),
    (1, movement::concat),
    (1, movement::split),
    (1, movement::gather),
    (1, movement::pad),
    (1, movement::expand),
    (1, movement::tile),
    (1, movement::axes_of_one),
    (1, movement::depth),
    (1, movement::triangle),
    (1, movement::gather_elements),
    (2, layers::reduce),
    (1, layers::running_sum),
    (1, layers::softmax),
    (2, layers::matmul),
    (1, layers::gemm),
    (2, layers::conv),
    (1, layers::pool),
    (1, layers::batch_norm),
    (1, layers::layer_norm),
    (1, layers::resize),
    (1, layers::extremes),
    (1, motifs::attention),
    (1, motifs::gelu),
    (1, motifs::gated),
    (1, motifs::written_norm),
    (1, motifs::residual_block),
    (1, motifs::linear),
    (1, coded::quantise),
    (1, coded::product),
    (1, coded::convolution),
    (1, layers::conv_transpose),
    (1, layers::recurrent),
    (1, movement::scatter),
    (1, control::branch),
    (1, control::repeated),
    (1, control::kept),
];

impl Maker {
    /// The model of a seed.
    pub fn model(seed: u64) -> Model {
        let mut maker = Maker { random: Random::of(seed), model: Model::default(), usable: Vec::new() };
        for _ in 0..maker.random.between(1, 3) {
            let rank = *maker.random.pick(&[1, 2, 2, 3, 3, 4, 4]);
            let dims = maker.dims(rank);
            maker.input(dims, DType::F32);
        }
        if maker.random.once_in(3) {
            let dims = maker.dims(2);
            maker.input(dims, DType::I64);
        }
        let total: usize = STEPS.iter().map(|(weight, _)| weight).sum();
        let wanted = maker.random.between(3, 24) as usize;
        for _ in 0..wanted * 3 {
            if maker.model.nodes.len() >= wanted {
                break;
            }
            let mut at = maker.random.below(total);
            let step = STEPS.iter().find(|(weight, _)| {
                let here = at < *weight;
                at = at.wrapping_sub(*weight);
                here
            });
            if let Some((_, step)) = step {
                step(&mut maker);
            }
        }
        maker.finish()
    }

    /// What nothing reads is an output, sometimes a value within, sometimes every value.
    fn finish(mut self) -> Model {
        let read: Vec<Id> = self.model.nodes.iter().flat_map(Node::reads).collect();
        let made: Vec<Id> = self.model.nodes.iter().flat_map(|n| n.outputs.iter().copied()).collect();
        let every = self.random.once_in(8);
        for id in made {
            let inner = read.contains(&id);
            if !inner || every || self.random.once_in(12) {
                self.model.outputs.push(id);
            }
        }
        self.model.prune();
        self.model
    }

    /// Small extents, one of them now and then larger.
    pub fn dims(&mut self, rank: usize) -> Vec<usize> {
        let large = self.random.below(rank * 3);
        (0..rank)
            .map(|axis| match axis == large {
                true => *self.random.pick(&[9, 16, 17, 33]),
                false => self.random.between(1, 6) as usize,
            })
            .collect()
    }

    fn input(&mut self, dims: Vec<usize>, dtype: DType) -> Id {
        let (tensor, bound) = self.numbers(&dims, dtype, 4.0);
        let id = self.value(Info { dims, dtype, low: -bound, high: bound, error: 0.0 });
        self.model.inputs.push((id, tensor));
        id
    }

    /// Numbers that every engine reads the same, up to a bound: multiples of a sixteenth of it.
    fn numbers(&mut self, dims: &[usize], dtype: DType, bound: f64) -> (Tensor, f64) {
        let count = dims.iter().product();
        let whole: Vec<i64> = (0..count).map(|_| self.random.between(-16, 16)).collect();
        let tensor = match dtype {
            DType::I64 => Tensor::from_slice(dims, &whole),
            _ => {
                let floats: Vec<f32> = whole.iter().map(|&v| (v as f64 * bound / 16.0) as f32).collect();
                Tensor::from_slice(dims, &floats)
            }
        };
        let bound = if dtype == DType::I64 { 16.0 } else { bound };
        (tensor.unwrap_or_else(|_| Tensor::scalar(0f32)), bound)
    }

    /// A new value that later steps may use.
    pub fn value(&mut self, info: Info) -> Id {
        let usable = info.count() <= MOST && info.count() > 0 && info.size() < 1e4;
        let usable = usable && info.error <= 1e-3 * info.size().max(1.0);
        self.model.values.push(info);
        let id = self.model.values.len() - 1;
        if usable {
            self.usable.push(id);
        }
        id
    }

    /// A constant of floats up to a bound.
    pub fn weight(&mut self, dims: &[usize], bound: f64) -> Id {
        let (tensor, _) = self.numbers(dims, DType::F32, bound);
        self.constant(tensor, bound)
    }

    /// A constant with numbers of `low ..= high`.
    pub fn positive(&mut self, dims: &[usize], low: f64, high: f64) -> Id {
        let count: usize = dims.iter().product();
        let step = |v: usize| (low + (high - low) * v as f64 / 8.0) as f32;
        let values: Vec<f32> = (0..count).map(|_| step(self.random.below(9))).collect();
        let tensor = Tensor::from_slice(dims, &values).unwrap_or_else(|_| Tensor::scalar(0f32));
        let id = self.constant(tensor, high);
        self.model.values[id].low = low;
        id
    }

    /// A scalar constant.
    pub fn scalar(&mut self, value: f64) -> Id {
        self.constant(Tensor::scalar(value as f32), value.abs())
    }

    /// A constant vector of I64.
    pub fn ints(&mut self, values: &[i64]) -> Id {
        let bound = values.iter().map(|v| v.unsigned_abs()).max().unwrap_or(0) as f64;
        let tensor = Tensor::from_slice(&[values.len()], values).unwrap_or_else(|_| Tensor::scalar(0i64));
        self.constant(tensor, bound)
    }

    /// A constant of codes of eight bits.
    pub fn codes(&mut self, dims: &[usize], dtype: DType) -> Id {
        let count = dims.iter().product();
        let tensor = match dtype {
            DType::I8 => {
                let codes: Vec<i8> = (0..count).map(|_| self.random.between(-128, 127) as i8).collect();
                Tensor::from_slice(dims, &codes)
            }
            _ => {
                let codes: Vec<u8> = (0..count).map(|_| self.random.between(0, 255) as u8).collect();
                Tensor::from_slice(dims, &codes)
            }
        };
        self.constant(tensor.unwrap_or_else(|_| Tensor::scalar(0u8)), 255.0)
    }

    /// A constant, which steps do not pick by chance.
    pub fn constant(&mut self, tensor: Tensor, bound: f64) -> Id {
        let (dims, dtype) = (tensor.dims().to_vec(), tensor.dtype());
        self.model.values.push(Info { dims, dtype, low: -bound, high: bound, error: 0.0 });
        let id = self.model.values.len() - 1;
        self.model.constants.push((id, tensor));
        id
    }

    /// A value that steps may use.
    pub fn pick(&mut self, fits: impl Fn(&Info) -> bool) -> Option<Id> {
        let fitting: Vec<Id> =
            self.usable.iter().copied().filter(|&id| fits(&self.model.values[id])).collect();
        if fitting.is_empty() {
            return None;
        }
        // The newest half of the time, so that chains become long.
        let from = if self.random.once_in(2) { fitting.len().saturating_sub(3) } else { 0 };
        Some(*self.random.pick(&fitting[from..]))
    }

    pub fn floats(&mut self) -> Option<Id> {
        self.pick(|info| info.dtype == DType::F32)
    }

    pub fn info(&self, id: Id) -> &Info {
        &self.model.values[id]
    }

    /// A node with one result.
    pub fn emit(
        &mut self,
        op: &'static str,
        inputs: &[Id],
        attrs: Vec<(&'static str, Attr)>,
        info: Info,
    ) -> Id {
        self.emit_all(op, &inputs.iter().map(|&id| Some(id)).collect::<Vec<_>>(), attrs, vec![info])[0]
    }

    /// A node.
    pub fn emit_all(
        &mut self,
        op: &'static str,
        inputs: &[Option<Id>],
        attrs: Vec<(&'static str, Attr)>,
        infos: Vec<Info>,
    ) -> Vec<Id> {
        let outputs: Vec<Id> = infos.into_iter().map(|info| self.value(info)).collect();
        self.model.nodes.push(Node { op, inputs: inputs.to_vec(), outputs: outputs.clone(), attrs });
        outputs
    }

    /// An elementwise function with its bounds: range of results and how much it stretches differences.
    pub fn function(
        &mut self,
        op: &'static str,
        x: Id,
        attrs: Vec<(&'static str, Attr)>,
        range: (f64, f64),
        stretch: f64,
    ) -> Id {
        let info = self.info(x).clone();
        let error = info.error * stretch + FUNCTION + EPS * range.0.abs().max(range.1.abs());
        self.emit(op, &[x], attrs, Info { low: range.0, high: range.1, error, ..info })
    }

    /// `a op b` for one of Add, Sub, Mul, Min, Max; dims must broadcast.
    pub fn arithmetic(&mut self, op: &'static str, a: Id, b: Id) -> Option<Id> {
        let (x, y) = (self.info(a).clone(), self.info(b).clone());
        let dims = broadcast(&x.dims, &y.dims)?;
        let products = [x.low * y.low, x.low * y.high, x.high * y.low, x.high * y.high];
        let (low, high) = match op {
            "Add" => (x.low + y.low, x.high + y.high),
            "Sub" => (x.low - y.high, x.high - y.low),
            "Min" => (x.low.min(y.low), x.high.min(y.high)),
            "Max" => (x.low.max(y.low), x.high.max(y.high)),
            _ => products.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), &p| (l.min(p), h.max(p))),
        };
        let size = low.abs().max(high.abs());
        let whole = x.dtype != DType::F32;
        let error = match op {
            _ if whole => 0.0,
            "Min" | "Max" => x.error.max(y.error),
            "Mul" => x.size() * y.error + y.size() * x.error + x.error * y.error + EPS * size,
            _ => x.error + y.error + EPS * size,
        };
        Some(self.emit(op, &[a, b], Vec::new(), Info { dims, dtype: x.dtype, low, high, error }))
    }
}

/// Dims that two shapes broadcast to.
pub fn broadcast(a: &[usize], b: &[usize]) -> Option<Vec<usize>> {
    let rank = a.len().max(b.len());
    let at = |dims: &[usize], i: usize| if i + dims.len() < rank { 1 } else { dims[i + dims.len() - rank] };
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (x, y) if x == y => Some(x),
            (1, y) => Some(y),
            (x, 1) => Some(x),
            _ => None,
        })
        .collect()
}

fn unary(m: &mut Maker) -> Option<()> {
    let x = m.floats()?;
    let Info { low, high, error, .. } = m.info(x).clone();
    let size = low.abs().max(high.abs());
    match m.random.below(16) {
        0 => m.emit("Neg", &[x], Vec::new(), Info { low: -high, high: -low, ..m.info(x).clone() }),
        1 => m.emit("Abs", &[x], Vec::new(), Info { low: 0.0, high: size, ..m.info(x).clone() }),
        2 => m.emit(
            "Relu",
            &[x],
            Vec::new(),
            Info { low: low.max(0.0), high: high.max(0.0), ..m.info(x).clone() },
        ),
        3 => m.function(
            "LeakyRelu",
            x,
            vec![("alpha", Attr::Float(0.125))],
            (low.min(0.0), high.max(0.0)),
            1.0,
        ),
        4 => m.function("Tanh", x, Vec::new(), (-1.0, 1.0), 1.0),
        5 => m.function("Sigmoid", x, Vec::new(), (0.0, 1.0), 0.25),
        6 => m.function("Erf", x, Vec::new(), (-1.0, 1.0), 1.13),
        7 if high < 4.0 => m.function("Exp", x, Vec::new(), (0.0, high.exp()), high.exp()),
        8 if low - error > 0.2 => m.function("Log", x, Vec::new(), (low.ln(), high.ln()), 5.0),
        9 if low - error > 0.2 => m.function("Sqrt", x, Vec::new(), (0.0, high.sqrt()), 1.2),
        10 if low - error > 0.2 => m.function("Reciprocal", x, Vec::new(), (1.0 / high, 1.0 / low), 25.0),
        11 if size < 32.0 => {
            let op = *m.random.pick(&["Sin", "Cos"]);
            m.function(op, x, Vec::new(), (-1.0, 1.0), 1.0)
        }
        12 => m.function("Softplus", x, Vec::new(), (0.0, high.max(0.0) + 0.7), 1.0),
        13 => m.function(
            "HardSigmoid",
            x,
            vec![("alpha", Attr::Float(0.25)), ("beta", Attr::Float(0.5))],
            (0.0, 1.0),
            0.25,
        ),
        14 => m.function("HardSwish", x, Vec::new(), (-0.4, high.max(0.0)), 1.5),
        15 => {
            let approximate = if m.random.once_in(2) { "tanh" } else { "none" };
            m.function("Gelu", x, vec![("approximate", Attr::Text(approximate))], (-0.2, high.max(0.0)), 1.2)
        }
        _ => m.function("Elu", x, vec![("alpha", Attr::Float(0.5))], (-0.5, high.max(0.0)), 1.0),
    };
    Some(())
}

fn binary(m: &mut Maker) -> Option<()> {
    let a = m.floats()?;
    let dims = m.info(a).dims.clone();
    let other = m.pick(|info| info.dtype == DType::F32 && broadcast(&info.dims, &dims).is_some());
    let b = match m.random.below(4) {
        0 => {
            let rank = m.random.below(dims.len() + 1);
            let kept = dims[dims.len() - rank..].to_vec();
            let kept: Vec<usize> = kept.iter().map(|&d| if m.random.once_in(3) { 1 } else { d }).collect();
            m.weight(&kept, 2.0)
        }
        1 => {
            let value = *m.random.pick(&[0.0, 1.0, 0.5, 2.0, -1.0, 3.0, 6.0, 0.25]);
            m.scalar(value)
        }
        _ => other?,
    };
    if m.random.once_in(8) {
        let divisor = m.positive(&dims[dims.len().saturating_sub(1)..], 0.5, 4.0);
        let x = m.info(a).clone();
        let (error, high) = (2.0 * x.error + EPS * 2.0 * x.size(), 2.0 * x.size());
        m.emit("Div", &[a, divisor], Vec::new(), Info { low: -high, high, error, ..x });
        return Some(());
    }
    let op = *m.random.pick(&["Add", "Add", "Sub", "Mul", "Mul", "Min", "Max"]);
    let (a, b) = if m.random.once_in(2) { (a, b) } else { (b, a) };
    m.arithmetic(op, a, b).map(drop)
}

fn clip(m: &mut Maker) -> Option<()> {
    let x = m.floats()?;
    let info = m.info(x).clone();
    let (from, to) = *m.random.pick(&[(0.0, 6.0), (-1.0, 1.0), (0.0, 1.0), (-0.5, 2.0)]);
    let (least, most) = (m.scalar(from), m.scalar(to));
    let limits = Info { low: info.low.clamp(from, to), high: info.high.clamp(from, to), ..info };
    m.emit("Clip", &[x, least, most], Vec::new(), limits);
    Some(())
}

/// Comparisons of values that are the same for all.
fn compare(m: &mut Maker) -> Option<()> {
    let a = m.pick(|info| info.exact() && info.dtype != DType::Bool)?;
    let (dims, dtype) = (m.info(a).dims.clone(), m.info(a).dtype);
    let b = m.pick(|i| i.exact() && i.dtype == dtype && broadcast(&i.dims, &dims).is_some())?;
    let dims = broadcast(&dims, &m.info(b).dims)?;
    let op = *m.random.pick(&["Greater", "Less", "Equal", "GreaterOrEqual", "LessOrEqual"]);
    let truth = Info { dims, dtype: DType::Bool, low: 0.0, high: 1.0, error: 0.0 };
    let result = m.emit(op, &[a, b], Vec::new(), truth.clone());
    if m.random.once_in(2) {
        let other = m.pick(|i| i.dtype == DType::Bool && broadcast(&i.dims, &truth.dims).is_some())?;
        let dims = broadcast(&truth.dims, &m.info(other).dims)?;
        let op = *m.random.pick(&["And", "Or", "Xor"]);
        m.emit(op, &[result, other], Vec::new(), Info { dims, ..truth });
    } else if m.random.once_in(2) {
        m.emit("Not", &[result], Vec::new(), truth);
    }
    Some(())
}

fn choose(m: &mut Maker) -> Option<()> {
    let by = m.pick(|info| info.dtype == DType::Bool)?;
    let dims = m.info(by).dims.clone();
    let a = m.pick(|i| i.dtype == DType::F32 && broadcast(&i.dims, &dims).is_some())?;
    let both = broadcast(&dims, &m.info(a).dims)?;
    let b = m.pick(|i| i.dtype == DType::F32 && broadcast(&i.dims, &both).is_some())?;
    let dims = broadcast(&both, &m.info(b).dims)?;
    let (x, y) = (m.info(a).clone(), m.info(b).clone());
    let error = x.error.max(y.error);
    let (low, high) = (x.low.min(y.low), x.high.max(y.high));
    m.emit("Where", &[by, a, b], Vec::new(), Info { dims, dtype: DType::F32, low, high, error });
    Some(())
}

/// Functions that jump.
fn jumps(m: &mut Maker) -> Option<()> {
    let x = m.pick(|info| info.dtype == DType::F32 && info.exact())?;
    let info = m.info(x).clone();
    let op = *m.random.pick(&["Floor", "Ceil", "Round", "Sign"]);
    let (low, high) = if op == "Sign" { (-1.0, 1.0) } else { (info.low.floor(), info.high.ceil()) };
    m.emit(op, &[x], Vec::new(), Info { low, high, ..info });
    Some(())
}

fn whole_numbers(m: &mut Maker) -> Option<()> {
    let a = m.pick(|info| info.dtype == DType::I64 && info.size() < 1e3)?;
    let dims = m.info(a).dims.clone();
    if m.random.once_in(3) {
        let by = m.random.between(2, 5);
        let divisor = m.constant(Tensor::scalar(by), by as f64);
        let info = m.info(a).clone();
        let op = if m.random.once_in(2) { "Div" } else { "Mod" };
        let low = if op == "Mod" { -(by as f64) } else { info.low };
        m.emit(op, &[a, divisor], Vec::new(), Info { low, high: info.high.max(by as f64), ..info });
        return Some(());
    }
    let b = m.pick(|i| i.dtype == DType::I64 && broadcast(&i.dims, &dims).is_some())?;
    let op = *m.random.pick(&["Add", "Sub", "Mul", "Min", "Max"]);
    m.arithmetic(op, a, b).map(drop)
}

fn casts(m: &mut Maker) -> Option<()> {
    let x = m.pick(|info| info.exact() && info.size() < 1e4)?;
    let info = m.info(x).clone();
    let (dtype, code) = match info.dtype {
        DType::F32 => (DType::I64, 7),
        _ => (DType::F32, 1),
    };
    let (low, high) = (info.low.trunc(), info.high.trunc());
    m.emit("Cast", &[x], vec![("to", Attr::Int(code))], Info { dtype, low, high, ..info });
    Some(())
}
