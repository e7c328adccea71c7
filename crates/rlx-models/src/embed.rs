//! Texts to vectors: tokenised, packed into ragged batches, run, in the order given.

use crate::arch::EncoderInfo;
use crate::error::{ModelError, Result};
use crate::generate::RunError;
use crate::tokenizer::TextTokenizer;

/// Something that runs an encoder's graph.
pub trait EncoderRuntime {
    /// Capacities it was made for.
    fn limits(&self) -> EncoderLimits;

    /// Runs the graph on `inputs` and writes the output `embedding`, row after row, to `embeddings` (`batch * embedding_dim`).
    ///
    /// # Errors
    /// Whatever went wrong.
    fn run(&mut self, inputs: &EncoderInputs, embeddings: &mut [f32]) -> std::result::Result<(), RunError>;
}

/// Capacities of a runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncoderLimits {
    /// Most rows of a run.
    pub max_rows: usize,
    /// Most sequences of a run.
    pub max_batch: usize,
}

/// The inputs of an encoder's graph for one run; reused from run to run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EncoderInputs {
    /// `[rows]`
    pub input_ids: Vec<i32>,
    /// `[rows]`
    pub positions: Vec<i32>,
    /// `[batch + 1]`
    pub seq_starts: Vec<i32>,
}

impl EncoderInputs {
    /// Empties the inputs.
    pub fn clear(&mut self) {
        self.input_ids.clear();
        self.positions.clear();
        self.seq_starts.clear();
        self.seq_starts.push(0);
    }

    /// Adds a sequence.
    pub fn push(&mut self, info: &EncoderInfo, tokens: &[u32]) {
        self.input_ids.extend(tokens.iter().map(|&id| id as i32));
        self.positions.extend((0..tokens.len()).map(|i| (info.first_position + i) as i32));
        self.seq_starts.push(self.input_ids.len() as i32);
    }

    /// Rows so far.
    pub fn rows(&self) -> usize {
        self.input_ids.len()
    }

    /// Sequences so far.
    pub fn batch(&self) -> usize {
        self.seq_starts.len().saturating_sub(1)
    }
}

/// Embeds sequences of tokens: one vector each, in order. Sequences are packed in the order given, as many as fit into a run.
///
/// # Errors
/// [`ModelError::TokenId`]; [`ModelError::Context`] for a sequence that no run can hold; [`ModelError::Run`].
pub fn embed_tokens<R: EncoderRuntime + ?Sized>(
    runtime: &mut R,
    info: &EncoderInfo,
    sequences: &[Vec<u32>],
) -> Result<Vec<Vec<f32>>> {
    let limits = runtime.limits();
    let longest = limits.max_rows.min(info.max_tokens);
    for tokens in sequences {
        if let Some(&id) = tokens.iter().find(|&&id| id as usize >= info.vocab) {
            return Err(ModelError::TokenId { id, vocab: info.vocab });
        }
        if tokens.len() > longest || limits.max_batch == 0 {
            let advice = "shorten the text, or let the tokenizer cut it";
            return Err(ModelError::Context {
                prompt_tokens: tokens.len(),
                new_tokens: 0,
                limit: longest,
                advice,
            });
        }
    }
    let mut embeddings = Vec::with_capacity(sequences.len());
    let (mut inputs, mut flat) = (EncoderInputs::default(), Vec::new());
    let mut rest = sequences;
    while !rest.is_empty() {
        inputs.clear();
        let fits = |inputs: &EncoderInputs, tokens: &[u32]| {
            inputs.rows() + tokens.len() <= limits.max_rows && inputs.batch() < limits.max_batch
        };
        while let Some((tokens, after)) = rest.split_first().filter(|(tokens, _)| fits(&inputs, tokens)) {
            inputs.push(info, tokens);
            rest = after;
        }
        flat.resize(inputs.batch() * info.embedding_dim, 0.0);
        runtime.run(&inputs, &mut flat).map_err(ModelError::Run)?;
        embeddings.extend(flat.chunks(info.embedding_dim).map(<[f32]>::to_vec));
    }
    Ok(embeddings)
}

/// Embeds texts: one vector each, in order; tokenised on up to `threads` threads.
///
/// # Errors
/// As [`embed_tokens`], and of the tokenizer.
pub fn embed_texts<R: EncoderRuntime + ?Sized>(
    runtime: &mut R,
    info: &EncoderInfo,
    tokenizer: &TextTokenizer,
    texts: &[impl AsRef<str>],
    threads: usize,
) -> Result<Vec<Vec<f32>>> {
    embed_tokens(runtime, info, &tokenizer.encode_all(texts, true, threads)?)
}
