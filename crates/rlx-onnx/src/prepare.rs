//! What becomes of a model for inputs of given extents, before anything runs: compiled regions, what is left to the host, memory.

use crate::error::OnnxError;
use crate::model::DeclaredDim;
use crate::program::{Trace, Variant};
use crate::runtime::Runtime;
use crate::value::{ElementType, Value};
use crate::{Declared, OnnxModel};
use rlx::memory::{MemoryEstimate, estimate_with};
use rlx::plan::Lir;
use rlx::session::{State, StepTimes};
use rlx::{CompiledGraph, SessionError, TensorArg};
use rlx_graph::Graph;
use rlx_graph::eval::from_f64;
use rlx_graph::interpret::nearest_name;
use rlx_tensor::{DimBinding, Symbol, Tensor};
use std::sync::{Arc, Once, OnceLock};

/// Graph, plan and schedule, what the allocator holds back, stacks of the workers, and the pages of the program that running touches.
const SLACK_BYTES: u64 = 20 << 20;

/// A region of a model as its device runs it.
pub struct CompiledRegion {
    /// For the device that took it when it was compiled.
    pub(crate) graph: CompiledGraph,
    /// That device's position.
    pub(crate) at: usize,
    /// For a later device, and its position, if that one could not run it.
    pub(crate) moved: OnceLock<(CompiledGraph, usize)>,
    pub(crate) inputs: Vec<(usize, String)>,
    pub(crate) outputs: Vec<Vec<usize>>,
    pub(crate) nodes: String,
    pub(crate) source: Graph,
    /// With the position of the device whose steps they are of.
    pub(crate) times: OnceLock<(usize, StepTimes)>,
    /// Done once its steps are in the model's report: kernels are chosen when weights are packed, which a plan does not need.
    pub(crate) counted: Once,
}

impl CompiledRegion {
    /// The executable.
    pub fn graph(&self) -> &CompiledGraph {
        self.placed().0
    }

    fn placed(&self) -> (&CompiledGraph, usize) {
        self.moved.get().map_or((&self.graph, self.at), |(graph, at)| (graph, *at))
    }

    /// Runs it on its device, or on the first after it that can.
    pub(crate) fn run(
        &self,
        runtime: &Runtime,
        args: &[(&str, TensorArg<'_>)],
    ) -> Result<Vec<(String, Tensor)>, SessionError> {
        let (graph, mut at) = self.placed();
        let times = self.times.get().filter(|(of, _)| *of == at);
        let control = times.map(|(_, times)| times.control()).unwrap_or_default();
        let mut error = match graph.run_controlled(&mut State::default(), args, control) {
            Err(error) => error,
            results => return results,
        };
        loop {
            at = runtime.after(&self.nodes, at, error)?;
            let (graph, taken) = runtime.compile(&self.nodes, &self.source, at)?;
            at = taken;
            error = match graph.run(args) {
                Err(error) => error,
                results => {
                    // Another run may have moved it meanwhile.
                    let _ = self.moved.set((graph, at));
                    if self.counted.is_completed() {
                        self.count_steps(runtime);
                    }
                    return results;
                }
            };
        }
    }

    /// The graph as it was imported.
    pub fn source(&self) -> &Graph {
        &self.source
    }

    /// Adds its steps to the model's report. It has run, so that it can be reported.
    pub(crate) fn count_steps(&self, runtime: &Runtime) {
        let Ok(report) = self.graph().report() else { return };
        runtime.note(|r| {
            *r.devices.entry(report.backend.clone()).or_default() += report.steps.len();
            for step in &report.steps {
                *r.steps.entry(step.op.clone()).or_default() += 1;
            }
            for step in report.steps.iter().filter(|step| !step.native) {
                *r.reference.entry(step.op.clone()).or_default() += 1;
            }
        });
    }

    /// Its nodes in a few words.
    pub fn nodes(&self) -> &str {
        &self.nodes
    }

    /// Times of its steps, if [`OnnxModel::time_steps`] asked for them.
    pub fn times(&self) -> Option<&StepTimes> {
        self.times.get().map(|(_, times)| times)
    }
}

/// A model for inputs of given extents, compiled as far as extents alone decide.
pub struct Prepared {
    pub(crate) variant: Arc<Variant>,
    binding: DimBinding,
    lir: Option<Lir>,
    /// The sum of what each input and the region's plan take.
    pub estimate: MemoryEstimate,
    /// Nodes that are evaluated after the region, `domain::op`, in order.
    pub host: Vec<String>,
    /// Nodes whose form depends on values that only a run knows, in order: they are compiled when it gets there.
    pub later: Vec<String>,
}

impl Prepared {
    /// The region that runs first; nothing if no node is part of one.
    pub fn region(&self) -> Option<&CompiledRegion> {
        self.variant.region.as_deref()
    }

    /// The region's plan at these extents.
    pub fn lir(&self) -> Option<&Lir> {
        self.lir.as_ref()
    }

    /// What the region's symbols are.
    pub fn binding(&self) -> &DimBinding {
        &self.binding
    }
}

impl Declared {
    /// Its extents, each a number or given by `size`, which gets the dim's name; for a dim without one `INPUT.AXIS`.
    ///
    /// # Errors
    /// The name of a dim that has no size; nothing for an input without rank or dtype.
    pub fn extents(&self, size: impl Fn(&str) -> Option<usize>) -> Result<Vec<usize>, Option<String>> {
        let dims = self.dims.as_ref().filter(|_| self.element.is_some()).ok_or(None)?;
        let extent = |(axis, dim): (usize, &DeclaredDim)| match (dim, self.open_name(axis, dim)) {
            (DeclaredDim::Known(extent), _) => Ok(*extent),
            (_, name) => name.as_deref().and_then(&size).ok_or(name),
        };
        dims.iter().enumerate().map(extent).collect()
    }

    /// The name by which a dim that is no number gets its size: its own, or `INPUT.AXIS`.
    fn open_name(&self, axis: usize, dim: &DeclaredDim) -> Option<String> {
        match dim {
            DeclaredDim::Known(_) => None,
            DeclaredDim::Named(name) => Some(name.clone()),
            DeclaredDim::Open => Some(format!("{}.{axis}", self.name)),
        }
    }

    /// A tensor of ones for it.
    ///
    /// # Errors
    /// [`OnnxError::Input`] for an input that is no tensor of numbers.
    pub fn ones(&self, dims: &[usize]) -> Result<Value, OnnxError> {
        let fail = |reason: String| OnnxError::Input { name: self.name.clone(), reason };
        let Some(ElementType::Plain(dtype)) = self.element else {
            return Err(fail("only tensors of numbers can be made up".to_owned()));
        };
        let ones = vec![1.0; dims.iter().product()];
        from_f64(dims, dtype, &ones).map(Value::Tensor).map_err(|e| fail(e.to_string()))
    }
}

impl OnnxModel {
    /// Inputs that every run is given.
    pub fn required_inputs(&self) -> impl Iterator<Item = &Declared> {
        self.program.inputs().filter(|(_, required)| *required).map(|(declared, _)| declared)
    }

    /// Names of the dims of required inputs that are no numbers, each once; `INPUT.AXIS` for one without a name.
    pub fn open_dims(&self) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        for declared in self.required_inputs() {
            for (axis, dim) in declared.dims.iter().flatten().enumerate() {
                if let Some(name) = declared.open_name(axis, dim)
                    && !names.contains(&name)
                {
                    names.push(name);
                }
            }
        }
        names
    }

    /// Sizes of the open dims that these inputs have; the first input that has a dim says how large it is.
    pub fn sizes_of(&self, inputs: &[(&str, Value)]) -> Vec<(String, usize)> {
        let mut sizes: Vec<(String, usize)> = Vec::new();
        for declared in self.required_inputs() {
            let given = inputs.iter().find(|(name, _)| *name == declared.name);
            let extents = given.and_then(|(_, value)| value.dims()).unwrap_or_default();
            for (axis, (dim, &extent)) in declared.dims.iter().flatten().zip(extents).enumerate() {
                if let Some(name) = declared.open_name(axis, dim)
                    && sizes.iter().all(|(known, _)| *known != name)
                {
                    sizes.push((name, extent));
                }
            }
        }
        sizes
    }

    /// Extents of the required inputs by the sizes of their open dims.
    ///
    /// # Errors
    /// [`OnnxError::Input`] for a dim without a size, a size of a dim that there is not, an input of unknown rank or dtype.
    pub fn extents(&self, sizes: &[(String, usize)]) -> Result<Vec<(String, Vec<usize>)>, OnnxError> {
        let open = self.open_dims();
        if let Some((name, _)) = sizes.iter().find(|(name, _)| !open.contains(name)) {
            let nearest = nearest_name(name, open.iter().map(String::as_str));
            let hint = nearest.map_or_else(String::new, |near| format!("; the nearest name is {near:?}"));
            let reason = format!("no input has such a dim{hint}");
            return Err(OnnxError::Input { name: name.clone(), reason });
        }
        let size = |name: &str| sizes.iter().find(|(known, _)| known == name).map(|(_, size)| *size);
        let extents = |declared: &Declared| match declared.extents(size) {
            Ok(dims) => Ok((declared.name.clone(), dims)),
            Err(Some(dim)) => Err(OnnxError::Input {
                name: declared.name.clone(),
                reason: format!("dim {dim:?} has no size; give it as {dim}=N"),
            }),
            Err(None) => Err(OnnxError::Input {
                name: declared.name.clone(),
                reason: "the file does not say its rank and dtype".to_owned(),
            }),
        };
        self.required_inputs().map(extents).collect()
    }

    /// Compiles what extents alone decide, and plans its memory. Nothing runs, and no weight is packed.
    ///
    /// # Errors
    /// As [`OnnxModel::extents`]; errors of nodes and regions.
    pub fn prepare(&self, sizes: &[(String, usize)]) -> Result<Prepared, OnnxError> {
        let extents = self.extents(sizes)?;
        if let Some((variant, binding)) = self.over_symbols(&extents)? {
            match self.planned(variant, binding) {
                Err(error) if self.program.is_compiled() => return Err(error),
                Err(_) => {}
                prepared => return prepared,
            }
        }
        let mut env = vec![None; self.program.slot_count()];
        for (slot, declared, required) in self.program.input_slots() {
            let Some((_, dims)) = extents.iter().find(|(name, _)| required && *name == declared.name) else {
                continue;
            };
            env[slot] = Some(zeros(declared, dims)?);
        }
        let stage = self.program.root(&self.program.required_slots());
        let variant = self.program.variant(&self.runtime, &stage, &env)?;
        self.planned(variant, DimBinding::new())
    }

    /// The graph over the model's symbols, if it can be built, with the symbols' values.
    pub(crate) fn over_symbols(
        &self,
        extents: &[(String, Vec<usize>)],
    ) -> Result<Option<(Arc<Variant>, DimBinding)>, OnnxError> {
        let Some(variant) = self.program.template(&self.runtime) else { return Ok(None) };
        let mut binding = DimBinding::new();
        for (slot, declared, _) in self.program.input_slots() {
            let Some((name, dims)) = extents.iter().find(|(name, _)| *name == declared.name) else {
                continue;
            };
            let fail = |reason: String| OnnxError::Input { name: name.clone(), reason };
            for (axis, (dim, &extent)) in declared.dims.iter().flatten().zip(dims).enumerate() {
                if let Some(symbol) = Trace::symbol_name(slot, axis, dim) {
                    binding.bind(&Symbol::new(symbol), extent).map_err(|e| fail(e.to_string()))?;
                }
            }
        }
        Ok(Some((variant, binding)))
    }

    pub(crate) fn planned(&self, variant: Arc<Variant>, binding: DimBinding) -> Result<Prepared, OnnxError> {
        let labels = |nodes: &[usize]| nodes.iter().map(|&i| self.program.nodes()[i].label()).collect();
        let (host, later) = (labels(&variant.hosts), labels(&variant.next.remaining));
        let Some(region) = variant.region.clone() else {
            let estimate = MemoryEstimate::default();
            return Ok(Prepared { variant, binding, lir: None, estimate, host, later });
        };
        let fail = |source: SessionError| OnnxError::Region {
            nodes: region.nodes.clone(),
            source: Box::new(source),
        };
        let (graph, at) = region.placed();
        let lir = graph.specialize(&binding).map_err(fail)?;
        let session = self.runtime.device(at);
        let mut estimate = estimate_with(&lir, &**session.backend(), session.weights()).map_err(fail)?;
        estimate.host_bytes = SLACK_BYTES;
        Ok(Prepared { variant, binding, lir: Some(lir), estimate, host, later })
    }

    /// Every region that was compiled so far, in no particular order.
    pub fn regions(&self) -> Vec<Arc<CompiledRegion>> {
        self.program.regions()
    }

    /// From now on every region that there is adds up its steps' times.
    ///
    /// # Errors
    /// [`OnnxError::Region`] if a region cannot report its steps.
    pub fn time_steps(&self) -> Result<(), OnnxError> {
        for region in self.regions() {
            let (graph, at) = region.placed();
            let times = StepTimes::new(graph).map_err(|source| OnnxError::Region {
                nodes: region.nodes.clone(),
                source: Box::new(source),
            })?;
            region.times.get_or_init(|| (at, times));
        }
        Ok(())
    }

    /// Bytes of the file and its external data that importing it read.
    pub fn bytes_read(&self) -> u64 {
        self.program.bytes_read()
    }
}

fn zeros(declared: &Declared, dims: &[usize]) -> Result<Value, OnnxError> {
    let fail = |reason: String| OnnxError::Input { name: declared.name.clone(), reason };
    let Some(ElementType::Plain(dtype)) = declared.element else {
        return Err(fail("only tensors of numbers can be planned for".to_owned()));
    };
    Tensor::zeros(dims, dtype).map(Value::Tensor).map_err(|e| fail(e.to_string()))
}
