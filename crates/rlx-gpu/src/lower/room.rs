//! Scratch memory of a step, shared out among its launches.

use super::{Amount, Operand};
use rlx_tensor::DType;

/// Scratch memory being shared out.
#[derive(Clone)]
pub(crate) struct Room {
    end: Amount,
}

impl Default for Room {
    fn default() -> Self {
        Room { end: Amount::Known(0) }
    }
}

impl Room {
    /// Room that begins at a multiple of four words.
    pub fn take(&mut self, dtype: DType, dims: &[Amount]) -> Operand {
        self.take_words(dtype, dims, |words| words)
    }

    /// As [`Room::take`], in runs where `of` is at least so much.
    pub fn take_from(&mut self, dtype: DType, dims: &[Amount], of: &Amount, least: usize) -> Operand {
        self.take_words(dtype, dims, |words| of.when(least, usize::MAX, words).unwrap_or(Amount::Known(0)))
    }

    fn take_words(&mut self, dtype: DType, dims: &[Amount], taken: impl FnOnce(Amount) -> Amount) -> Operand {
        let operand = Operand::scratch(dtype, self.end.clone(), dims);
        let words = Amount::product(&[Amount::product(dims).ceil_div(4), Amount::Known(4)]);
        self.end = Amount::sum(&self.end, &taken(words));
        operand
    }

    /// Words that were taken.
    pub fn words(self) -> Amount {
        self.end
    }
}
