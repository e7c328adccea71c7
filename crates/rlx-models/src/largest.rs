//! The largest logits instead of all of them: what tokens are chosen from where logits are in a device's memory.

use crate::error::Result;
use crate::generate::{Constraint, DecoderRuntime, StepInputs, step_error};
use crate::runtime::{Executables, with_weights};
use crate::sampling::Sampler;
use rlx::pipeline::ModelCompilePipeline;
use rlx_graph::Graph;
use rlx_graph::ops::topk::TopK;
use rlx_graph::passes::PassOptions;
use std::sync::{Arc, Mutex, PoisonError};

/// Outputs of a decoder's graph that gives the largest logits.
pub(crate) const LARGEST: [&str; 2] = ["largest_logits", "largest_tokens"];

/// Most logits of a row that a device is asked to find.
const MOST: usize = 129;

/// A decoder's graph with outputs `[outs, count]`: the largest of its logits, largest first, and their tokens.
fn graph_of(source: &Graph, count: usize) -> Result<Graph> {
    let mut graph = source.clone();
    if let Some(&(_, logits)) = source.outputs().first() {
        let found = graph.add(TopK { k: count }, &[logits])?;
        graph.set_outputs(&[(LARGEST[0], found[0]), (LARGEST[1], found[1])])?;
    }
    Ok(graph)
}

/// Executables of a decoder that give this many of the largest logits.
#[derive(Clone)]
pub(crate) struct Largest {
    pub count: usize,
    pub executables: Executables,
}

/// The one that was asked for last.
#[derive(Default)]
pub(crate) struct LargestGraphs(Mutex<Option<Largest>>);

impl LargestGraphs {
    /// Executables for so many logits, if the device has a memory of its own and all logits are more than a few.
    pub fn of(
        &self,
        pipeline: &Arc<ModelCompilePipeline>,
        source: &Graph,
        vocab: usize,
        wanted: Option<usize>,
    ) -> Result<Option<Largest>> {
        let far = pipeline.session().backend().traffic().is_some();
        let Some(count) = wanted.map(|count| count.min(vocab)).filter(|count| far && *count <= MOST) else {
            return Ok(None);
        };
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = last.as_ref().filter(|known| known.count == count) {
            return Ok(Some(known.clone()));
        }
        let graph = graph_of(source, count)?;
        let template = pipeline.ensure_template(&graph, &with_weights(PassOptions::default()))?;
        let executables = Executables::of(Arc::clone(pipeline), template)?;
        Ok(Some(last.insert(Largest { count, executables }).clone()))
    }
}

/// The logits of a step's rows: all of them, or the largest.
#[derive(Debug)]
pub(crate) struct RowLogits {
    vocab: usize,
    /// How many of the largest steps give; 0 where they give all.
    largest: usize,
    logits: Vec<f32>,
    /// The tokens of the largest.
    tokens: Vec<i32>,
    /// All are there, for the last step ran a second time.
    all: bool,
    ran_again: usize,
}

impl RowLogits {
    /// With room for so many rows.
    pub fn new(vocab: usize, largest: usize, rows: usize) -> Self {
        let width = if largest == 0 { vocab } else { largest };
        let (logits, tokens) = (vec![0.0; width * rows.max(1)], vec![0; largest * rows.max(1)]);
        Self { vocab, largest, logits, tokens, all: false, ran_again: 0 }
    }

    /// The same count of steps that ran again, with other sizes.
    pub fn anew(&self, largest: usize, rows: usize) -> Self {
        Self { ran_again: self.ran_again, ..Self::new(self.vocab, largest, rows) }
    }

    pub fn largest(&self) -> Option<usize> {
        Some(self.largest).filter(|&count| count > 0)
    }

    pub fn ran_again(&self) -> usize {
        self.ran_again
    }

    /// Runs a step.
    pub fn run(&mut self, runtime: &mut impl DecoderRuntime, inputs: &StepInputs) -> Result<()> {
        let rows = inputs.logit_rows.len();
        self.all = self.largest == 0;
        let width = if self.all { self.vocab } else { self.largest };
        self.logits.resize(rows * width, 0.0);
        self.tokens.resize(rows * self.largest, 0);
        let ran = match self.all {
            true => runtime.step(inputs, &mut self.logits),
            false => runtime.step_largest(inputs, &mut self.logits, &mut self.tokens),
        };
        ran.map_err(step_error)
    }

    /// The likeliest token of one of the rows.
    pub fn likeliest(&self, at: usize) -> u32 {
        if !self.all {
            return self.tokens[at * self.largest] as u32;
        }
        let (mut best, row) = (0, &self.logits[at * self.vocab..(at + 1) * self.vocab]);
        for (token, &logit) in row.iter().enumerate() {
            if logit > row[best] {
                best = token;
            }
        }
        best as u32
    }

    /// Draws a token from the logits of one of the rows of the last step, whose inputs these are; runs it again where the largest do not
    /// decide.
    pub fn sample(
        &mut self,
        at: usize,
        sampler: &mut Sampler,
        constraint: Option<&mut (dyn Constraint + 'static)>,
        runtime: &mut impl DecoderRuntime,
        inputs: &StepInputs,
    ) -> Result<u32> {
        if !self.all {
            let row = at * self.largest..(at + 1) * self.largest;
            if let Some(token) = sampler.sample_largest(&self.logits[row.clone()], &self.tokens[row])? {
                return Ok(token);
            }
            // The same keys and values go to the same places.
            self.logits.resize(inputs.logit_rows.len() * self.vocab, 0.0);
            runtime.step(inputs, &mut self.logits).map_err(step_error)?;
            (self.all, self.ran_again) = (true, self.ran_again + 1);
        }
        let logits = &mut self.logits[at * self.vocab..(at + 1) * self.vocab];
        if let Some(constraint) = constraint {
            constraint.mask(logits)?;
        }
        sampler.sample(logits)
    }
}
