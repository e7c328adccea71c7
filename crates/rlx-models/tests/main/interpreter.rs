//! Runtimes over the reference interpreter: slow, and the oracle of every other runtime.

use rlx::weights::WeightLoader;
use rlx_graph::Graph;
use rlx_models::embed::{EncoderInputs, EncoderLimits, EncoderRuntime};
use rlx_models::generate::{DecoderLimits, DecoderRuntime, RunError, StepInputs};
use rlx_models::{Decoder, DecoderInfo, Encoder};
use rlx_tensor::{Dim, Shape, Tensor};
use std::collections::BTreeMap;

/// Runs a decoder's graph node by node.
pub struct InterpretedDecoder {
    graph: Graph,
    info: DecoderInfo,
    params: BTreeMap<String, Tensor>,
    states: BTreeMap<String, Tensor>,
    limits: DecoderLimits,
    pub last_logits: Vec<f32>,
}

/// Runs an encoder's graph node by node.
pub struct InterpretedEncoder {
    graph: Graph,
    params: BTreeMap<String, Tensor>,
    pub limits: EncoderLimits,
}

/// Every param of a graph as a tensor.
pub fn load_params(graph: &Graph, weights: &dyn WeightLoader) -> BTreeMap<String, Tensor> {
    let load = |name: &str| {
        let view = weights.tensor(name).unwrap().unwrap();
        Tensor::from_bytes(view.dims, view.dtype, view.bytes).unwrap()
    };
    graph.params().filter_map(|(_, v)| v.name.clone()).map(|name| (name.clone(), load(&name))).collect()
}

impl InterpretedDecoder {
    pub fn new(model: &Decoder, weights: &dyn WeightLoader, limits: DecoderLimits) -> Self {
        let info = model.info.clone();
        let zeros = |shape: &Shape| {
            let of_window = shape.dims()[0] == Dim::symbol("window_blocks");
            let blocks = if of_window { limits.window.unwrap().blocks } else { limits.blocks };
            let known = shape.dims()[1..].iter().map(|dim| dim.known().unwrap());
            Tensor::zeros(&[blocks].into_iter().chain(known).collect::<Vec<_>>(), shape.dtype()).unwrap()
        };
        let states = model.graph.states().map(|(_, v)| (v.name.clone().unwrap(), zeros(&v.shape))).collect();
        let params = load_params(&model.graph, weights);
        Self { graph: model.graph.clone(), info, params, states, limits, last_logits: Vec::new() }
    }

    /// Logits of the wanted rows.
    pub fn run(&mut self, inputs: &StepInputs) -> Result<Vec<f32>, RunError> {
        let list = |values: &[i32]| Tensor::from_slice(&[values.len()], values);
        let table = |entries: &[i32]| Tensor::from_slice(&[inputs.past.len(), inputs.table], entries);
        let mut tensors = vec![
            ("input_ids", list(&inputs.input_ids)?),
            ("positions", list(&inputs.positions)?),
            ("seq_starts", list(&inputs.seq_starts)?),
            ("past", list(&inputs.past)?),
            ("logit_rows", list(&inputs.logit_rows)?),
        ];
        if self.info.full_layers > 0 {
            tensors.push(("block_table", table(&inputs.block_table)?));
        }
        if self.info.window.is_some() {
            tensors.push(("window_table", table(&inputs.window_table)?));
        }
        if let Some(rope) = &self.info.rope {
            tensors.push(("angles", Tensor::from_slice(&[inputs.rows(), rope.rotary_dim], &inputs.angles)?));
        }
        let params = |name: &str| self.params.get(name).cloned();
        let outputs = rlx_graph::interpret(&self.graph, &tensors, &params, &mut self.states)?;
        Ok(outputs[0].1.as_slice::<f32>()?.to_vec())
    }
}

impl DecoderRuntime for InterpretedDecoder {
    fn limits(&self) -> DecoderLimits {
        self.limits
    }

    fn step(&mut self, inputs: &StepInputs, logits: &mut [f32]) -> Result<(), RunError> {
        self.last_logits = self.run(inputs)?;
        logits.copy_from_slice(&self.last_logits);
        Ok(())
    }
}

impl InterpretedEncoder {
    pub fn new(model: &Encoder, weights: &dyn WeightLoader) -> Self {
        let limits = EncoderLimits { max_rows: 1024, max_batch: 64 };
        Self { graph: model.graph.clone(), params: load_params(&model.graph, weights), limits }
    }

    /// Every output by name.
    pub fn run_all(&self, inputs: &EncoderInputs) -> Result<BTreeMap<String, Vec<f32>>, RunError> {
        let list = |values: &[i32]| Tensor::from_slice(&[values.len()], values);
        let tensors = [
            ("input_ids", list(&inputs.input_ids)?),
            ("positions", list(&inputs.positions)?),
            ("seq_starts", list(&inputs.seq_starts)?),
        ];
        let params = |name: &str| self.params.get(name).cloned();
        let outputs = rlx_graph::interpret(&self.graph, &tensors, &params, &mut BTreeMap::new())?;
        outputs.into_iter().map(|(name, tensor)| Ok((name, tensor.as_slice::<f32>()?.to_vec()))).collect()
    }
}

impl EncoderRuntime for InterpretedEncoder {
    fn limits(&self) -> EncoderLimits {
        self.limits
    }

    fn run(&mut self, inputs: &EncoderInputs, embeddings: &mut [f32]) -> Result<(), RunError> {
        embeddings.copy_from_slice(&self.run_all(inputs)?["embedding"]);
        Ok(())
    }
}
