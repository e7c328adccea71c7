//! From a template's steps to schedule steps: operands, weights in the forms kernels read, constants.

use super::{CpuBackend, ops};
use crate::backend::BackendError;
use crate::memory::experts::{ExpertPool, ExpertWeight};
use crate::plan::{BufferKind, Place, StepSpec, Template};
use crate::weights::{Packed, PackedKey, PinGuard, WeightRegistry};
use rlx_graph::eval::to_f64;
use rlx_kernels::gemm::{
    PackError, PackedLayout, PackedMatrix, Precision, Products, WeightOrder, WeightPart, WeightType, pack_on,
};
use rlx_kernels::isa::Isa;
use rlx_kernels::schedule::{Operand, Schedule, SharedBytes, Step};
use rlx_kernels::steps::solo::{SoloInput, SoloOutput, SoloStep};
use rlx_tensor::storage::AlignedBytes;
use rlx_tensor::{DType, Dim, Symbol, Tensor};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// What can be asked of a template without weights.
pub(super) struct ShapeCx<'t> {
    pub template: &'t Template,
    pub isa: Isa,
    pub precision: Precision,
    /// Experts of a layer that are in memory at once; all if none.
    pub expert_slots: Option<usize>,
}

/// The weights of a linear layer: how many, how they lie, whether gate and up are interleaved.
pub(super) struct MatrixSpec<'s> {
    pub weights: &'s [Place],
    pub transposed: bool,
    pub gated: bool,
}

impl<'t> ShapeCx<'t> {
    pub fn new(template: &'t Template, backend: &CpuBackend) -> Self {
        let expert_slots = backend.experts.as_ref().map(|pool| pool.slots());
        Self { template, isa: backend.isa, precision: backend.precision, expert_slots }
    }

    /// How products are formed.
    pub fn products(&self) -> Products {
        Products::choose(self.precision, self.isa)
    }

    /// The number a size is, if it has no symbols.
    pub fn known(&self, place: &Place, axis: usize) -> Option<usize> {
        self.template.sizes().known(*place.dims.get(axis)?)
    }

    /// The name of the param a place is the whole of.
    pub fn param<'p>(&'p self, place: &Place) -> Option<&'p str> {
        match self.template.buffers()[place.buffer.index()].kind {
            BufferKind::Param(i) if place.is_whole() => Some(&self.template.params()[i].name),
            _ => None,
        }
    }

    /// The packed layout of a linear layer's weights; `None` if they are no params of known size and supported dtype.
    pub fn matrix_layout(&self, spec: &MatrixSpec<'_>) -> Option<PackedLayout> {
        let (mut n, mut k, mut dtypes) = (0, None, Vec::with_capacity(spec.weights.len()));
        for weight in spec.weights {
            self.param(weight)?;
            let (rows, columns) = (self.known(weight, 0)?, self.known(weight, 1)?);
            let (part_n, part_k) = if spec.transposed { (columns, rows) } else { (rows, columns) };
            n += part_n;
            k = Some(part_k);
            dtypes.push(weight_type(weight.dtype)?);
        }
        let dtype = self.precision.packed_type(dtypes)?;
        PackedLayout::new(dtype, n, k?, spec.gated, self.isa).ok()
    }

    /// Params that some step reads as a packed matrix of their own.
    pub fn packed_alone(&self) -> HashSet<String> {
        let mut packed = HashSet::new();
        for step in self.template.steps() {
            if let Some(spec) = ops::linear::matrix_of(step)
                && let [only] = spec.weights
                && !spec.transposed
                && self.matrix_layout(&spec).is_some()
                && let Some(name) = self.param(only)
            {
                packed.insert(name.to_owned());
            }
        }
        packed
    }
}

/// The kernels' name of a weight's dtype.
pub(super) fn weight_type(dtype: DType) -> Option<WeightType> {
    match dtype {
        DType::F32 => Some(WeightType::F32),
        DType::BF16 => Some(WeightType::Bf16),
        DType::F16 => Some(WeightType::F16),
        _ => None,
    }
}

/// Bytes of the copies of weights that the CPU makes for a template.
pub(super) fn packed_bytes(template: &Template, backend: &CpuBackend) -> Result<usize, BackendError> {
    let cx = ShapeCx::new(template, backend);
    let mut counted = HashSet::new();
    let mut total = 0usize;
    for step in template.steps() {
        let Some(op) = ops::find(step.op.def().name()) else { continue };
        for (key, bytes) in op.packed(&cx, step) {
            if counted.insert(key) {
                total = total.saturating_add(bytes);
            }
        }
    }
    Ok(total)
}

/// The state of lowering one template.
pub(super) struct LowerCx<'a> {
    template: &'a Template,
    weights: &'a WeightRegistry,
    backend: &'a CpuBackend,
    schedule: Schedule,
    bound: HashSet<usize>,
    vectors: HashMap<String, Arc<[f32]>>,
    packed_alone: HashSet<String>,
    step: Option<&'a StepSpec>,
}

/// Keeps a weight's storage in while a schedule reads it.
struct Pinned(PinGuard);

impl AsRef<[u8]> for Pinned {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
    }
}

struct Aligned(AlignedBytes);

impl AsRef<[u8]> for Aligned {
    fn as_ref(&self) -> &[u8] {
        self.0.as_slice()
    }
}

struct Constant(Tensor);

impl AsRef<[u8]> for Constant {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
    }
}

impl<'a> LowerCx<'a> {
    pub fn new(template: &'a Template, weights: &'a WeightRegistry, backend: &'a CpuBackend) -> Self {
        let packed_alone = ShapeCx::new(template, backend).packed_alone();
        Self {
            template,
            weights,
            backend,
            schedule: Schedule::new(),
            bound: HashSet::new(),
            vectors: HashMap::new(),
            packed_alone,
            step: None,
        }
    }

    pub fn shapes(&self) -> ShapeCx<'a> {
        ShapeCx::new(self.template, self.backend)
    }

    pub fn isa(&self) -> Isa {
        self.backend.isa()
    }

    /// The precision of products.
    pub fn precision(&self) -> Precision {
        self.backend.precision
    }

    /// How products are formed.
    pub fn products(&self) -> Products {
        self.shapes().products()
    }

    /// Adds the schedule step of a template step; false if it runs by the reference evaluation.
    pub fn lower(&mut self, step: &'a StepSpec) -> Result<bool, BackendError> {
        self.step = Some(step);
        let lowered = match ops::find(step.op.def().name()) {
            Some(op) => op.lower(self, step)?,
            None => None,
        };
        let native = lowered.is_some();
        let kernel = match lowered {
            Some(kernel) => kernel,
            None => self.reference(step)?,
        };
        self.bind_params(kernel.as_ref())?;
        self.schedule.push(kernel);
        Ok(native)
    }

    /// The finished schedule.
    pub fn finish(self) -> Schedule {
        self.schedule
    }

    /// A place as kernels see it.
    pub fn operand(&self, place: &Place) -> Operand {
        Operand {
            region: place.buffer.index(),
            offset: place.offset,
            dims: place.dims.iter().map(|d| d.index()).collect(),
            stride: place.stride,
            dtype: place.dtype,
        }
    }

    /// An error about the step being lowered.
    pub fn unsupported(&self, reason: impl Into<String>) -> BackendError {
        let (op, location) = match self.step {
            Some(step) => (step.op.def().name().to_owned(), step.location.clone()),
            None => ("lowering".to_owned(), String::new()),
        };
        BackendError::Unsupported { op, location, reason: reason.into() }
    }

    fn guard(&self, name: &str) -> Result<PinGuard, BackendError> {
        let handle = self.weights.lookup(name);
        let handle = handle.ok_or_else(|| BackendError::Unset { name: name.to_owned() })?;
        Ok(self.weights.guard(handle)?)
    }

    /// True if this param is read as a packed matrix by a linear layer anyway.
    pub fn is_packed_alone(&self, name: &str) -> bool {
        self.packed_alone.contains(name)
    }

    /// A param or constant as f32 values, shared by all steps that ask.
    pub fn vector(&mut self, place: &Place) -> Result<Option<Arc<[f32]>>, BackendError> {
        let tensor = match &self.template.buffers()[place.buffer.index()].kind {
            BufferKind::Const(tensor) if place.is_whole() => tensor.clone(),
            BufferKind::Param(i) if place.is_whole() => {
                let name = &self.template.params()[*i].name;
                if let Some(known) = self.vectors.get(name) {
                    return Ok(Some(Arc::clone(known)));
                }
                let guard = self.guard(name)?;
                let len = guard.bytes().len() / place.dtype.element_bytes().unwrap_or(1);
                let tensor = Tensor::from_bytes(&[len], place.dtype, guard.bytes());
                tensor.map_err(|e| self.unsupported(e.to_string()))?
            }
            _ => return Ok(None),
        };
        let values = to_f64(&tensor).map_err(|e| self.unsupported(e.to_string()))?;
        let values: Arc<[f32]> = values.into_iter().map(|v| v as f32).collect();
        if let BufferKind::Param(i) = self.template.buffers()[place.buffer.index()].kind {
            self.vectors.insert(self.template.params()[i].name.clone(), Arc::clone(&values));
        }
        Ok(Some(values))
    }

    /// The packed matrix of a linear layer's weights, made once for a storage and layout; `None` if the kernels have no layout for
    /// them.
    pub fn matrix(&self, spec: &MatrixSpec<'_>) -> Result<Option<PackedMatrix>, BackendError> {
        let shapes = self.shapes();
        if shapes.matrix_layout(spec).is_none() {
            return Ok(None);
        }
        let names: Vec<&str> = spec.weights.iter().filter_map(|w| shapes.param(w)).collect();
        let guards = names.iter().map(|n| self.guard(n)).collect::<Result<Vec<_>, _>>()?;
        let Some(first) = guards.first() else { return Ok(None) };
        let mut layout = format!("panels gated={} transposed={}", spec.gated, spec.transposed);
        for (guard, name) in guards.iter().zip(&names) {
            layout += &format!(" {name}#{}", guard.entry().version());
        }
        let key = PackedKey::new(layout, self.isa().to_string(), self.backend.precision.name());
        let packed = first.packed_or_insert_with(&key, |_| {
            let mut parts = Vec::with_capacity(guards.len());
            for (guard, weight) in guards.iter().zip(spec.weights) {
                parts.push(self.part(&shapes, guard, weight, spec.transposed)?);
            }
            let matrix = pack_on(self.backend.pool(), &parts, spec.gated, self.isa(), self.precision());
            let matrix = matrix.map_err(|e: PackError| self.unsupported(e.to_string()))?;
            let bytes = matrix.bytes().len() as u64;
            Ok::<_, BackendError>(Packed::new(matrix, bytes))
        })?;
        Ok(packed.downcast_ref::<PackedMatrix>().cloned())
    }

    /// The backend's pool of experts.
    pub fn expert_pool(&self) -> Option<&ExpertPool> {
        self.backend.experts.as_deref()
    }

    /// A weight of an expert for the pool.
    pub fn expert_weight(&self, place: &Place) -> Result<ExpertWeight, BackendError> {
        let shapes = self.shapes();
        let sizes = (shapes.known(place, 0), shapes.known(place, 1), weight_type(place.dtype));
        let (Some(n), Some(k), Some(dtype), Some(name)) = (sizes.0, sizes.1, sizes.2, shapes.param(place))
        else {
            return Err(self.unsupported("the weight's size or dtype has no packed layout"));
        };
        Ok(ExpertWeight { guard: self.guard(name)?, n, k, dtype })
    }

    fn part<'g>(
        &self,
        shapes: &ShapeCx<'_>,
        guard: &'g PinGuard,
        weight: &Place,
        transposed: bool,
    ) -> Result<WeightPart<'g>, BackendError> {
        let sizes = (shapes.known(weight, 0), shapes.known(weight, 1), weight_type(weight.dtype));
        let (Some(rows), Some(columns), Some(dtype)) = sizes else {
            return Err(self.unsupported("the weight's size or dtype has no packed layout"));
        };
        let (n, k) = if transposed { (columns, rows) } else { (rows, columns) };
        let order = if transposed { WeightOrder::Transposed } else { WeightOrder::RowMajor };
        Ok(WeightPart { bytes: guard.bytes(), dtype, n, k, order })
    }

    /// Binds the params and constants a step reads as they are.
    fn bind_params(&mut self, step: &dyn Step) -> Result<(), BackendError> {
        let mut regions = Vec::new();
        step.operands(&mut |operand, _| regions.push(operand.region));
        for region in regions {
            let bytes: SharedBytes = match &self.template.buffers()[region].kind {
                _ if self.bound.contains(&region) => continue,
                BufferKind::Const(tensor) => Arc::new(Constant(tensor.clone())),
                BufferKind::Param(i) => {
                    let guard = self.guard(&self.template.params()[*i].name)?;
                    match (guard.bytes().as_ptr() as usize).is_multiple_of(8) {
                        true => Arc::new(Pinned(guard)),
                        false => Arc::new(Aligned(AlignedBytes::copied_from(guard.bytes()))),
                    }
                }
                _ => continue,
            };
            self.bound.insert(region);
            self.schedule.share(region, bytes);
        }
        Ok(())
    }

    /// A step that evaluates the op's reference on one worker. Ops that update states have no such step.
    fn reference(&self, step: &StepSpec) -> Result<Box<dyn Step>, BackendError> {
        if !step.op.def().props().writes.is_empty() {
            return Err(self.unsupported("the CPU has no kernel for this form of a state-updating op"));
        }
        let operands = |places: &[Place]| places.iter().map(|p| self.operand(p)).collect::<Vec<_>>();
        let (inputs, outputs) = (operands(&step.inputs), operands(&step.outputs));
        let dtypes: Vec<DType> = step.inputs.iter().map(|p| p.dtype).collect();
        let op = step.op.clone();
        let dims_of = |places: &[Place]| -> Vec<Vec<Dim>> {
            let dims = |p: &Place| p.dims.iter().map(|&d| self.template.sizes().dim(d).clone()).collect();
            places.iter().map(dims).collect()
        };
        let (operand_dims, result_dims) = (dims_of(&step.inputs), dims_of(&step.outputs));
        let body = move |inputs: &[SoloInput<'_>], outputs: &mut [SoloOutput<'_>]| {
            let mut known: HashMap<Symbol, usize> = HashMap::new();
            let extents = inputs.iter().map(|i| &i.extents).chain(outputs.iter().map(|o| &o.extents));
            for (extents, dims) in extents.zip(operand_dims.iter().chain(&result_dims)) {
                for (extent, dim) in extents.iter().zip(dims) {
                    if let Some((symbol, offset)) = dim.as_symbol_plus() {
                        known.insert(symbol.clone(), extent.saturating_sub(offset));
                    }
                }
            }
            let op = op.bind_dims(&|symbol| known.get(symbol).map(|&v| Dim::Known(v)));
            let tensors = inputs
                .iter()
                .zip(&dtypes)
                .map(|(input, &dtype)| Tensor::from_bytes(&input.extents, dtype, &input.bytes))
                .collect::<Result<Vec<_>, _>>()
                .map_err(|e| e.to_string())?;
            let operands: Vec<&Tensor> = tensors.iter().collect();
            let results = op.def().reference(&operands).map_err(|e| e.to_string())?;
            for (out, tensor) in outputs.iter_mut().zip(&results) {
                if out.bytes.len() != tensor.bytes().len() {
                    return Err(format!(
                        "result has {} bytes, planned {}",
                        tensor.bytes().len(),
                        out.bytes.len()
                    ));
                }
                out.bytes.copy_from_slice(tensor.bytes());
            }
            Ok(())
        };
        let name = format!("reference {}", step.op.def().name());
        Ok(Box::new(SoloStep::new(name, inputs, outputs, Box::new(body))))
    }
}
