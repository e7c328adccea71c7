//! The memory of one run in flight, reusable.

use super::compiled::{Health, State, unknown};
use super::error::SessionError;
use super::value::TensorArg;
use crate::backend::{BackendError, Context, Io, Program};
use crate::plan::{InterfaceEntry, Lir, Template};
use rlx_kernels::schedule::RunControl;
use rlx_tensor::storage::AlignedBytes;
use rlx_tensor::{Dim, DimBinding, DimError, SizeId, SizeTable, Tensor, byte_count};
use smallvec::SmallVec;
use std::sync::Arc;

/// How one extent of an input or state takes part in a run.
#[derive(Debug, Clone, Copy)]
enum Rule {
    /// Must be this number.
    Known(usize),
    /// Gives this symbol its value, less a number.
    Symbol(usize, usize),
    /// Must equal this size once all symbols have values.
    Size(SizeId),
}

/// Arena, scratch and sizes for runs of one executable under fixed capacities.
#[derive(Debug)]
pub struct RunContext {
    program: Arc<dyn Program>,
    template: Arc<Template>,
    binding: DimBinding,
    health: Arc<Health>,
    inner: Box<dyn Context>,
    /// States that ops overwrite, with what stood in them before the run.
    saved: Vec<(usize, AlignedBytes)>,
    input_rules: Vec<Vec<Rule>>,
    state_rules: Vec<Vec<Rule>>,
    symbols: Vec<usize>,
    sizes: Vec<usize>,
}

const UNBOUND: usize = usize::MAX;

impl RunContext {
    pub(super) fn new(
        program: Arc<dyn Program>,
        health: Arc<Health>,
        lir: &Lir,
    ) -> Result<Self, SessionError> {
        let template = Arc::clone(lir.template());
        let inner = health.contain(|| program.context(lir))?;
        let save = |state: usize| {
            let bytes = lir.buffer_bytes(template.states()[state].place.buffer);
            let room = AlignedBytes::try_zeroed(bytes).ok_or_else(|| {
                let what = format!("a copy of state {}", template.states()[state].name);
                BackendError::OutOfMemory { bytes: bytes as u64, what }
            });
            room.map(|room| (state, room))
        };
        let saved = template.overwritten_states().map(save).collect::<Result<_, _>>()?;
        let rules =
            |entries: &[InterfaceEntry]| entries.iter().map(|e| rules_of(template.sizes(), e)).collect();
        let (input_rules, state_rules) = (rules(template.inputs()), rules(template.states()));
        let symbols = Vec::with_capacity(template.sizes().symbols().len());
        let sizes = Vec::with_capacity(template.sizes().len());
        let binding = lir.binding().clone();
        Ok(Self {
            program,
            template,
            binding,
            health,
            inner,
            saved,
            input_rules,
            state_rules,
            symbols,
            sizes,
        })
    }

    /// The capacities.
    pub fn binding(&self) -> &DimBinding {
        &self.binding
    }

    /// The program it runs.
    pub fn program(&self) -> &Arc<dyn Program> {
        &self.program
    }

    /// `(arena, scratch)` bytes it holds; copies of states count as scratch.
    pub fn bytes(&self) -> (usize, usize) {
        let (arena, scratch) = self.inner.bytes();
        (arena, scratch + self.saved.iter().map(|(_, copy)| copy.len()).sum::<usize>())
    }

    /// True if every symbol fits its capacity, and the capacities are not much larger than needed.
    pub(super) fn covers(&self, symbols: &DimBinding) -> bool {
        self.binding.len() == symbols.len()
            && symbols.iter().all(|(symbol, value)| {
                self.binding
                    .value(symbol)
                    .is_some_and(|cap| value <= cap && cap <= value.saturating_mul(4).max(64))
            })
    }

    /// Runs once and returns the outputs; allocates them only.
    pub fn run(
        &mut self,
        state: &mut State,
        inputs: &[(&str, TensorArg<'_>)],
    ) -> Result<Vec<(String, Tensor)>, SessionError> {
        self.run_controlled(state, inputs, RunControl::default())
    }

    /// As [`RunContext::run`], ended early by a cancel token or a deadline.
    ///
    /// # Errors
    /// As [`RunContext::run`]; `StepError::Cancelled` and `StepError::DeadlinePassed` as [`SessionError::Backend`].
    pub fn run_controlled(
        &mut self,
        state: &mut State,
        inputs: &[(&str, TensorArg<'_>)],
        control: RunControl<'_>,
    ) -> Result<Vec<(String, Tensor)>, SessionError> {
        let given = self.prepare(state, inputs)?;
        let mut results = Vec::with_capacity(self.template.outputs().len());
        for entry in self.template.outputs() {
            let dims: Vec<usize> = entry.place.dims.iter().map(|d| self.sizes[d.index()]).collect();
            let tensor = Tensor::zeros(&dims, entry.shape.dtype());
            let tensor = tensor.map_err(|e| SessionError::Shape {
                name: entry.name.clone(),
                expected: entry.shape.to_string(),
                found: e.to_string(),
            })?;
            results.push((entry.name.clone(), tensor));
        }
        let mut outputs: SmallVec<[&mut [u8]; 8]> = results.iter_mut().map(|(_, t)| t.bytes_mut()).collect();
        self.execute(&given, &mut outputs, state, control)?;
        drop(outputs);
        Ok(results)
    }

    /// Runs once into the caller's buffers, by output name; each buffer's start is filled. Allocates nothing in steady state.
    pub fn run_into(
        &mut self,
        state: &mut State,
        inputs: &[(&str, TensorArg<'_>)],
        outputs: &mut [(&str, &mut [u8])],
        control: RunControl<'_>,
    ) -> Result<(), SessionError> {
        let given = self.prepare(state, inputs)?;
        for (name, _) in outputs.iter() {
            if !self.template.outputs().iter().any(|e| e.name == *name) {
                return Err(unknown("output", name, self.template.outputs()));
            }
        }
        let mut ordered: SmallVec<[&mut [u8]; 8]> = SmallVec::new();
        for entry in self.template.outputs() {
            let given = outputs.iter_mut().find(|(name, _)| *name == entry.name);
            let Some((_, buffer)) = given else {
                return Err(SessionError::Missing { kind: "output", name: entry.name.clone() });
            };
            let dims: SmallVec<[usize; 8]> = entry.place.dims.iter().map(|d| self.sizes[d.index()]).collect();
            let need = byte_count(&dims, entry.shape.dtype()).unwrap_or(usize::MAX);
            if buffer.len() < need {
                let (expected, found) = (format!("{need} bytes"), format!("{} bytes", buffer.len()));
                return Err(SessionError::Shape { name: entry.name.clone(), expected, found });
            }
            // A name given twice would need two mutable borrows of one buffer; the second lookup takes the emptied slot and fails above.
            ordered.push(&mut std::mem::take(buffer)[..need]);
        }
        self.execute(&given, &mut ordered, state, control)
    }

    /// An output's extents in the last run.
    pub fn output_dims(&self, output: usize) -> impl Iterator<Item = usize> + '_ {
        let dims = self.template.outputs().get(output).map_or(&[][..], |e| &e.place.dims);
        dims.iter().map(|d| self.sizes.get(d.index()).copied().unwrap_or(0))
    }

    fn execute(
        &mut self,
        inputs: &[&[u8]],
        outputs: &mut [&mut [u8]],
        state: &mut State,
        control: RunControl<'_>,
    ) -> Result<(), SessionError> {
        self.health.check()?;
        for (at, copy) in &mut self.saved {
            let now = state.buffers[*at].bytes()?;
            if copy.len() != now.len() {
                *copy = AlignedBytes::copied_from(now);
            } else {
                copy.as_mut_slice().copy_from_slice(now);
            }
        }
        let io = Io { symbols: &self.symbols, inputs, outputs, states: &mut state.buffers, control };
        let inner = &mut self.inner;
        let result = self.health.contain(|| inner.run(io));
        if result.is_err() {
            for (at, copy) in &self.saved {
                state.buffers[*at] = AlignedBytes::copied_from(copy.as_slice()).into();
            }
        }
        Ok(result?)
    }

    /// Checks names, dtypes and extents, and gives every symbol its value.
    fn prepare<'a>(
        &mut self,
        state: &State,
        inputs: &[(&str, TensorArg<'a>)],
    ) -> Result<SmallVec<[&'a [u8]; 32]>, SessionError> {
        check_inputs(&self.template, inputs)?;
        if state.buffers.len() != self.template.states().len() {
            let (want, have) = (self.template.states().len(), state.buffers.len());
            return Err(SessionError::State {
                reason: format!("the graph has {want} states, {have} were given"),
            });
        }
        self.symbols.clear();
        self.symbols.resize(self.template.sizes().symbols().len(), UNBOUND);
        let mut given: SmallVec<[&[u8]; 32]> = SmallVec::new();
        for index in 0..self.template.inputs().len() {
            let entry = &self.template.inputs()[index];
            let found = inputs.iter().find(|(name, _)| *name == entry.name);
            let Some((_, value)) = found else {
                return Err(SessionError::Missing { kind: "input", name: entry.name.clone() });
            };
            match value.dims {
                Some(dims) => {
                    bind_extents(&mut self.symbols, &self.template, entry, &self.input_rules[index], dims)?
                }
                None => self.bind_length(index, value.bytes.len())?,
            }
            given.push(value.bytes);
        }
        for ((entry, dims), rules) in self.template.states().iter().zip(&state.dims).zip(&self.state_rules) {
            bind_extents(&mut self.symbols, &self.template, entry, rules, dims)?;
        }
        self.finish_sizes(state, inputs, &given)?;
        Ok(given)
    }

    /// A vector's symbol from the number of bytes given without extents.
    fn bind_length(&mut self, index: usize, bytes: usize) -> Result<(), SessionError> {
        let entry = &self.template.inputs()[index];
        if let [Rule::Symbol(at, offset)] = self.input_rules[index][..] {
            let elements = bytes / entry.shape.dtype().element_bytes().unwrap_or(1);
            bind_symbol(&mut self.symbols, &self.template, at, elements.saturating_sub(offset))?;
        }
        Ok(())
    }

    fn finish_sizes(
        &mut self,
        state: &State,
        inputs: &[(&str, TensorArg<'_>)],
        given: &[&[u8]],
    ) -> Result<(), SessionError> {
        for (at, symbol) in self.template.sizes().symbols().iter().enumerate() {
            if self.symbols[at] == UNBOUND {
                let expr = format!("no input or state of {} gives it a value", self.template.name());
                return Err(DimError::Unbound { symbol: symbol.clone(), expr }.into());
            }
        }
        self.template.sizes().eval(&self.symbols, &mut self.sizes)?;
        self.template.check_sizes(&self.sizes)?;
        let rules = self.template.inputs().iter().zip(&self.input_rules);
        for ((entry, rules), bytes) in rules.zip(given) {
            let dims = inputs.iter().find(|(name, _)| *name == entry.name).and_then(|(_, v)| v.dims);
            check_sizes(&self.sizes, entry, rules, dims)?;
            let extents: SmallVec<[usize; 8]> =
                entry.place.dims.iter().map(|d| self.sizes[d.index()]).collect();
            let need = byte_count(&extents, entry.shape.dtype());
            if need != Some(bytes.len()) {
                let expected = format!("{} = {extents:?}", entry.shape);
                let found = format!("{} bytes", bytes.len());
                return Err(SessionError::Shape { name: entry.name.clone(), expected, found });
            }
        }
        for ((entry, dims), rules) in self.template.states().iter().zip(&state.dims).zip(&self.state_rules) {
            check_sizes(&self.sizes, entry, rules, Some(dims))?;
        }
        Ok(())
    }
}

/// Checks every input that is given alone, and that none is missing: names, dtypes, and extents as far as the graph knows them. An
/// extent that a caller merely claims passes only with the bytes to go with it, so nothing is allocated for a claim.
pub(super) fn check_inputs(
    template: &Template,
    inputs: &[(&str, TensorArg<'_>)],
) -> Result<(), SessionError> {
    for (at, (name, value)) in inputs.iter().enumerate() {
        let Some(entry) = template.inputs().iter().find(|e| e.name == *name) else {
            return Err(unknown("input", name, template.inputs()));
        };
        if inputs[..at].iter().any(|(earlier, _)| earlier == name) {
            return Err(SessionError::Twice { kind: "input", name: (*name).to_owned() });
        }
        if value.dtype != entry.shape.dtype() {
            let (name, expected) = ((*name).to_owned(), entry.shape.dtype());
            return Err(SessionError::DType { name, expected, found: value.dtype });
        }
        let Some(dims) = value.dims else { continue };
        let known = |(dim, &extent): (&Dim, &usize)| dim.known().is_none_or(|known| known == extent);
        let fits = dims.len() == entry.shape.rank() && entry.shape.dims().iter().zip(dims).all(known);
        if !fits {
            let (expected, found) = (entry.shape.to_string(), format!("{dims:?}"));
            return Err(SessionError::Shape { name: entry.name.clone(), expected, found });
        }
        if byte_count(dims, value.dtype) != Some(value.bytes.len()) {
            let expected = format!("{} = {dims:?}", entry.shape);
            let found = format!("{} bytes", value.bytes.len());
            return Err(SessionError::Shape { name: entry.name.clone(), expected, found });
        }
    }
    let given = |entry: &&InterfaceEntry| !inputs.iter().any(|(name, _)| *name == entry.name);
    match template.inputs().iter().find(given) {
        None => Ok(()),
        Some(entry) => Err(SessionError::Missing { kind: "input", name: entry.name.clone() }),
    }
}

fn rules_of(sizes: &SizeTable, entry: &InterfaceEntry) -> Vec<Rule> {
    let dims = entry.shape.dims().iter().zip(&entry.place.dims);
    dims.map(|(dim, &size)| match dim {
        Dim::Known(value) => Rule::Known(*value),
        _ => match dim.as_symbol_plus().and_then(|(s, n)| Some((sizes.symbol_index(s)?, n))) {
            Some((at, offset)) => Rule::Symbol(at, offset),
            None => Rule::Size(size),
        },
    })
    .collect()
}

fn bind_symbol(
    symbols: &mut [usize],
    template: &Template,
    at: usize,
    value: usize,
) -> Result<(), SessionError> {
    match symbols[at] {
        UNBOUND => symbols[at] = value,
        first if first != value => {
            let symbol = template.sizes().symbols()[at].clone();
            return Err(DimError::Conflict { symbol, first, second: value }.into());
        }
        _ => {}
    }
    Ok(())
}

fn bind_extents(
    symbols: &mut [usize],
    template: &Template,
    entry: &InterfaceEntry,
    rules: &[Rule],
    dims: &[usize],
) -> Result<(), SessionError> {
    let mismatch = || SessionError::Shape {
        name: entry.name.clone(),
        expected: entry.shape.to_string(),
        found: format!("{dims:?}"),
    };
    if dims.len() != rules.len() {
        return Err(mismatch());
    }
    for (rule, &extent) in rules.iter().zip(dims) {
        match *rule {
            Rule::Known(value) if value != extent => return Err(mismatch()),
            Rule::Symbol(_, offset) if extent < offset => return Err(mismatch()),
            Rule::Symbol(at, offset) => bind_symbol(symbols, template, at, extent - offset)?,
            _ => {}
        }
    }
    Ok(())
}

fn check_sizes(
    sizes: &[usize],
    entry: &InterfaceEntry,
    rules: &[Rule],
    dims: Option<&[usize]>,
) -> Result<(), SessionError> {
    let Some(dims) = dims else { return Ok(()) };
    for (rule, &extent) in rules.iter().zip(dims) {
        if let Rule::Size(id) = rule
            && sizes[id.index()] != extent
        {
            let (expected, found) = (entry.shape.to_string(), format!("{dims:?}"));
            return Err(SessionError::Shape { name: entry.name.clone(), expected, found });
        }
    }
    Ok(())
}
