//! Attention: a launch that appends the run's keys and values to the cache, if there is one, then one of the forms of [`super::flash`].

use super::cache::{encode, in_words};
use super::whole::is_narrow;
use super::{Amount, Draft, GpuOp, LANES, LowerCx, Operand, element};
use crate::ir::{BinaryFn, Value, ViewId};
use rlx::backend::BackendError;
use rlx::plan::StepSpec;
use rlx_graph::OpDef;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::attention::{Attention, BLOCK};
use rlx_tensor::quant::CACHE_GROUP;
use rlx_tensor::{DType, Shape};

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
        let Some(op) = op.as_any().downcast_ref::<Attention>() else { return false };
        let caches = op.past_at().map_or(inputs.len(), |past| past + 2);
        let (inputs, caches) = inputs.split_at(caches.min(inputs.len()));
        let held = |s: &&Shape| element(s.dtype()).is_some() && !is_narrow(s.dtype());
        op.head_dim <= MAX_HEAD
            && inputs.iter().chain(outputs).all(held)
            && caches.iter().all(|s| held(s) || s.dtype() == DType::U8)
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<Attention>().ok_or_else(|| cx.mismatched())?.clone();
        let (from, to) = (cx.inputs(step), cx.operand(&step.outputs[0]));
        let parts = Parts { op: &op, from: &from };
        match parts.is_quantised() {
            true => parts.append_integers(cx)?,
            false if op.cache => parts.append(cx)?,
            false => {}
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

    /// Whether the cache is of 8-bit integers.
    pub fn is_quantised(&self) -> bool {
        self.op.past_at().is_some_and(|at| self.from[at + 2].dtype == DType::U8)
    }

    /// The cache's views; `write` chooses what may be done with keys and values.
    pub fn cache(&self, d: &mut Draft<'_>, write: bool) -> Option<Cache> {
        let at = self.op.past_at()?;
        let (table, keys, values) = (&self.from[at + 1], &self.from[at + 2], &self.from[at + 3]);
        let (width, blocks) = (table.dims[1].clone(), keys.dims[0].clone());
        let table = d.read(table);
        let (dim, quantised) = (self.op.head_dim, self.is_quantised());
        let [keys, values] = [(keys, true), (values, false)].map(|(cache, of_keys)| {
            let cache = if quantised { in_words(cache, dim, of_keys) } else { cache.clone() };
            if write { d.write(&cache) } else { d.read(&cache) }
        });
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

    /// Where the cache has the row of a run: sequences' block, head and place in the block, and whether it has one.
    fn behind_past(
        &self,
        cx: &mut LowerCx<'_>,
        d: &mut Draft<'_>,
        cache: &Cache,
        row: Value,
        inside: Value,
    ) -> ([Value; 2], Value) {
        let sequence = self.sequence(cx, d, row, inside);
        let behind = d.b.sub(row, sequence.start);
        let position = d.b.add(sequence.past, behind);
        let (block, there) = self.block(d, cache, sequence.number, position);
        let slot = cx.guard(d, "the block table has no room for the run's positions");
        d.b.check(there, inside, slot);
        let low = d.b.int(BLOCK as i32 - 1);
        let within = d.b.binary(BinaryFn::And, position, low);
        ([block, within], d.b.and(inside, there))
    }

    /// Writes the run's keys and values behind the past: a lane an element.
    fn append(&self, cx: &mut LowerCx<'_>) -> Result<(), BackendError> {
        let op = self.op;
        let mut d = cx.draft("attention_append");
        let k = heads(&self.from[1], op.kv_heads, op.head_dim);
        let v = heads(&self.from[2], op.kv_heads, op.head_dim);
        let linear = d.linear();
        let (at, inside) = d.coordinates(linear, &k.dims);
        let Some(cache) = self.cache(&mut d, true) else { return Err(cx.mismatched()) };
        let ([block, within], mask) = self.behind_past(cx, &mut d, &cache, at[0], inside);
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

    /// As [`Parts::append`], of a cache of integers: a lane a group of elements.
    fn append_integers(&self, cx: &mut LowerCx<'_>) -> Result<(), BackendError> {
        let op = self.op;
        let mut d = cx.draft("attention_append_q8");
        let of = |from: &Operand| {
            let groups = op.head_dim / CACHE_GROUP;
            heads(from, op.kv_heads, op.head_dim).split_last(groups, Amount::Known(CACHE_GROUP))
        };
        let (k, v) = (of(&self.from[1]), of(&self.from[2]));
        let linear = d.linear();
        let (at, inside) = d.coordinates(linear, &k.dims[..3]);
        let Some(cache) = self.cache(&mut d, true) else { return Err(cx.mismatched()) };
        let ([block, within], mask) = self.behind_past(cx, &mut d, &cache, at[0], inside);
        let extent = d.size(&Amount::Known(super::cache::head_words(op.head_dim)));
        let size = d.b.int(super::cache::GROUP_WORDS as i32);
        let first = d.b.mul(at[2], size);
        for (from, to, of_keys) in [(&k, cache.keys, true), (&v, cache.values, false)] {
            let view = d.read(from);
            let count = d.size(&from.dims[3]);
            let element = |d: &mut Draft<'_>, i: usize| {
                let i = d.b.int(i as i32);
                let known = d.b.within(i, count);
                let mask = d.b.and(inside, known);
                d.b.load(view, &[at[0], at[1], at[2], i], Some(mask))
            };
            let values: Vec<Value> = (0..CACHE_GROUP).map(|i| element(&mut d, i)).collect();
            for (i, word) in encode(&mut d, &values).into_iter().enumerate() {
                let i = d.b.int(i as i32);
                let own = d.b.add(first, i);
                let known = d.b.within(own, extent);
                let mask = d.b.and(mask, known);
                let place = if of_keys { [block, at[1], own, within] } else { [block, at[1], within, own] };
                d.b.store(to, &place, word, Some(mask));
            }
        }
        cx.launch(d, Amount::product(&k.dims[..3]).ceil_div(LANES as usize))
    }
}
