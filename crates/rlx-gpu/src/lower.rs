//! From a template's steps to launches of kernels.
//!
//! Sizes are not part of a kernel unless they are known when the graph is compiled: they are arguments, evaluated for each run, as are
//! the places of views. So one kernel serves every capacity and every extent.

#![forbid(unsafe_code)]

mod attention;
pub(crate) mod blocks;
pub(crate) mod cache;
pub(crate) mod classes;
mod dot;
mod elementwise;
mod few;
mod flash;
mod grouped;
pub(crate) mod library;
mod linear;
mod lines;
mod lora;
mod mma;
mod moe;
mod moves;
pub(crate) mod operands;
mod plain;
mod product;
mod quantise;
mod room;
mod rope;
mod rows;
pub(crate) mod schedules;
mod topk;
mod whole;
mod windows;

#[cfg(test)]
pub(crate) use whole::BEYOND;

use crate::ir::build::Builder;
use crate::ir::verify::verify;
use crate::ir::{Access, Arg, BinaryFn, Binding, Element, Kernel, Storage, Value, ViewId};
use classes::Class;
use rlx::backend::BackendError;
use rlx::plan::{BufferId, BufferKind, Place, StepSpec, Template};
use rlx_graph::OpDef;
use rlx_tensor::{DType, Dim, Shape, SizeId, Symbol};
pub(crate) use room::Room;
use schedules::Choices;
use std::collections::HashMap;
use std::sync::Arc;

/// Lanes of a program.
pub(crate) const LANES: u32 = 64;
/// Constants up to this many words stand in the arena; larger ones are bound as weights are.
pub(crate) const SMALL_CONSTANT: usize = 1024;
/// Weights and states that one kernel binds at most: what every device binds, less arguments and arena.
pub(crate) const MAX_BOUND: usize = 6;

/// A size of a run.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Amount {
    Known(usize),
    Size(SizeId),
    Dim(Dim),
    Product(Vec<Amount>),
    Sum(Vec<Amount>),
    CeilDiv(Box<Amount>, usize),
    /// Less a number, but not below 0.
    Less(Box<Amount>, usize),
    /// The first divided by the second, rounded up; by 1 instead of 0.
    Ratio(Box<Amount>, Box<Amount>),
    /// `then` where `of` is within both bounds, otherwise 0.
    When {
        of: Box<Amount>,
        from: usize,
        to: usize,
        then: Box<Amount>,
    },
}

/// What sizes are evaluated against.
pub(crate) struct Extents<'r> {
    pub sizes: &'r [usize],
    pub symbol: &'r dyn Fn(&Symbol) -> Option<usize>,
}

impl Amount {
    pub fn eval(&self, run: &Extents<'_>) -> Option<usize> {
        match self {
            Amount::Known(value) => Some(*value),
            Amount::Size(id) => run.sizes.get(id.index()).copied(),
            Amount::Dim(dim) => dim.eval_with(run.symbol).ok(),
            Amount::Product(parts) => parts.iter().try_fold(1usize, |a, b| a.checked_mul(b.eval(run)?)),
            Amount::Sum(parts) => parts.iter().try_fold(0usize, |a, b| a.checked_add(b.eval(run)?)),
            Amount::CeilDiv(a, b) => Some(a.eval(run)?.div_ceil(*b)),
            Amount::Less(a, b) => Some(a.eval(run)?.saturating_sub(*b)),
            Amount::Ratio(a, b) => Some(a.eval(run)?.div_ceil(b.eval(run)?.max(1))),
            Amount::When { of, from, to, then } => match (*from..=*to).contains(&of.eval(run)?) {
                true => then.eval(run),
                false => Some(0),
            },
        }
    }

    /// `then` in runs where the amount is within both bounds, 0 in others; `None` if there is no such run.
    pub fn when(&self, from: usize, to: usize, then: Amount) -> Option<Amount> {
        match self {
            Amount::Known(value) => (from..=to).contains(value).then_some(then),
            of => Some(Amount::When { of: Box::new(of.clone()), from, to, then: Box::new(then) }),
        }
    }

    /// Whether it is a multiple of `of` in every run.
    pub fn is_multiple(&self, of: usize) -> bool {
        match self {
            Amount::Known(value) => value % of == 0,
            Amount::Product(parts) => parts.iter().any(|p| p.is_multiple(of)),
            Amount::When { then, .. } => then.is_multiple(of),
            Amount::Sum(parts) => parts.iter().all(|p| p.is_multiple(of)),
            _ => of == 1,
        }
    }

    pub fn of_dim(dim: &Dim) -> Amount {
        dim.known().map_or_else(|| Amount::Dim(dim.clone()), Amount::Known)
    }

    /// The factors multiplied; known ones into one, in front.
    pub fn product<'a>(parts: impl IntoIterator<Item = &'a Amount>) -> Amount {
        let (mut known, mut rest) = (1usize, Vec::new());
        for part in parts {
            match part {
                Amount::Known(value) => known = known.saturating_mul(*value),
                Amount::Product(inner) => inner.iter().for_each(|p| match p {
                    Amount::Known(value) => known = known.saturating_mul(*value),
                    other => rest.push(other.clone()),
                }),
                other => rest.push(other.clone()),
            }
        }
        if known != 1 || rest.is_empty() {
            rest.insert(0, Amount::Known(known));
        }
        match rest.as_slice() {
            [one] => one.clone(),
            _ => Amount::Product(rest),
        }
    }

    pub fn sum(a: &Amount, b: &Amount) -> Amount {
        match (a, b) {
            (Amount::Known(a), Amount::Known(b)) => Amount::Known(a.saturating_add(*b)),
            (Amount::Known(0), other) | (other, Amount::Known(0)) => other.clone(),
            _ => Amount::Sum(vec![a.clone(), b.clone()]),
        }
    }

    pub fn ceil_div(&self, by: usize) -> Amount {
        match self {
            Amount::Known(value) => Amount::Known(value.div_ceil(by)),
            other => Amount::CeilDiv(Box::new(other.clone()), by),
        }
    }

    pub fn is_one(&self) -> bool {
        *self == Amount::Known(1)
    }
}

/// Strides of elements in row-major order.
pub(crate) fn contiguous(dims: &[Amount]) -> Vec<Amount> {
    (0..dims.len()).map(|axis| Amount::product(&dims[axis + 1..])).collect()
}

/// Some lines of a weight that is too large for one binding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Band {
    pub first: usize,
    pub count: usize,
    /// Lines of the weight.
    pub of: usize,
    /// How often so many lines come one after another: the band has its lines of each.
    pub times: usize,
    /// Words of the band on the device.
    pub words: usize,
}

/// What holds an operand's elements.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Home {
    /// A buffer of the template.
    Buffer(BufferId),
    /// Params of one dtype and as many columns, bound as one weight of all their lines.
    Stack(Arc<[BufferId]>),
    /// Memory that holds something between two launches of one step only.
    Scratch,
}

/// A weight that a kernel binds, a band of it, or several as one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Bound {
    pub home: Home,
    pub band: Option<Band>,
}

/// Where a view of a kernel stands.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    pub home: Home,
    /// The lines of a weight that it is of, if it is not of all; of a stack it is all.
    pub band: Option<Band>,
    pub base: Amount,
    pub strides: Vec<Amount>,
}

/// A kernel with everything that a run must know to launch it.
#[derive(Debug, Clone)]
pub(crate) struct Launch {
    pub step: usize,
    pub kernel: Arc<Kernel>,
    pub sizes: Vec<Amount>,
    pub views: Vec<Source>,
    pub weights: Vec<Bound>,
    /// States that stay on the device, bound behind the weights.
    pub states: Vec<BufferId>,
    pub programs: Amount,
}

/// What a check of a launch guards: the step, and what is wrong if it fails.
#[derive(Debug, Clone)]
pub(crate) struct Guard {
    pub step: usize,
    pub reason: &'static str,
    /// Another device may do better: the caller's values are right.
    pub of_device: bool,
}

/// An operand: a place with its strides spelled out.
#[derive(Debug, Clone)]
pub(crate) struct Operand {
    pub home: Home,
    pub dtype: DType,
    pub base: Amount,
    pub dims: Vec<Amount>,
    pub strides: Vec<Amount>,
    /// The lines of a weight that it is, if it is not all of it; of a stack it is all.
    pub band: Option<Band>,
}

impl Operand {
    /// Floats or integers in scratch memory, from a word on.
    pub fn scratch(dtype: DType, base: Amount, dims: &[Amount]) -> Operand {
        let (dims, strides) = (dims.to_vec(), contiguous(dims));
        Operand { home: Home::Scratch, dtype, base, dims, strides, band: None }
    }

    /// Rows of the last dim, all other axes taken together.
    pub fn rows(&self) -> Operand {
        let mut flat = self.clone();
        let Some((last, lead)) = self.dims.split_last() else { return flat };
        flat.dims = vec![Amount::product(lead), last.clone()];
        let row = self.strides.iter().rev().nth(1).cloned().unwrap_or_else(|| last.clone());
        flat.strides = vec![row, Amount::Known(1)];
        flat
    }

    /// The strides under which the operand broadcasts to `dims`.
    pub fn broadcast(&self, dims: &[Amount]) -> Operand {
        let lead = dims.len().saturating_sub(self.dims.len());
        let stride = |axis: usize| match axis.checked_sub(lead) {
            Some(own) if !self.dims[own].is_one() || dims[axis].is_one() => self.strides[own].clone(),
            _ => Amount::Known(0),
        };
        let strides = (0..dims.len()).map(stride).collect();
        Operand { dims: dims.to_vec(), strides, ..self.clone() }
    }

    /// Axes in another order, or some of them.
    pub fn axes(&self, order: &[usize]) -> Operand {
        let pick = |list: &[Amount]| order.iter().map(|&a| list[a].clone()).collect();
        Operand { dims: pick(&self.dims), strides: pick(&self.strides), ..self.clone() }
    }

    /// The last axis as two: `outer` of `inner`.
    pub fn split_last(&self, outer: usize, inner: Amount) -> Operand {
        let mut split = self.clone();
        split.dims.pop();
        let stride = split.strides.pop().unwrap_or(Amount::Known(1));
        split.dims.extend([Amount::Known(outer), inner.clone()]);
        split.strides.extend([Amount::product(&[stride.clone(), inner]), stride]);
        split
    }

    /// What starts so many elements further on.
    pub fn shifted(&self, by: &Amount) -> Operand {
        Operand { base: Amount::sum(&self.base, by), ..self.clone() }
    }
}

/// How elements of a dtype are computed with; `None` for a dtype that devices do not hold.
pub(crate) fn element(dtype: DType) -> Option<Element> {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => Some(Element::F32),
        DType::I32 | DType::I8 | DType::U8 | DType::I16 | DType::U16 => Some(Element::I32),
        DType::I64 | DType::U64 | DType::U32 => Some(Element::I32),
        DType::Bool => Some(Element::Bool),
        _ => None,
    }
}

/// Lowers a template's steps.
pub(crate) struct LowerCx<'t> {
    template: &'t Template,
    resident: Arc<[bool]>,
    step: usize,
    kernels: HashMap<String, Arc<Kernel>>,
    /// Words that one binding may have.
    pub binding_words: usize,
    /// Schedules that are not the ones that shapes decide.
    pub choices: Choices,
    /// Kernels that a schedule may be chosen for.
    pub classes: Vec<Class>,
    /// Words that steps need between their launches; one place serves all.
    pub scratch: Vec<Amount>,
    pub launches: Vec<Launch>,
    pub guards: Vec<Guard>,
}

impl<'t> LowerCx<'t> {
    pub fn new(template: &'t Template) -> Self {
        let (kernels, resident) = (HashMap::new(), resident(template));
        let (scratch, launches, guards) = (Vec::new(), Vec::new(), Vec::new());
        let binding_words = usize::MAX;
        let (choices, classes) = (Choices::default(), Vec::new());
        Self {
            template,
            resident,
            step: 0,
            kernels,
            binding_words,
            choices,
            classes,
            scratch,
            launches,
            guards,
        }
    }

    /// Lowers a step.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`] for a form that has no kernel.
    pub fn lower(&mut self, at: usize, step: &StepSpec) -> Result<(), BackendError> {
        self.step = at;
        let name = step.op.def().name();
        let op = find(name).ok_or_else(|| self.unsupported(format!("{name} has no kernel")))?;
        op.lower(self, step)
    }

    /// Notes that a schedule may be chosen for kernels of this class.
    pub fn may_choose(&mut self, class: Option<Class>) {
        self.classes.extend(class.filter(|class| !self.classes.contains(class)));
    }

    /// A weight that is bound whole and is too large for that: its name and its words.
    fn beyond(&self, weight: &Bound) -> Option<(String, usize)> {
        let (Home::Buffer(id), None) = (&weight.home, weight.band) else { return None };
        let (name, dtype, count) = match &self.template.buffers()[id.index()].kind {
            BufferKind::Param(at) => {
                let param = &self.template.params()[*at];
                let dims = param.shape.known_dims()?;
                (format!("its weight {}", param.name), param.shape.dtype(), dims.iter().product())
            }
            BufferKind::Const(tensor) => ("its constant".to_owned(), tensor.dtype(), tensor.len()),
            _ => return None,
        };
        let words = blocks::weight_words(dtype, count);
        (words > self.binding_words).then_some((name, words))
    }

    /// The kernels of the launches so far, each once.
    pub fn kernels(&self) -> Vec<Arc<Kernel>> {
        let mut seen: Vec<Arc<Kernel>> = Vec::new();
        for launch in &self.launches {
            if !seen.iter().any(|known| Arc::ptr_eq(known, &launch.kernel)) {
                seen.push(Arc::clone(&launch.kernel));
            }
        }
        seen
    }

    pub fn unsupported(&self, reason: impl Into<String>) -> BackendError {
        let step = &self.template.steps()[self.step];
        BackendError::Unsupported {
            op: step.op.def().name().to_owned(),
            location: step.location.clone(),
            reason: reason.into(),
        }
    }

    /// The step being lowered is of another op than its lowering.
    pub fn mismatched(&self) -> BackendError {
        self.unsupported("its attributes are those of another op")
    }

    pub fn amount(&self, id: SizeId) -> Amount {
        self.template.sizes().known(id).map_or(Amount::Size(id), Amount::Known)
    }

    pub fn operand(&self, place: &Place) -> Operand {
        let dims: Vec<Amount> = place.dims.iter().map(|&id| self.amount(id)).collect();
        let mut strides = contiguous(&dims);
        if let Some(row) = place.stride {
            let count = dims.len();
            for (axis, stride) in strides.iter_mut().enumerate().take(count.saturating_sub(1)) {
                *stride =
                    Amount::product([&Amount::product(&dims[axis + 1..count - 1]), &Amount::Known(row)]);
            }
        }
        let base = Amount::Known(place.offset);
        let home = Home::Buffer(place.buffer);
        Operand { home, dtype: place.dtype, base, dims, strides, band: None }
    }

    /// A whole weight in as few bands of an axis as bindings hold; anything else as it is. Blocks are not cut along their last axis.
    pub fn bands(&self, operand: &Operand, axis: usize) -> Vec<Operand> {
        let known = |dim: &Amount| match dim {
            Amount::Known(n) => Some(*n),
            _ => None,
        };
        let dims: Option<Vec<usize>> = operand.dims.iter().map(known).collect();
        let Some(dims) = dims.filter(|dims| axis < dims.len() && self.is_weight(operand)) else {
            return vec![operand.clone()];
        };
        let [times, each] = [&dims[..axis], &dims[axis + 1..]].map(|dims| dims.iter().product::<usize>());
        let of = dims[axis];
        let blocks = blocks::is_blocks(operand.dtype) && axis + 1 == dims.len();
        let whole = operand.base == Amount::Known(0) && operand.strides == contiguous(&operand.dims);
        let words = |lines: usize| blocks::weight_words(operand.dtype, times * lines * each);
        if blocks || !whole || words(of) <= self.binding_words {
            return vec![operand.clone()];
        }
        // Planes of blocks, and pairs of halves, fill whole words in 32 lines.
        let most = self.binding_words / words(32).max(1) * 32;
        let band = |first: usize| {
            let count = most.min(of - first);
            let band = Some(Band { first, count, of, times, words: words(count) });
            let mut dims = operand.dims.clone();
            dims[axis] = Amount::Known(count);
            Operand { strides: contiguous(&dims), dims, band, ..operand.clone() }
        };
        match most {
            0 => vec![operand.clone()],
            _ => (0..of).step_by(most).map(band).collect(),
        }
    }

    /// Whether an operand is bound as a weight.
    pub fn is_weight(&self, operand: &Operand) -> bool {
        bound_apart(self.template, &operand.home)
    }

    /// Whole params of one dtype and as many columns as the lines of one weight, in as few stacks as bindings hold, each with how many
    /// are in it; `None` for operands that are no such params.
    pub fn stacks(&self, params: &[Operand]) -> Option<Vec<(Operand, usize)>> {
        let first = params.first()?;
        let [Amount::Known(lines), Amount::Known(k)] = first.dims.as_slice() else { return None };
        let whole = |o: &Operand| match o.home {
            Home::Buffer(id) => {
                let param = matches!(self.template.buffers()[id.index()].kind, BufferKind::Param(_));
                let all = o.base == Amount::Known(0) && o.strides == contiguous(&o.dims);
                (param && all && o.dims == first.dims && o.dtype == first.dtype).then_some(id)
            }
            _ => None,
        };
        let ids: Vec<BufferId> = params.iter().map(whole).collect::<Option<_>>()?;
        let words = |count: usize| blocks::weight_words(first.dtype, count * lines * k);
        let most = (1..=ids.len()).take_while(|&count| words(count) <= self.binding_words).last()?;
        let stack = |ids: &[BufferId]| {
            let of = ids.len() * lines;
            let band = Some(Band { first: 0, count: of, of, times: 1, words: words(ids.len()) });
            let dims = vec![Amount::Known(of), Amount::Known(*k)];
            (Operand { home: Home::Stack(ids.into()), dims, band, ..first.clone() }, ids.len())
        };
        Some(ids.chunks(most).map(stack).collect())
    }

    pub fn inputs(&self, step: &StepSpec) -> Vec<Operand> {
        step.inputs.iter().map(|p| self.operand(p)).collect()
    }

    pub fn outputs(&self, step: &StepSpec) -> Vec<Operand> {
        step.outputs.iter().map(|p| self.operand(p)).collect()
    }

    pub fn draft(&self, name: impl Into<String>) -> Draft<'t> {
        self.draft_of(name, LANES)
    }

    /// A kernel whose programs have so many lanes.
    pub fn draft_of(&self, name: impl Into<String>, lanes: u32) -> Draft<'t> {
        let b = Builder::new(name, lanes);
        let (template, resident) = (self.template, Arc::clone(&self.resident));
        let (sizes, views, weights, states) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Draft { b, template, resident, sizes, views, weights, states, misread: None }
    }

    /// A word that a check of the launch being drafted sets where the caller's values are wrong.
    pub fn guard(&mut self, draft: &mut Draft<'_>, reason: &'static str) -> Arg {
        self.guarded(draft, reason, false)
    }

    /// A word that a check sets where a value is beyond what the device computes with.
    pub fn limit(&mut self, draft: &mut Draft<'_>, reason: &'static str) -> Arg {
        self.guarded(draft, reason, true)
    }

    fn guarded(&mut self, draft: &mut Draft<'_>, reason: &'static str, of_device: bool) -> Arg {
        let slot = self.guards.len();
        self.guards.push(Guard { step: self.step, reason, of_device });
        draft.free(Amount::Known(slot))
    }

    /// Adds a launch of a drafted kernel.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`] for a kernel that the verifier refuses or that binds too much.
    pub fn launch(&mut self, draft: Draft<'_>, programs: Amount) -> Result<(), BackendError> {
        let Draft { b, sizes, views, weights, states, misread, .. } = draft;
        if let Some(dtype) = misread {
            return Err(self.unsupported(format!("it reads elements of {dtype} out of their blocks")));
        }
        let kernel = b.finish();
        let bound = weights.len() + states.len();
        if bound > MAX_BOUND {
            let reason = format!("its kernel binds {bound} weights and states, of at most {MAX_BOUND}");
            return Err(self.unsupported(reason));
        }
        if let Some((name, words)) = weights.iter().find_map(|weight| self.beyond(weight)) {
            let [bytes, limit] = [words, self.binding_words].map(|words| words.saturating_mul(4));
            return Err(self.unsupported(format!(
                "{name} takes {bytes} bytes in one binding, which on this device has at most {limit} bytes, and this op does not read it in parts; \
                 narrower weights or another device run it"
            )));
        }
        for (view, source) in kernel.views.iter().zip(&views).filter(|(view, _)| view.wide > 1) {
            let whole = |amount: &Amount| amount.is_multiple(view.wide as usize);
            let last = source.strides.last().is_none_or(Amount::is_one);
            let lead = source.strides.split_last().is_none_or(|(_, lead)| lead.iter().all(whole));
            if !last || !lead || !whole(&source.base) {
                return Err(self.unsupported(format!("{}: a wide load would not be aligned", kernel.name)));
            }
        }
        let text = kernel.to_string();
        let kernel = match self.kernels.get(&text) {
            Some(known) => Arc::clone(known),
            None => {
                verify(&kernel).map_err(|fault| self.unsupported(fault.to_string()))?;
                let kernel = Arc::new(kernel);
                self.kernels.insert(text, Arc::clone(&kernel));
                kernel
            }
        };
        self.launches.push(Launch { step: self.step, kernel, sizes, views, weights, states, programs });
        Ok(())
    }
}

/// A kernel being written, with where its arguments come from.
pub(crate) struct Draft<'t> {
    pub b: Builder,
    template: &'t Template,
    resident: Arc<[bool]>,
    sizes: Vec<Amount>,
    views: Vec<Source>,
    weights: Vec<Bound>,
    states: Vec<BufferId>,
    /// A packed type whose elements were to be read one by one.
    misread: Option<DType>,
}

/// For each buffer whether it is a state that stays on the device: one that ops only append to. A failed run has to put back what
/// others overwrote, so those go up and come down with each run.
pub(crate) fn resident(template: &Template) -> Arc<[bool]> {
    let overwritten: Vec<usize> = template.overwritten_states().collect();
    let stays = |(_, buffer): (BufferId, &rlx::plan::Buffer)| match buffer.kind {
        BufferKind::State(at) => !overwritten.contains(&at),
        _ => false,
    };
    template.buffer_ids().map(stays).collect()
}

/// Whether what is at home there is bound as a weight.
fn bound_apart(template: &Template, home: &Home) -> bool {
    match home {
        Home::Buffer(buffer) => is_weight(template, *buffer),
        Home::Stack(_) => true,
        Home::Scratch => false,
    }
}

/// Whether a buffer is bound as a weight.
pub(crate) fn is_weight(template: &Template, buffer: BufferId) -> bool {
    match &template.buffers()[buffer.index()].kind {
        BufferKind::Param(_) => true,
        BufferKind::Const(tensor) => tensor.len() > SMALL_CONSTANT,
        _ => false,
    }
}

impl Draft<'_> {
    /// A size as argument; a known one is part of the kernel.
    pub fn size(&mut self, amount: &Amount) -> Arg {
        match amount {
            Amount::Known(value) => match i32::try_from(*value) {
                Ok(value) => self.b.known(value),
                Err(_) => self.free(amount.clone()),
            },
            other => self.free(other.clone()),
        }
    }

    /// A size as argument even if it is known.
    pub fn free(&mut self, amount: Amount) -> Arg {
        let at = self.sizes.iter().position(|known| *known == amount).unwrap_or_else(|| {
            self.sizes.push(amount);
            self.sizes.len() - 1
        });
        self.b.size(at as u32)
    }

    pub fn sizes(&mut self, amounts: &[Amount]) -> Vec<Arg> {
        amounts.iter().map(|a| self.size(a)).collect()
    }

    pub fn view(&mut self, operand: &Operand, access: Access) -> ViewId {
        let extents = self.sizes(&operand.dims);
        if self.is_weight(operand) && blocks::is_packed(operand.dtype) {
            self.misread = Some(operand.dtype);
        }
        // Blocks that are no longer packed are floats.
        let other = if blocks::is_blocks(operand.dtype) { Element::F32 } else { Element::I32 };
        let element = element(operand.dtype).unwrap_or(other);
        let binding = self.binding(operand);
        let storage = match (binding, operand.dtype) {
            (Binding::Weight(_), DType::F16) => Storage::HalfPair,
            (Binding::Weight(_), DType::BF16) => Storage::BrainPair,
            _ => Storage::Word(element),
        };
        let (base, strides) = (operand.base.clone(), operand.strides.clone());
        self.views.push(Source { home: operand.home.clone(), band: operand.band, base, strides });
        self.b.view(binding, storage, access, &extents)
    }

    /// Whole words of a weight, or of an arena's elements, seen as integers.
    pub fn words(&mut self, operand: &Operand) -> ViewId {
        self.stored(operand, Storage::Word(Element::I32))
    }

    /// Binary16 numbers of a weight that holds other things too.
    pub fn halves(&mut self, operand: &Operand) -> ViewId {
        self.stored(operand, Storage::HalfPair)
    }

    fn stored(&mut self, operand: &Operand, storage: Storage) -> ViewId {
        let extents = self.sizes(&operand.dims);
        let binding = self.binding(operand);
        let (base, strides) = (operand.base.clone(), operand.strides.clone());
        self.views.push(Source { home: operand.home.clone(), band: operand.band, base, strides });
        self.b.view(binding, storage, Access::Read, &extents)
    }

    fn binding(&mut self, operand: &Operand) -> Binding {
        fn position<T: PartialEq>(list: &mut Vec<T>, wanted: T) -> u32 {
            let at = list.iter().position(|known| *known == wanted).unwrap_or_else(|| {
                list.push(wanted);
                list.len() - 1
            });
            at as u32
        }
        if self.is_weight(operand) {
            let bound = Bound { home: operand.home.clone(), band: operand.band };
            return Binding::Weight(position(&mut self.weights, bound));
        }
        match operand.home {
            Home::Buffer(buffer) if self.resident[buffer.index()] => {
                Binding::State(position(&mut self.states, buffer))
            }
            _ => Binding::Arena,
        }
    }

    /// Floats that hold something until the step's next launch, whose words [`LowerCx::scratch`] counts.
    pub fn scratch(&mut self, dims: &[Amount], base: &Amount, access: Access) -> ViewId {
        self.view(&Operand::scratch(DType::F32, base.clone(), dims), access)
    }

    /// Whether a buffer stands as packed as it came.
    pub fn is_weight(&self, operand: &Operand) -> bool {
        bound_apart(self.template, &operand.home)
    }

    pub fn read(&mut self, operand: &Operand) -> ViewId {
        self.view(operand, Access::Read)
    }

    pub fn write(&mut self, operand: &Operand) -> ViewId {
        self.view(operand, Access::Write)
    }

    /// The linear index of the lane among all lanes of all programs.
    pub fn linear(&mut self) -> Value {
        let (program, lane) = (self.b.program(), self.b.lane());
        let lanes = self.b.int(LANES as i32);
        let first = self.b.mul(program, lanes);
        self.b.add(first, lane)
    }

    /// Coordinates of a linear index, and whether it is inside.
    pub fn coordinates(&mut self, linear: Value, extents: &[Amount]) -> (Vec<Value>, Value) {
        let extents = self.sizes(extents);
        if extents.is_empty() {
            let one = self.b.int(1);
            return (Vec::new(), self.b.less(linear, one));
        }
        let total = self.b.product(&extents);
        let total = self.b.arg(total);
        let inside = self.b.less(linear, total);
        (self.b.digits(linear, &extents), inside)
    }

    /// Goes over `total` indices, a lane each; `body` gets an index and whether it is inside.
    pub fn stride_over(
        &mut self,
        total: &Amount,
        firsts: &[Value],
        body: impl FnOnce(&mut Self, Value, Value, &[Value]) -> Vec<Value>,
    ) -> Vec<Value> {
        let total = self.size(total);
        let (zero, lane, end) = (self.b.int(0), self.b.lane(), self.b.arg(total));
        let total = self.b.arg(total);
        self.repeat([zero, end], LANES, firsts, |d, index, carried| {
            let index = d.b.add(index, lane);
            let inside = d.b.less(index, total);
            body(d, index, inside, carried)
        })
    }

    /// A loop that carries values of lanes; `body` gives what each becomes.
    pub fn repeat(
        &mut self,
        bounds: [Value; 2],
        step: u32,
        firsts: &[Value],
        body: impl FnOnce(&mut Self, Value, &[Value]) -> Vec<Value>,
    ) -> Vec<Value> {
        let (index, params) = self.b.open_loop(firsts);
        let next = body(self, index, &params);
        self.b.close_loop(bounds, step, index, firsts, &params, &next)
    }

    /// The value as the dtype holds it.
    pub fn rounded(&mut self, dtype: DType, value: Value) -> Value {
        match dtype {
            DType::BF16 => self.round_bits(value, 16),
            DType::F16 => self.round_half(value),
            _ => whole::wrapped(self, dtype, value),
        }
    }

    /// Drops the lowest bits of a float, to nearest even; NaN stays.
    fn round_bits(&mut self, x: Value, dropped: i32) -> Value {
        let b = &mut self.b;
        let bits = b.unary(crate::ir::UnaryFn::Bits, x);
        let (by, one) = (b.int(dropped), b.int(1));
        let shifted = b.binary(BinaryFn::ShiftRight, bits, by);
        let odd = b.binary(BinaryFn::And, shifted, one);
        let half = b.int((1 << (dropped - 1)) - 1);
        let up = b.add(bits, half);
        let up = b.add(up, odd);
        let keep = b.int(-1 << dropped);
        let kept = b.binary(BinaryFn::And, up, keep);
        let y = b.unary(crate::ir::UnaryFn::FromBits, kept);
        let nan = b.unary(crate::ir::UnaryFn::IsNan, x);
        b.select(nan, x, y)
    }

    /// The nearest binary16: 11 bits where it is normal, multiples of 2^-24 below, infinity above.
    fn round_half(&mut self, x: Value) -> Value {
        let normal = self.round_bits(x, 13);
        let b = &mut self.b;
        let size = b.unary(crate::ir::UnaryFn::Abs, x);
        let (grid, zero) = (b.float(0.5), b.float(0.0));
        let small = b.add(size, grid);
        let small = b.sub(small, grid);
        let negative = b.less(x, zero);
        let minus = b.unary(crate::ir::UnaryFn::Neg, small);
        let small = b.select(negative, minus, small);
        let least = b.float(2f64.powi(-14));
        let tiny = b.less(size, least);
        let y = b.select(tiny, small, normal);
        let (most, infinity) = (b.float(65520.0), b.float(f64::INFINITY));
        let huge = b.binary(BinaryFn::LessEqual, most, size);
        let minus = b.unary(crate::ir::UnaryFn::Neg, infinity);
        let limit = b.select(negative, minus, infinity);
        b.select(huge, limit, y)
    }
}

/// How an op becomes launches.
pub(crate) trait GpuOp: Sync {
    /// The op.
    fn name(&self) -> &'static str;

    /// Whether there are kernels for these shapes.
    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        let _ = op;
        inputs.iter().chain(outputs).all(|s| element(s.dtype()).is_some())
    }

    /// Adds the step's launches.
    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError>;
}

/// Whether every operand and result is a number of one word or less, or a truth value, of a dtype that needs no care.
pub(crate) fn computes(inputs: &[&Shape], outputs: &[&Shape]) -> bool {
    let plain = |dtype| matches!(element(dtype), Some(Element::F32 | Element::Bool)) || dtype == DType::I32;
    inputs.iter().chain(outputs).all(|s| plain(s.dtype()))
}

/// The list.
pub(crate) const OPS: &[&dyn GpuOp] = &[
    &elementwise::GpuUnary,
    &elementwise::GpuBinary,
    &elementwise::GpuActivation,
    &elementwise::GpuGated,
    &elementwise::GpuFusedElementwise,
    &elementwise::GpuSelect,
    &elementwise::GpuCast,
    &moves::GpuBroadcast,
    &moves::GpuReshape,
    &moves::GpuSlice,
    &moves::GpuTranspose,
    &moves::GpuConcat,
    &moves::GpuPad,
    &moves::GpuIota,
    &moves::GpuGather,
    &moves::GpuEmbedding,
    &rows::GpuReduce,
    &rows::GpuSoftmax,
    &rows::GpuLayerNorm,
    &rows::GpuRmsNorm,
    &rows::GpuL2Normalize,
    &rows::GpuCumSum,
    &topk::GpuTopK,
    &rows::GpuPool,
    &linear::GpuMatMul,
    &linear::GpuLinear,
    &lora::GpuLoraLinear,
    &moe::GpuMoe,
    &windows::GpuConv,
    &windows::GpuConvTranspose,
    &windows::GpuPoolWindow,
    &rope::GpuRope,
    &rope::GpuRopeAngles,
    &attention::GpuAttention,
];

/// The entry of an op.
pub(crate) fn find(name: &str) -> Option<&'static dyn GpuOp> {
    OPS.iter().copied().find(|op| op.name() == name)
}
