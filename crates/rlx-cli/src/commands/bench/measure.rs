//! Timings of one case.

use super::super::doctor::Limits;
use super::Work;
use crate::context::Context;
use crate::engine::Engine;
use crate::failure::Result;
use rlx::plan::{BufferKind, Place, Template};
use rlx::{CompiledGraph, SessionError};
use rlx_kernels::limits;
use rlx_kernels::pool::Pool;
use rlx_models::embed::{EncoderInputs, EncoderRuntime as _};
use rlx_models::generate::{DecoderRuntime as _, SequenceStep, StepInputs};
use rlx_models::kv::{BlockPool, BlockTable};
use rlx_models::runtime::{DecoderRunner, ENCODER_ROWS, EncoderRunner};
use rlx_models::{Built, ModelError};
use rlx_tensor::DimBinding;
use serde::Serialize;
use std::time::{Duration, Instant};

/// What to measure.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub work: Work,
    pub batch: usize,
    pub seq: usize,
    pub ctx: usize,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Row {
    pub work: &'static str,
    pub batch: usize,
    pub seq: usize,
    pub ctx: usize,
    pub median_ms: f64,
    pub p10_ms: f64,
    pub n: usize,
    pub tokens_per_s: f64,
    /// Of the f32 limit (embed, prefill: without attention) or of the read limit for the weights (decode).
    pub fraction_of_limit: Option<f64>,
}

/// Time a case gets.
const BUDGET: Duration = Duration::from_millis(800);
const LEAST_RUNS: usize = 5;
const MOST_RUNS: usize = 2000;

/// Measures a case.
pub fn run(engine: &Engine, case: &Case, limits: &Limits, context: &Context) -> Result<Row> {
    let times = match case.work {
        Work::Embed => {
            let mut embedding = EmbedRun::new(engine, case.batch, case.seq)?;
            timed(|| embedding.run())?
        }
        Work::Prefill | Work::Decode => {
            let mut decoding = DecodeRun::new(engine, case)?;
            timed(|| decoding.run())?
        }
    };
    let median_ms = times[times.len() / 2];
    let tokens = case.batch * case.seq;
    let seconds = median_ms / 1e3;
    let fraction_of_limit = match case.work {
        Work::Embed | Work::Prefill => {
            let flops = weight_flops(engine.model.compiled(), tokens)?;
            limits.f32_flops.map(|limit| flops / seconds / limit)
        }
        Work::Decode => {
            let pool = Pool::new(context.threads());
            let bytes = weight_bytes(engine.model.compiled().template());
            let limit = bytes.and_then(|bytes| limits::read_rate(&pool, engine.isa, bytes));
            bytes.zip(limit).map(|(bytes, limit)| bytes as f64 / seconds / limit)
        }
    };
    Ok(Row {
        work: case.work.name(),
        batch: case.batch,
        seq: case.seq,
        ctx: case.ctx,
        median_ms,
        p10_ms: times[times.len() / 10],
        n: times.len(),
        tokens_per_s: tokens as f64 / seconds,
        fraction_of_limit,
    })
}

/// Times in milliseconds, shortest first.
fn timed(mut run: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
    run()?;
    run()?;
    let (started, mut times) = (Instant::now(), Vec::new());
    while times.len() < LEAST_RUNS || (started.elapsed() < BUDGET && times.len() < MOST_RUNS) {
        let start = Instant::now();
        run()?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}

/// Operations of a pass over `rows` tokens, without attention, whose work depends on the sequences' lengths.
fn weight_flops(compiled: &CompiledGraph, rows: usize) -> Result<f64> {
    let mut binding = DimBinding::new();
    for symbol in compiled.template().sizes().symbols() {
        binding = binding.with(symbol.name(), if symbol.name() == "rows" { rows } else { 1 });
    }
    let report = compiled.report().map_err(ModelError::from)?;
    let work = report.work(&binding).map_err(SessionError::from).map_err(ModelError::from)?;
    let steps = report.steps.iter().zip(work).filter(|(step, _)| step.op != "attention");
    Ok(steps.map(|(_, work)| work.flops as f64).sum())
}

/// Bytes of the matrices that every token is multiplied with; `None` where a router chooses among them, and if there are none.
fn weight_bytes(template: &Template) -> Option<usize> {
    let is_param =
        |place: &&Place| matches!(template.buffers()[place.buffer.index()].kind, BufferKind::Param(_));
    let steps = template.steps().iter().filter(|step| step.op.def().name().contains("linear"));
    let mut bytes = 0;
    for place in steps.flat_map(|step| step.inputs.iter().filter(is_param)) {
        let dims: Option<Vec<usize>> = place.dims.iter().map(|&dim| template.sizes().known(dim)).collect();
        if let Some(&[n, k]) = dims.as_deref() {
            bytes += place.dtype.bytes_for(n * k)?;
        }
    }
    let routed = template.steps().iter().any(|step| step.op.def().name().contains("moe"));
    (bytes > 0 && !routed).then_some(bytes)
}

/// The token ids that every worker of the peer comparison takes, within the vocabulary.
pub fn token(index: usize, vocab: usize) -> u32 {
    ((index * 131) % vocab.min(30_000)) as u32
}

/// One forward pass over a batch of equal sequences, in runs of [`ENCODER_ROWS`] rows at most.
pub struct EmbedRun {
    runner: EncoderRunner,
    parts: Vec<EncoderInputs>,
    embeddings: Vec<f32>,
    dim: usize,
    width: usize,
}

impl EmbedRun {
    pub fn new(engine: &Engine, batch: usize, seq: usize) -> Result<EmbedRun> {
        let runner = engine.model.encoder_runner(ENCODER_ROWS.min(batch * seq))?;
        let info = runner.info().clone();
        let in_run = (ENCODER_ROWS / seq.max(1)).max(1);
        let mut parts = Vec::new();
        for first in (0..batch).step_by(in_run) {
            let mut inputs = EncoderInputs::default();
            inputs.clear();
            for sequence in first..(first + in_run).min(batch) {
                let ids: Vec<u32> = (0..seq).map(|i| token(sequence * seq + i, info.vocab)).collect();
                inputs.push(&info, &ids);
            }
            parts.push(inputs);
        }
        let embeddings = vec![0.0; batch.min(in_run) * info.embedding_dim];
        Ok(EmbedRun { runner, parts, embeddings, dim: info.embedding_dim, width: info.width })
    }

    pub fn run(&mut self) -> Result<()> {
        self.run_with(|_| ())
    }

    /// As [`EmbedRun::run`]; `see` gets the hidden states of each run, in order.
    pub fn run_with(&mut self, mut see: impl FnMut(&[f32])) -> Result<()> {
        for inputs in &self.parts {
            let embeddings = &mut self.embeddings[..inputs.batch() * self.dim];
            self.runner.run(inputs, embeddings).map_err(ModelError::Run)?;
            see(&self.runner.hidden(inputs.rows())[..inputs.rows() * self.width]);
        }
        Ok(())
    }
}

/// Reads a prompt, or decodes one token on a filled cache.
struct DecodeRun {
    runner: DecoderRunner,
    steps: Vec<StepInputs>,
    logits: Vec<f32>,
}

impl DecodeRun {
    fn new(engine: &Engine, case: &Case) -> Result<DecodeRun> {
        let total = case.ctx + case.seq;
        let runner = engine.model.decoder_runner(total)?;
        let Built::Decoder(model) = engine.model.built() else {
            return Err(ModelError::NotADecoder { path: engine.model.folder().root().to_path_buf() }.into());
        };
        let limits = runner.limits();
        let (mut pool, mut table) = (BlockPool::new(limits.blocks), BlockTable::new());
        pool.reserve(&mut table, total)?;
        let ids: Vec<u32> = (0..total).map(|i| token(i, model.info.vocab)).collect();
        let mut run = DecodeRun { runner, steps: Vec::new(), logits: vec![0.0; model.info.vocab] };
        let mut past = 0;
        while past < total {
            // The measured part begins with a step of its own.
            let until = if past < case.ctx { case.ctx } else { total };
            let end = (past + limits.max_rows).min(until);
            let mut inputs = StepInputs::default();
            inputs.clear(limits.table);
            let (tokens, length) = (&ids[past..end], total);
            let step = SequenceStep { tokens, past, length, table: &table, wants_logits: true };
            inputs.push(&model.info, step);
            run.steps.push(inputs);
            past = end;
        }
        run.run()?;
        run.steps.retain(|step| step.past.first().is_some_and(|&past| past as usize >= case.ctx));
        Ok(run)
    }

    fn run(&mut self) -> Result<()> {
        for step in &self.steps {
            self.runner.step(step, &mut self.logits).map_err(ModelError::Run)?;
        }
        Ok(())
    }
}
