//! From a template's steps to schedule steps: operands, weights in the forms kernels read, constants.

use super::{CpuBackend, ops};
use crate::backend::{BackendError, PackedUse, WeightUses};
use crate::memory::experts::{ExpertPool, ExpertWeight};
use crate::plan::{BufferKind, Place, StepSpec, Template};
use crate::weights::{Packed, PackedKey, PinGuard, WeightHandle, WeightRegistry};
use rlx_graph::eval::to_f64;
use rlx_kernels::conv::{ConvLayer, conv_layout, conv_rows};
use rlx_kernels::gemm::{
    PackError, PackedLayout, PackedMatrix, Precision, Products, WeightOrder, WeightPart, WeightType, pack_on,
    pack_on_releasing,
};
use rlx_kernels::integer_product::{self, CodeOrder, IntegerKernel, IntegerMatrix};
use rlx_kernels::isa::Isa;
use rlx_kernels::quant_dot;
use rlx_kernels::schedule::{Operand, Schedule, SharedBytes, Step};
use rlx_kernels::steps::solo::{SoloInput, SoloOutput, SoloStep};
use rlx_tensor::storage::AlignedBytes;
use rlx_tensor::storage::mapped::MappedFile;
use rlx_tensor::{DType, DTypeClass, Dim, Symbol, Tensor};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap, HashSet};
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

impl<'s> MatrixSpec<'s> {
    /// The matrices that are packed apart: one, unless blocks of a quantised dtype stand beside another dtype.
    pub fn pieces(&self) -> Vec<MatrixSpec<'s>> {
        let (transposed, gated) = (self.transposed, self.gated);
        let spec = |weights| MatrixSpec { weights, transposed, gated };
        let quantised = self.weights.iter().any(|w| w.dtype.class() == DTypeClass::Quant);
        match quantised && !gated {
            true => self.weights.chunk_by(|a, b| a.dtype == b.dtype).map(spec).collect(),
            false => vec![spec(self.weights)],
        }
    }
}

impl<'t> ShapeCx<'t> {
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

    /// The constant a place is the whole of.
    fn constant<'p>(&'p self, place: &Place) -> Option<&'p Tensor> {
        match &self.template.buffers()[place.buffer.index()].kind {
            BufferKind::Const(tensor) if place.is_whole() => Some(tensor),
            _ => None,
        }
    }

    /// Bytes of a place as a vector of f32, if it is a param or constant of known size.
    pub fn vector_bytes(&self, place: &Place) -> usize {
        if !self.is_known(place) {
            return 0;
        }
        let values: Option<usize> = (0..place.dims.len()).map(|axis| self.known(place, axis)).product();
        values.unwrap_or(0) * size_of::<f32>()
    }

    /// Whether a place is the whole of a param or of a constant.
    pub fn is_known(&self, place: &Place) -> bool {
        self.param(place).is_some() || self.constant(place).is_some()
    }

    /// Whether a place is the whole of a constant of the graph.
    pub fn is_constant(&self, place: &Place) -> bool {
        self.constant(place).is_some()
    }

    /// The packed layout of a linear layer's weights; `None` if they are no params of known size and supported dtype.
    pub fn matrix_layout(&self, spec: &MatrixSpec<'_>) -> Option<PackedLayout> {
        spec.weights.iter().all(|w| self.param(w).is_some()).then(|| self.layout_of(spec))?
    }

    /// The same where some of the weights are constants of the graph, which are packed for one executable alone.
    pub fn constant_layout(&self, spec: &MatrixSpec<'_>) -> Option<PackedLayout> {
        let known = |w: &Place| self.param(w).is_some() || self.constant(w).is_some();
        let some = spec.weights.iter().any(|w| self.constant(w).is_some());
        (some && spec.weights.iter().all(known)).then(|| self.layout_of(spec))?
    }

    fn layout_of(&self, spec: &MatrixSpec<'_>) -> Option<PackedLayout> {
        let (mut n, mut k, mut dtypes) = (0, None, Vec::with_capacity(spec.weights.len()));
        for weight in spec.weights {
            let (rows, columns) = (self.known(weight, 0)?, self.known(weight, 1)?);
            let (part_n, part_k) = if spec.transposed { (columns, rows) } else { (rows, columns) };
            n += part_n;
            k = Some(part_k);
            dtypes.push(weight_type(weight.dtype)?);
        }
        let dtype = self.precision.packed_type(dtypes)?;
        PackedLayout::new(dtype, n, k?, spec.gated, self.isa).ok()
    }

    /// The packed copy of a linear layer's weights; `None` if the kernels have no layout for them.
    pub fn packed_spec(&self, spec: &MatrixSpec<'_>) -> Option<PackedSpec> {
        let bytes = self.matrix_layout(spec)?.bytes();
        let params = spec.weights.iter().filter_map(|w| self.param(w)).map(str::to_owned).collect();
        let (gated, transposed) = (spec.gated, spec.transposed);
        Some(PackedSpec { params, gated, transposed, groups: 0, winograd: false, codes: None, bytes })
    }

    /// The packed copy of a convolution's weights; `None` if they are no param.
    pub fn conv_spec(&self, weight: &Place, layer: &ConvLayer) -> Option<PackedSpec> {
        let params = vec![self.param(weight)?.to_owned()];
        let bytes = conv_layout(layer, self.isa).ok()?.bytes();
        let (gated, transposed, groups, winograd) = (false, false, layer.groups, layer.is_winograd());
        Some(PackedSpec { params, gated, transposed, groups, winograd, codes: None, bytes })
    }

    /// The packed copy of a weight of codes; `None` if it is no param or no kernel takes it.
    pub fn codes_spec(&self, weight: &Place, layer: &ConvLayer, order: CodeOrder) -> Option<PackedSpec> {
        let params = vec![self.param(weight)?.to_owned()];
        let bytes = integer_product::packed_bytes(self.isa, layer)?;
        let (gated, transposed, winograd, codes) = (false, false, false, Some(order));
        Some(PackedSpec { params, gated, transposed, groups: 0, winograd, codes, bytes })
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
        dtype => quant_dot::dtypes().any(|known| known == dtype).then_some(WeightType::Blocks(dtype)),
    }
}

/// A packed copy that a step will ask for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct PackedSpec {
    /// The params packed together.
    pub params: Vec<String>,
    /// Whether gate and up are interleaved.
    pub gated: bool,
    /// Whether the weights are stored `[k, n]`.
    pub transposed: bool,
    /// Groups of a convolution's channels; 0 of a linear layer.
    pub groups: usize,
    /// Whether a convolution's weights are transformed.
    pub winograd: bool,
    /// How codes of eight bits lie; none of other weights.
    pub codes: Option<CodeOrder>,
    /// The copy's size.
    pub bytes: usize,
}

impl PackedSpec {
    /// The layout's name in the key of the copy.
    pub fn layout_name(&self, versions: &[u64]) -> String {
        let mut text = match (self.codes, self.groups) {
            (Some(order), _) => format!("codes {order:?}"),
            (None, 0) => format!("panels gated={} transposed={}", self.gated, self.transposed),
            _ if self.winograd => "windows transformed".to_owned(),
            (None, groups) => format!("windows groups={groups}"),
        };
        for (name, version) in self.params.iter().zip(versions) {
            text += &format!(" {name}#{version}");
        }
        text
    }
}

/// What a template reads of its params on the CPU, from shapes alone.
#[derive(Debug, Default)]
pub(super) struct WeightNeeds {
    /// Packed copies, each once.
    pub packed: Vec<PackedSpec>,
    /// Params read as they are stored.
    pub raw: BTreeSet<String>,
}

/// What a template reads of its params.
pub(super) fn weight_needs(cx: &ShapeCx<'_>) -> WeightNeeds {
    let template = cx.template;
    let mut needs = WeightNeeds::default();
    let mut counted = HashSet::new();
    for step in template.steps() {
        let packed = ops::find(step.op.def().name()).map(|op| op.packed(cx, step)).unwrap_or_default();
        for place in &step.inputs {
            let BufferKind::Param(i) = template.buffers()[place.buffer.index()].kind else { continue };
            let name = &template.params()[i].name;
            if !packed.iter().any(|spec| spec.params.contains(name)) {
                needs.raw.insert(name.clone());
            }
        }
        for spec in packed {
            if counted.insert(spec.clone()) {
                needs.packed.push(spec);
            }
        }
    }
    needs
}

/// Bytes of the copies of weights that the CPU makes for a template.
pub(super) fn packed_bytes(cx: &ShapeCx<'_>) -> usize {
    let needs = weight_needs(cx);
    needs.packed.iter().fold(0, |sum, spec| sum.saturating_add(spec.bytes))
}

/// Bytes of what the steps of a template make of constants and vectors for themselves; a vector that several steps read counts once.
pub(super) fn own_bytes(cx: &ShapeCx<'_>) -> usize {
    let mut counted = HashSet::new();
    let mut bytes = 0;
    for step in cx.template.steps() {
        let Some(op) = ops::find(step.op.def().name()) else { continue };
        bytes += op.own_bytes(cx, step);
        for place in op.vectors(step) {
            if cx.param(place).is_none_or(|name| counted.insert(name.to_owned())) {
                bytes += cx.vector_bytes(place);
            }
        }
    }
    bytes
}

/// The key of a packed copy of these weights; `None` if one has no value.
fn packed_key(
    backend: &CpuBackend,
    weights: &WeightRegistry,
    spec: &PackedSpec,
) -> Result<Option<(Vec<WeightHandle>, PackedKey)>, BackendError> {
    let handles: Option<Vec<WeightHandle>> = spec.params.iter().map(|name| weights.lookup(name)).collect();
    let Some(handles) = handles else { return Ok(None) };
    let versions = handles.iter().map(|&handle| Ok::<_, BackendError>(weights.get(handle)?.version()));
    let layout = spec.layout_name(&versions.collect::<Result<Vec<_>, _>>()?);
    Ok(Some((handles, PackedKey::new(layout, backend.isa().to_string(), backend.precision.name()))))
}

/// Whether a packed copy is, or will be, pages of a mapped file.
pub(super) fn is_mapped(
    backend: &CpuBackend,
    weights: &WeightRegistry,
    spec: &PackedSpec,
) -> Result<bool, BackendError> {
    let Some((handles, key)) = packed_key(backend, weights, spec)? else { return Ok(false) };
    let Some(&first) = handles.first() else { return Ok(false) };
    match weights.packed(first, &key)? {
        Some(packed) => Ok(packed.file().is_some()),
        None => Ok(backend.kept(weights, &handles, spec)?.is_some_and(|kept| kept.is_there(backend))),
    }
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
    uses: RefCell<WeightUses>,
    files: RefCell<Vec<Arc<MappedFile>>>,
    own_bytes: Cell<usize>,
}

/// What lowering a template made.
pub(super) struct Lowered {
    /// The steps.
    pub schedule: Schedule,
    /// The weights they read.
    pub uses: WeightUses,
    /// The mapped files that these are in.
    pub files: Vec<Arc<MappedFile>>,
    /// Bytes of packed constants and of vectors that the steps hold.
    pub own_bytes: usize,
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
        let packed_alone = backend.shapes(template).packed_alone();
        Self {
            template,
            weights,
            backend,
            schedule: Schedule::new(),
            bound: HashSet::new(),
            vectors: HashMap::new(),
            packed_alone,
            step: None,
            uses: RefCell::default(),
            files: RefCell::default(),
            own_bytes: Cell::new(0),
        }
    }

    pub fn shapes(&self) -> ShapeCx<'a> {
        self.backend.shapes(self.template)
    }

    pub fn isa(&self) -> Isa {
        self.backend.isa()
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

    /// The finished schedule and what it reads.
    pub fn finish(self) -> Lowered {
        Lowered {
            schedule: self.schedule,
            uses: self.uses.into_inner(),
            files: self.files.into_inner(),
            own_bytes: self.own_bytes.get(),
        }
    }

    /// Notes bytes that the step being lowered holds for itself.
    pub fn holds(&self, bytes: usize) {
        self.own_bytes.set(self.own_bytes.get() + bytes);
    }

    fn reads_from(&self, file: &Arc<MappedFile>) {
        let files = &mut *self.files.borrow_mut();
        if !files.iter().any(|known| Arc::ptr_eq(known, file)) {
            files.push(Arc::clone(file));
        }
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

    fn handle(&self, name: &str) -> Result<WeightHandle, BackendError> {
        let handle = self.weights.lookup(name);
        handle.ok_or_else(|| BackendError::Unset { name: name.to_owned() })
    }

    /// The bytes of a param as they are stored.
    fn raw(&self, name: &str) -> Result<PinGuard, BackendError> {
        self.uses.borrow_mut().raw.insert(name.to_owned());
        let guard = self.weights.guard(self.handle(name)?)?;
        if let Some(range) = guard.mapped() {
            self.reads_from(range.file());
        }
        Ok(guard)
    }

    /// True if this param is read as a packed matrix by a linear layer anyway.
    pub fn is_packed_alone(&self, name: &str) -> bool {
        self.packed_alone.contains(name)
    }

    /// A param or constant as f32 values, shared by all steps that ask; the step keeps them.
    pub fn vector(&mut self, place: &Place) -> Result<Option<Arc<[f32]>>, BackendError> {
        let known = self.shapes().param(place).is_some_and(|name| self.vectors.contains_key(name));
        let values = self.numbers(place)?;
        if !known {
            self.holds(values.as_ref().map_or(0, |v| size_of_val(&v[..])));
        }
        Ok(values)
    }

    /// The same for a step that makes something else of them.
    pub fn numbers(&mut self, place: &Place) -> Result<Option<Arc<[f32]>>, BackendError> {
        let tensor = match &self.template.buffers()[place.buffer.index()].kind {
            BufferKind::Const(tensor) if place.is_whole() => tensor.clone(),
            BufferKind::Param(i) if place.is_whole() => {
                let name = &self.template.params()[*i].name;
                if let Some(known) = self.vectors.get(name) {
                    return Ok(Some(Arc::clone(known)));
                }
                let guard = self.raw(name)?;
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
        if shapes.constant_layout(spec).is_some() {
            return self.pack_constants(&shapes, spec).map(Some);
        }
        let Some(layout) = shapes.matrix_layout(spec) else { return Ok(None) };
        let Some(described) = shapes.packed_spec(spec) else { return Ok(None) };
        self.packed_copy(&described, layout, |guards| self.pack(&shapes, spec, guards))
    }

    /// The packed matrix of a convolution's weights, made once for a storage and layout; `None` if they are neither a param nor a
    /// constant.
    pub fn conv_matrix(
        &self,
        weight: &Place,
        layer: &ConvLayer,
    ) -> Result<Option<PackedMatrix>, BackendError> {
        let fail = |e: PackError| self.unsupported(e.to_string());
        let layout = conv_layout(layer, self.isa()).map_err(fail)?;
        let pack = |values: &[f32]| {
            let rows = conv_rows(layer, self.isa(), values);
            let rows = rows.ok_or_else(|| self.unsupported("the weight's size does not fit the layer"))?;
            let (bytes, k) = (bytemuck::cast_slice(&rows), layout.k());
            let (dtype, order) = (WeightType::F32, WeightOrder::RowMajor);
            let part = WeightPart { bytes, dtype, n: rows.len() / k.max(1), k, order };
            pack_on(self.backend.pool(), &[part], false, self.isa(), Precision::F32).map_err(fail)
        };
        if let BufferKind::Const(tensor) = &self.template.buffers()[weight.buffer.index()].kind {
            let values = tensor.as_slice::<f32>().ok().filter(|_| weight.is_whole());
            let packed = values.map(pack).transpose()?;
            self.holds(packed.as_ref().map_or(0, |matrix| matrix.bytes().len()));
            return Ok(packed);
        }
        let Some(described) = self.shapes().conv_spec(weight, layer) else { return Ok(None) };
        self.packed_copy(&described, layout, |guards| {
            let values: Vec<f32> = bytemuck::pod_collect_to_vec(guards[0].bytes());
            pack(&values)
        })
    }

    /// The packed weights of a product of codes, made once for a storage; `None` if they are neither a param nor a constant.
    pub fn codes_matrix(
        &mut self,
        weight: &Place,
        kernel: &IntegerKernel,
        order: CodeOrder,
        zeros: Option<&Place>,
    ) -> Result<Option<IntegerMatrix>, BackendError> {
        let zeros = match zeros {
            Some(place) => match self.numbers(place)? {
                Some(zeros) => zeros.iter().map(|&zero| zero as i32).collect(),
                None => return Ok(None),
            },
            None => Vec::new(),
        };
        let pack = |codes: &[u8]| {
            let packed = kernel.pack(self.backend.pool(), codes, &order, weight.dtype == DType::I8, &zeros);
            packed.ok_or_else(|| self.unsupported("the weight's size does not fit the layer"))
        };
        if let BufferKind::Const(tensor) = &self.template.buffers()[weight.buffer.index()].kind {
            let packed = weight.is_whole().then(|| pack(tensor.bytes())).transpose()?;
            self.holds(packed.as_ref().map_or(0, IntegerMatrix::bytes));
            return Ok(packed);
        }
        let Some(spec) = self.shapes().codes_spec(weight, kernel.layer(), order) else { return Ok(None) };
        let handle = self.handle(&spec.params[0])?;
        let version = self.weights.get(handle)?.version();
        let layout = format!("{} zeros={zeros:?}", spec.layout_name(&[version]));
        let key = PackedKey::new(layout, self.isa().to_string(), self.backend.precision.name());
        let guard = self.weights.guard(handle)?;
        let packed = guard.packed_or_insert_with(&key, |_| {
            let matrix = pack(guard.bytes())?;
            let bytes = matrix.bytes() as u64;
            Ok::<_, BackendError>(Packed::new(matrix, bytes))
        })?;
        guard.release_pages();
        let matrix = packed.downcast_ref::<IntegerMatrix>().filter(|matrix| kernel.takes(matrix)).cloned();
        let param = spec.params[0].clone();
        let matrix =
            matrix.ok_or_else(|| self.unsupported(format!("the packed copy of {param} is another's")))?;
        self.uses.borrow_mut().packed.push(PackedUse { param, key });
        Ok(Some(matrix))
    }

    /// A packed copy, from the registry or made now.
    fn packed_copy(
        &self,
        described: &PackedSpec,
        layout: PackedLayout,
        make: impl Fn(&[PinGuard]) -> Result<PackedMatrix, BackendError>,
    ) -> Result<Option<PackedMatrix>, BackendError> {
        described.params.iter().try_for_each(|name| self.handle(name).map(|_| ()))?;
        let found = packed_key(self.backend, self.weights, described)?;
        let (Some((handles, key)), Some(param)) = (found, described.params.first()) else { return Ok(None) };
        let packed = match self.weights.packed(handles[0], &key)? {
            Some(packed) => packed,
            None => self.insert_packed(&handles, &key, described, make)?,
        };
        let matrix =
            packed.downcast_ref::<PackedMatrix>().filter(|matrix| *matrix.layout() == layout).cloned();
        let matrix =
            matrix.ok_or_else(|| self.unsupported(format!("the packed copy of {param} is no {layout:?}")))?;
        if let Some(file) = packed.file() {
            self.reads_from(file);
        }
        let used = PackedUse { param: param.clone(), key };
        let uses = &mut self.uses.borrow_mut().packed;
        if !uses.contains(&used) {
            uses.push(used);
        }
        Ok(Some(matrix))
    }

    /// Leaves a packed copy in the registry, and gives the pages of its sources back.
    fn insert_packed(
        &self,
        handles: &[WeightHandle],
        key: &PackedKey,
        described: &PackedSpec,
        make: impl Fn(&[PinGuard]) -> Result<PackedMatrix, BackendError>,
    ) -> Result<Arc<Packed>, BackendError> {
        let guards = handles.iter().map(|&h| self.weights.guard(h)).collect::<Result<Vec<_>, _>>()?;
        let packed = guards[0].packed_or_insert_with(key, |_| {
            let kept = self.backend.kept(self.weights, handles, described)?;
            if let Some(packed) = kept.as_ref().and_then(|kept| kept.find(self.backend)) {
                return Ok(packed);
            }
            let matrix = make(&guards)?;
            let bytes = matrix.bytes().len() as u64;
            if let Some(kept) = kept {
                kept.keep(self.backend, &matrix);
            }
            Ok::<_, BackendError>(Packed::new(matrix, bytes))
        })?;
        guards.iter().for_each(PinGuard::release_pages);
        Ok(packed)
    }

    /// Packs a matrix on all threads.
    fn pack(
        &self,
        shapes: &ShapeCx<'_>,
        spec: &MatrixSpec<'_>,
        guards: &[PinGuard],
    ) -> Result<PackedMatrix, BackendError> {
        let mut parts = Vec::with_capacity(guards.len());
        for (guard, weight) in guards.iter().zip(spec.weights) {
            parts.push(self.part(shapes, guard.bytes(), weight, spec.transposed)?);
        }
        let release = &mut |part: usize, read: std::ops::Range<usize>| {
            let range = guards[part].mapped().and_then(|all| all.slice(read.start, read.len()).ok());
            if let Some(range) = range {
                // Advice only: pages that stay are reclaimable.
                let _ = range.release_pages();
            }
        };
        let (isa, precision) = (self.isa(), self.backend.precision);
        let matrix = pack_on_releasing(self.backend.pool(), &parts, spec.gated, isa, precision, release);
        matrix.map_err(|e| self.unsupported(e.to_string()))
    }

    /// The packed matrix of weights of which some are constants.
    fn pack_constants(
        &self,
        shapes: &ShapeCx<'_>,
        spec: &MatrixSpec<'_>,
    ) -> Result<PackedMatrix, BackendError> {
        let names = spec.weights.iter().map(|weight| shapes.param(weight));
        let guards =
            names.map(|name| name.map(|name| self.raw(name)).transpose()).collect::<Result<Vec<_>, _>>()?;
        let mut parts = Vec::with_capacity(spec.weights.len());
        for (guard, weight) in guards.iter().zip(spec.weights) {
            let constant = shapes.constant(weight).map(Tensor::bytes);
            let bytes = guard.as_ref().map(PinGuard::bytes).or(constant).unwrap_or_default();
            parts.push(self.part(shapes, bytes, weight, spec.transposed)?);
        }
        let (isa, precision) = (self.isa(), self.backend.precision);
        let matrix = pack_on(self.backend.pool(), &parts, spec.gated, isa, precision);
        let matrix = matrix.map_err(|e| self.unsupported(e.to_string()))?;
        self.holds(matrix.bytes().len());
        Ok(matrix)
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
        Ok(ExpertWeight { guard: self.raw(name)?, n, k, dtype })
    }

    fn part<'g>(
        &self,
        shapes: &ShapeCx<'_>,
        bytes: &'g [u8],
        weight: &Place,
        transposed: bool,
    ) -> Result<WeightPart<'g>, BackendError> {
        let sizes = (shapes.known(weight, 0), shapes.known(weight, 1), weight_type(weight.dtype));
        let (Some(rows), Some(columns), Some(dtype)) = sizes else {
            return Err(self.unsupported("the weight's size or dtype has no packed layout"));
        };
        let (n, k) = if transposed { (columns, rows) } else { (rows, columns) };
        let order = if transposed { WeightOrder::Transposed } else { WeightOrder::RowMajor };
        Ok(WeightPart { bytes, dtype, n, k, order })
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
                    let guard = self.raw(&self.template.params()[*i].name)?;
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
