//! The bits of f16 and bf16 values to and from f32, as the vector conversions give them.

/// Widens bf16 bits; exact.
#[inline(always)]
pub const fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

/// Rounds to bf16 bits, to nearest even; keeps denormals, quiets a NaN.
#[inline(always)]
pub const fn f32_to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if bits & 0x7fff_ffff > 0x7f80_0000 {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// Widens f16 bits; exact, quiets a NaN.
#[inline(always)]
pub const fn f16_to_f32(bits: u16) -> f32 {
    let sign = ((bits as u32) & 0x8000) << 16;
    let magnitude = (bits as u32) & 0x7fff;
    if magnitude > 0x7c00 {
        return f32::from_bits(sign | 0x7fc0_0000 | (magnitude << 13));
    }
    if magnitude == 0x7c00 {
        return f32::from_bits(sign | 0x7f80_0000);
    }
    if magnitude < 0x400 {
        let value = magnitude as f32 * (1.0 / 16_777_216.0);
        return f32::from_bits(sign | value.to_bits());
    }
    f32::from_bits(sign | ((magnitude << 13) + 0x3800_0000))
}

/// Rounds to f16 bits, to nearest even; overflow gives infinity, a NaN is quieted.
#[inline(always)]
pub const fn f32_to_f16(x: f32) -> u16 {
    let bits = x.to_bits();
    let sign = ((bits >> 16) & 0x8000) as u16;
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        return sign | 0x7e00 | ((magnitude >> 13) & 0x3ff) as u16;
    }
    if magnitude >= 0x4780_0000 {
        return sign | 0x7c00;
    }
    if magnitude < 0x3880_0000 {
        // Adding 0.5 leaves units of 2^-24 in the last place, which is f16's denormal step.
        let shifted = f32::from_bits(magnitude) + 0.5;
        return sign | (shifted.to_bits() - 0x3f00_0000) as u16;
    }
    let rounded = magnitude - 0x3800_0000 + 0xfff + ((magnitude >> 13) & 1);
    sign | (rounded >> 13) as u16
}
