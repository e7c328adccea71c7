//! Operands of products in lines along k: how elements come from memory, whatever they are stored as.

use super::blocks::Blocks;
use super::operands::Operands;
use super::{Amount, Draft, Operand};
use crate::ir::{self, BinaryFn, Pairs, UnaryFn, Value, ViewId};
use rlx_tensor::DType;
use std::rc::Rc;

/// An element of rows that stand nowhere: given lead coordinates, row and place along k, and whether there is one.
pub(super) type MadeElement<'e> = dyn Fn(&mut Draft<'_>, &[Value], [Value; 2], Value) -> Value + 'e;

/// How an operand's elements come from memory.
#[derive(Clone)]
enum Form {
    /// One at a time, made from others.
    Made(Rc<MadeElement<'static>>),
    /// One at a time; `true` if neighbours along k are neighbours in memory.
    Single(ViewId, bool),
    /// Four floats at a time.
    Wide(ViewId),
    /// Words of two elements, of this dtype.
    Pairs(ViewId, DType),
    /// Packed blocks.
    Blocks(Blocks),
}

/// An operand in lines along k.
#[derive(Clone)]
pub(super) struct Lines {
    form: Form,
    line: Amount,
    k: Amount,
    operands: Operands,
}

impl Lines {
    pub fn new(d: &mut Draft<'_>, operand: &Operand) -> Self {
        let rank = operand.dims.len();
        let (line, k) = (operand.dims[rank - 2].clone(), operand.dims[rank - 1].clone());
        Lines { form: Self::form(d, operand), line, k, operands: Operands::Floats }
    }

    /// Rows that are computed where they are needed.
    pub fn made(element: Rc<MadeElement<'static>>, line: &Amount, k: &Amount) -> Self {
        let (line, k) = (line.clone(), k.clone());
        Lines { form: Form::Made(element), line, k, operands: Operands::Floats }
    }

    /// The same, multiplied as such operands.
    pub fn multiplied_as(self, operands: Operands) -> Self {
        Lines { operands, ..self }
    }

    /// Whether neighbours along k are no neighbours in memory.
    pub fn is_apart(&self) -> bool {
        matches!(self.form, Form::Single(_, false) | Form::Made(_))
    }

    fn form(d: &mut Draft<'_>, operand: &Operand) -> Form {
        if let Some(blocks) = Blocks::new(d, operand) {
            return Form::Blocks(blocks);
        }
        let last = operand.dims.len() - 1;
        let along = operand.strides[last].is_one();
        let whole = |by: usize| {
            let known = matches!(operand.dims[last], Amount::Known(k) if k % by == 0);
            let lead = operand.strides[..last].iter().all(|s| s.is_multiple(by));
            known && along && lead && operand.base.is_multiple(by)
        };
        let packed = d.is_weight(operand) && matches!(operand.dtype, DType::F16 | DType::BF16);
        if packed && whole(8) {
            let mut words = operand.clone();
            let halved =
                [&mut words.base, &mut words.dims[last]].into_iter().chain(&mut words.strides[..last]);
            halved.for_each(|amount| *amount = amount.ceil_div(2));
            let view = d.words(&words);
            d.b.widen(view, 4);
            return Form::Pairs(view, operand.dtype);
        }
        let view = d.read(operand);
        if packed || !whole(4) || d.b.view_element(view) != ir::Element::F32 {
            return Form::Single(view, along);
        }
        d.b.widen(view, 4);
        Form::Wide(view)
    }

    /// Elements that one fetch gives, if a program's lanes fetch so many elements in all, `depth` of each line.
    pub fn group(&self, elements: u32, depth: u32, lanes: u32) -> u32 {
        let sizes: &[u32] = match self.form {
            Form::Blocks(_) => &[32, 16, 8],
            Form::Pairs(..) => &[8, 4],
            _ => &[4],
        };
        let fits = |size: &u32| elements.is_multiple_of(size * lanes) && depth.is_multiple_of(*size);
        sizes.iter().copied().find(fits).unwrap_or(sizes[sizes.len() - 1])
    }

    /// Values that a fetch of so many elements gives.
    pub fn raw(&self, count: u32) -> usize {
        match &self.form {
            Form::Blocks(blocks) => blocks.raw(count),
            Form::Pairs(..) => count as usize / 2,
            _ => count as usize,
        }
    }

    /// What a fetched word holds, if it is two floats.
    pub fn pairs(&self) -> Option<Pairs> {
        match self.form {
            Form::Pairs(_, DType::F16) => Some(Pairs::Half),
            Form::Pairs(..) => Some(Pairs::Brain),
            _ => None,
        }
    }

    /// What must be loaded for so many elements from `k` on, a multiple of so many; zero where there are none.
    pub fn fetch(
        &self,
        d: &mut Draft<'_>,
        lead: &[Value],
        [line, k]: [Value; 2],
        mask: Value,
        count: u32,
    ) -> Vec<Value> {
        let extent = d.size(&self.line);
        let there = d.b.within(line, extent);
        let mask = d.b.and(mask, there);
        let extent = d.size(&self.k);
        let at = |k: Value| lead.iter().copied().chain([line, k]).collect::<Vec<_>>();
        match &self.form {
            Form::Single(view, _) => {
                singly(d, k, mask, extent, count, &|d, k, mask| d.b.load(*view, &at(k), Some(mask)))
            }
            Form::Made(element) => {
                singly(d, k, mask, extent, count, &|d, k, mask| element(d, lead, [line, k], mask))
            }
            Form::Wide(view) => {
                let within = d.b.within(k, extent);
                let mask = d.b.and(mask, within);
                d.b.load_wide(*view, &at(k), count, Some(mask))
            }
            Form::Pairs(view, _) => {
                let ((word, _), half) = (d.b.halves(k, 2), d.size(&self.k.ceil_div(2)));
                let within = d.b.within(word, half);
                let mask = d.b.and(mask, within);
                d.b.load_wide(*view, &at(word), count / 2, Some(mask))
            }
            Form::Blocks(blocks) => blocks.fetch(d, [line, k], mask, count),
        }
    }

    /// The elements of what was fetched for `k`.
    pub fn decode(
        &self,
        d: &mut Draft<'_>,
        raw: &[Value],
        k: impl FnOnce(&mut Draft<'_>) -> Value,
        count: u32,
    ) -> Vec<Value> {
        match &self.form {
            Form::Pairs(_, dtype) => raw.iter().flat_map(|&w| halves_of(d, *dtype, w)).collect(),
            Form::Blocks(blocks) => {
                let k = k(d);
                blocks.decode(d, raw, k, count)
            }
            _ => raw.to_vec(),
        }
    }

    /// Elements as they are multiplied.
    pub fn multiplied(&self, d: &mut Draft<'_>, elements: Vec<Value>) -> Vec<Value> {
        match (&self.form, self.operands) {
            (Form::Pairs(_, DType::BF16), _) | (_, Operands::Floats) => elements,
            _ => elements.into_iter().map(|x| self.operands.element(d, x)).collect(),
        }
    }
}

/// So many elements from `k` on, one at a time.
fn singly(
    d: &mut Draft<'_>,
    k: Value,
    mask: Value,
    extent: ir::Arg,
    count: u32,
    element: &dyn Fn(&mut Draft<'_>, Value, Value) -> Value,
) -> Vec<Value> {
    let mut one = |i: u32| {
        let k = offset(d, k, i);
        let within = d.b.within(k, extent);
        let mask = d.b.and(mask, within);
        element(d, k, mask)
    };
    (0..count).map(&mut one).collect()
}

/// The two floats of a word.
fn halves_of(d: &mut Draft<'_>, dtype: DType, word: Value) -> [Value; 2] {
    if dtype == DType::F16 {
        return [UnaryFn::LowHalf, UnaryFn::HighHalf].map(|function| d.b.unary(function, word));
    }
    let (up, high) = (d.b.int(1 << 16), d.b.int(-1 << 16));
    let low = d.b.mul(word, up);
    let high = d.b.binary(BinaryFn::And, word, high);
    [low, high].map(|bits| d.b.unary(UnaryFn::FromBits, bits))
}

pub(super) fn offset(d: &mut Draft<'_>, at: Value, by: u32) -> Value {
    let by = d.b.int(by as i32);
    d.b.add(at, by)
}

pub(super) fn scaled(d: &mut Draft<'_>, at: Value, by: u32) -> Value {
    let by = d.b.int(by as i32);
    d.b.mul(at, by)
}
