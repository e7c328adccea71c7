//! In what precision products of weights multiply.

use super::blocks::is_blocks;
use super::{Draft, Operand};
use crate::ir::Value;
use rlx_tensor::DType;

/// What products of weights multiply: linear layers and experts, whose weights are no blocks. It is the same for every number of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Operands {
    /// Floats of 32 bits; narrower weights are widened.
    #[default]
    Floats,
    /// Floats rounded to bfloat16, multiplied and summed as floats of 32 bits.
    Rounded,
    /// Floats rounded to bfloat16, multiplied by matrix units.
    Units {
        /// Programs that a device runs at once: from so many on, larger ones serve.
        wave: usize,
    },
}

impl Operands {
    /// In words of reports.
    pub fn told(self) -> &'static str {
        match self {
            Operands::Floats => "f32",
            Operands::Rounded => "bf16 without matrix units",
            Operands::Units { .. } => "bf16 by matrix units",
        }
    }

    /// What products of these matrices multiply.
    pub fn of(self, matrices: &[Operand]) -> Self {
        if matrices.iter().any(|matrix| is_blocks(matrix.dtype)) { Operands::Floats } else { self }
    }

    /// An operand's element as it is multiplied.
    pub fn element(self, d: &mut Draft<'_>, x: Value) -> Value {
        if self == Operands::Floats { x } else { d.rounded(DType::BF16, x) }
    }
}
