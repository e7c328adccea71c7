//! Recurrent networks: a step at a time, by the standard's equations.

use super::Row;
use crate::NodeDef;
use crate::error::{Refusal, invalid};
use crate::lower::Host;
use crate::value::{Value, from_floats};

mod unrolled;

type Evaluated = Result<Vec<Value>, Refusal>;

/// The rows of this family.
pub const ROWS: &[Row] = &[
    Row::both("RNN", |l| unrolled::lower(l, Cell::Rnn), |h| recurrent(h, Cell::Rnn)),
    Row::both("GRU", |l| unrolled::lower(l, Cell::Gru), |h| recurrent(h, Cell::Gru)),
    Row::both("LSTM", |l| unrolled::lower(l, Cell::Lstm), |h| recurrent(h, Cell::Lstm)),
];

#[derive(Clone, Copy, PartialEq)]
enum Cell {
    Rnn,
    Gru,
    Lstm,
}

/// The bound of what gates sum.
fn clip_of(node: &NodeDef) -> Result<Option<f64>, Refusal> {
    match node.float_opt("clip")? {
        Some(clip) if clip.is_nan() || clip < 0.0 => invalid(format!("attribute \"clip\" is {clip}")),
        clip => Ok(clip),
    }
}

impl Cell {
    fn gates(self) -> usize {
        match self {
            Cell::Rnn => 1,
            Cell::Gru => 3,
            Cell::Lstm => 4,
        }
    }

    /// Activations of one direction that a node need not name.
    fn activations(self) -> &'static [&'static str] {
        match self {
            Cell::Rnn => &["Tanh"],
            Cell::Gru => &["Sigmoid", "Tanh"],
            Cell::Lstm => &["Sigmoid", "Tanh", "Tanh"],
        }
    }
}

/// An activation with its numbers.
#[derive(Clone)]
struct Activation {
    name: String,
    alpha: f64,
    beta: f64,
}

impl Activation {
    fn new(name: &str, alpha: Option<f64>, beta: Option<f64>) -> Result<Self, Refusal> {
        let name = name.to_ascii_lowercase();
        let (a, b) = match name.as_str() {
            "leakyrelu" => (0.01, 0.0),
            "thresholdedrelu" | "elu" => (1.0, 0.0),
            "hardsigmoid" => (0.2, 0.5),
            "affine" | "scaledtanh" => (1.0, if name == "affine" { 0.0 } else { 1.0 }),
            "tanh" | "sigmoid" | "relu" | "softsign" | "softplus" => (0.0, 0.0),
            other => return invalid(format!("activation {other:?}")),
        };
        Ok(Self { name, alpha: alpha.unwrap_or(a), beta: beta.unwrap_or(b) })
    }

    fn eval(&self, x: f64) -> f64 {
        let (a, b) = (self.alpha, self.beta);
        match self.name.as_str() {
            "tanh" => x.tanh(),
            "sigmoid" => 1.0 / (1.0 + (-x).exp()),
            "relu" => x.max(0.0),
            "leakyrelu" if x < 0.0 => a * x,
            "thresholdedrelu" if x <= a => 0.0,
            "elu" if x < 0.0 => a * (x.exp() - 1.0),
            "hardsigmoid" => (a * x + b).clamp(0.0, 1.0),
            "affine" => a * x + b,
            "scaledtanh" => a * (b * x).tanh(),
            "softsign" => x / (1.0 + x.abs()),
            "softplus" => (1.0 + x.exp()).ln(),
            _ => x,
        }
    }
}

/// Sizes of a node, and its operands as numbers.
struct Layer {
    cell: Cell,
    steps: usize,
    batch: usize,
    inputs: usize,
    hidden: usize,
    directions: usize,
    clip: Option<f64>,
    linear_before_reset: bool,
    input_forget: bool,
    x: Vec<f64>,
    w: Vec<f64>,
    r: Vec<f64>,
    b: Vec<f64>,
    lens: Vec<usize>,
    first_h: Vec<f64>,
    first_c: Vec<f64>,
    peepholes: Vec<f64>,
    activations: Vec<Activation>,
}

/// A row times the transpose of some rows.
fn times(row: &[f64], matrix: &[f64]) -> Vec<f64> {
    let product = |weights: &[f64]| weights.iter().zip(row).map(|(w, x)| w * x).sum();
    matrix.chunks_exact(row.len().max(1)).map(product).collect()
}

impl Layer {
    fn read(h: &Host<'_>, cell: Cell, batch_first: bool) -> Result<Self, Refusal> {
        let (x_dims, w_dims, r_dims) = (h.dims(0)?, h.dims(1)?, h.dims(2)?);
        let (&[first, second, inputs], &[directions, rows, columns], &[.., hidden]) =
            (x_dims, w_dims, r_dims)
        else {
            return invalid("x, w and r must have rank 3");
        };
        let (steps, batch) = if batch_first { (second, first) } else { (first, second) };
        let gates = cell.gates();
        if rows != gates * hidden || columns != inputs || hidden == 0 || r_dims != [directions, rows, hidden]
        {
            return invalid(format!("weights {w_dims:?} and {r_dims:?} do not fit {x_dims:?}"));
        }
        let optional = |operand: usize, len: usize| match h.optional(operand) {
            None => Ok(vec![0.0; len]),
            Some(value) => match value.floats()? {
                found if found.len() == len => Ok(found),
                found => invalid(format!("operand {operand} has {} numbers, not {len}", found.len())),
            },
        };
        let states = directions * batch * hidden;
        let turn = |values: Vec<f64>| match batch_first {
            false => values,
            true => (0..values.len())
                .map(|i| {
                    let (d, n, j) = (i / hidden / batch, i / hidden % batch, i % hidden);
                    values[(n * directions + d) * hidden + j]
                })
                .collect(),
        };
        let mut x = h.floats(0)?;
        if batch_first {
            let own = std::mem::take(&mut x);
            let at = |i: usize| {
                let (t, n, j) = (i / inputs.max(1) / batch, i / inputs.max(1) % batch, i % inputs.max(1));
                own[(n * steps + t) * inputs + j]
            };
            x = (0..own.len()).map(at).collect();
        }
        let lens = match h.optional(4) {
            None => vec![steps; batch],
            Some(lens) => lens.ints()?.iter().map(|&n| (n.max(0) as usize).min(steps)).collect(),
        };
        if lens.len() != batch {
            return invalid(format!("{} lengths for {batch} sequences", lens.len()));
        }
        Ok(Self {
            cell,
            steps,
            batch,
            inputs,
            hidden,
            directions,
            clip: clip_of(h.node)?,
            linear_before_reset: h.node.flag("linear_before_reset", false)?,
            input_forget: h.node.flag("input_forget", false)?,
            x,
            w: h.floats(1)?,
            r: h.floats(2)?,
            b: optional(3, directions * 2 * rows)?,
            lens,
            first_h: turn(optional(5, states)?),
            first_c: if cell == Cell::Lstm { turn(optional(6, states)?) } else { Vec::new() },
            peepholes: if cell == Cell::Lstm { optional(7, directions * 3 * hidden)? } else { Vec::new() },
            activations: activations(h, cell, directions)?,
        })
    }

    fn clipped(&self, x: f64) -> f64 {
        self.clip.map_or(x, |c| x.clamp(-c, c))
    }

    fn activate(&self, direction: usize, which: usize, x: f64) -> f64 {
        let each = self.cell.activations().len();
        self.activations[direction * each + which].eval(self.clipped(x))
    }

    /// One step of one sequence: the next hidden and cell state.
    fn step(&self, direction: usize, x: &[f64], h: &[f64], c: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let (hidden, gates) = (self.hidden, self.cell.gates());
        let rows = gates * hidden;
        let w = &self.w[direction * rows * self.inputs..][..rows * self.inputs];
        let r = &self.r[direction * rows * hidden..][..rows * hidden];
        let b = &self.b[direction * 2 * rows..][..2 * rows];
        let from_x: Vec<f64> = times(x, w).iter().zip(&b[..rows]).map(|(v, b)| v + b).collect();
        let from_x = if self.inputs == 0 { b[..rows].to_vec() } else { from_x };
        let from_h: Vec<f64> = times(h, r).iter().zip(&b[rows..]).map(|(v, b)| v + b).collect();
        let act = |which: usize, v: f64| self.activate(direction, which, v);
        let gate = |g: usize, j: usize| from_x[g * hidden + j] + from_h[g * hidden + j];
        match self.cell {
            Cell::Rnn => ((0..hidden).map(|j| act(0, gate(0, j))).collect(), Vec::new()),
            Cell::Gru => {
                let z: Vec<f64> = (0..hidden).map(|j| act(0, gate(0, j))).collect();
                let reset: Vec<f64> = (0..hidden).map(|j| act(0, gate(1, j))).collect();
                let from_reset: Vec<f64> = match self.linear_before_reset {
                    true => (0..hidden).map(|j| reset[j] * from_h[2 * hidden + j]).collect(),
                    false => {
                        let kept: Vec<f64> = (0..hidden).map(|j| reset[j] * h[j]).collect();
                        let product = times(&kept, &r[2 * hidden * hidden..]);
                        product.iter().zip(&b[rows + 2 * hidden..]).map(|(v, b)| v + b).collect()
                    }
                };
                let next = (0..hidden).map(|j| {
                    let candidate = act(1, from_x[2 * hidden + j] + from_reset[j]);
                    (1.0 - z[j]) * candidate + z[j] * h[j]
                });
                (next.collect(), Vec::new())
            }
            Cell::Lstm => {
                let peep = &self.peepholes[direction * 3 * hidden..][..3 * hidden];
                let (mut next_h, mut next_c) = (Vec::with_capacity(hidden), Vec::with_capacity(hidden));
                for j in 0..hidden {
                    let input = act(0, gate(0, j) + peep[j] * c[j]);
                    let forget = match self.input_forget {
                        true => 1.0 - input,
                        false => act(0, gate(2, j) + peep[2 * hidden + j] * c[j]),
                    };
                    let cell = forget * c[j] + input * act(1, gate(3, j));
                    let output = act(0, gate(1, j) + peep[hidden + j] * cell);
                    next_c.push(cell);
                    next_h.push(output * self.activations[direction * 3 + 2].eval(cell));
                }
                (next_h, next_c)
            }
        }
    }
}

fn activations(h: &Host<'_>, cell: Cell, directions: usize) -> Result<Vec<Activation>, Refusal> {
    let given: Vec<String> = match h.node.texts_opt("activations")? {
        Some(names) => names.to_vec(),
        None => (0..directions).flat_map(|_| cell.activations()).map(|&n| n.to_owned()).collect(),
    };
    if given.len() != directions * cell.activations().len() {
        return invalid(format!("{} activations for {directions} directions", given.len()));
    }
    let alphas = h.node.floats_opt("activation_alpha")?.unwrap_or_default();
    let betas = h.node.floats_opt("activation_beta")?.unwrap_or_default();
    // Numbers stand in the order of the activations that take them.
    let (mut alphas, mut betas) = (alphas.into_iter(), betas.into_iter());
    let one = |name: &String| {
        let lower = name.to_ascii_lowercase();
        let two = ["hardsigmoid", "affine", "scaledtanh"].contains(&lower.as_str());
        let takes = two || ["leakyrelu", "thresholdedrelu", "elu"].contains(&lower.as_str());
        let alpha = if takes { alphas.next() } else { None };
        let beta = if two { betas.next() } else { None };
        Activation::new(name, alpha, beta)
    };
    given.iter().map(one).collect()
}

fn recurrent(h: &Host<'_>, cell: Cell) -> Evaluated {
    let batch_first = h.node.flag("layout", false)?;
    let layer = Layer::read(h, cell, batch_first)?;
    let Layer { steps, batch, inputs, hidden, directions, .. } = layer;
    let direction_name = h.node.text("direction", "forward")?;
    let backward = |direction: usize| direction_name == "reverse" || direction == 1;
    let (mut last_h, mut last_c) = (layer.first_h.clone(), layer.first_c.clone());
    let mut y = vec![0.0; steps * directions * batch * hidden];
    for direction in 0..directions {
        for sequence in 0..batch {
            let state = (direction * batch + sequence) * hidden;
            let mut now = last_h[state..state + hidden].to_vec();
            let mut cell_now = match cell {
                Cell::Lstm => last_c[state..state + hidden].to_vec(),
                _ => Vec::new(),
            };
            let len = layer.lens[sequence];
            for step in 0..len {
                let t = if backward(direction) { len - 1 - step } else { step };
                let x = &layer.x[(t * batch + sequence) * inputs..][..inputs];
                (now, cell_now) = layer.step(direction, x, &now, &cell_now);
                let at = ((t * directions + direction) * batch + sequence) * hidden;
                y[at..at + hidden].copy_from_slice(&now);
            }
            last_h[state..state + hidden].copy_from_slice(&now);
            if cell == Cell::Lstm {
                last_c[state..state + hidden].copy_from_slice(&cell_now);
            }
        }
    }
    let element = h.element(0)?;
    let mut results = Vec::new();
    if batch_first {
        let state = |values: &[f64]| -> Vec<f64> {
            let at = |i: usize| {
                let (n, d, j) = (i / hidden / directions, i / hidden % directions, i % hidden);
                values[(d * batch + n) * hidden + j]
            };
            (0..values.len()).map(at).collect()
        };
        let at = |i: usize| {
            let (row, j) = (i / hidden, i % hidden);
            let (n, t, d) = (row / directions / steps, row / directions % steps, row % directions);
            y[((t * directions + d) * batch + n) * hidden + j]
        };
        let turned: Vec<f64> = (0..y.len()).map(at).collect();
        results.push(from_floats(element, &[batch, steps, directions, hidden], &turned)?);
        results.push(from_floats(element, &[batch, directions, hidden], &state(&last_h))?);
        if cell == Cell::Lstm {
            results.push(from_floats(element, &[batch, directions, hidden], &state(&last_c))?);
        }
        return Ok(results);
    }
    results.push(from_floats(element, &[steps, directions, batch, hidden], &y)?);
    results.push(from_floats(element, &[directions, batch, hidden], &last_h)?);
    if cell == Cell::Lstm {
        results.push(from_floats(element, &[directions, batch, hidden], &last_c)?);
    }
    Ok(results)
}
