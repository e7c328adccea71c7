//! How the operands of a product are rounded, and which instructions form the product.

use std::fmt;
use std::str::FromStr;

use super::pack::WeightType;
use crate::isa::{CpuFeatures, Isa};

/// How the operands of matrix products are rounded. Accumulation is in f32 either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Operands in f32; narrower weights are widened in registers.
    #[default]
    F32,
    /// Both operands rounded to bf16, to nearest even: activations when a product reads them, weights when they are packed.
    Bf16,
}

impl Precision {
    /// All, in order.
    pub const ALL: [Precision; 2] = [Precision::F32, Precision::Bf16];

    /// The name in settings, keys and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        }
    }

    /// The element type that parts of these types have once they are packed together; `None` of no parts. Blocks stay
    /// as they are, whatever the precision; `None` also of blocks beside another type.
    pub fn packed_type(self, parts: impl IntoIterator<Item = WeightType>) -> Option<WeightType> {
        let mut parts = parts.into_iter();
        let first = parts.next()?;
        match self {
            _ if matches!(first, WeightType::Blocks(_)) => parts.all(|part| part == first).then_some(first),
            Precision::F32 if parts.all(|part| part == first) => Some(first),
            Precision::F32 => Some(WeightType::F32),
            Precision::Bf16 => Some(WeightType::Bf16),
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A text that names no [`Precision`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownPrecision {
    /// The text.
    pub text: String,
}

impl fmt::Display for UnknownPrecision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unknown precision {:?}: expected f32 or bf16", self.text)
    }
}

impl std::error::Error for UnknownPrecision {}

impl FromStr for Precision {
    type Err = UnknownPrecision;

    fn from_str(text: &str) -> Result<Precision, UnknownPrecision> {
        let lower = text.trim().to_ascii_lowercase();
        let unknown = || UnknownPrecision { text: text.to_owned() };
        Precision::ALL.into_iter().find(|precision| precision.name() == lower).ok_or_else(unknown)
    }
}

/// Which instructions form the products of a precision.
///
/// The two bf16 forms sum in the same order, the second of two consecutive k before the first, each with one rounding. They
/// give the same bits unless a denormal f32 occurs, which [`Products::Bf16Dot`] takes and leaves as zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Products {
    /// Fused multiply-adds of f32 operands.
    F32,
    /// Fused multiply-adds of bf16 operands, widened.
    Bf16Fma,
    /// `vdpbf16ps`.
    Bf16Dot,
}

impl Products {
    /// All, in order.
    pub const ALL: [Products; 3] = [Products::F32, Products::Bf16Fma, Products::Bf16Dot];

    /// What serves a precision best on an instruction set of this machine: a matter of the processor, not of a measurement, so
    /// that one machine always gives the same bits.
    pub fn choose(precision: Precision, isa: Isa) -> Products {
        Products::choose_for(CpuFeatures::detect(), precision, isa)
    }

    /// As [`Products::choose`], for a machine of these features.
    pub fn choose_for(features: &CpuFeatures, precision: Precision, isa: Isa) -> Products {
        match precision {
            Precision::F32 => Products::F32,
            Precision::Bf16 if isa == Isa::Avx512 && features.avx512_bf16_fast => Products::Bf16Dot,
            Precision::Bf16 => Products::Bf16Fma,
        }
    }

    /// Whether this build and this machine can form them on an instruction set.
    pub fn is_available(self, isa: Isa) -> bool {
        let dot = cfg!(target_arch = "x86_64") && isa == Isa::Avx512 && CpuFeatures::detect().avx512_bf16;
        isa.is_available() && (self != Products::Bf16Dot || dot)
    }
}
