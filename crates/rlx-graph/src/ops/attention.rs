//! Attention of a ragged batch, over this run's keys or over a paged cache (Vaswani et al., 2017; Kwon et al., 2023).
//!
//! Without a cache or a mask it decomposes into dense primitives over all rows, with other sequences masked away. With a cache the
//! keys of a sequence lie in blocks that run-time data names and whose number run-time data decides: primitives over symbolic
//! dims cannot say that, so there the reference evaluation is what a backend without the op falls back on.

use crate::attrs::op_struct;
use crate::eval::{from_f64, sequence_ranges, to_f64, to_i64};
use crate::expand::Expand;
use crate::graph::{Graph, GraphError};
use crate::ids::ValueId;
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, Props, op_boilerplate, shape_bytes};
use crate::ops::binary::BinaryOp;
use crate::ops::matmul::MatMul;
use crate::ops::pool::sequence_count;
use crate::ops::reduce::{Reduce, ReduceOp};
use crate::ops::softmax::{Softmax, softmax_of};
use crate::ops::transpose::Transpose;
use crate::ops::unary::UnaryOp;
use rlx_tensor::{DType, Dim, Shape, Tensor};
use std::ops::Range;

mod q8;

/// Positions in one block of a cache.
pub const BLOCK: usize = 64;

op_struct! {
    /// `softmax(scale * q k^T + mask) v` for each head of each sequence.
    ///
    /// Operands: `q [rows, heads * head_dim]`, `k` and `v [rows, kv_heads * head_dim]` F32; `seq_starts [batch + 1]` I32; if `mask`,
    /// `[1 or batch, 1 or heads, max_q, max_k]` F32, indexed by row of the sequence and key position, added last; if `cache`,
    /// `past [batch]` I32, `block_table [batch, table]` I32, the states `k_cache [blocks, kv_heads, head_dim, 64]` and
    /// `v_cache [blocks, kv_heads, 64, head_dim]` of one dtype, F32, F16 or BF16. Result `[rows, heads * head_dim]` F32.
    ///
    /// Caches of U8 hold 8-bit integers, 32 elements of a head with one scale (see [`rlx_tensor::quant::Q8Head`]): both are `[blocks,
    /// kv_heads, 64, head_dim / 32 * 34]`, and 32 has to divide `head_dim`.
    ///
    /// `block_table[b][i]` is the block of positions `64 i .. 64 i + 63` of sequence b; `past[b]` positions are there already. This
    /// run's keys and values are written at `past[b] ..`, rounded to the cache's dtype, then all are read from the cache. Query row
    /// i has position `p = past[b] + i`. Head h reads key head `h / (heads / kv_heads)`. A row that sees no key gives zeros.
    pub struct Attention = "attention" {
        /// Query heads.
        heads: usize,
        /// Key and value heads; divides `heads`.
        kv_heads: usize,
        /// Elements of a head.
        head_dim: usize,
        /// Factor of the scores.
        scale: f64,
        /// A row sees positions up to its own.
        causal: bool,
        /// A row sees positions above its own less this; at least 1.
        window: Option<usize>,
        /// Scores become `cap * tanh(score / cap)`, after scaling.
        softcap: Option<f64>,
        /// There is a mask operand.
        mask: bool,
        /// There are past, block table and cache operands.
        cache: bool,
    }
}

impl Attention {
    /// Position of the mask, if there is one.
    pub fn mask_at(&self) -> Option<usize> {
        self.mask.then_some(4)
    }

    /// Position of `past`, which block table, key cache and value cache follow.
    pub fn past_at(&self) -> Option<usize> {
        self.cache.then_some(4 + usize::from(self.mask))
    }

    /// Number of operands.
    pub fn arity(&self) -> usize {
        4 + usize::from(self.mask) + if self.cache { 4 } else { 0 }
    }

    fn check_attributes(&self) -> Result<(), InferError> {
        InferError::positive("heads", self.heads)?;
        InferError::positive("kv_heads", self.kv_heads)?;
        InferError::positive("head_dim", self.head_dim)?;
        InferError::positive("window", self.window.unwrap_or(1))?;
        if !self.heads.is_multiple_of(self.kv_heads) {
            let reason = format!("{} does not divide heads={}", self.kv_heads, self.heads);
            return Err(InferError::Attribute { name: "kv_heads", reason });
        }
        match self.softcap {
            Some(cap) if cap.is_nan() || cap <= 0.0 => {
                Err(InferError::Attribute { name: "softcap", reason: format!("{cap} is not above 0") })
            }
            _ => Ok(()),
        }
    }

    fn infer_cache(
        &self,
        cx: &mut InferCx,
        inputs: &[&Shape],
        past: usize,
        batch: &Dim,
    ) -> Result<(), InferError> {
        let (table, k_cache, v_cache) = (past + 1, past + 2, past + 3);
        for (operand, rank) in [(past, 1), (table, 2)] {
            InferError::dtype(inputs, operand, DType::I32)?;
            InferError::rank(inputs, operand, rank)?;
            cx.require_equal("sequences", &inputs[operand].dims()[0], batch)?;
        }
        let found = inputs[k_cache].dtype();
        if !matches!(found, DType::F32 | DType::F16 | DType::BF16 | DType::U8) {
            return Err(InferError::DType {
                operand: k_cache,
                expected: "f32, f16, bf16 or u8".into(),
                found,
            });
        }
        InferError::dtype(inputs, v_cache, found)?;
        InferError::rank(inputs, k_cache, 4)?;
        let blocks = inputs[k_cache].dims()[0].clone();
        if found == DType::U8 {
            let Some(extents) = q8::extents(self) else {
                let reason = format!("{} is not a multiple of 32, as a cache of u8 needs", self.head_dim);
                return Err(InferError::Attribute { name: "head_dim", reason });
            };
            let dims = [blocks].into_iter().chain(extents.map(Dim::Known)).collect::<Vec<_>>();
            let what = "caches of u8 [blocks, kv_heads, 64, head_dim / 32 * 34]";
            cx.require_same(what, k_cache, inputs[k_cache].dims(), &dims)?;
            return cx.require_same(what, v_cache, inputs[v_cache].dims(), &dims);
        }
        let [heads, dim, block] = [self.kv_heads, self.head_dim, BLOCK].map(Dim::Known);
        let k_dims = [blocks.clone(), heads.clone(), dim.clone(), block.clone()];
        cx.require_same(
            "key cache [blocks, kv_heads, head_dim, 64]",
            k_cache,
            inputs[k_cache].dims(),
            &k_dims,
        )?;
        let v_dims = [blocks, heads, block, dim];
        cx.require_same(
            "value cache [blocks, kv_heads, 64, head_dim]",
            v_cache,
            inputs[v_cache].dims(),
            &v_dims,
        )
    }

    /// Positions that a query at `position` sees, of `count` keys.
    pub fn visible(&self, position: usize, count: usize) -> Range<usize> {
        let end = if self.causal { count.min(position + 1) } else { count };
        let start = self.window.map_or(0, |w| (position + 1).saturating_sub(w));
        start.min(end)..end
    }
}

/// The operands of one run as f64, with positions resolved to cache elements.
struct Evaluation<'t> {
    op: &'t Attention,
    past: Vec<usize>,
    table: Vec<usize>,
    table_width: usize,
    k: Vec<f64>,
    v: Vec<f64>,
    mask: Option<(Vec<f64>, Vec<usize>)>,
    /// What `k` and `v` were read from, where caches hold integers.
    integers: Option<[q8::Bytes; 2]>,
}

impl Evaluation<'_> {
    fn block(&self, sequence: usize, position: usize) -> usize {
        self.table[sequence * self.table_width + position / BLOCK]
    }

    fn key_at(&self, sequence: usize, first_row: usize, position: usize, head: usize, i: usize) -> usize {
        let (heads, dim) = (self.op.kv_heads, self.op.head_dim);
        match self.op.cache {
            true => ((self.block(sequence, position) * heads + head) * dim + i) * BLOCK + position % BLOCK,
            false => ((first_row + position) * heads + head) * dim + i,
        }
    }

    fn value_at(&self, sequence: usize, first_row: usize, position: usize, head: usize, i: usize) -> usize {
        let (heads, dim) = (self.op.kv_heads, self.op.head_dim);
        match self.op.cache {
            true => ((self.block(sequence, position) * heads + head) * BLOCK + position % BLOCK) * dim + i,
            false => ((first_row + position) * heads + head) * dim + i,
        }
    }

    /// Stores this run's keys and values in caches of integers, and reads these.
    fn append_integers(
        &mut self,
        inputs: &[&Tensor],
        ranges: &[Range<usize>],
        at: usize,
    ) -> Result<(), EvalError> {
        let (heads, dim) = (self.op.kv_heads, self.op.head_dim);
        let mut caches =
            [(at + 2, true), (at + 3, false)].map(|(i, keys)| q8::Bytes::of(self.op, inputs[i], keys));
        let rows = [to_f64(inputs[1])?, to_f64(inputs[2])?];
        for (sequence, range) in ranges.iter().enumerate() {
            for (row, head) in range.clone().flat_map(|row| (0..heads).map(move |head| (row, head))) {
                let position = self.past[sequence] + row - range.start;
                let index = self.block(sequence, position) * heads + head;
                for (cache, rows) in caches.iter_mut().zip(&rows) {
                    cache.store(index, position % BLOCK, &rows[(row * heads + head) * dim..][..dim]);
                }
            }
        }
        (self.k, self.v) = (caches[0].values(), caches[1].values());
        self.integers = Some(caches);
        Ok(())
    }

    fn mask(&self, sequence: usize, head: usize, row: usize, position: usize) -> f64 {
        let Some((values, dims)) = &self.mask else { return 0.0 };
        let (b, h) = (if dims[0] == 1 { 0 } else { sequence }, if dims[1] == 1 { 0 } else { head });
        values[((b * dims[1] + h) * dims[2] + row) * dims[3] + position]
    }

    /// One head of one query row.
    fn row(&self, q: &[f64], sequence: usize, rows: &Range<usize>, row: usize, head: usize) -> Vec<f64> {
        let op = self.op;
        let kv_head = head / (op.heads / op.kv_heads);
        let past = self.past[sequence];
        let visible = op.visible(past + row, past + rows.len());
        let score = |position: usize| {
            let at = |i| self.k[self.key_at(sequence, rows.start, position, kv_head, i)];
            let dot: f64 = q.iter().enumerate().map(|(i, q)| q * at(i)).sum();
            let scaled = dot * op.scale;
            let capped = op.softcap.map_or(scaled, |cap| cap * (scaled / cap).tanh());
            capped + self.mask(sequence, head, row, position)
        };
        let scores: Vec<f64> = visible.clone().map(score).collect();
        if scores.iter().all(|&s| s == f64::NEG_INFINITY) {
            return vec![0.0; op.head_dim];
        }
        let weights = softmax_of(&scores);
        let element = |i: usize| {
            let value = |position| self.v[self.value_at(sequence, rows.start, position, kv_head, i)];
            let terms = visible.clone().zip(&weights).filter(|(_, w)| **w != 0.0);
            terms.map(|(position, w)| w * value(position)).sum()
        };
        (0..op.head_dim).map(element).collect()
    }
}

impl Attention {
    fn evaluation(&self, inputs: &[&Tensor], ranges: &[Range<usize>]) -> Result<Evaluation<'_>, EvalError> {
        let mask = match self.mask_at() {
            Some(at) => Some((to_f64(inputs[at])?, inputs[at].dims().to_vec())),
            None => None,
        };
        let Some(at) = self.past_at() else {
            let (past, k, v) = (vec![0; ranges.len()], to_f64(inputs[1])?, to_f64(inputs[2])?);
            let (table, integers) = (Vec::new(), None);
            return Ok(Evaluation { op: self, past, table, table_width: 0, k, v, mask, integers });
        };
        let (blocks, table_width) = (inputs[at + 2].dims()[0], inputs[at + 1].dims()[1]);
        let given = to_i64(inputs[at])?;
        let past = crate::ops::gather::checked_indices(&given, table_width * BLOCK + 1, at)?;
        let table = to_i64(inputs[at + 1])?;
        for (sequence, range) in ranges.iter().enumerate() {
            let used = (past[sequence] + range.len()).div_ceil(BLOCK);
            if used > table_width {
                let reason = format!(
                    "sequence {sequence} needs {used} blocks for {} positions, its table has {table_width}",
                    past[sequence] + range.len()
                );
                return Err(EvalError::Value { operand: at + 1, reason });
            }
            crate::ops::gather::checked_indices(&table[sequence * table_width..][..used], blocks, at + 1)?;
        }
        let table = table.into_iter().map(|block| usize::try_from(block).unwrap_or(0)).collect();
        let (k, v) = (to_f64(inputs[at + 2])?, to_f64(inputs[at + 3])?);
        let mut evaluation = Evaluation { op: self, past, table, table_width, k, v, mask, integers: None };
        let dtype = inputs[at + 2].dtype();
        if dtype == DType::U8 {
            evaluation.append_integers(inputs, ranges, at)?;
            return Ok(evaluation);
        }
        let rounded = |x: &Tensor| to_f64(&from_f64(x.dims(), dtype, &to_f64(x)?)?);
        let (new_k, new_v) = (rounded(inputs[1])?, rounded(inputs[2])?);
        for (sequence, range) in ranges.iter().enumerate() {
            for (row, head) in range.clone().flat_map(|row| (0..self.kv_heads).map(move |head| (row, head))) {
                let position = evaluation.past[sequence] + row - range.start;
                for i in 0..self.head_dim {
                    let from = (row * self.kv_heads + head) * self.head_dim + i;
                    let to = evaluation.key_at(sequence, 0, position, head, i);
                    evaluation.k[to] = new_k[from];
                    let to = evaluation.value_at(sequence, 0, position, head, i);
                    evaluation.v[to] = new_v[from];
                }
            }
        }
        Ok(evaluation)
    }

    fn check_mask(
        &self,
        inputs: &[&Tensor],
        ranges: &[Range<usize>],
        past: &[usize],
    ) -> Result<(), EvalError> {
        let Some(operand) = self.mask_at() else { return Ok(()) };
        let dims = inputs[operand].dims();
        for (range, past) in ranges.iter().zip(past) {
            if range.len() > dims[2] || past + range.len() > dims[3] {
                let reason = format!("{dims:?} is too small for {} rows after {past}", range.len());
                return Err(EvalError::Value { operand, reason });
            }
        }
        Ok(())
    }
}

impl OpDef for Attention {
    op_boilerplate!();

    fn infer(&self, cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        self.check_attributes()?;
        InferError::arity(self.arity(), inputs)?;
        for (operand, heads) in [(0, self.heads), (1, self.kv_heads), (2, self.kv_heads)] {
            InferError::dtype(inputs, operand, DType::F32)?;
            InferError::rank(inputs, operand, 2)?;
            cx.require_equal("rows of q, k and v", &inputs[operand].dims()[0], &inputs[0].dims()[0])?;
            let width = Dim::Known(heads) * self.head_dim;
            cx.require_equal("width and heads * head_dim", &inputs[operand].dims()[1], &width)?;
        }
        let batch = sequence_count(inputs, 3)?;
        if let Some(operand) = self.mask_at() {
            InferError::dtype(inputs, operand, DType::F32)?;
            InferError::rank(inputs, operand, 4)?;
            let dims = inputs[operand].dims();
            if dims[0] != 1 {
                cx.require_equal("mask and sequences", &dims[0], &batch)?;
            }
            if dims[1] != 1 {
                cx.require_equal("mask and heads", &dims[1], &Dim::Known(self.heads))?;
            }
        }
        if let Some(past) = self.past_at() {
            self.infer_cache(cx, inputs, past, &batch)?;
        }
        Ok(vec![inputs[0].clone()])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let ranges = sequence_ranges(inputs[3], inputs[0].dims()[0], 3)?;
        let evaluation = self.evaluation(inputs, &ranges)?;
        self.check_mask(inputs, &ranges, &evaluation.past)?;
        let q = to_f64(inputs[0])?;
        let mut result = Vec::with_capacity(q.len());
        for (sequence, rows) in ranges.iter().enumerate() {
            for row in rows.clone() {
                for head in 0..self.heads {
                    let q = &q[(row * self.heads + head) * self.head_dim..][..self.head_dim];
                    result.extend(evaluation.row(q, sequence, rows, row - rows.start, head));
                }
            }
        }
        let mut results = vec![from_f64(inputs[0].dims(), DType::F32, &result)?];
        if let (Some(at), Some([k, v])) = (self.past_at(), evaluation.integers) {
            results.push(k.into_tensor(inputs[at + 2].dims())?);
            results.push(v.into_tensor(inputs[at + 3].dims())?);
        } else if let Some(at) = self.past_at() {
            for (operand, values) in [(at + 2, &evaluation.k), (at + 3, &evaluation.v)] {
                results.push(from_f64(inputs[operand].dims(), inputs[operand].dtype(), values)?);
            }
        }
        Ok(results)
    }

    fn props(&self) -> Props {
        Props {
            composite: !self.cache && !self.mask,
            writes: self.past_at().map_or(vec![], |at| vec![at + 2, at + 3]),
            appends: true,
            ..Props::default()
        }
    }

    /// An upper bound: every row sees every key its sequence can have (the block table's capacity, or all rows of the run).
    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        let keys = match self.past_at() {
            Some(at) => inputs[at + 1].dims()[1].clone() * BLOCK,
            None => inputs[0].dims()[0].clone(),
        };
        let keys = self.window.map_or(keys.clone(), |w| if self.causal { keys.minimum(w) } else { keys });
        let flops = inputs[0].elements() * keys * Dim::Known(4);
        let operands = inputs[..4].iter().chain(outputs).fold(Dim::Known(0), |sum, s| sum + shape_bytes(s));
        let bytes = match self.past_at() {
            Some(at) => {
                let dtype = inputs[at + 2].dtype();
                let of_head =
                    q8::extents(self).filter(|_| dtype == DType::U8).map_or(self.head_dim, |e| e[2]);
                let cached = inputs[at + 1].elements() * (2 * BLOCK) * self.kv_heads * of_head;
                operands + shape_bytes(&Shape::from_dims(vec![cached], dtype))
            }
            None => operands,
        };
        Cost { flops, bytes }
    }

    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Option<Result<Vec<ValueId>, GraphError>> {
        (!self.cache && !self.mask).then(|| self.expand(Expand { graph }, inputs).map(|y| vec![y]))
    }
}

impl Attention {
    /// Scores of every row with every row, those of other sequences masked away.
    fn expand(&self, mut to: Expand<'_>, inputs: &[ValueId]) -> Result<ValueId, GraphError> {
        let whole = to.graph.shape(inputs[0]).dims().to_vec();
        let rows = whole[0].clone();
        let group = self.heads / self.kv_heads;
        let q = self.split(&mut to, inputs[0], &rows, self.heads)?;
        let mut keys_values = Vec::with_capacity(2);
        for &x in &inputs[1..3] {
            let split = self.split(&mut to, x, &rows, self.kv_heads)?;
            let [kv, group, dim] = [self.kv_heads, group, self.head_dim].map(Dim::Known);
            let narrow = to.reshape(split, &[kv.clone(), Dim::Known(1), rows.clone(), dim.clone()])?;
            let wide = to.broadcast(narrow, &[kv, group, rows.clone(), dim.clone()])?;
            keys_values.push(to.reshape(wide, &[Dim::Known(self.heads), rows.clone(), dim])?);
        }
        let product = MatMul { transpose_a: false, transpose_b: true };
        let dots = to.graph.add_one(product, &[q, keys_values[0]])?;
        let mut scores = to.scalar(BinaryOp::Mul, dots, self.scale)?;
        if let Some(cap) = self.softcap {
            let small = to.scalar(BinaryOp::Div, scores, cap)?;
            let bent = to.unary(UnaryOp::Tanh, small)?;
            scores = to.scalar(BinaryOp::Mul, bent, cap)?;
        }
        let sees = self.visibility(&mut to, inputs[3], &rows)?;
        let hidden = to.number(f64::NEG_INFINITY, DType::F32)?;
        let masked = to.select(sees, scores, hidden)?;
        let weights = to.graph.add_one(Softmax { axis: 2 }, &[masked])?;
        let heads = to.graph.add_one(MatMul::plain(), &[weights, keys_values[1]])?;
        let joined = to.graph.add_one(Transpose { perm: vec![1, 0, 2] }, &[heads])?;
        to.reshape(joined, &whole)
    }

    fn split(
        &self,
        to: &mut Expand<'_>,
        x: ValueId,
        rows: &Dim,
        heads: usize,
    ) -> Result<ValueId, GraphError> {
        let dims = [rows.clone(), Dim::Known(heads), Dim::Known(self.head_dim)];
        let split = to.reshape(x, &dims)?;
        to.graph.add_one(Transpose { perm: vec![1, 0, 2] }, &[split])
    }

    /// `[rows, rows]` Bool: whether a row sees a key.
    fn visibility(&self, to: &mut Expand<'_>, starts: ValueId, rows: &Dim) -> Result<ValueId, GraphError> {
        let one = Dim::Known(1);
        let count = to.graph.shape(starts).dims()[0].clone();
        let (column, row) = ([rows.clone(), one.clone()], [one.clone(), rows.clone()]);
        let index = to.count_up(rows)?;
        let (query, key) = (to.reshape(index, &column)?, to.reshape(index, &row)?);
        let starts = to.reshape(starts, &[one, count])?;
        let begun = to.binary(BinaryOp::LessEqual, starts, query)?;
        let begun = crate::ops::cast::to_dtype(to.graph, begun, DType::I32)?;
        let sum = Reduce { kind: ReduceOp::Sum, axes: vec![1], keep_dims: false };
        let sequence = to.graph.add_one(sum, &[begun])?;
        let (mine, theirs) = (to.reshape(sequence, &column)?, to.reshape(sequence, &row)?);
        let mut sees = to.binary(BinaryOp::Equal, mine, theirs)?;
        if self.causal {
            let past = to.binary(BinaryOp::LessEqual, key, query)?;
            sees = to.binary(BinaryOp::And, sees, past)?;
        }
        if let Some(window) = self.window {
            let first = to.scalar(BinaryOp::Sub, query, window as f64)?;
            let near = to.binary(BinaryOp::Greater, key, first)?;
            sees = to.binary(BinaryOp::And, sees, near)?;
        }
        Ok(sees)
    }
}
