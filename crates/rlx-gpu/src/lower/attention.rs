//! Attention: a launch that appends the run's keys and values to the cache, if there is one, then one of the forms of [`super::flash`].

use super::whole::is_narrow;
use super::{Amount, Draft, GpuOp, LANES, LowerCx, Operand, element};
use crate::ir::{BinaryFn, Value, ViewId};
use rlx::backend::BackendError;
use rlx::plan::StepSpec;
use rlx_graph::OpDef;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::attention::{Attention, BLOCK};
use rlx_tensor::Shape;

/// Elements of a head at most: each lane keeps one in so many.
const MAX_HEAD: usize = 8 * LANES as usize;
const BLOCK_BITS: i32 = BLOCK.trailing_zeros() as i32;

/// `attention`.
pub(super) struct GpuAttention;

/// The operands of a step.
pub(super) struct Parts<'o> {
    pub op: &'o Attention,
    pub from: &'o [Operand],
}

/// Views of the cache.
pub(super) struct Cache {
    pub table: ViewId,
    pub keys: ViewId,
    pub values: ViewId,
    pub width: Amount,
    pub blocks: Amount,
}

/// Where a row's sequence lies; every value is the same in all lanes.
struct Sequence {
    number: Value,
    start: Value,
    past: Value,
}

impl GpuOp for GpuAttention {
    fn name(&self) -> &'static str {
        Attention::NAME
    }

    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        let fits = op.as_any().downcast_ref::<Attention>().is_some_and(|a| a.head_dim <= MAX_HEAD);
        fits && inputs.iter().chain(outputs).all(|s| element(s.dtype()).is_some() && !is_narrow(s.dtype()))
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<Attention>().ok_or_else(|| cx.mismatched())?.clone();
        let (from, to) = (cx.inputs(step), cx.operand(&step.outputs[0]));
        let parts = Parts { op: &op, from: &from };
        if op.cache {
            parts.append(cx)?;
        }
        parts.launch(cx, &to)
    }
}

pub(super) fn heads(operand: &Operand, heads: usize, dim: usize) -> Operand {
    operand.split_last(heads, Amount::Known(dim))
}

impl Parts<'_> {
    pub fn rows(&self) -> Amount {
        self.from[0].dims[0].clone()
    }

    /// The cache's views; `write` chooses what may be done with keys and values.
    pub fn cache(&self, d: &mut Draft<'_>, write: bool) -> Option<Cache> {
        let at = self.op.past_at()?;
        let (table, keys, values) = (&self.from[at + 1], &self.from[at + 2], &self.from[at + 3]);
        let (width, blocks) = (table.dims[1].clone(), keys.dims[0].clone());
        let table = d.read(table);
        let (keys, values) =
            if write { (d.write(keys), d.write(values)) } else { (d.read(keys), d.read(values)) };
        Some(Cache { table, keys, values, width, blocks })
    }

    /// The sequence of a row, found among the starts.
    fn sequence(&self, cx: &mut LowerCx<'_>, d: &mut Draft<'_>, row: Value, inside: Value) -> Sequence {
        let starts = d.read(&self.from[3]);
        let count = d.size(&self.from[3].dims[0]);
        let (zero, one) = (d.b.int(0), d.b.int(1));
        let end = d.b.arg(count);
        let found = d.repeat([zero, end], 1, &[zero, zero], |d, at, carried| {
            let start = d.b.load(starts, &[at], None);
            let begun = d.b.binary(BinaryFn::LessEqual, start, row);
            let next = d.b.add(carried[0], one);
            let number = d.b.select(begun, next, carried[0]);
            let latest = d.b.binary(BinaryFn::Max, carried[1], start);
            vec![number, d.b.select(begun, latest, carried[1])]
        });
        let limit = d.b.arg(count);
        let some = d.b.less(zero, found[0]);
        let known = d.b.less(found[0], limit);
        let holds = d.b.and(some, known);
        let slot = cx.guard(d, "sequence starts do not cover every row");
        d.b.check(holds, inside, slot);
        let number = d.b.sub(found[0], one);
        let past = match self.op.past_at() {
            Some(at) => {
                let past = d.read(&self.from[at]);
                let extent = d.size(&self.from[at].dims[0]);
                let there = d.b.within(number, extent);
                let value = d.b.load(past, &[number], Some(there));
                let valid = d.b.binary(BinaryFn::LessEqual, zero, value);
                let slot = cx.guard(d, "a past length is below 0");
                d.b.check(valid, inside, slot);
                value
            }
            None => zero,
        };
        Sequence { number, start: found[1], past }
    }

    /// The block of a position, and whether the cache has it.
    pub fn block(
        &self,
        d: &mut Draft<'_>,
        cache: &Cache,
        sequence: Value,
        position: Value,
    ) -> (Value, Value) {
        let at = self.op.past_at().unwrap_or_default();
        let (width, blocks) = (d.size(&cache.width), d.size(&cache.blocks));
        let sequences = d.size(&self.from[at + 1].dims[0]);
        let bits = d.b.int(BLOCK_BITS);
        let entry = d.b.binary(BinaryFn::ShiftRight, position, bits);
        let (row, column) = (d.b.within(sequence, sequences), d.b.within(entry, width));
        let mask = d.b.and(row, column);
        let block = d.b.load(cache.table, &[sequence, entry], Some(mask));
        let there = d.b.within(block, blocks);
        (block, d.b.and(mask, there))
    }

    /// Writes the run's keys and values behind the past: a lane an element.
    fn append(&self, cx: &mut LowerCx<'_>) -> Result<(), BackendError> {
        let op = self.op;
        let mut d = cx.draft("attention_append");
        let k = heads(&self.from[1], op.kv_heads, op.head_dim);
        let v = heads(&self.from[2], op.kv_heads, op.head_dim);
        let linear = d.linear();
        let (at, inside) = d.coordinates(linear, &k.dims);
        let row = at[0];
        let sequence = self.sequence(cx, &mut d, row, inside);
        let behind = d.b.sub(row, sequence.start);
        let position = d.b.add(sequence.past, behind);
        let Some(cache) = self.cache(&mut d, true) else { return Err(cx.mismatched()) };
        let (block, there) = self.block(&mut d, &cache, sequence.number, position);
        let slot = cx.guard(&mut d, "the block table has no room for the run's positions");
        d.b.check(there, inside, slot);
        let mask = d.b.and(inside, there);
        let low = d.b.int(BLOCK as i32 - 1);
        let within = d.b.binary(BinaryFn::And, position, low);
        let dtype = self.from[op.past_at().unwrap_or_default() + 2].dtype;
        let (keys, values) = (d.read(&k), d.read(&v));
        let key = d.b.load(keys, &at, Some(inside));
        let key = d.rounded(dtype, key);
        d.b.store(cache.keys, &[block, at[1], at[2], within], key, Some(mask));
        let value = d.b.load(values, &at, Some(inside));
        let value = d.rounded(dtype, value);
        d.b.store(cache.values, &[block, at[1], within, at[2]], value, Some(mask));
        cx.launch(d, Amount::product(&k.dims).ceil_div(LANES as usize))
    }
}
