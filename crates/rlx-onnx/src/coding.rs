//! Number types of fewer than nine bits, by the list of their values.

/// A narrow number type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Coding {
    /// 8-bit float, 4 exponent bits, no infinities.
    F8E4M3Fn,
    /// 8-bit float, 4 exponent bits, no infinities, no negative zero.
    F8E4M3Fnuz,
    /// 8-bit float, 5 exponent bits.
    F8E5M2,
    /// 8-bit float, 5 exponent bits, no infinities, no negative zero.
    F8E5M2Fnuz,
    /// A power of two.
    F8E8M0,
    /// 4-bit float.
    F4E2M1,
    /// Signed, 4 bits.
    Int4,
    /// Unsigned, 4 bits.
    Uint4,
    /// Signed, 2 bits.
    Int2,
    /// Unsigned, 2 bits.
    Uint2,
}

/// A small float: exponent bits, mantissa bits, bias.
struct Mini {
    exponent: u32,
    mantissa: u32,
    bias: i32,
}

impl Coding {
    /// Number in ONNX files and coding.
    const NUMBERS: &'static [(i32, Coding)] = &[
        (17, Coding::F8E4M3Fn),
        (18, Coding::F8E4M3Fnuz),
        (19, Coding::F8E5M2),
        (20, Coding::F8E5M2Fnuz),
        (21, Coding::Uint4),
        (22, Coding::Int4),
        (23, Coding::F4E2M1),
        (24, Coding::F8E8M0),
        (25, Coding::Uint2),
        (26, Coding::Int2),
    ];

    /// The coding with this number in ONNX files.
    pub fn from_onnx(code: i32) -> Option<Coding> {
        Self::NUMBERS.iter().find(|(number, _)| *number == code).map(|(_, coding)| *coding)
    }

    /// Its number in ONNX files.
    pub fn to_onnx(self) -> i32 {
        Self::NUMBERS.iter().find(|(_, coding)| *coding == self).map_or(0, |(number, _)| *number)
    }

    /// Bits of one code.
    pub fn bits(self) -> usize {
        match self {
            Coding::F4E2M1 | Coding::Int4 | Coding::Uint4 => 4,
            Coding::Int2 | Coding::Uint2 => 2,
            _ => 8,
        }
    }

    /// Smallest and largest number of an integer coding.
    pub fn int_range(self) -> Option<(f64, f64)> {
        match self {
            Coding::Int4 => Some((-8.0, 7.0)),
            Coding::Uint4 => Some((0.0, 15.0)),
            Coding::Int2 => Some((-2.0, 1.0)),
            Coding::Uint2 => Some((0.0, 3.0)),
            _ => None,
        }
    }

    fn mini(self) -> Option<Mini> {
        let (exponent, mantissa, bias) = match self {
            Coding::F8E4M3Fn => (4, 3, 7),
            Coding::F8E4M3Fnuz => (4, 3, 8),
            Coding::F8E5M2 => (5, 2, 15),
            Coding::F8E5M2Fnuz => (5, 2, 16),
            Coding::F4E2M1 => (2, 1, 1),
            _ => return None,
        };
        Some(Mini { exponent, mantissa, bias })
    }

    /// The code of the largest finite positive number of a float coding.
    fn largest(self) -> u8 {
        match self {
            Coding::F8E4M3Fn => 0x7e,
            Coding::F8E5M2 => 0x7b,
            Coding::F4E2M1 => 0x7,
            _ => 0x7f,
        }
    }

    fn nan(self) -> u8 {
        match self {
            Coding::F8E4M3Fnuz | Coding::F8E5M2Fnuz => 0x80,
            Coding::F8E8M0 => 0xff,
            Coding::F4E2M1 => 0x8,
            _ => 0x7f,
        }
    }

    /// The number a code stands for.
    pub fn decode(self, code: u8) -> f64 {
        if let Some((low, _)) = self.int_range() {
            let span = 1u8 << self.bits();
            let code = code & (span - 1);
            let signed = low < 0.0 && code >= span / 2;
            return f64::from(code) - if signed { f64::from(span) } else { 0.0 };
        }
        let Some(mini) = self.mini() else {
            return if code == 0xff { f64::NAN } else { 2f64.powi(i32::from(code) - 127) };
        };
        let magnitude_bits = mini.exponent + mini.mantissa;
        let negative = code >> magnitude_bits & 1 == 1;
        let magnitude = code & ((1u32 << magnitude_bits) - 1) as u8;
        let fnuz = matches!(self, Coding::F8E4M3Fnuz | Coding::F8E5M2Fnuz);
        if (fnuz && negative && magnitude == 0) || (!fnuz && self.is_nan_magnitude(magnitude)) {
            return f64::NAN;
        }
        let value = match self == Coding::F8E5M2 && magnitude == 0x7c {
            true => f64::INFINITY,
            false => mini.value(magnitude),
        };
        if negative { -value } else { value }
    }

    fn is_nan_magnitude(self, magnitude: u8) -> bool {
        match self {
            Coding::F8E4M3Fn => magnitude == 0x7f,
            Coding::F8E5M2 => magnitude > 0x7c,
            _ => false,
        }
    }

    /// As [`Coding::encode`]; powers of two round as `rounding` says: up, down or nearest.
    pub fn encode_rounded(self, value: f64, saturate: bool, rounding: &str) -> u8 {
        if self != Coding::F8E8M0 || value.is_nan() {
            return self.encode(value, saturate);
        }
        let up = encode_power(value);
        let exact = up >= 0xfe || up == 0 || self.decode(up) == value;
        match rounding {
            _ if exact => up,
            "down" => up - 1,
            "nearest" if value < (self.decode(up) + self.decode(up - 1)) / 2.0 => up - 1,
            _ => up,
        }
    }

    /// The nearest code, ties to the even one; beyond the range the end of it if `saturate`, else infinity or NaN. Integers truncate
    /// and wrap.
    pub fn encode(self, value: f64, saturate: bool) -> u8 {
        if self.int_range().is_some() {
            let mask = (1u32 << self.bits()) - 1;
            return (value as i64 as u32 & mask) as u8;
        }
        if value.is_nan() {
            return self.nan();
        }
        let Some(mini) = self.mini() else { return encode_power(value) };
        let sign_bit = 1u8 << (mini.exponent + mini.mantissa);
        let fnuz = matches!(self, Coding::F8E4M3Fnuz | Coding::F8E5M2Fnuz);
        let sign = if value.is_sign_negative() { sign_bit } else { 0 };
        let largest = self.largest();
        let magnitude = mini.nearest(value.abs(), largest);
        match magnitude {
            0 if fnuz => 0,
            code if code <= largest => sign | code,
            _ if saturate || self == Coding::F4E2M1 => sign | largest,
            _ if self == Coding::F8E5M2 => sign | 0x7c,
            _ if fnuz => 0x80,
            _ => sign | self.nan(),
        }
    }
}

impl Mini {
    fn value(&self, magnitude: u8) -> f64 {
        let scale = f64::from(1u32 << self.mantissa);
        let fraction = f64::from(u32::from(magnitude) & ((1 << self.mantissa) - 1)) / scale;
        match u32::from(magnitude) >> self.mantissa {
            0 => fraction * 2f64.powi(1 - self.bias),
            exponent => (1.0 + fraction) * 2f64.powi(exponent as i32 - self.bias),
        }
    }

    /// The nearest magnitude, ties to even; `largest + 1` beyond the range.
    fn nearest(&self, value: f64, largest: u8) -> u8 {
        let above = (0..=largest).find(|&code| self.value(code) >= value);
        let Some(above) = above else {
            let half = self.value(largest) + (self.value(largest) - self.value(largest - 1)) / 2.0;
            let inside = value < half || (value == half && largest.is_multiple_of(2));
            return if inside { largest } else { largest + 1 };
        };
        if above == 0 || self.value(above) == value {
            return above;
        }
        let (low, high) = (value - self.value(above - 1), self.value(above) - value);
        let upper = high < low || (high == low && above.is_multiple_of(2));
        if upper { above } else { above - 1 }
    }
}

/// The power of two not below.
fn encode_power(value: f64) -> u8 {
    if value.is_infinite() || value < 0.0 {
        return if value > 0.0 { 0xfe } else { 0xff };
    }
    (0..0xfeu8).find(|&code| 2f64.powi(i32::from(code) - 127) >= value).unwrap_or(0xfe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_come_back() {
        for (_, coding) in Coding::NUMBERS {
            for code in 0..=(((1u32 << coding.bits()) - 1) as u8) {
                let value = coding.decode(code);
                if value.is_nan() || value.is_infinite() {
                    continue;
                }
                assert_eq!(coding.decode(coding.encode(value, true)), value, "{coding:?} {code}");
            }
        }
    }

    #[test]
    fn what_is_too_large_saturates_or_not() {
        assert_eq!(Coding::F8E4M3Fn.encode(1e6, true), 0x7e);
        assert_eq!(Coding::F8E4M3Fn.encode(-1e6, false), 0xff);
        assert_eq!(Coding::F8E5M2.encode(1e6, false), 0x7c);
        assert_eq!(Coding::F8E4M3Fn.encode(464.0, false), 0x7e);
        assert_eq!(Coding::F8E4M3Fn.encode(464.1, false), 0x7f);
    }
}
