//! The reference backend: each step by its op's reference evaluation. Slow, obvious, the oracle of every other backend.

use super::{Backend, BackendError, Context, Io, KernelChoice, Program};
use crate::plan::{BufferKind, Lir, Place, PlanTarget, Template};
use crate::weights::{WeightKind, WeightRegistry};
use rlx_graph::Op;
use rlx_graph::passes::{OpSet, Target};
use rlx_kernels::schedule::StepError;
use rlx_tensor::time::Instant;
use rlx_tensor::{DTypeClass, Dim, Shape, Symbol, Tensor};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Runs every op by its reference evaluation.
pub struct ReferenceBackend {
    target: OpSet,
}

impl Default for ReferenceBackend {
    fn default() -> Self {
        Self { target: OpSet::every_op("reference") }
    }
}

struct NoViews;

impl PlanTarget for NoViews {
    fn accepts_strided(&self, _op: &Op, _operand: usize) -> bool {
        true
    }

    fn accepts_in_place(&self, _op: &Op, _operand: Option<usize>, _result: &Shape) -> bool {
        true
    }
}

impl Backend for ReferenceBackend {
    fn name(&self) -> &str {
        "reference"
    }

    fn capabilities(&self) -> Vec<String> {
        vec!["every op".to_owned(), "f64 accumulation".to_owned()]
    }

    fn free_bytes(&self) -> Option<u64> {
        super::registry::host_headroom()
    }

    fn reads_host_memory(&self) -> bool {
        true
    }

    fn target(&self) -> &dyn Target {
        &self.target
    }

    fn plan_target(&self) -> &dyn PlanTarget {
        &NoViews
    }

    fn packed_bytes(&self, _template: &Template) -> Result<usize, BackendError> {
        Ok(0)
    }

    fn workspace_bytes(&self, _lir: &Lir) -> Result<usize, BackendError> {
        Ok(0)
    }

    fn load(
        &self,
        template: &Arc<Template>,
        weights: &WeightRegistry,
    ) -> Result<Arc<dyn Program>, BackendError> {
        let mut params = Vec::with_capacity(template.params().len());
        for param in template.params() {
            let name = &param.name;
            let handle = weights.lookup(name).ok_or_else(|| BackendError::Unset { name: name.clone() })?;
            let guard = weights.guard(handle)?;
            debug_assert!(
                !matches!(guard.entry().kind(), WeightKind::TiedAlias { .. }) || !guard.bytes().is_empty()
            );
            let dims = param.shape.known_dims().unwrap_or_default();
            let tensor = Tensor::from_bytes(&dims, param.shape.dtype(), guard.bytes());
            params.push(tensor.map_err(|e| BackendError::Eval { op: name.clone(), cause: e.into() })?);
        }
        Ok(Arc::new(ReferenceProgram { template: Arc::clone(template), params }))
    }
}

#[derive(Debug)]
struct ReferenceProgram {
    template: Arc<Template>,
    params: Vec<Tensor>,
}

impl Program for ReferenceProgram {
    fn context(&self, lir: &Lir) -> Result<Box<dyn Context>, BackendError> {
        Ok(Box::new(ReferenceContext {
            template: Arc::clone(&self.template),
            params: self.params.clone(),
            capacities: lir.capacities().to_vec(),
        }))
    }

    fn kernels(&self) -> Vec<KernelChoice> {
        let steps = self.template.steps().iter();
        steps
            .map(|s| KernelChoice { kernel: format!("reference {}", s.op.def().name()), native: true })
            .collect()
    }
}

#[derive(Debug)]
struct ReferenceContext {
    template: Arc<Template>,
    params: Vec<Tensor>,
    capacities: Vec<usize>,
}

/// The bytes of every buffer during one run.
struct Buffers<'r> {
    bytes: Vec<Vec<u8>>,
    sizes: &'r [usize],
}

impl Buffers<'_> {
    fn read(&self, place: &Place) -> Result<Tensor, BackendError> {
        let dims: Vec<usize> = place.dims.iter().map(|d| self.sizes[d.index()]).collect();
        let bytes = &self.bytes[place.buffer.index()];
        if place.dtype.class() == DTypeClass::Quant {
            // Blocks are read whole: no view cuts them.
            return Tensor::from_bytes(&dims, place.dtype, bytes)
                .map_err(|e| BackendError::Eval { op: "reading an operand".to_owned(), cause: e.into() });
        }
        let element = place.dtype.element_bytes().unwrap_or(1);
        let columns = dims.last().copied().unwrap_or(1) * element;
        let rows: usize = dims[..dims.len().saturating_sub(1)].iter().product();
        let start = place.offset * element;
        let stride = place.stride.map_or(columns, |s| s * element);
        let mut data = Vec::with_capacity(rows * columns);
        for row in 0..rows {
            let at = start + row * stride;
            data.extend_from_slice(bytes.get(at..at + columns).unwrap_or(&[]));
        }
        Tensor::from_bytes(&dims, place.dtype, &data)
            .map_err(|e| BackendError::Eval { op: "reading an operand".to_owned(), cause: e.into() })
    }

    fn write(&mut self, place: &Place, tensor: &Tensor) {
        let bytes = &mut self.bytes[place.buffer.index()];
        let needed = tensor.bytes().len();
        if bytes.len() < needed {
            bytes.resize(needed, 0);
        }
        bytes[..needed].copy_from_slice(tensor.bytes());
    }
}

impl ReferenceContext {
    fn fill(&self, io: &mut Io<'_, '_>) -> Result<Vec<Vec<u8>>, BackendError> {
        let mut content = |kind: &BufferKind| match kind {
            BufferKind::Input(i) => Ok(io.inputs[*i].to_vec()),
            BufferKind::State(i) => io.states[*i].bytes().map(<[u8]>::to_vec),
            BufferKind::Param(i) => Ok(self.params[*i].bytes().to_vec()),
            BufferKind::Const(tensor) => Ok(tensor.bytes().to_vec()),
            _ => Ok(Vec::new()),
        };
        self.template.buffers().iter().map(|b| content(&b.kind)).collect()
    }
}

impl Context for ReferenceContext {
    fn run(&mut self, mut io: Io<'_, '_>) -> Result<(), BackendError> {
        let template = Arc::clone(&self.template);
        let mut sizes = Vec::new();
        template.sizes().eval(io.symbols, &mut sizes).map_err(crate::plan::PlanError::from)?;
        let bytes = self.fill(&mut io)?;
        let mut buffers = Buffers { bytes, sizes: &sizes };
        let value =
            |symbol: &Symbol| template.sizes().symbol_index(symbol).map(|i| Dim::Known(io.symbols[i]));
        for (at, step) in template.steps().iter().enumerate() {
            if io.control.cancel.is_some_and(|c| c.load(Ordering::Relaxed)) {
                return Err(BackendError::Step(StepError::Cancelled));
            }
            if io.control.deadline.is_some_and(|d| Instant::now() >= d) {
                return Err(BackendError::Step(StepError::DeadlinePassed));
            }
            let started = Instant::now();
            let inputs: Vec<Tensor> =
                step.inputs.iter().map(|p| buffers.read(p)).collect::<Result<_, _>>()?;
            let operands: Vec<&Tensor> = inputs.iter().collect();
            let op = step.op.bind_dims(&value);
            let results = op
                .def()
                .reference(&operands)
                .map_err(|cause| BackendError::Eval { op: op.def().name().to_owned(), cause })?;
            let written = op.def().props().writes;
            let states = written.iter().map(|&operand| &step.inputs[operand]);
            for (place, tensor) in step.outputs.iter().chain(states).zip(&results) {
                buffers.write(place, tensor);
            }
            if let Some(time) = io.control.times.and_then(|t| t.get(at)) {
                time.fetch_add(started.elapsed().as_nanos() as u64, Ordering::Relaxed);
            }
        }
        for (buffer, bytes) in template.buffers().iter().zip(&buffers.bytes) {
            match buffer.kind {
                BufferKind::Output(i) => io.outputs[i].copy_from_slice(&bytes[..io.outputs[i].len()]),
                BufferKind::State(i) => io.states[i].bytes_mut()?.copy_from_slice(bytes),
                _ => {}
            }
        }
        Ok(())
    }

    fn bytes(&self) -> (usize, usize) {
        (self.capacities.len() * size_of::<usize>(), 0)
    }
}
