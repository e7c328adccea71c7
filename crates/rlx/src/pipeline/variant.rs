//! Sizes of a model's runs, as the symbols of its graphs.

use super::PipelineError;
use super::key::{CacheKey, KeyFields};
use rlx_graph::ops::attention::BLOCK;
use rlx_tensor::{DimBinding, Symbol};

/// What part of a model's work a run does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// Reads a prompt into the caches.
    Prefill,
    /// One token of each sequence.
    Decode,
    /// Whole sequences, no caches.
    Encoder,
}

impl Phase {
    /// The word in keys.
    pub const fn name(self) -> &'static str {
        match self {
            Phase::Prefill => "prefill",
            Phase::Decode => "decode",
            Phase::Encoder => "encoder",
        }
    }
}

/// Capacities of a model's runs. They bind every symbol that the graphs of models use: rows derive from batch and sequence, blocks and
/// tables of caches from the positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ModelVariant {
    /// Sequences of a run.
    pub batch: usize,
    /// Rows of each sequence in a run.
    pub seq: usize,
    /// Positions that a sequence's caches hold, those of the run included.
    pub past: usize,
    /// What the runs do.
    pub phase: Phase,
}

impl ModelVariant {
    /// Whole sequences without caches.
    pub fn encoder(batch: usize, seq: usize) -> Self {
        Self { batch, seq, past: 0, phase: Phase::Encoder }
    }

    /// Steps of up to `seq` rows over caches of `past` positions.
    pub fn prefill(batch: usize, seq: usize, past: usize) -> Self {
        Self { batch, seq, past, phase: Phase::Prefill }
    }

    /// Steps of one row over caches of `past` positions.
    pub fn decode(batch: usize, past: usize) -> Self {
        Self { batch, seq: 1, past, phase: Phase::Decode }
    }

    /// A key that is the same everywhere.
    pub fn cache_key(&self) -> CacheKey {
        self.fields(KeyFields::new()).key()
    }

    fn fields(&self, fields: KeyFields) -> KeyFields {
        let number = |value: usize| (value as u64).to_le_bytes();
        let fields = fields.with("batch", number(self.batch)).with("seq", number(self.seq));
        fields.with("past", number(self.past)).with("phase", self.phase.name())
    }

    /// The value of a symbol; `None` for one that this does not know, or that overflows.
    pub fn value(&self, symbol: &Symbol) -> Option<usize> {
        let table = self.past.div_ceil(BLOCK);
        match symbol.name() {
            "batch" | "outs" => Some(self.batch),
            "seq" => Some(self.seq),
            "past" => Some(self.past),
            "rows" => self.batch.checked_mul(self.seq),
            "table" => Some(table),
            "blocks" | "window_blocks" => self.batch.checked_mul(table),
            _ => None,
        }
    }

    /// Values for these symbols.
    ///
    /// # Errors
    /// [`PipelineError::Unbound`] names every symbol that this has no value for.
    pub fn dim_binding<'s>(
        &self,
        symbols: impl IntoIterator<Item = &'s Symbol>,
    ) -> Result<DimBinding, PipelineError> {
        let (mut binding, mut unbound) = (DimBinding::new(), Vec::new());
        for symbol in symbols {
            match self.value(symbol) {
                Some(value) => binding.bind(symbol, value).map_err(crate::plan::PlanError::from)?,
                None => unbound.push(symbol.name().to_owned()),
            }
        }
        if unbound.is_empty() { Ok(binding) } else { Err(PipelineError::Unbound { symbols: unbound }) }
    }
}

/// A part of a model with a graph of its own, at some capacities.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ModelComponent {
    /// What it is: `decoder`, say.
    pub name: String,
    /// Its capacities.
    pub variant: ModelVariant,
}

impl ModelComponent {
    /// A component of this name.
    pub fn new(name: impl Into<String>, variant: ModelVariant) -> Self {
        Self { name: name.into(), variant }
    }

    /// A key that is the same everywhere.
    pub fn cache_key(&self) -> CacheKey {
        self.variant.fields(KeyFields::new().with("component", &self.name)).key()
    }

    /// As [`ModelVariant::dim_binding`].
    ///
    /// # Errors
    /// As [`ModelVariant::dim_binding`].
    pub fn dim_binding<'s>(
        &self,
        symbols: impl IntoIterator<Item = &'s Symbol>,
    ) -> Result<DimBinding, PipelineError> {
        self.variant.dim_binding(symbols)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn symbols(names: &[&str]) -> Vec<Symbol> {
        names.iter().map(Symbol::new).collect()
    }

    #[test]
    fn rows_derive_from_batch_and_sequence_and_blocks_from_positions() {
        let all = symbols(&["rows", "batch", "outs", "blocks", "table", "seq", "past"]);
        let values = |variant: ModelVariant| {
            let binding = variant.dim_binding(&all).unwrap();
            all.iter().map(|symbol| binding.value(symbol).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(values(ModelVariant::prefill(2, 100, 300)), [200, 2, 2, 10, 5, 100, 300]);
        assert_eq!(values(ModelVariant::decode(3, 64)), [3, 3, 3, 3, 1, 1, 64]);
        assert_eq!(values(ModelVariant::encoder(4, 32)), [128, 4, 4, 0, 0, 32, 0]);
    }

    #[test]
    fn every_symbol_without_a_value_is_named() {
        let error =
            ModelVariant::decode(1, 64).dim_binding(&symbols(&["rows", "height", "width"])).unwrap_err();
        assert!(error.to_string().contains("height, width"), "{error}");
        let huge = ModelVariant::prefill(usize::MAX, 2, 1).dim_binding(&symbols(&["rows"])).unwrap_err();
        assert!(huge.to_string().contains("rows"), "{huge}");
    }

    #[test]
    fn keys_of_variants_and_components_differ_in_every_field_and_are_stable() {
        let one = ModelVariant::prefill(1, 2, 3);
        let others = [
            ModelVariant::prefill(2, 2, 3),
            ModelVariant::prefill(1, 3, 3),
            ModelVariant::prefill(1, 2, 2),
            ModelVariant { phase: Phase::Decode, ..one },
            ModelVariant { phase: Phase::Encoder, ..one },
        ];
        for other in others {
            assert_ne!(one.cache_key(), other.cache_key());
            assert_ne!(
                ModelComponent::new("decoder", one).cache_key(),
                ModelComponent::new("decoder", other).cache_key()
            );
        }
        assert_ne!(
            ModelComponent::new("decoder", one).cache_key(),
            ModelComponent::new("vision", one).cache_key()
        );
        assert_eq!(one.cache_key(), ModelVariant::prefill(1, 2, 3).cache_key());
    }
}
