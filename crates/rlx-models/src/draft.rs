//! Speculative decoding: tokens that are guessed and then checked in one step, several at a time.
//!
//! A guess never changes the text. Every token is drawn from the logits of the model at its place, which have the same bits whether
//! a token runs alone or after guessed ones, and the random stream moves once a token; a wrong guess costs its rows.

use crate::arch::DecoderInfo;
use crate::error::{ModelError, Result};
use crate::generate::{DecoderRuntime, SequenceStep, StepInputs, length_dependent};
use crate::kv::{BLOCK_POSITIONS, BlockPool, BlockTable, blocks_for};
use crate::largest::RowLogits;
use std::fmt;

/// Guesses how a text goes on.
pub trait Drafter: Send {
    /// Appends at most `most` tokens to the empty `draft`: those that may follow `tokens`.
    ///
    /// # Errors
    /// Whatever went wrong; the generation ends.
    fn propose(&mut self, tokens: &[u32], most: usize, draft: &mut Vec<u32>) -> Result<()>;
}

impl fmt::Debug for dyn Drafter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a drafter")
    }
}

/// How many tokens were guessed, and how many of them were right.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DraftStats {
    /// Guessed and run.
    pub proposed: usize,
    /// Of these, those that the text goes on with.
    pub accepted: usize,
}

/// Guesses that the text goes on as it did after the last place with the same end: good where answers repeat what was asked, such as
/// summaries and changes to code. Known as prompt lookup decoding.
#[derive(Debug, Clone, Copy, Default)]
pub struct PromptLookup;

/// Tokens of the end that is looked for: the longest first.
const ENDS: [usize; 3] = [4, 3, 2];

impl Drafter for PromptLookup {
    fn propose(&mut self, tokens: &[u32], most: usize, draft: &mut Vec<u32>) -> Result<()> {
        for length in ENDS {
            let Some(split) = tokens.len().checked_sub(length) else { continue };
            let (before, end) = (&tokens[..tokens.len() - 1], &tokens[split..]);
            if let Some(at) = before.windows(length).rposition(|window| window == end) {
                draft.extend(tokens[at + length..].iter().take(most));
                return Ok(());
            }
        }
        Ok(())
    }
}

/// Guesses what a smaller model with the same tokens would say.
#[derive(Debug)]
pub struct ModelDrafter<R> {
    runtime: R,
    info: DecoderInfo,
    /// Tokens whose keys and values are in the runtime's cache.
    held: Vec<u32>,
    pool: BlockPool,
    table: BlockTable,
    inputs: StepInputs,
    logits: RowLogits,
}

impl<R: DecoderRuntime> ModelDrafter<R> {
    /// A drafter over a runtime of its own, for texts of a model with `vocab` tokens.
    ///
    /// # Errors
    /// [`ModelError::Setting`] if the draft model has another number of tokens, or rotates by the length of the text.
    pub fn new(runtime: R, info: &DecoderInfo, vocab: usize) -> Result<Self> {
        let wrong = |expected, found: String| {
            Err(ModelError::Setting { setting: "the draft model", expected, found })
        };
        if info.vocab != vocab {
            return wrong("one with the tokens of the model", format!("{} tokens, not {vocab}", info.vocab));
        }
        if length_dependent(info) {
            return wrong("one whose rotation does not depend on the text's length", info.model_type.clone());
        }
        let limits = runtime.limits();
        let (mut pool, mut table) = (BlockPool::of(&limits), BlockTable::new());
        pool.reserve(&mut table, limits.blocks.min(limits.table) * BLOCK_POSITIONS)?;
        let logits = RowLogits::new(vocab, runtime.largest(), 1);
        Ok(Self {
            runtime,
            info: info.clone(),
            held: Vec::new(),
            pool,
            table,
            inputs: StepInputs::default(),
            logits,
        })
    }

    /// Runs `held[past..]`; the likeliest next token.
    fn next(&mut self, mut past: usize) -> Result<u32> {
        let (length, most) = (self.held.len(), self.runtime.limits().max_rows.max(1));
        while past < length {
            let end = length.min(past + most);
            self.pool.advance(&mut self.table, past, end)?;
            self.inputs.clear(blocks_for(self.table.capacity()));
            let tokens = &self.held[past..end];
            let wants_logits = end == length;
            let step = SequenceStep { tokens, past, length, table: &self.table, wants_logits };
            self.inputs.push(&self.info, step);
            self.logits.run(&mut self.runtime, &self.inputs)?;
            past = end;
        }
        Ok(self.logits.likeliest(0))
    }
}

impl<R: DecoderRuntime + Send> Drafter for ModelDrafter<R> {
    fn propose(&mut self, tokens: &[u32], most: usize, draft: &mut Vec<u32>) -> Result<()> {
        let room = self.table.capacity().saturating_sub(tokens.len());
        let shared = shared_start(&self.held, tokens).min(tokens.len().saturating_sub(1));
        let mut past = self.pool.resume(&mut self.table, shared);
        self.held.clear();
        self.held.extend_from_slice(tokens);
        for _ in 0..most.min(room) {
            let token = self.next(past)?;
            past = self.held.len();
            draft.push(token);
            self.held.push(token);
        }
        // The last guess has not been run.
        self.held.truncate(past);
        Ok(())
    }
}

/// Tokens that two texts begin with alike.
pub(crate) fn shared_start(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proposed(tokens: &[u32], most: usize) -> Vec<u32> {
        let mut draft = Vec::new();
        PromptLookup.propose(tokens, most, &mut draft).unwrap();
        draft
    }

    #[test]
    fn the_last_place_with_the_longest_equal_end_is_continued() {
        assert_eq!(proposed(&[1, 2, 3, 4, 5, 9, 1, 2, 3], 2), [4, 5]);
        assert_eq!(proposed(&[1, 2, 7, 8, 1, 2, 6, 8, 1, 2], 9), [6, 8, 1, 2]);
        assert_eq!(proposed(&[5, 1, 2, 3, 7, 2, 3, 8, 1, 2, 3], 1), [7]);
        assert_eq!(proposed(&[4, 4, 4], 3), [4]);
        assert!(proposed(&[1, 2, 3], 4).is_empty() && proposed(&[1], 4).is_empty());
        assert!(proposed(&[], 4).is_empty());
    }
}
