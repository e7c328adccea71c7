//! A text as it is generated: pieces of text instead of tokens, with what came of it.

use crate::draft::DraftStats;
use crate::error::{ModelError, Result};
use crate::generate::{DecoderRuntime as _, FinishReason, Generation, Shift};
use crate::lora::Adapter;
use crate::model::{HeldText, Model};
use crate::runtime::DecoderRunner;
use crate::tokenizer::Detokenizer;
use rlx_tensor::time::Instant;
use std::sync::Arc;

fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// A text being generated: an iterator of pieces, each complete UTF-8.
pub struct TextGeneration<'m> {
    inner: Generation<DecoderRunner>,
    pieces: Option<Detokenizer<'m>>,
    adapter: Option<Arc<Adapter>>,
    prompt_tokens: usize,
    load_ms: f64,
    prefill_ms: Option<f64>,
    decode_ms: f64,
}

impl<'m> TextGeneration<'m> {
    /// `started`: when its weights began to be bound.
    pub(crate) fn new(
        inner: Generation<DecoderRunner>,
        pieces: Detokenizer<'m>,
        adapter: Option<Arc<Adapter>>,
        started: Instant,
    ) -> Self {
        let (prompt_tokens, load_ms) = (inner.tokens().len(), millis(started));
        let (pieces, prefill_ms, decode_ms) = (Some(pieces), None, 0.0);
        Self { inner, pieces, adapter, prompt_tokens, load_ms, prefill_ms, decode_ms }
    }

    /// Goes on by the same model on another device: the step of the next token runs all tokens so far there. What was given out stays; the
    /// random stream, penalties and a grammar go on from where they are.
    ///
    /// # Errors
    /// As [`Model::generate`]; [`ModelError::Setting`] for a model of other sizes.
    pub fn continue_on(&mut self, model: &Model) -> Result<()> {
        let (here, there) = (self.inner.runtime().info(), &model.decoder()?.info);
        if (here.vocab, here.layers, here.max_positions) != (there.vocab, there.layers, there.max_positions) {
            let (setting, expected) = ("the model to go on by", "the one that the text was begun by");
            return Err(ModelError::Setting { setting, expected, found: there.model_type.clone() });
        }
        let (limits, wanted) = (self.inner.runtime().limits(), self.inner.decisive());
        self.inner.move_to(model.runner_after(limits, wanted, self.adapter.as_ref())?)
    }

    /// True if this model runs it.
    pub(crate) fn is_on(&self, model: &Model) -> bool {
        Arc::ptr_eq(self.inner.runtime().compiled(), model.compiled())
    }

    /// Goes on without guesses, which never change a text.
    pub(crate) fn without_draft(&mut self) {
        self.inner.without_drafter();
    }

    /// Gives no more pieces.
    pub(crate) fn end(&mut self) {
        self.pieces = None;
    }

    /// The next piece, never empty; `None` at the end. After an error it may be asked for again.
    pub(crate) fn next_piece(&mut self) -> Result<Option<String>> {
        loop {
            match self.piece()? {
                Some(piece) if piece.is_empty() && self.pieces.is_some() => {}
                Some(piece) if piece.is_empty() => return Ok(None),
                other => return Ok(other),
            }
        }
    }

    fn piece(&mut self) -> Result<Option<String>> {
        if self.pieces.is_none() {
            return Ok(None);
        }
        let started = Instant::now();
        let token = self.inner.next_token()?;
        match self.prefill_ms {
            None => self.prefill_ms = Some(millis(started)),
            Some(_) => self.decode_ms += millis(started),
        }
        let Some(pieces) = &mut self.pieces else { return Ok(None) };
        match token {
            Some(token) => pieces.push(token).map(Some),
            None => match self.pieces.take() {
                Some(pieces) => pieces.finish().map(Some),
                None => Ok(None),
            },
        }
    }

    /// Ids of the prompt.
    pub fn prompt_ids(&self) -> &[u32] {
        &self.inner.tokens()[..self.prompt_tokens]
    }

    /// Ids generated so far.
    pub fn token_ids(&self) -> &[u32] {
        self.inner.new_tokens()
    }

    /// Why the text ended, once it has.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.inner.finish_reason()
    }

    /// Tokens of the prompt that were not run: see [`Model::generate_after`].
    pub fn reused(&self) -> usize {
        self.inner.reused()
    }

    /// What became of guesses.
    pub fn drafts(&self) -> DraftStats {
        self.inner.drafts()
    }

    /// How many of the largest logits of a step come back from a device with a memory of its own; `None` if all do.
    pub fn largest(&self) -> Option<usize> {
        self.inner.largest()
    }

    /// Steps that ran a second time because the largest logits did not decide.
    pub fn ran_again(&self) -> usize {
        self.inner.ran_again()
    }

    /// What the text has forgotten since this was last asked, where it reached the context.
    pub fn take_shift(&mut self) -> Option<Shift> {
        self.inner.take_shift()
    }

    /// The text with its keys and values, for [`Model::generate_after`].
    pub fn into_held(self) -> HeldText {
        let (runner, held) = self.inner.into_held();
        HeldText { runner, held, adapter: self.adapter }
    }

    /// Time to bind weights (packed at first use) and make the caches, in milliseconds.
    pub fn load_ms(&self) -> f64 {
        self.load_ms
    }

    /// Time from the first request for a piece to the first token, in milliseconds.
    pub fn prefill_ms(&self) -> f64 {
        self.prefill_ms.unwrap_or(0.0)
    }

    /// Time of all later tokens, in milliseconds.
    pub fn decode_ms(&self) -> f64 {
        self.decode_ms
    }
}

impl Iterator for TextGeneration<'_> {
    type Item = Result<String>;

    /// The next piece, never empty; after an error or the end, nothing.
    fn next(&mut self) -> Option<Result<String>> {
        let piece = self.next_piece();
        if piece.is_err() {
            self.end();
        }
        piece.transpose()
    }
}
