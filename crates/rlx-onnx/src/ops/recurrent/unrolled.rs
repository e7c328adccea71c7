//! Recurrent networks as part of a region: what the steps have in common is one product, the steps follow each other.

use super::Cell;
use crate::error::{Refusal, invalid};
use crate::lower::Lowering;
use rlx_graph::ValueId;
use rlx_graph::ops::activation::{Activation, ActivationKind};
use rlx_graph::ops::binary::BinaryOp;
use rlx_graph::ops::concat::Concat;
use rlx_graph::ops::matmul::MatMul;
use rlx_graph::ops::transpose::Transpose;
use rlx_tensor::{DType, Tensor};

/// Longer sequences, directions together, are evaluated on the host: each step is some nodes of the graph.
const STEPS: usize = 512;

const X: usize = 0;
const W: usize = 1;
const R: usize = 2;
const B: usize = 3;
const LENGTHS: usize = 4;
const FIRST_H: usize = 5;
const FIRST_C: usize = 6;
const PEEPHOLES: usize = 7;

/// A layer over all of its directions.
struct Layer {
    cell: Cell,
    steps: usize,
    batch: usize,
    hidden: usize,
    directions: usize,
    backward_first: bool,
    /// `[steps, batch, inputs]`
    x: ValueId,
    clip: Option<f64>,
    linear_before_reset: bool,
    activations: Vec<ActivationKind>,
    /// `[batch, 1]` of I64
    lengths: Option<ValueId>,
}

/// One direction: its weights as the steps read them.
struct Direction<'l> {
    layer: &'l Layer,
    number: usize,
    /// `[steps, batch, gates * hidden]`: products with x, biases included that are added to them whatever the gate.
    from_x: ValueId,
    /// `[hidden, gates * hidden]`
    r: ValueId,
    /// Of a GRU that resets after the product: `[gates * hidden]`.
    r_bias: Option<ValueId>,
    /// Of a GRU that resets before the product: the rows of the candidate.
    r_candidate: Option<ValueId>,
    /// Input, output, forget: `[hidden]` each.
    peepholes: Option<[ValueId; 3]>,
}

fn activation(name: &str) -> Result<ActivationKind, Refusal> {
    match name.to_ascii_lowercase().as_str() {
        "tanh" => Ok(ActivationKind::Tanh),
        "sigmoid" => Ok(ActivationKind::Sigmoid),
        "relu" => Ok(ActivationKind::Relu),
        _ => Err(Refusal::Host),
    }
}

/// A node as part of a region. What is rare (other activations, coupled gates, other dtypes) or long is left to the host.
pub(super) fn lower(l: &mut Lowering<'_>, cell: Cell) -> Result<Vec<ValueId>, Refusal> {
    let batch_first = l.node.flag("layout", false)?;
    let layer = layer(l, cell, batch_first)?;
    let (mut ys, mut last_hs, mut last_cs) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..layer.directions {
        let direction = Direction::read(l, &layer, number)?;
        let h = first_state(l, &layer, FIRST_H, number, batch_first)?;
        let c = match cell {
            Cell::Lstm => Some(first_state(l, &layer, FIRST_C, number, batch_first)?),
            _ => None,
        };
        let (y, h, c) = direction.run(l, h, c)?;
        ys.push(y);
        last_hs.push(h);
        last_cs.extend(c);
    }
    let y = joined(l, &ys, 1)?;
    let mut results = vec![y, joined(l, &last_hs, 0)?];
    if cell == Cell::Lstm {
        results.push(joined(l, &last_cs, 0)?);
    }
    if batch_first {
        results[0] = l.add(Transpose { perm: vec![2, 0, 1, 3] }, &[y])?;
        for state in &mut results[1..] {
            *state = l.add(Transpose { perm: vec![1, 0, 2] }, &[*state])?;
        }
    }
    Ok(results)
}

fn joined(l: &mut Lowering<'_>, parts: &[ValueId], axis: usize) -> Result<ValueId, Refusal> {
    if let [only] = parts { Ok(*only) } else { l.add(Concat { axis }, parts) }
}

fn layer(l: &mut Lowering<'_>, cell: Cell, batch_first: bool) -> Result<Layer, Refusal> {
    let (x_dims, w_dims, r_dims) = (l.dims(X)?, l.dims(W)?, l.dims(R)?);
    let (&[first, second, inputs], &[directions, rows, columns], &[.., hidden]) =
        (x_dims.as_slice(), w_dims.as_slice(), r_dims.as_slice())
    else {
        return Err(Refusal::Host);
    };
    let (steps, batch) = if batch_first { (second, first) } else { (first, second) };
    let fits = rows == cell.gates() * hidden && columns == inputs && r_dims == [directions, rows, hidden];
    let sized = ![inputs, batch, hidden, steps, directions].contains(&0) && steps * directions <= STEPS;
    let float = (X..=FIRST_C)
        .filter(|&i| i != LENGTHS && l.has(i))
        .all(|i| l.dtype(i).is_ok_and(|d| d == DType::F32));
    if !fits || !sized || !float || l.node.flag("input_forget", false)? {
        return Err(Refusal::Host);
    }
    let activations = match l.node.texts_opt("activations")? {
        Some(names) => names.iter().map(|name| activation(name)).collect::<Result<Vec<_>, _>>()?,
        None => {
            let names = (0..directions).flat_map(|_| cell.activations());
            names.map(|name| activation(name)).collect::<Result<Vec<_>, _>>()?
        }
    };
    if activations.len() != directions * cell.activations().len() {
        return Err(Refusal::Host);
    }
    let mut x = l.value(X)?;
    if batch_first {
        x = l.add(Transpose { perm: vec![1, 0, 2] }, &[x])?;
    }
    let lengths = match l.optional(LENGTHS)? {
        Some(lengths) => {
            let lengths = l.cast(lengths, DType::I64)?;
            Some(l.reshape(lengths, &[batch, 1])?)
        }
        None => None,
    };
    Ok(Layer {
        cell,
        steps,
        batch,
        hidden,
        directions,
        backward_first: l.node.text("direction", "forward")? == "reverse",
        x,
        clip: super::clip_of(l.node)?,
        linear_before_reset: l.node.flag("linear_before_reset", false)?,
        activations,
        lengths,
    })
}

/// `[batch, hidden]` of a direction's first state, zeros if it is not given.
fn first_state(
    l: &mut Lowering<'_>,
    layer: &Layer,
    operand: usize,
    number: usize,
    batch_first: bool,
) -> Result<ValueId, Refusal> {
    let dims = [layer.batch, layer.hidden];
    let Some(state) = l.optional(operand)? else {
        return Ok(l.tensor(Tensor::from_slice(&dims, &vec![0f32; layer.batch * layer.hidden])?));
    };
    let part = l.expand().slice(state, usize::from(batch_first), number, 1usize)?;
    l.reshape(part, &dims)
}

/// Rows `from .. from + rows` of a direction's matrix, `[directions, all, columns]`, as columns: `[columns, rows]`.
fn columns_of(
    l: &mut Lowering<'_>,
    operand: usize,
    number: usize,
    [from, rows]: [usize; 2],
) -> Result<ValueId, Refusal> {
    let [directions, all, columns] = l.dims(operand)?[..] else { return invalid("weights must have rank 3") };
    if number >= directions || from + rows > all {
        return invalid("weights do not fit the directions and the hidden size");
    }
    let Some(known) = l.constant(operand) else {
        let whole = l.value(operand)?;
        let part = l.expand().slice(whole, 0, number, 1usize)?;
        let part = l.expand().slice(part, 1, from, rows)?;
        let part = l.reshape(part, &[rows, columns])?;
        return l.add(Transpose { perm: vec![1, 0] }, &[part]);
    };
    l.derived(operand, &format!("d{number}from{from}"), &[columns, rows], || {
        let values = known.floats()?;
        let at = |i: usize| values[(number * all + from + i % rows) * columns + i / rows] as f32;
        Ok(Tensor::from_slice(&[columns, rows], &(0..columns * rows).map(at).collect::<Vec<f32>>())?)
    })
}

/// Numbers `from .. from + len` of a direction's vector, `[directions, all]`.
fn part_of(
    l: &mut Lowering<'_>,
    operand: usize,
    number: usize,
    [from, len]: [usize; 2],
) -> Result<ValueId, Refusal> {
    let [directions, all] = l.dims(operand)?[..] else { return invalid("vectors must have rank 2") };
    if number >= directions || from + len > all {
        return invalid("vectors do not fit the directions and the hidden size");
    }
    match l.constant(operand) {
        Some(known) => {
            let values: Vec<f32> =
                known.floats()?[number * all + from..][..len].iter().map(|&v| v as f32).collect();
            Ok(l.tensor(Tensor::from_slice(&[len], &values)?))
        }
        None => {
            let whole = l.value(operand)?;
            let part = l.expand().slice(whole, 0, number, 1usize)?;
            let part = l.expand().slice(part, 1, from, len)?;
            l.reshape(part, &[len])
        }
    }
}

impl<'l> Direction<'l> {
    fn read(l: &mut Lowering<'_>, layer: &'l Layer, number: usize) -> Result<Self, Refusal> {
        let (hidden, rows) = (layer.hidden, layer.cell.gates() * layer.hidden);
        let w = columns_of(l, W, number, [0, rows])?;
        let mut from_x = l.add(MatMul::plain(), &[layer.x, w])?;
        let (after, before) = match layer.cell {
            Cell::Gru => (layer.linear_before_reset, !layer.linear_before_reset),
            _ => (false, false),
        };
        let mut r_bias = None;
        if l.has(B) {
            let mut bias = part_of(l, B, number, [0, rows])?;
            let of_h = part_of(l, B, number, [rows, rows])?;
            match after {
                true => r_bias = Some(of_h),
                false => bias = l.expand().binary(BinaryOp::Add, bias, of_h)?,
            }
            from_x = l.expand().binary(BinaryOp::Add, from_x, bias)?;
        }
        let r_rows = if before { 2 * hidden } else { rows };
        let peepholes = match layer.cell == Cell::Lstm && l.has(PEEPHOLES) {
            true => {
                let mut part = |gate: usize| part_of(l, PEEPHOLES, number, [gate * hidden, hidden]);
                Some([part(0)?, part(1)?, part(2)?])
            }
            false => None,
        };
        Ok(Self {
            layer,
            number,
            from_x,
            r: columns_of(l, R, number, [0, r_rows])?,
            r_bias,
            r_candidate: match before {
                true => Some(columns_of(l, R, number, [2 * hidden, hidden])?),
                false => None,
            },
            peepholes,
        })
    }

    /// All steps: `[steps, 1, batch, hidden]`, then the last states, `[1, batch, hidden]`.
    fn run(
        &self,
        l: &mut Lowering<'_>,
        mut h: ValueId,
        mut c: Option<ValueId>,
    ) -> Result<(ValueId, ValueId, Option<ValueId>), Refusal> {
        let Layer { steps, batch, hidden, .. } = *self.layer;
        let backward = self.layer.backward_first || self.number == 1;
        let mut outputs = vec![h; steps];
        let zero = l.expand().number(0.0, DType::F32)?;
        for step in 0..steps {
            let t = if backward { steps - 1 - step } else { step };
            let x = l.expand().slice(self.from_x, 0, t, 1usize)?;
            let x = l.reshape(x, &[batch, self.layer.cell.gates() * hidden])?;
            let (next_h, next_c) = self.step(l, x, h, c)?;
            let mut y = next_h;
            (h, c) = match self.layer.lengths {
                None => (next_h, next_c),
                Some(lengths) => {
                    let inside = l.expand().scalar(BinaryOp::Greater, lengths, t as f64)?;
                    y = l.expand().select(inside, next_h, zero)?;
                    let kept = l.expand().select(inside, next_h, h)?;
                    let kept_c = match next_c.zip(c) {
                        Some((next, before)) => Some(l.expand().select(inside, next, before)?),
                        None => None,
                    };
                    (kept, kept_c)
                }
            };
            outputs[t] = l.reshape(y, &[1, 1, batch, hidden])?;
        }
        let y = joined(l, &outputs, 0)?;
        let last_h = l.reshape(h, &[1, batch, hidden])?;
        let last_c = c.map(|c| l.reshape(c, &[1, batch, hidden])).transpose()?;
        Ok((y, last_h, last_c))
    }

    fn act(&self, l: &mut Lowering<'_>, which: usize, x: ValueId) -> Result<ValueId, Refusal> {
        let each = self.layer.cell.activations().len();
        let kind = self.layer.activations[self.number * each + which];
        l.add(Activation { kind }, &[x])
    }

    /// An activation of what a gate sums, which is clipped first.
    fn gate(&self, l: &mut Lowering<'_>, which: usize, x: ValueId) -> Result<ValueId, Refusal> {
        let mut x = x;
        if let Some(clip) = self.layer.clip {
            x = l.expand().scalar(BinaryOp::Max, x, -clip)?;
            x = l.expand().scalar(BinaryOp::Min, x, clip)?;
        }
        self.act(l, which, x)
    }

    /// Gate `gate` of `[batch, gates * hidden]`.
    fn of_gate(&self, l: &mut Lowering<'_>, all: ValueId, gate: usize) -> Result<ValueId, Refusal> {
        let hidden = self.layer.hidden;
        Ok(l.expand().slice(all, 1, gate * hidden, hidden)?)
    }

    fn step(
        &self,
        l: &mut Lowering<'_>,
        x: ValueId,
        h: ValueId,
        c: Option<ValueId>,
    ) -> Result<(ValueId, Option<ValueId>), Refusal> {
        let mut from_h = l.add(MatMul::plain(), &[h, self.r])?;
        if let Some(bias) = self.r_bias {
            from_h = l.expand().binary(BinaryOp::Add, from_h, bias)?;
        }
        match (self.layer.cell, c) {
            (Cell::Lstm, Some(c)) => self.lstm(l, x, from_h, c).map(|(h, c)| (h, Some(c))),
            (Cell::Gru, _) => self.gru(l, x, from_h, h).map(|h| (h, None)),
            _ => {
                let sum = l.expand().binary(BinaryOp::Add, from_h, x)?;
                Ok((self.gate(l, 0, sum)?, None))
            }
        }
    }

    fn lstm(
        &self,
        l: &mut Lowering<'_>,
        x: ValueId,
        from_h: ValueId,
        c: ValueId,
    ) -> Result<(ValueId, ValueId), Refusal> {
        let sums = l.expand().binary(BinaryOp::Add, from_h, x)?;
        let peep = |l: &mut Lowering<'_>, sum: ValueId, which: usize, c: ValueId| match self.peepholes {
            None => Ok(sum),
            Some(peepholes) => {
                let seen = l.expand().binary(BinaryOp::Mul, c, peepholes[which])?;
                l.expand().binary(BinaryOp::Add, sum, seen).map_err(Refusal::from)
            }
        };
        let mut gates = Vec::with_capacity(4);
        for gate in 0..4 {
            gates.push(self.of_gate(l, sums, gate)?);
        }
        let (input, forget) = (peep(l, gates[0], 0, c)?, peep(l, gates[2], 2, c)?);
        let (input, forget) = (self.gate(l, 0, input)?, self.gate(l, 0, forget)?);
        let candidate = self.gate(l, 1, gates[3])?;
        let mut e = l.expand();
        let kept = e.binary(BinaryOp::Mul, forget, c)?;
        let added = e.binary(BinaryOp::Mul, input, candidate)?;
        let next_c = e.binary(BinaryOp::Add, kept, added)?;
        let output = peep(l, gates[1], 1, next_c)?;
        let (output, shown) = (self.gate(l, 0, output)?, self.act(l, 2, next_c)?);
        Ok((l.expand().binary(BinaryOp::Mul, output, shown)?, next_c))
    }

    fn gru(&self, l: &mut Lowering<'_>, x: ValueId, from_h: ValueId, h: ValueId) -> Result<ValueId, Refusal> {
        let mut gates = Vec::with_capacity(2);
        for gate in 0..2 {
            let (a, b) = (self.of_gate(l, x, gate)?, self.of_gate(l, from_h, gate)?);
            let sum = l.expand().binary(BinaryOp::Add, a, b)?;
            gates.push(self.gate(l, 0, sum)?);
        }
        let (update, reset) = (gates[0], gates[1]);
        let from_reset = match self.r_candidate {
            Some(r) => {
                let kept = l.expand().binary(BinaryOp::Mul, reset, h)?;
                l.add(MatMul::plain(), &[kept, r])?
            }
            None => {
                let all = self.of_gate(l, from_h, 2)?;
                l.expand().binary(BinaryOp::Mul, reset, all)?
            }
        };
        let own = self.of_gate(l, x, 2)?;
        let sum = l.expand().binary(BinaryOp::Add, own, from_reset)?;
        let candidate = self.gate(l, 1, sum)?;
        // (1 - z) n + z h
        let mut e = l.expand();
        let moved = e.binary(BinaryOp::Sub, h, candidate)?;
        let moved = e.binary(BinaryOp::Mul, update, moved)?;
        Ok(e.binary(BinaryOp::Add, candidate, moved)?)
    }
}
