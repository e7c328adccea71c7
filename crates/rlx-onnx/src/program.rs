//! Running a model: the largest static regions are compiled as graphs, what remains is evaluated between them.
//!
//! A run goes from stage to stage. A stage is a set of nodes still to run; its variants are what was made of it for given extents (and
//! for the values that a graph's form depends on): one compiled region, the nodes evaluated after it, and the stage that follows. So
//! extents that data decides are extents of the next stage, known when it begins.

use crate::decode::int_vector;
use crate::error::{OnnxError, Refusal};
use crate::lower::{Bound, Host, Lowering, Region};
use crate::model::{Attr, Declared, DeclaredDim, NodeDef, Slot};
use crate::ops;
use crate::prepare::CompiledRegion;
use crate::runtime::Runtime;
use crate::symbolic::{self, Dims, Operand};
use crate::value::{ElementType, Value};
use rlx::TensorArg;
use rlx_graph::{Graph, Source, ValueId, interpret};
use rlx_tensor::time::Instant;
use rlx_tensor::{Dim, Shape};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, OnceLock, PoisonError};

/// Variants kept of one stage.
const VARIANTS: usize = 32;
/// After so many variants of a stage, nodes that would build a run's values into the graph are evaluated on the host where they can be.
const BY_VALUE: usize = 4;
static NEXT_ID: AtomicUsize = AtomicUsize::new(0);

/// A graph of a model, ready to run.
pub struct Program {
    name: String,
    prefix: String,
    slots: Vec<String>,
    inputs: Vec<(Slot, Declared, Option<Value>)>,
    captures: Vec<(Slot, Slot)>,
    outputs: Vec<(Slot, Declared)>,
    constants: Vec<(Slot, Value)>,
    initial: HashSet<Slot>,
    nodes: Vec<NodeDef>,
    roots: Mutex<BTreeMap<Vec<Slot>, Arc<Stage>>>,
    template: OnceLock<Result<Arc<Variant>, String>>,
    /// Whether the template is all there is.
    compiled: bool,
    bytes_read: u64,
}

impl std::fmt::Debug for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Program({:?}, {} nodes)", self.name, self.nodes.len())
    }
}

/// Nodes still to run, with what is the same in every run that comes here.
pub(crate) struct Stage {
    pub(crate) remaining: Vec<usize>,
    pub(crate) constants: Vec<Option<Value>>,
    variants: Mutex<Vec<Arc<Variant>>>,
}

/// What a value must be for a variant to apply.
pub(crate) struct Guard {
    slot: Slot,
    element: Option<ElementType>,
    dims: Option<Vec<usize>>,
    value: Option<Value>,
}

/// A stage for given extents.
pub(crate) struct Variant {
    guards: Vec<Guard>,
    pub(crate) region: Option<Arc<CompiledRegion>>,
    pub(crate) copies: Vec<(Slot, Slot)>,
    /// Constants that nodes on the host read.
    constants: Vec<(Slot, Value)>,
    pub(crate) hosts: Vec<usize>,
    pub(crate) next: Arc<Stage>,
}

type Env = Vec<Option<Value>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Variant {
    /// Whether it was made for values of a run, not for extents alone.
    pub(crate) fn reads_values(&self) -> bool {
        self.guards.iter().any(|guard| guard.value.is_some())
    }
}

impl Guard {
    fn holds(&self, env: &Env) -> bool {
        let Some(value) = &env[self.slot] else { return false };
        value.element() == self.element
            && value.dims() == self.dims.as_deref()
            && self.value.as_ref().is_none_or(|v| v.same(value))
    }
}

impl Program {
    pub(crate) fn new(
        name: String,
        slots: Vec<String>,
        inputs: Vec<(Slot, Declared, Option<Value>)>,
        captures: Vec<(Slot, Slot)>,
        outputs: Vec<(Slot, Declared)>,
        constants: Vec<(Slot, Value)>,
        nodes: Vec<NodeDef>,
    ) -> Self {
        let prefix = format!("onnx{}.", NEXT_ID.fetch_add(1, Ordering::Relaxed));
        let defaults = inputs.iter().filter(|(_, _, default)| default.is_some()).map(|(slot, _, _)| *slot);
        let initial = constants.iter().map(|(slot, _)| *slot).chain(defaults).collect();
        let roots = Mutex::default();
        Self {
            name,
            prefix,
            slots,
            inputs,
            captures,
            outputs,
            constants,
            initial,
            nodes,
            roots,
            template: OnceLock::new(),
            compiled: false,
            bytes_read: 0,
        }
    }

    /// A program that is one region, compiled before, with copies of inputs and constants among its results.
    pub(crate) fn of_region(
        name: String,
        inputs: Vec<(Slot, Declared)>,
        outputs: Vec<(Slot, Declared)>,
        region: CompiledRegion,
        copies: Vec<(Slot, Slot)>,
        constants: Vec<Option<Value>>,
    ) -> Self {
        let slots = vec![String::new(); constants.len()];
        let next = Stage { remaining: Vec::new(), constants, variants: Mutex::default() };
        let (guards, hosts, region) = (Vec::new(), Vec::new(), Some(Arc::new(region)));
        let variant = Variant { guards, region, copies, constants: Vec::new(), hosts, next: Arc::new(next) };
        let inputs = inputs.into_iter().map(|(slot, declared)| (slot, declared, None)).collect();
        let program = Self::new(name, slots, inputs, Vec::new(), outputs, Vec::new(), Vec::new());
        Self { compiled: true, template: OnceLock::from(Ok(Arc::new(variant))), ..program }
    }

    /// Whether it is one region that was compiled before, and nothing else can be made of it.
    pub(crate) fn is_compiled(&self) -> bool {
        self.compiled
    }

    /// Each output with its slot.
    pub(crate) fn output_slots(&self) -> impl Iterator<Item = (Slot, &Declared)> {
        self.outputs.iter().map(|(slot, declared)| (*slot, declared))
    }

    pub(crate) fn with_bytes_read(self, bytes_read: u64) -> Self {
        Self { bytes_read, ..self }
    }

    pub(crate) fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    pub(crate) fn slot_count(&self) -> usize {
        self.slots.len()
    }

    /// Each input with its slot, and whether a run must give it.
    pub(crate) fn input_slots(&self) -> impl Iterator<Item = (Slot, &Declared, bool)> {
        self.inputs.iter().map(|(slot, declared, default)| (*slot, declared, default.is_none()))
    }

    /// Slots of inputs that a run must give.
    pub(crate) fn required_slots(&self) -> Vec<Slot> {
        self.input_slots().filter(|(_, _, required)| *required).map(|(slot, _, _)| slot).collect()
    }

    /// Every region that was compiled so far, those of graphs within it included.
    pub(crate) fn regions(&self) -> Vec<Arc<CompiledRegion>> {
        let mut found: Vec<Arc<CompiledRegion>> = Vec::new();
        let template = self.template.get().and_then(|made| made.as_ref().ok());
        found.extend(template.and_then(|variant| variant.region.clone()));
        let mut stages: Vec<Arc<Stage>> = lock(&self.roots).values().map(Arc::clone).collect();
        while let Some(stage) = stages.pop() {
            for variant in lock(&stage.variants).iter() {
                found.extend(variant.region.clone());
                stages.push(Arc::clone(&variant.next));
            }
        }
        let attrs = self.nodes.iter().flat_map(|node| node.attrs.values());
        let graphs = attrs.filter_map(|attr| if let Attr::Graph(graph) = attr { Some(graph) } else { None });
        found.extend(graphs.flat_map(|graph| graph.regions()));
        found
    }

    /// The graph over symbols, if the program is declared with any and can be built so.
    pub(crate) fn template(&self, runtime: &Runtime) -> Option<Arc<Variant>> {
        if !self.compiled && (!self.captures.is_empty() || !self.is_symbolic()) {
            return None;
        }
        let made = self.template.get_or_init(|| {
            let made = Trace::over_symbols(self, runtime).and_then(|trace| trace.build());
            made.map(Arc::new).map_err(|e| e.to_string())
        });
        if self.is_symbolic() {
            runtime.note(|r| r.template = made.as_ref().err().cloned().or(Some(String::new())));
        }
        made.as_ref().ok().map(Arc::clone)
    }

    /// The graph's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Inputs that a run is given, as the file declares them; those with a default last looked up by name.
    pub fn inputs(&self) -> impl ExactSizeIterator<Item = (&Declared, bool)> {
        self.inputs.iter().map(|(_, declared, default)| (declared, default.is_none()))
    }

    /// Outputs as the file declares them.
    pub fn outputs(&self) -> impl ExactSizeIterator<Item = &Declared> {
        self.outputs.iter().map(|(_, declared)| declared)
    }

    /// Nodes after functions were written out.
    pub fn nodes(&self) -> &[NodeDef] {
        &self.nodes
    }

    /// Slots around it and the slots here that take their values.
    pub(crate) fn captures(&self) -> &[(Slot, Slot)] {
        &self.captures
    }

    /// Runs once: operands by position (`None`: the default), captured values in order of [`Program::captures`].
    pub(crate) fn run(
        &self,
        runtime: &Runtime,
        inputs: &[Option<Value>],
        captured: &[Value],
    ) -> Result<Vec<Value>, OnnxError> {
        let fail = |reason: String| OnnxError::Graph { graph: self.name.clone(), reason };
        let mut env: Env = vec![None; self.slots.len()];
        let mut given = Vec::new();
        for (i, (slot, declared, default)) in self.inputs.iter().enumerate() {
            match inputs.get(i).cloned().flatten() {
                Some(value) => {
                    env[*slot] = Some(value);
                    given.push(*slot);
                }
                None if default.is_some() => {}
                None => {
                    let (name, reason) = (declared.name.clone(), "is missing".to_owned());
                    return Err(OnnxError::Input { name, reason });
                }
            }
        }
        for ((_, slot), value) in self.captures.iter().zip(captured) {
            env[*slot] = Some(value.clone());
        }
        if let Some(last) = self.run_template(runtime, &given, &mut env)? {
            return self.results(&env, &last);
        }
        let mut stage = self.root(&given);
        while !stage.remaining.is_empty() {
            let variant = self.variant(runtime, &stage, &env)?;
            self.execute(runtime, &variant, &mut env)?;
            if variant.next.remaining.len() == stage.remaining.len() {
                return Err(fail("no node can run".to_owned()));
            }
            stage = Arc::clone(&variant.next);
        }
        self.results(&env, &stage)
    }

    fn results(&self, env: &Env, last: &Stage) -> Result<Vec<Value>, OnnxError> {
        let output = |(slot, declared): &(Slot, Declared)| {
            let fail = |what: &str| OnnxError::Graph {
                graph: self.name.clone(),
                reason: format!("output {:?} {what}", declared.name),
            };
            let value = env[*slot].as_ref().or(last.constants[*slot].as_ref());
            let value = value.ok_or_else(|| fail("was not produced"))?;
            value.loaded().map_err(|_| fail("cannot be loaded"))
        };
        self.outputs.iter().map(output).collect()
    }

    /// Runs the whole program as one graph over symbols, if it is declared with any and can be built so. What does not hold for these
    /// extents (a dim that broadcasts, say) is left to stages, if there are any.
    fn run_template(
        &self,
        runtime: &Runtime,
        given: &[Slot],
        env: &mut Env,
    ) -> Result<Option<Arc<Stage>>, OnnxError> {
        if self.required_slots() != given {
            return Ok(None);
        }
        let Some(variant) = self.template(runtime) else { return Ok(None) };
        let before = env.clone();
        match self.execute(runtime, &variant, env) {
            Ok(()) => Ok(Some(Arc::clone(&variant.next))),
            Err(error) if self.compiled => Err(error),
            Err(error) => {
                *env = before;
                runtime.note(|r| r.template = Some(format!("the graph over symbols did not run: {error}")));
                Ok(None)
            }
        }
    }

    /// Whether every input is a tensor of known rank and some dim of one is no number.
    fn is_symbolic(&self) -> bool {
        let mut open = false;
        for (_, declared, _) in self.inputs.iter().filter(|(_, _, default)| default.is_none()) {
            let (Some(ElementType::Plain(_)), Some(dims)) = (declared.element, &declared.dims) else {
                return false;
            };
            open |= dims.iter().any(|d| !matches!(d, DeclaredDim::Known(_)));
        }
        open
    }

    /// The first stage, for these overridden defaults.
    pub(crate) fn root(&self, given: &[Slot]) -> Arc<Stage> {
        let mut roots = lock(&self.roots);
        let make = || {
            let mut constants: Env = vec![None; self.slots.len()];
            for (slot, value) in &self.constants {
                constants[*slot] = Some(value.clone());
            }
            for (slot, _, default) in &self.inputs {
                if let Some(value) = default.as_ref().filter(|_| !given.contains(slot)) {
                    constants[*slot] = Some(value.clone());
                }
            }
            let remaining = (0..self.nodes.len()).collect();
            Arc::new(Stage { remaining, constants, variants: Mutex::default() })
        };
        Arc::clone(roots.entry(given.to_vec()).or_insert_with(make))
    }

    pub(crate) fn variant(
        &self,
        runtime: &Runtime,
        stage: &Arc<Stage>,
        env: &Env,
    ) -> Result<Arc<Variant>, OnnxError> {
        let find = |variants: &[Arc<Variant>]| {
            variants.iter().find(|v| v.guards.iter().all(|g| g.holds(env))).map(Arc::clone)
        };
        if let Some(known) = find(&lock(&stage.variants)) {
            return Ok(known);
        }
        let made = Arc::new(Trace::of(self, runtime, stage, env).build()?);
        let mut variants = lock(&stage.variants);
        if variants.len() >= VARIANTS {
            variants.remove(0);
        }
        variants.push(Arc::clone(&made));
        Ok(made)
    }

    fn execute(&self, runtime: &Runtime, variant: &Variant, env: &mut Env) -> Result<(), OnnxError> {
        for (slot, value) in &variant.constants {
            env[*slot] = Some(value.clone());
        }
        if let Some(region) = &variant.region {
            let mut args: Vec<(&str, TensorArg<'_>)> = Vec::with_capacity(region.inputs.len());
            for (slot, name) in &region.inputs {
                match &env[*slot] {
                    Some(Value::Tensor(tensor)) => args.push((name, tensor.into())),
                    Some(Value::Stored(t)) => args.push((name, TensorArg::new(&t.dims, t.dtype, t.bytes()))),
                    _ => {}
                }
            }
            let results = region.run(runtime, &args).map_err(|source| OnnxError::Region {
                nodes: region.nodes.clone(),
                source: Box::new(source),
            })?;
            region.counted.call_once(|| region.count_steps(runtime));
            for ((_, tensor), slots) in results.into_iter().zip(&region.outputs) {
                for slot in slots {
                    env[*slot] = Some(Value::Tensor(tensor.clone()));
                }
            }
        }
        for (from, to) in &variant.copies {
            env[*to] = env[*from].clone();
        }
        for &index in &variant.hosts {
            let node = &self.nodes[index];
            let started = Instant::now();
            let results = self.evaluate(runtime, node, env)?;
            let micros = started.elapsed().as_micros() as u64;
            runtime.note(|r| {
                *r.host.entry(node.label()).or_default() += 1;
                *r.host_micros.entry(node.label()).or_default() += micros;
            });
            for (slot, value) in node.outputs.iter().zip(results) {
                if let Some(slot) = slot {
                    env[*slot] = Some(value);
                }
            }
        }
        Ok(())
    }

    /// A node by its host evaluation.
    fn evaluate(&self, runtime: &Runtime, node: &NodeDef, env: &Env) -> Result<Vec<Value>, OnnxError> {
        let row = ops::row_of(node)?;
        let host = row.host.ok_or_else(|| node_error(node, Refusal::Host))?;
        let mut captured = Vec::with_capacity(node.captures.len());
        for &slot in &node.captures {
            captured.push(self.operand(node, slot, env)?);
        }
        let mut inputs = Vec::with_capacity(node.inputs.len());
        for slot in &node.inputs {
            inputs.push(match slot {
                Some(slot) => Some(self.operand(node, *slot, env)?),
                None => None,
            });
        }
        host(&Host { node, inputs, captured, runtime }).map_err(|e| node_error(node, e))
    }

    fn operand(&self, node: &NodeDef, slot: Slot, env: &Env) -> Result<Value, OnnxError> {
        let Some(value) = &env[slot] else {
            let reason = format!("operand {:?} was not produced", self.slots[slot]);
            return Err(OnnxError::Node { node: node.name.clone(), op: node.label(), reason });
        };
        value.loaded().map_err(|e| node_error(node, e))
    }
}

/// The error of a node that was refused.
pub(crate) fn node_error(node: &NodeDef, refusal: Refusal) -> OnnxError {
    let (name, op) = (node.name.clone(), node.label());
    match refusal {
        Refusal::Inner(error) => *error,
        Refusal::Invalid(reason) => OnnxError::Node { node: name, op, reason },
        Refusal::Unsupported(reason) => OnnxError::Unsupported { node: name, op, reason },
        Refusal::Host => {
            let reason = "these operand types".to_owned();
            OnnxError::Unsupported { node: name, op, reason }
        }
        Refusal::NeedsValue(operand) => {
            let reason = format!("the value of operand {operand} cannot be known");
            OnnxError::Unsupported { node: name, op, reason }
        }
    }
}

/// Building one variant of a stage.
pub(crate) struct Trace<'p> {
    program: &'p Program,
    runtime: &'p Runtime,
    stage: Arc<Stage>,
    bound: Vec<Option<Bound>>,
    region: Region,
    read: BTreeSet<Slot>,
    lowered: Vec<usize>,
    hosts: Vec<usize>,
    deferred: Vec<usize>,
    over_symbols: bool,
    avoid_values: bool,
}

/// What became of a node.
enum Outcome {
    Lowered(Vec<ValueId>),
    Folded(Vec<Value>),
    Symbolic(Dims),
    Host,
    Deferred,
}

impl<'p> Trace<'p> {
    fn of(program: &'p Program, runtime: &'p Runtime, stage: &Arc<Stage>, env: &Env) -> Self {
        let bind = |(slot, value): (usize, &Option<Value>)| match &stage.constants[slot] {
            Some(constant) => Some(Bound::Const(constant.clone())),
            None => value.clone().map(Bound::Runtime),
        };
        Self {
            program,
            runtime,
            stage: Arc::clone(stage),
            bound: env.iter().enumerate().map(bind).collect(),
            region: Region::named(&program.name, false),
            read: BTreeSet::new(),
            lowered: Vec::new(),
            hosts: Vec::new(),
            deferred: Vec::new(),
            over_symbols: false,
            avoid_values: lock(&stage.variants).len() >= BY_VALUE,
        }
    }

    /// The whole program with its inputs' dims as symbols.
    fn over_symbols(program: &'p Program, runtime: &'p Runtime) -> Result<Self, OnnxError> {
        let env: Env = vec![None; program.slots.len()];
        let mut trace = Self::of(program, runtime, &program.root(&[]), &env);
        trace.over_symbols = true;
        for (slot, declared, default) in &program.inputs {
            let (Some(ElementType::Plain(dtype)), Some(dims), None) =
                (declared.element, &declared.dims, default)
            else {
                continue;
            };
            let dim = |(axis, dim): (usize, &DeclaredDim)| match (dim, Self::symbol_name(*slot, axis, dim)) {
                (DeclaredDim::Known(size), _) => Dim::Known(*size),
                (_, name) => Dim::symbol(name.unwrap_or_default()),
            };
            let shape = Shape::from_dims(dims.iter().enumerate().map(dim).collect(), dtype);
            let value = trace.region.graph.input(&format!("v{slot}"), shape);
            let value =
                value.map_err(|e| OnnxError::Graph { graph: program.name.clone(), reason: e.to_string() })?;
            trace.region.memo.insert(*slot, value);
            trace.region.inputs.push(*slot);
            trace.bound[*slot] = Some(Bound::Traced(value));
        }
        Ok(trace)
    }

    /// The symbol that stands for an input's dim; nothing for a number.
    pub(crate) fn symbol_name(slot: Slot, axis: usize, dim: &DeclaredDim) -> Option<String> {
        match dim {
            DeclaredDim::Known(_) => None,
            DeclaredDim::Named(name) => Some(name.clone()),
            DeclaredDim::Open => Some(format!("open{slot}_{axis}")),
        }
    }

    /// The dims that a node gives, where it computes them of dims that are not all known.
    fn dims_of(&self, node: &NodeDef) -> Option<Dims> {
        if node.op == "Shape" && node.domain.is_empty() {
            let Some(Bound::Traced(value)) = &self.bound[(*node.inputs.first()?)?] else { return None };
            let dims = self.region.graph.shape(*value).dims();
            let (start, end) = ops::shape_bounds(node, dims.len()).ok()?;
            return Some(Dims { dims: dims[start..end].to_vec(), scalar: false });
        }
        if !node.reads().any(|s| matches!(self.bound[s], Some(Bound::Dims(_)))) {
            return None;
        }
        let operand = |slot: &Option<Slot>| match &self.bound[(*slot)?] {
            Some(Bound::Dims(dims)) => Some(Operand::Dims(dims.clone())),
            Some(Bound::Const(value)) => {
                let dims = Dims::of(value).map(Operand::Dims);
                dims.or_else(|| value.ints().ok().map(Operand::Ints))
            }
            _ => None,
        };
        let operands: Vec<Option<Operand>> = node.inputs.iter().map(operand).collect();
        symbolic::evaluate(node, &operands)
    }

    fn build(mut self) -> Result<Variant, OnnxError> {
        let env = self.bound.clone();
        let mut by_host: HashSet<Slot> = HashSet::new();
        let stage = Arc::clone(&self.stage);
        for &index in &stage.remaining {
            let node = &self.program.nodes[index];
            let missing: Vec<Slot> = node.reads().filter(|&s| self.bound[s].is_none()).collect();
            let outcome = match missing.is_empty() {
                true => self.node(node)?,
                false
                    if missing.iter().all(|s| by_host.contains(s)) && ops::row_of(node)?.lower.is_none() =>
                {
                    Outcome::Host
                }
                false => Outcome::Deferred,
            };
            match outcome {
                Outcome::Lowered(values) => {
                    self.bind(node, values.into_iter().map(Bound::Traced));
                    self.lowered.push(index);
                }
                Outcome::Folded(values) => self.bind(node, values.into_iter().map(Bound::Const)),
                Outcome::Symbolic(dims) => {
                    let numbers: Option<Vec<i64>> =
                        dims.dims.iter().map(|d| d.known().and_then(|v| i64::try_from(v).ok())).collect();
                    let bound = match numbers {
                        Some(numbers) if !dims.scalar => Bound::Const(int_vector(&numbers)),
                        _ => Bound::Dims(dims),
                    };
                    self.bind(node, [bound].into_iter());
                }
                Outcome::Host | Outcome::Deferred if self.over_symbols => {
                    let reason = "its result depends on values, not on extents alone".to_owned();
                    return Err(node_error(node, Refusal::Unsupported(reason)));
                }
                Outcome::Host => {
                    by_host.extend(node.outputs.iter().flatten());
                    self.hosts.push(index);
                }
                Outcome::Deferred => self.deferred.push(index),
            }
        }
        self.finish(&env)
    }

    fn bind(&mut self, node: &NodeDef, results: impl Iterator<Item = Bound>) {
        for (slot, result) in node.outputs.iter().zip(results) {
            let Some(slot) = *slot else { continue };
            let constant = match &result {
                Bound::Traced(value) => self.region.graph.as_const(*value).cloned(),
                _ => None,
            };
            self.bound[slot] = Some(constant.map_or(result, |t| Bound::Const(Value::Tensor(t))));
        }
    }

    fn node(&mut self, node: &'p NodeDef) -> Result<Outcome, OnnxError> {
        let row = ops::row_of(node)?;
        if self.over_symbols
            && let Some(dims) = self.dims_of(node)
        {
            return Ok(Outcome::Symbolic(dims));
        }
        let constants = node.reads().all(|s| matches!(self.bound[s], Some(Bound::Const(_))));
        let bytes = node.reads().map(|s| match &self.bound[s] {
            Some(Bound::Const(value)) => value.bytes(),
            _ => 0,
        });
        let small = bytes.sum::<usize>() <= row.fold_bytes;
        if constants
            && !row.impure
            && (small || row.lower.is_none())
            && let Some(values) = self.fold(node, row)?
        {
            self.runtime.note(|r| *r.folded.entry(node.label()).or_default() += 1);
            return Ok(Outcome::Folded(values));
        }
        let Some(lower) = row.lower else { return Ok(self.host_or_later(node)) };
        let result = lower(&mut Lowering {
            node,
            region: &mut self.region,
            bound: &self.bound,
            read: &mut self.read,
            weights: self.runtime.session().weights(),
            prefix: &self.program.prefix,
            initial: &self.program.initial,
            avoid_values: self.avoid_values && row.host.is_some(),
        });
        match result {
            Ok(values) => Ok(Outcome::Lowered(values)),
            Err(Refusal::NeedsValue(_)) => Ok(Outcome::Deferred),
            Err(Refusal::Host) if row.host.is_some() => Ok(self.host_or_later(node)),
            Err(refusal) => Err(node_error(node, refusal)),
        }
    }

    /// Evaluated after the region.
    fn host_or_later(&self, _node: &NodeDef) -> Outcome {
        Outcome::Host
    }

    /// The results of a node whose operands are all known.
    fn fold(&mut self, node: &NodeDef, row: &ops::Row) -> Result<Option<Vec<Value>>, OnnxError> {
        if let Some(host) = row.host {
            let value = |slot: &Slot| match &self.bound[*slot] {
                Some(Bound::Const(value)) => value.loaded().ok(),
                _ => None,
            };
            let inputs = node.inputs.iter().map(|slot| slot.as_ref().and_then(value)).collect();
            let captured = node.captures.iter().filter_map(value).collect();
            let cx = Host { node, inputs, captured, runtime: self.runtime };
            match host(&cx) {
                Ok(values) => return Ok(Some(values)),
                Err(Refusal::Host) if row.lower.is_some() => {}
                Err(refusal) => return Err(node_error(node, refusal)),
            }
        }
        let Some(lower) = row.lower else { return Ok(None) };
        let mut region = Region::named("fold", true);
        let lowered = lower(&mut Lowering {
            node,
            region: &mut region,
            bound: &self.bound,
            read: &mut BTreeSet::new(),
            weights: self.runtime.session().weights(),
            prefix: "",
            initial: &HashSet::new(),
            avoid_values: false,
        });
        let values = match lowered {
            Ok(values) => values,
            Err(Refusal::Host) => return Ok(None),
            Err(refusal) => return Err(node_error(node, refusal)),
        };
        let names: Vec<String> = (0..values.len()).map(|i| i.to_string()).collect();
        let outputs: Vec<(&str, ValueId)> = names.iter().map(String::as_str).zip(values).collect();
        let graph = &mut region.graph;
        let run = graph
            .set_outputs(&outputs)
            .map_err(Refusal::from)
            .and_then(|()| interpret(graph, &[], &|_| None, &mut BTreeMap::new()).map_err(Refusal::from));
        let results = run.map_err(|e| node_error(node, e))?;
        Ok(Some(results.into_iter().map(|(_, tensor)| Value::Tensor(tensor)).collect()))
    }

    /// Slots that something after the region reads.
    fn needed(&self) -> BTreeSet<Slot> {
        let later = self.hosts.iter().chain(&self.deferred);
        let reads = later.flat_map(|&i| self.program.nodes[i].reads());
        reads.chain(self.program.outputs.iter().map(|(slot, _)| *slot)).collect()
    }

    fn finish(mut self, env: &[Option<Bound>]) -> Result<Variant, OnnxError> {
        let shapes = |slot: &Slot| matches!(self.bound[*slot], Some(Bound::Dims(_)) | None);
        if self.over_symbols && self.program.outputs.iter().any(|(slot, _)| shapes(slot)) {
            let reason = "an output is a shape".to_owned();
            return Err(OnnxError::Graph { graph: self.program.name.clone(), reason });
        }
        let guards = self.guards(env);
        let mut copies = Vec::new();
        let mut outputs: Vec<(ValueId, Vec<Slot>)> = Vec::new();
        let sources: HashMap<ValueId, Slot> = self.region.memo.iter().map(|(s, v)| (*v, *s)).collect();
        for slot in self.needed() {
            let Some(Bound::Traced(value)) = &self.bound[slot] else { continue };
            match self.region.graph.value(*value).source {
                Source::Input | Source::Param => copies.extend(sources.get(value).map(|from| (*from, slot))),
                _ => match outputs.iter_mut().find(|(v, _)| v == value) {
                    Some((_, slots)) => slots.push(slot),
                    None => outputs.push((*value, vec![slot])),
                },
            }
        }
        let mut constants = self.stage.constants.clone();
        for (slot, bound) in self.bound.iter().enumerate() {
            if let Some(Bound::Const(value)) = bound {
                constants[slot].get_or_insert_with(|| value.clone());
            }
        }
        let by_host = self.hosts.iter().flat_map(|&i| self.program.nodes[i].reads());
        let read: BTreeSet<Slot> = by_host.chain(copies.iter().map(|(from, _)| *from)).collect();
        let read_constants =
            read.into_iter().filter_map(|slot| Some((slot, constants[slot].clone()?))).collect();
        let region = if outputs.is_empty() { None } else { Some(Arc::new(self.compile(&outputs)?)) };
        let next = Stage { remaining: self.deferred, constants, variants: Mutex::default() };
        Ok(Variant {
            guards,
            region,
            copies,
            constants: read_constants,
            hosts: self.hosts,
            next: Arc::new(next),
        })
    }

    fn guards(&self, env: &[Option<Bound>]) -> Vec<Guard> {
        let used: BTreeSet<Slot> =
            self.stage.remaining.iter().flat_map(|&i| self.program.nodes[i].reads()).collect();
        let guard = |slot: Slot| match &env[slot] {
            Some(Bound::Runtime(value)) => Some(Guard {
                slot,
                element: value.element(),
                dims: value.dims().map(<[usize]>::to_vec),
                value: self.read.contains(&slot).then(|| value.clone()),
            }),
            _ => None,
        };
        used.into_iter().filter_map(guard).collect()
    }

    fn compile(&mut self, outputs: &[(ValueId, Vec<Slot>)]) -> Result<CompiledRegion, OnnxError> {
        let nodes = self.describe();
        let names: Vec<String> = outputs.iter().map(|(_, slots)| format!("v{}", slots[0])).collect();
        let pairs: Vec<(&str, ValueId)> =
            names.iter().map(String::as_str).zip(outputs.iter().map(|(v, _)| *v)).collect();
        let fail =
            |source: rlx::SessionError| OnnxError::Region { nodes: nodes.clone(), source: Box::new(source) };
        self.region.graph.set_outputs(&pairs).map_err(|e| fail(e.into()))?;
        let (compiled, at) = self.runtime.compile(&nodes, &self.region.graph, 0).map_err(fail)?;
        self.runtime.note(|r| {
            r.regions += 1;
            for &index in &self.lowered {
                *r.compiled.entry(self.program.nodes[index].label()).or_default() += 1;
            }
        });
        let known: HashSet<String> = compiled.inputs().iter().map(|i| i.name.clone()).collect();
        let inputs = self.region.inputs.iter().map(|&slot| (slot, format!("v{slot}")));
        Ok(CompiledRegion {
            inputs: inputs.filter(|(_, name)| known.contains(name)).collect(),
            outputs: outputs.iter().map(|(_, slots)| slots.clone()).collect(),
            graph: compiled,
            at,
            moved: OnceLock::new(),
            nodes,
            source: std::mem::replace(&mut self.region.graph, Graph::new("")),
            times: OnceLock::new(),
            counted: Once::new(),
        })
    }

    /// The region's nodes in a few words.
    fn describe(&self) -> String {
        let name = |&index: &usize| {
            let node = &self.program.nodes[index];
            format!("node {:?} ({})", node.name, node.label())
        };
        let first: Vec<String> = self.lowered.iter().take(3).map(name).collect();
        let rest = self.lowered.len().saturating_sub(first.len());
        let more = if rest > 0 { format!(" and {rest} more") } else { String::new() };
        format!("region of {}{more}", first.join(", "))
    }
}
