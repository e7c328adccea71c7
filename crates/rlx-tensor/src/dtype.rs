//! Element types, including the block-quantised storage types of GGUF.

use std::fmt;
use std::str::FromStr;

/// Text that names no dtype.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown dtype {text:?}")]
pub struct UnknownDType {
    /// The text as given.
    pub text: String,
}

macro_rules! dtypes {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $elements:literal per $bytes:literal, $class:ident;)*) => {
        /// The type of a tensor's elements.
        #[expect(non_camel_case_types, reason = "block-quantised types are spelled as GGUF spells them")]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum DType { $($(#[$doc])* $name,)* }

        impl DType {
            /// Every dtype, in declaration order.
            pub const ALL: &'static [DType] = &[$(DType::$name,)*];

            /// The name used in text forms and messages.
            pub const fn name(self) -> &'static str {
                match self { $(DType::$name => $text,)* }
            }

            /// `(elements, bytes)` of the smallest addressable block.
            pub const fn block(self) -> (usize, usize) {
                match self { $(DType::$name => ($elements, $bytes),)* }
            }

            /// What kind of number the elements are.
            pub const fn class(self) -> DTypeClass {
                match self { $(DType::$name => DTypeClass::$class,)* }
            }
        }

        impl FromStr for DType {
            type Err = UnknownDType;
            fn from_str(text: &str) -> Result<Self, UnknownDType> {
                match text {
                    $($text => Ok(DType::$name),)*
                    _ => Err(UnknownDType { text: text.to_owned() }),
                }
            }
        }
    };
}

/// The kind of number a dtype holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DTypeClass {
    /// Floating point.
    Float,
    /// Signed integer.
    Int,
    /// Unsigned integer.
    Uint,
    /// Truth value, one byte, 0 or 1.
    Bool,
    /// Complex, real then imaginary.
    Complex,
    /// Block-quantised weights: storage only.
    Quant,
}

dtypes! {
    /// IEEE 754 binary64.
    F64 = "f64", 1 per 8, Float;
    /// IEEE 754 binary32.
    F32 = "f32", 1 per 4, Float;
    /// IEEE 754 binary16.
    F16 = "f16", 1 per 2, Float;
    /// bfloat16: the upper half of a binary32.
    BF16 = "bf16", 1 per 2, Float;
    /// OCP 8-bit float, 4 exponent bits, no infinities.
    F8E4M3 = "f8e4m3", 1 per 1, Float;
    /// OCP 8-bit float, 5 exponent bits.
    F8E5M2 = "f8e5m2", 1 per 1, Float;
    /// Signed, 64 bits.
    I64 = "i64", 1 per 8, Int;
    /// Signed, 32 bits.
    I32 = "i32", 1 per 4, Int;
    /// Signed, 16 bits.
    I16 = "i16", 1 per 2, Int;
    /// Signed, 8 bits.
    I8 = "i8", 1 per 1, Int;
    /// Signed, 4 bits, two in a byte, low nibble first.
    I4 = "i4", 2 per 1, Int;
    /// Unsigned, 64 bits.
    U64 = "u64", 1 per 8, Uint;
    /// Unsigned, 32 bits.
    U32 = "u32", 1 per 4, Uint;
    /// Unsigned, 16 bits.
    U16 = "u16", 1 per 2, Uint;
    /// Unsigned, 8 bits.
    U8 = "u8", 1 per 1, Uint;
    /// Unsigned, 4 bits, two in a byte, low nibble first.
    U4 = "u4", 2 per 1, Uint;
    /// One byte, 0 or 1.
    Bool = "bool", 1 per 1, Bool;
    /// Two f32: real, imaginary.
    C64 = "c64", 1 per 8, Complex;
    /// Two f64: real, imaginary.
    C128 = "c128", 1 per 16, Complex;
    /// GGUF `Q4_0`.
    Q4_0 = "Q4_0", 32 per 18, Quant;
    /// GGUF `Q4_1`.
    Q4_1 = "Q4_1", 32 per 20, Quant;
    /// GGUF `Q5_0`.
    Q5_0 = "Q5_0", 32 per 22, Quant;
    /// GGUF `Q5_1`.
    Q5_1 = "Q5_1", 32 per 24, Quant;
    /// GGUF `Q8_0`.
    Q8_0 = "Q8_0", 32 per 34, Quant;
    /// GGUF `Q2_K`.
    Q2_K = "Q2_K", 256 per 84, Quant;
    /// GGUF `Q3_K`.
    Q3_K = "Q3_K", 256 per 110, Quant;
    /// GGUF `Q4_K`.
    Q4_K = "Q4_K", 256 per 144, Quant;
    /// GGUF `Q5_K`.
    Q5_K = "Q5_K", 256 per 176, Quant;
    /// GGUF `Q6_K`.
    Q6_K = "Q6_K", 256 per 210, Quant;
    /// GGUF `IQ4_NL`.
    IQ4_NL = "IQ4_NL", 32 per 18, Quant;
    /// GGUF `IQ4_XS`.
    IQ4_XS = "IQ4_XS", 256 per 136, Quant;
    /// GGUF `IQ2_XXS`.
    IQ2_XXS = "IQ2_XXS", 256 per 66, Quant;
    /// GGUF `IQ2_XS`.
    IQ2_XS = "IQ2_XS", 256 per 74, Quant;
    /// GGUF `IQ2_S`.
    IQ2_S = "IQ2_S", 256 per 82, Quant;
    /// GGUF `IQ3_XXS`.
    IQ3_XXS = "IQ3_XXS", 256 per 98, Quant;
    /// GGUF `IQ3_S`.
    IQ3_S = "IQ3_S", 256 per 110, Quant;
    /// GGUF `IQ1_S`.
    IQ1_S = "IQ1_S", 256 per 50, Quant;
    /// GGUF `IQ1_M`.
    IQ1_M = "IQ1_M", 256 per 56, Quant;
    /// GGUF `MXFP4`: OCP microscaling, E2M1 with an E8M0 scale.
    MXFP4 = "MXFP4", 32 per 17, Quant;
}

impl DType {
    /// Bytes of one element, or `None` where elements share a byte or a block.
    pub const fn element_bytes(self) -> Option<usize> {
        match self.block() {
            (1, bytes) => Some(bytes),
            _ => None,
        }
    }

    /// Bytes that `elements` elements take: `None` if they do not fill whole blocks or the size overflows.
    pub const fn bytes_for(self, elements: usize) -> Option<usize> {
        let (per_block, bytes) = self.block();
        if !elements.is_multiple_of(per_block) {
            return None;
        }
        (elements / per_block).checked_mul(bytes)
    }

    /// True for floating-point types.
    pub const fn is_float(self) -> bool {
        matches!(self.class(), DTypeClass::Float)
    }

    /// True for signed and unsigned integers (not Bool).
    pub const fn is_int(self) -> bool {
        matches!(self.class(), DTypeClass::Int | DTypeClass::Uint)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for &dtype in DType::ALL {
            assert_eq!(dtype.name().parse::<DType>(), Ok(dtype));
        }
        assert!("f31".parse::<DType>().is_err());
    }

    #[test]
    fn sizes_are_checked() {
        assert_eq!(DType::F32.bytes_for(3), Some(12));
        assert_eq!(DType::Q4_0.bytes_for(64), Some(36));
        assert_eq!(DType::Q4_0.bytes_for(63), None);
        assert_eq!(DType::U4.bytes_for(6), Some(3));
        assert_eq!(DType::F64.bytes_for(usize::MAX / 2), None);
    }
}
