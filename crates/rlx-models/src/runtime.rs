//! What runs a model's graph: an executable with its context, and for decoders the caches.

use crate::arch::{Decoder, DecoderInfo, Encoder, EncoderInfo};
use crate::embed::{EncoderInputs, EncoderLimits, EncoderRuntime};
use crate::error::Result;
use crate::generate::{DecoderLimits, DecoderRuntime, RunError, StepInputs};
use crate::kv::blocks_for;
use rlx::backend::Backend;
use rlx::plan::Lir;
use rlx::session::{CompileOptions, RunContext};
use rlx::weights::{WeightKind, WeightLoader, WeightRegistry};
use rlx::{CompiledGraph, Session, State, TensorArg};
use rlx_graph::Graph;
use rlx_kernels::schedule::RunControl;
use rlx_tensor::DimBinding;
use std::sync::Arc;

/// Compiles a model's graph with its checkpoint's weights, which are registered under their own names and read when needed.
///
/// # Errors
/// [`crate::ModelError::Session`].
pub fn compile(
    graph: &Graph,
    weights: &dyn WeightLoader,
    backend: &Arc<dyn Backend>,
) -> Result<CompiledGraph> {
    let registry = Arc::new(WeightRegistry::new());
    for (_, param) in graph.params() {
        if let Some(name) = &param.name {
            registry.register_from(weights, name, WeightKind::Base).map_err(rlx::SessionError::from)?;
        }
    }
    let session = Session::with_backend(Arc::clone(backend)).with_weights(registry);
    let options = CompileOptions { weights_required: true, ..CompileOptions::default() };
    Ok(session.compile_with(graph, &options)?)
}

/// Rows of a run of an encoder, unless a sequence needs more.
pub const ENCODER_ROWS: usize = 1024;

/// Rows of a prefill step.
pub const PREFILL_ROWS: usize = 512;

/// Runs an encoder.
pub struct EncoderRunner {
    info: EncoderInfo,
    compiled: Arc<CompiledGraph>,
    lir: Lir,
    context: RunContext,
    limits: EncoderLimits,
    hidden: Vec<f32>,
    state: State,
}

impl EncoderRunner {
    /// Capacities for runs of up to `max_rows` rows (at least the model's longest sequence).
    pub fn binding(info: &EncoderInfo, max_rows: usize) -> (DimBinding, EncoderLimits) {
        let max_rows = max_rows.max(info.max_tokens);
        let limits = EncoderLimits { max_rows, max_batch: max_rows };
        (DimBinding::new().with("rows", max_rows).with("batch", max_rows), limits)
    }

    /// A runner for runs of up to `max_rows` rows.
    ///
    /// # Errors
    /// [`crate::ModelError::Session`].
    pub fn new(model: &Encoder, compiled: Arc<CompiledGraph>, max_rows: usize) -> Result<Self> {
        let (binding, limits) = Self::binding(&model.info, max_rows);
        let lir = compiled.specialize(&binding)?;
        let (context, state) = (compiled.context(&lir)?, compiled.new_state(&binding)?);
        let hidden = vec![0.0; max_rows.max(limits.max_rows) * model.info.width];
        Ok(Self { info: model.info.clone(), compiled, lir, context, limits, hidden, state })
    }

    /// The executable's plan.
    pub fn lir(&self) -> &Lir {
        &self.lir
    }

    /// The compiled graph.
    pub fn compiled(&self) -> &Arc<CompiledGraph> {
        &self.compiled
    }

    /// Sizes and limits of the model.
    pub fn info(&self) -> &EncoderInfo {
        &self.info
    }

    /// The hidden states of the last run: `rows * width` values.
    pub fn hidden(&self, rows: usize) -> &[f32] {
        &self.hidden[..rows * self.info.width]
    }
}

impl EncoderRuntime for EncoderRunner {
    fn limits(&self) -> EncoderLimits {
        self.limits
    }

    fn run(&mut self, inputs: &EncoderInputs, embeddings: &mut [f32]) -> std::result::Result<(), RunError> {
        let (rows, batch) = ([inputs.input_ids.len()], [inputs.seq_starts.len()]);
        let given = [
            ("input_ids", TensorArg::typed(&rows, &inputs.input_ids)),
            ("positions", TensorArg::typed(&rows, &inputs.positions)),
            ("seq_starts", TensorArg::typed(&batch, &inputs.seq_starts)),
        ];
        let mut outputs = [
            ("last_hidden_state", bytemuck::cast_slice_mut(&mut self.hidden)),
            ("embedding", bytemuck::cast_slice_mut(embeddings)),
        ];
        self.context.run_into(&mut self.state, &given, &mut outputs, RunControl::default())?;
        Ok(())
    }
}

/// Runs a decoder; holds its caches.
pub struct DecoderRunner {
    info: DecoderInfo,
    compiled: Arc<CompiledGraph>,
    lir: Lir,
    context: RunContext,
    state: State,
    limits: DecoderLimits,
}

impl DecoderRunner {
    /// Capacities for one sequence of up to `context` positions, prefilled in steps of up to `max_rows` rows.
    pub fn binding(info: &DecoderInfo, context: usize, max_rows: usize) -> (DimBinding, DecoderLimits) {
        let blocks = blocks_for(context.min(info.max_positions).max(1));
        let max_rows = max_rows.min(context).max(1);
        let limits = DecoderLimits { max_rows, blocks, table: blocks };
        let binding = DimBinding::new().with("rows", max_rows).with("batch", 1).with("outs", 1);
        (binding.with("blocks", blocks).with("table", blocks), limits)
    }

    /// A runner for one sequence of up to `context` positions.
    ///
    /// # Errors
    /// [`crate::ModelError::Session`].
    pub fn new(
        model: &Decoder,
        compiled: Arc<CompiledGraph>,
        context: usize,
        max_rows: usize,
    ) -> Result<Self> {
        let (binding, limits) = Self::binding(&model.info, context, max_rows);
        let lir = compiled.specialize(&binding)?;
        let (context, state) = (compiled.context(&lir)?, compiled.new_state(&binding)?);
        Ok(Self { info: model.info.clone(), compiled, lir, context, state, limits })
    }

    /// The executable's plan.
    pub fn lir(&self) -> &Lir {
        &self.lir
    }

    /// The compiled graph.
    pub fn compiled(&self) -> &Arc<CompiledGraph> {
        &self.compiled
    }

    /// Sizes and limits of the model.
    pub fn info(&self) -> &DecoderInfo {
        &self.info
    }

    /// Bytes of the caches.
    pub fn state_bytes(&self) -> usize {
        self.state.bytes()
    }
}

impl DecoderRuntime for DecoderRunner {
    fn limits(&self) -> DecoderLimits {
        self.limits
    }

    fn step(&mut self, inputs: &StepInputs, logits: &mut [f32]) -> std::result::Result<(), RunError> {
        let rows = [inputs.input_ids.len()];
        let (starts, batch, outs) =
            ([inputs.seq_starts.len()], [inputs.past.len()], [inputs.logit_rows.len()]);
        let table = [inputs.past.len(), inputs.table];
        let width = inputs.angles.len().checked_div(rows[0]).unwrap_or(0);
        let angles = [rows[0], width];
        let mut given = smallvec::SmallVec::<[(&str, TensorArg<'_>); 8]>::from_slice(&[
            ("input_ids", TensorArg::typed(&rows, &inputs.input_ids)),
            ("positions", TensorArg::typed(&rows, &inputs.positions)),
            ("seq_starts", TensorArg::typed(&starts, &inputs.seq_starts)),
            ("past", TensorArg::typed(&batch, &inputs.past)),
            ("block_table", TensorArg::typed(&table, &inputs.block_table)),
            ("logit_rows", TensorArg::typed(&outs, &inputs.logit_rows)),
        ]);
        if self.info.rope.is_some() {
            given.push(("angles", TensorArg::typed(&angles, &inputs.angles)));
        }
        let mut outputs = [("logits", bytemuck::cast_slice_mut(logits))];
        self.context.run_into(&mut self.state, &given, &mut outputs, RunControl::default())?;
        Ok(())
    }
}
