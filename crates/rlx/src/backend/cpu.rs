//! The CPU backend: steps bound to kernels of the chosen instruction set, on a thread pool of its own.

mod keeper;
mod lower;
mod ops;
mod stored;

use super::{
    Backend, BackendError, Context, ExpertLayer, Io, KernelChoice, PackedStorage, Program, WeightUses,
};
use crate::aot::AotCache;
use crate::memory::experts::ExpertPool;
use crate::plan::{InterfaceEntry, Lir, PlanError, PlanTarget, Template};
use crate::weights::{RegistryError, WeightRegistry};
use keeper::Keeper;
pub use keeper::LEAST_KEPT_BYTES;
use lower::{LowerCx, Lowered, ShapeCx};
use rlx_graph::passes::Target;
use rlx_graph::{Op, OpDef};
pub use rlx_kernels::gemm::Precision;
use rlx_kernels::isa::Isa;
use rlx_kernels::pool::Pool;
use rlx_kernels::schedule::{Frame, Schedule};
use rlx_tensor::storage::mapped::MappedFile;
use rlx_tensor::{Shape, SizeTable};
use std::collections::BTreeSet;
use std::sync::Arc;

/// The CPU: an instruction set and a pool of threads.
pub struct CpuBackend {
    isa: Isa,
    pool: Arc<Pool>,
    precision: Precision,
    keeper: Option<Keeper>,
    experts: Option<Arc<ExpertPool>>,
}

impl CpuBackend {
    /// A backend on an instruction set this machine has, with a pool of its own.
    pub fn new(isa: Isa, threads: usize) -> Self {
        Self::with_pool(isa, Arc::new(Pool::new(threads)))
    }

    /// A backend that shares a pool.
    pub fn with_pool(isa: Isa, pool: Arc<Pool>) -> Self {
        Self { isa, pool, precision: Precision::F32, keeper: None, experts: None }
    }

    /// The same backend, which takes packed weights from a cache and leaves new ones there. Only copies of weights in mapped files of
    /// at least [`LEAST_KEPT_BYTES`] are kept: others are packed faster than a file is opened.
    #[must_use]
    pub fn with_cache(mut self, cache: AotCache) -> Self {
        self.keeper = Some(Keeper::new(cache));
        self
    }

    /// The same with products of another precision; f32 unless chosen.
    #[must_use]
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// The precision of matrix products.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The same with mixtures of experts that keep only some experts in memory.
    #[must_use]
    pub fn with_experts(mut self, experts: Arc<ExpertPool>) -> Self {
        self.experts = Some(experts);
        self
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The pool.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }
}

impl CpuBackend {
    fn shapes<'t>(&self, template: &'t Template) -> ShapeCx<'t> {
        let expert_slots = self.experts.as_ref().map(|pool| pool.slots());
        ShapeCx { template, isa: self.isa, precision: self.precision, expert_slots }
    }
}

struct CpuTarget;

impl Target for CpuTarget {
    fn name(&self) -> &str {
        "cpu"
    }

    fn runs(&self, op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        match ops::find(op.name()) {
            Some(kernel) => kernel.supports(op, inputs, outputs),
            None => !op.props().composite,
        }
    }
}

impl PlanTarget for CpuTarget {
    fn accepts_strided(&self, op: &Op, operand: usize) -> bool {
        match ops::find(op.def().name()) {
            Some(kernel) => kernel.accepts_strided(op, operand),
            None => true,
        }
    }

    fn writes_strided(&self, op: &Op) -> bool {
        ops::find(op.def().name()).is_some_and(|kernel| kernel.writes_strided(op))
    }

    fn accepts_in_place(&self, op: &Op, operand: Option<usize>, result: &Shape) -> bool {
        let kernel = ops::find(op.def().name());
        operand.is_some_and(|operand| kernel.is_some_and(|k| k.accepts_in_place(op, operand, result)))
    }
}

impl Backend for CpuBackend {
    fn name(&self) -> &str {
        "cpu"
    }

    fn fingerprint(&self) -> String {
        format!("cpu {} {}", self.isa, self.precision.name())
    }

    fn precision(&self) -> Option<Precision> {
        Some(self.precision)
    }

    fn capabilities(&self) -> Vec<String> {
        let threads = format!("{} threads", self.pool.threads());
        vec![self.isa.name().to_owned(), self.precision.name().to_owned(), threads]
    }

    fn free_bytes(&self) -> Option<u64> {
        super::registry::host_headroom()
    }

    fn reads_host_memory(&self) -> bool {
        true
    }

    fn target(&self) -> &dyn Target {
        &CpuTarget
    }

    fn plan_target(&self) -> &dyn PlanTarget {
        &CpuTarget
    }

    fn packed_bytes(&self, template: &Template) -> Result<usize, BackendError> {
        Ok(lower::packed_bytes(&self.shapes(template)))
    }

    fn own_bytes(&self, template: &Template) -> usize {
        lower::own_bytes(&self.shapes(template))
    }

    fn raw_params(&self, template: &Template) -> Option<BTreeSet<String>> {
        Some(lower::weight_needs(&self.shapes(template)).raw)
    }

    fn packed_mapped_bytes(
        &self,
        template: &Template,
        weights: &WeightRegistry,
    ) -> Result<u64, BackendError> {
        let mut mapped = 0u64;
        for spec in lower::weight_needs(&self.shapes(template)).packed {
            if lower::is_mapped(self, weights, &spec)? {
                mapped = mapped.saturating_add(spec.bytes as u64);
            }
        }
        Ok(mapped)
    }

    fn expert_layers(&self, template: &Template) -> Vec<ExpertLayer> {
        let cx = self.shapes(template);
        template.steps().iter().filter_map(|step| ops::moe::expert_layer(&cx, step)).collect()
    }

    fn workspace_bytes(&self, lir: &Lir) -> Result<usize, BackendError> {
        let workers = self.pool.threads();
        let (mut each, mut shared) = (0, 0);
        for step in lir.template().steps() {
            let Some(op) = ops::find(step.op.def().name()) else { continue };
            let (e, s) = op.scratch(&self.shapes(lir.template()), step, lir.capacities(), workers)?;
            (each, shared) = (each.max(e), shared.max(s));
        }
        let line = |bytes: usize| bytes.next_multiple_of(64);
        Ok(line(each) * workers + line(shared))
    }

    fn storage(&self) -> Option<&dyn PackedStorage> {
        Some(self)
    }

    fn load(
        &self,
        template: &Arc<Template>,
        weights: &WeightRegistry,
    ) -> Result<Arc<dyn Program>, BackendError> {
        let mut cx = LowerCx::new(template, weights, self);
        let mut kernels = Vec::with_capacity(template.steps().len());
        for step in template.steps() {
            let native = cx.lower(step)?;
            kernels.push(native);
        }
        let Lowered { schedule, uses, files, own_bytes } = cx.finish();
        let schedule = Arc::new(schedule);
        let kernels = schedule.steps().iter().zip(kernels);
        let kernels = kernels.map(|(s, native)| KernelChoice { kernel: s.name(), native }).collect();
        Ok(Arc::new(CpuProgram {
            template: Arc::clone(template),
            schedule,
            pool: Arc::clone(&self.pool),
            kernels,
            uses,
            own_bytes,
            files: files.into(),
        }))
    }
}

#[derive(Debug)]
struct CpuProgram {
    template: Arc<Template>,
    schedule: Arc<Schedule>,
    pool: Arc<Pool>,
    kernels: Vec<KernelChoice>,
    uses: WeightUses,
    own_bytes: usize,
    files: Arc<[Arc<MappedFile>]>,
}

impl Program for CpuProgram {
    fn context(&self, lir: &Lir) -> Result<Box<dyn Context>, BackendError> {
        let placed: Vec<_> = lir.placed().map(|(buffer, range)| (buffer.index(), range)).collect();
        let frame = Frame::new(
            Arc::clone(&self.schedule),
            self.template.buffers().len(),
            lir.arena_bytes(),
            &placed,
            lir.capacities(),
            self.pool.threads(),
        )?;
        let of = |entries: &[InterfaceEntry]| entries.iter().map(|e| e.place.buffer.index()).collect();
        let regions = Regions {
            inputs: of(self.template.inputs()),
            outputs: of(self.template.outputs()),
            states: of(self.template.states()),
        };
        let sizes = self.template.sizes().clone();
        let (pool, files) = (Arc::clone(&self.pool), Arc::clone(&self.files));
        Ok(Box::new(CpuContext { frame, regions, sizes, pool, files }))
    }

    fn kernels(&self) -> Vec<KernelChoice> {
        self.kernels.clone()
    }

    fn own_bytes(&self) -> usize {
        self.own_bytes
    }

    fn weight_uses(&self) -> Option<&WeightUses> {
        Some(&self.uses)
    }
}

/// Region numbers of the caller's buffers, by position.
#[derive(Debug)]
struct Regions {
    inputs: Vec<usize>,
    outputs: Vec<usize>,
    states: Vec<usize>,
}

#[derive(Debug)]
struct CpuContext {
    frame: Frame,
    regions: Regions,
    sizes: SizeTable,
    pool: Arc<Pool>,
    files: Arc<[Arc<MappedFile>]>,
}

impl Context for CpuContext {
    fn run(&mut self, io: Io<'_, '_>) -> Result<(), BackendError> {
        for file in &*self.files {
            file.still_valid().map_err(RegistryError::from)?;
        }
        self.sizes.eval(io.symbols, self.frame.sizes_mut()).map_err(PlanError::from)?;
        let mut launch = self.frame.launch();
        for (&region, bytes) in self.regions.inputs.iter().zip(io.inputs) {
            launch.read(region, bytes);
        }
        for (&region, bytes) in self.regions.outputs.iter().zip(io.outputs.iter_mut()) {
            launch.write(region, bytes);
        }
        for (&region, state) in self.regions.states.iter().zip(io.states.iter_mut()) {
            launch.write(region, state.bytes_mut()?);
        }
        Ok(launch.run(&self.pool, io.control)?)
    }

    fn bytes(&self) -> (usize, usize) {
        self.frame.bytes()
    }
}
