//! Each block format, described once: how a packed strip holds it, and what a register of it means.
//!
//! A strip is 16 columns, a panel one or two strips. A panel is cut along k into superblocks of the format's block size: of each
//! first the *words* of every strip, vectors of one 32-bit word per column (64 bytes), then the *shorts* of every strip, vectors of
//! one binary16 per column (32 bytes). Words are the source block's own words, transposed; so a panel has exactly the bytes
//! of its source rows, and is read from its first byte to its last. A *cell* is 32 consecutive k of a strip.

use rlx_tensor::DType;

use super::dot::{Dot, I, V};
use crate::isa::{LANES, Simd};

/// Bytes of a vector of words.
pub(super) const WORDS_BYTES: usize = 4 * LANES;

/// Bytes of a vector of shorts.
pub(super) const SHORTS_BYTES: usize = 2 * LANES;

/// Inputs of a cell.
pub(super) const CELL: usize = 32;

/// Groups of four inputs in a cell: a dot product each.
pub(super) const GROUPS: usize = CELL / 4;

/// What is added to every integer sum so that its bits, read as f32, are `ANCHOR + sum`.
pub(super) const ANCHOR_BITS: i32 = 0x4b40_0000;

/// 1.5 * 2^23.
pub(super) const ANCHOR: f32 = f32::from_bits(ANCHOR_BITS as u32);

/// How a strip is read. `w` points at the words of a superblock, `h` at its shorts.
pub(super) trait Cells: 'static {
    /// Cells per superblock.
    const CELLS: usize;
    /// A scale covers 16 inputs, not 32.
    const HALVES: bool;
    /// A minimum is subtracted.
    const MIN: bool;
    /// Codes use all eight bits.
    const WIDE: bool;
    /// Bytes of words per superblock.
    const W_BYTES: usize;
    /// Bytes of shorts per superblock.
    const H_BYTES: usize;
    /// Bytes ahead of the cell being read that are fetched into the cache; 0 if the strip is there already.
    const AHEAD: usize;

    /// Codes of inputs `4 group .. 4 group + 4` of a cell.
    ///
    /// # Safety
    /// As all functions here: `w` and `h` are valid for the superblock.
    unsafe fn codes<D: Dot>(d: D, w: *const u8, cell: usize, group: usize) -> I<D>;
    /// Scales of a cell, or of half of it.
    ///
    /// # Safety
    /// As [`Cells::codes`].
    unsafe fn scale<D: Dot>(d: D, w: *const u8, h: *const u8, cell: usize, half: usize) -> V<D>;
    /// `-ANCHOR * scale`, exactly.
    ///
    /// # Safety
    /// As [`Cells::codes`].
    #[inline(always)]
    unsafe fn anchor<D: Dot>(d: D, w: *const u8, cell: usize, half: usize, scale: V<D>) -> V<D> {
        let _ = (w, cell, half);
        d.simd().mul(scale, d.simd().splat(-ANCHOR))
    }
    /// Minima of a cell, or of half of it.
    ///
    /// # Safety
    /// As [`Cells::codes`].
    #[inline(always)]
    unsafe fn min<D: Dot>(d: D, w: *const u8, h: *const u8, cell: usize, half: usize) -> V<D> {
        let _ = (w, h, cell, half);
        d.simd().zero()
    }
}

/// A block format as stored in files: `(code - OFFSET) * scale - min`.
pub(super) trait Format: Cells {
    const DTYPE: DType;
    /// The name in kernels' names.
    const NAME: &'static str;
    const OFFSET: i32;
    /// Source byte offset and number of words, in the order of the strip.
    const WORDS: &'static [(usize, usize)];
    /// Source byte offsets of the shorts.
    const SHORTS: &'static [usize];

    /// The word as the strip holds it, of entry `field` of [`Format::WORDS`].
    #[inline(always)]
    fn stored(word: u32, field: usize) -> u32 {
        let _ = field;
        word
    }
}

const fn words_of(fields: &[(usize, usize)]) -> usize {
    let (mut sum, mut i) = (0, 0);
    while i < fields.len() {
        sum += fields[i].1;
        i += 1;
    }
    sum
}

macro_rules! geometry {
    ($cells:literal) => {
        const CELLS: usize = $cells;
        const W_BYTES: usize = words_of(Self::WORDS) * WORDS_BYTES;
        const H_BYTES: usize = Self::SHORTS.len() * SHORTS_BYTES;
        const AHEAD: usize = 4096;
    };
}

/// Vector `index` of words.
#[inline(always)]
unsafe fn word<D: Dot>(d: D, w: *const u8, index: usize) -> I<D> {
    // SAFETY: the caller guarantees the vector.
    unsafe { d.simd().iload(w.wrapping_add(index * WORDS_BYTES).cast()) }
}

/// Vector `index` of shorts, widened.
#[inline(always)]
unsafe fn short<D: Dot>(d: D, h: *const u8, index: usize) -> V<D> {
    // SAFETY: the caller guarantees the vector.
    unsafe { d.simd().load_f16(h.wrapping_add(index * SHORTS_BYTES).cast()) }
}

const fn bytes(value: u8) -> i32 {
    i32::from_le_bytes([value; 4])
}

/// Bits `at ..` of each byte, `mask` wide, moved to bit `to`. What crosses into a neighbouring byte is masked off.
#[inline(always)]
fn field<D: Dot>(d: D, v: I<D>, at: usize, to: usize, mask: u8) -> I<D> {
    let s = d.simd();
    let moved = if at >= to { s.ishr(v, (at - to) as u32) } else { s.ishl(v, (to - at) as u32) };
    s.iand(moved, s.isplat(bytes(mask << to)))
}

/// Nibbles of a 32-element block: word `g` holds groups `g` (low) and `g + 4` (high).
#[inline(always)]
unsafe fn nibbles<D: Dot>(d: D, w: *const u8, first: usize, group: usize) -> I<D> {
    // SAFETY: the caller guarantees four vectors from `first` on.
    unsafe { field(d, word(d, w, first + group % 4), group / 4 * 4, 0, 15) }
}

/// Byte `index` of each word, of which bits `at ..` under `mask` are wanted, as a number.
#[inline(always)]
fn number<D: Dot>(d: D, v: I<D>, index: usize, at: usize, mask: i32) -> I<D> {
    d.simd().iand(d.simd().ishr(v, (8 * index + at) as u32), d.simd().isplat(mask))
}

macro_rules! format {
    ($(#[$doc:meta])* $name:ident, $text:literal, offset $offset:literal, words $words:expr, shorts $shorts:expr) => {
        $(#[$doc])*
        pub(super) struct $name;

        impl Format for $name {
            const DTYPE: DType = DType::$name;
            const NAME: &'static str = $text;
            const OFFSET: i32 = $offset;
            const WORDS: &'static [(usize, usize)] = &$words;
            const SHORTS: &'static [usize] = &$shorts;
        }
    };
}

/// 32 signed bytes, kept with 128 added.
pub(super) struct Q8_0;

impl Format for Q8_0 {
    const DTYPE: DType = DType::Q8_0;
    const NAME: &'static str = "q8_0";
    const OFFSET: i32 = 128;
    const WORDS: &'static [(usize, usize)] = &[(2, 8)];
    const SHORTS: &'static [usize] = &[0];

    #[inline(always)]
    fn stored(word: u32, _field: usize) -> u32 {
        word ^ 0x8080_8080
    }
}

impl Cells for Q8_0 {
    geometry!(1);
    const HALVES: bool = false;
    const MIN: bool = false;
    const WIDE: bool = true;

    #[inline(always)]
    unsafe fn codes<D: Dot>(d: D, w: *const u8, _cell: usize, group: usize) -> I<D> {
        // SAFETY: the caller guarantees the superblock.
        unsafe { word(d, w, group) }
    }
    #[inline(always)]
    unsafe fn scale<D: Dot>(d: D, _w: *const u8, h: *const u8, _cell: usize, _half: usize) -> V<D> {
        // SAFETY: the caller guarantees the superblock.
        unsafe { short(d, h, 0) }
    }
}

format!(
    /// 32 codes of 4 bits.
    Q4_0, "q4_0", offset 8, words [(2, 4)], shorts [0]
);
format!(
    /// 32 codes of 4 bits, with an offset.
    Q4_1, "q4_1", offset 0, words [(4, 4)], shorts [0, 2]
);
format!(
    /// 32 codes of 4 bits into a table of bytes.
    #[expect(non_camel_case_types, reason = "formats are spelled as GGUF spells them")]
    IQ4_NL, "iq4_nl", offset 128, words [(2, 4)], shorts [0]
);

/// The values of IQ4_NL and IQ4_XS codes, 128 added.
pub(super) const NONLINEAR: [u8; 16] =
    [1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241];

macro_rules! small {
    ($name:ident, min $min:literal, wide $wide:literal, |$d:ident, $w:ident, $group:ident| $codes:expr) => {
        impl Cells for $name {
            geometry!(1);
            const HALVES: bool = false;
            const MIN: bool = $min;
            const WIDE: bool = $wide;

            #[inline(always)]
            unsafe fn codes<D: Dot>($d: D, $w: *const u8, _cell: usize, $group: usize) -> I<D> {
                // SAFETY: the caller guarantees the superblock.
                unsafe { $codes }
            }
            #[inline(always)]
            unsafe fn scale<D: Dot>(d: D, _w: *const u8, h: *const u8, _cell: usize, _half: usize) -> V<D> {
                // SAFETY: the caller guarantees the superblock.
                unsafe { short(d, h, 0) }
            }
            #[inline(always)]
            unsafe fn min<D: Dot>(d: D, _w: *const u8, h: *const u8, _cell: usize, _half: usize) -> V<D> {
                if !$min {
                    return d.simd().zero();
                }
                // SAFETY: the caller guarantees the superblock.
                unsafe { d.simd().neg(short(d, h, 1)) }
            }
        }
    };
}

small!(Q4_0, min false, wide false, |d, w, group| nibbles(d, w, 0, group));
small!(Q4_1, min true, wide false, |d, w, group| nibbles(d, w, 0, group));
small!(IQ4_NL, min false, wide true, |d, w, group| d.lookup(&NONLINEAR, nibbles(d, w, 0, group)));

/// Fifth bits: bit `i` of the source word is that of element `i`; bit `g` of byte `b` of the strip's that of `4 g + b`.
const fn spread_fifth_bits(word: u32) -> u32 {
    let mut spread = 0;
    let mut i = 0;
    while i < 4 {
        let mut bits = word >> i & 0x1111_1111;
        bits = (bits | bits >> 3) & 0x0303_0303;
        bits = (bits | bits >> 6) & 0x000f_000f;
        bits = (bits | bits >> 12) & 0x0000_00ff;
        spread |= bits << (8 * i);
        i += 1;
    }
    spread
}

macro_rules! five_bits {
    ($(#[$doc:meta])* $name:ident, $text:literal, offset $offset:literal, min $min:literal, bits $bits:literal, shorts $shorts:expr) => {
        $(#[$doc])*
        pub(super) struct $name;

        impl Format for $name {
            const DTYPE: DType = DType::$name;
            const NAME: &'static str = $text;
            const OFFSET: i32 = $offset;
            const WORDS: &'static [(usize, usize)] = &[($bits + 4, 4), ($bits, 1)];
            const SHORTS: &'static [usize] = &$shorts;

            #[inline(always)]
            fn stored(word: u32, field: usize) -> u32 {
                if field == 1 { spread_fifth_bits(word) } else { word }
            }
        }

        small!($name, min $min, wide false, |d, w, group| {
            let fifth = field(d, word(d, w, 4), group, 4, 1);
            d.simd().ior(nibbles(d, w, 0, group), fifth)
        });
    };
}

five_bits!(
    /// 32 codes of 5 bits.
    Q5_0, "q5_0", offset 16, min false, bits 2, shorts [0]
);
five_bits!(
    /// 32 codes of 5 bits, with an offset.
    Q5_1, "q5_1", offset 0, min true, bits 4, shorts [0, 2]
);

/// The six-bit scales (or minima) of Q4_K and Q5_K, whose twelve bytes are words `first ..`.
#[inline(always)]
unsafe fn six_bits<D: Dot>(d: D, w: *const u8, first: usize, cell: usize, min: bool) -> V<D> {
    let (s, at) = (d.simd(), cell % 4);
    // SAFETY: the caller guarantees three vectors from `first` on.
    let code = unsafe {
        let own = word(d, w, first + usize::from(min));
        if cell < 4 {
            number(d, own, at, 0, 63)
        } else {
            let low = number(d, word(d, w, first + 2), at, if min { 4 } else { 0 }, 15);
            s.ior(low, s.ishl(number(d, own, at, 6, 3), 4))
        }
    };
    s.to_float(code)
}

macro_rules! super_scales {
    ($name:ident, first $first:literal, |$d:ident, $w:ident, $cell:ident, $group:ident| $codes:expr) => {
        impl Cells for $name {
            geometry!(8);
            const HALVES: bool = false;
            const MIN: bool = true;
            const WIDE: bool = false;

            #[inline(always)]
            unsafe fn codes<D: Dot>($d: D, $w: *const u8, $cell: usize, $group: usize) -> I<D> {
                // SAFETY: the caller guarantees the superblock.
                unsafe { $codes }
            }
            #[inline(always)]
            unsafe fn scale<D: Dot>(d: D, w: *const u8, h: *const u8, cell: usize, _half: usize) -> V<D> {
                // SAFETY: the caller guarantees the superblock.
                unsafe { d.simd().mul(short(d, h, 0), six_bits(d, w, $first, cell, false)) }
            }
            #[inline(always)]
            unsafe fn min<D: Dot>(d: D, w: *const u8, h: *const u8, cell: usize, _half: usize) -> V<D> {
                // SAFETY: the caller guarantees the superblock.
                unsafe { d.simd().mul(short(d, h, 1), six_bits(d, w, $first, cell, true)) }
            }
        }
    };
}

/// Nibbles of a 256-element block: eight words for each pair of cells, the even one low.
#[inline(always)]
unsafe fn paired_nibbles<D: Dot>(d: D, w: *const u8, cell: usize, group: usize) -> I<D> {
    // SAFETY: the caller guarantees 32 vectors.
    unsafe { field(d, word(d, w, cell / 2 * 8 + group), cell % 2 * 4, 0, 15) }
}

format!(
    /// 8 x 32 codes of 4 bits, scales and minima of 6 bits.
    #[expect(non_camel_case_types, reason = "formats are spelled as GGUF spells them")]
    Q4_K, "q4_k", offset 0, words [(16, 32), (4, 3)], shorts [0, 2]
);
super_scales!(Q4_K, first 32, |d, w, cell, group| paired_nibbles(d, w, cell, group));
format!(
    /// 8 x 32 codes of 5 bits, scales and minima of 6 bits.
    #[expect(non_camel_case_types, reason = "formats are spelled as GGUF spells them")]
    Q5_K, "q5_k", offset 0, words [(48, 32), (16, 8), (4, 3)], shorts [0, 2]
);
super_scales!(Q5_K, first 40, |d, w, cell, group| {
    let fifth = field(d, word(d, w, 32 + group), cell, 4, 1);
    d.simd().ior(paired_nibbles(d, w, cell, group), fifth)
});

/// Two-bit fields of a 256-element block: eight words for each four cells.
#[inline(always)]
unsafe fn quarters<D: Dot>(d: D, w: *const u8, first: usize, cell: usize, group: usize, to: usize) -> I<D> {
    // SAFETY: the caller guarantees 16 vectors from `first` on.
    unsafe { field(d, word(d, w, first + cell / 4 * 8 + group), cell % 4 * 2, to, 3) }
}

macro_rules! sixteenths {
    ($name:ident, min $min:literal, |$d:ident, $w:ident, $cell:ident, $group:ident| $codes:expr,
        |$sd:ident, $sw:ident, $index:ident| $scale:expr, |$md:ident, $mw:ident, $mindex:ident| $minimum:expr) => {
        impl Cells for $name {
            geometry!(8);
            const HALVES: bool = true;
            const MIN: bool = $min;
            const WIDE: bool = false;

            #[inline(always)]
            unsafe fn codes<D: Dot>($d: D, $w: *const u8, $cell: usize, $group: usize) -> I<D> {
                // SAFETY: the caller guarantees the superblock.
                unsafe { $codes }
            }
            #[inline(always)]
            unsafe fn scale<D: Dot>($sd: D, $sw: *const u8, h: *const u8, cell: usize, half: usize) -> V<D> {
                let $index = 2 * cell + half;
                // SAFETY: the caller guarantees the superblock.
                unsafe {
                    let code = $scale;
                    $sd.simd().mul(short($sd, h, 0), $sd.simd().to_float(code))
                }
            }
            #[inline(always)]
            unsafe fn min<D: Dot>($md: D, $mw: *const u8, h: *const u8, cell: usize, half: usize) -> V<D> {
                if !$min {
                    return $md.simd().zero();
                }
                let $mindex = 2 * cell + half;
                // SAFETY: the caller guarantees the superblock.
                unsafe {
                    let code = $minimum;
                    $md.simd().mul(short($md, h, 1), $md.simd().to_float(code))
                }
            }
        }
    };
}

format!(
    /// 16 x 16 codes of 6 bits, scales of 8 bits.
    #[expect(non_camel_case_types, reason = "formats are spelled as GGUF spells them")]
    Q6_K, "q6_k", offset 32, words [(0, 32), (128, 16), (192, 4)], shorts [208]
);
sixteenths!(
    Q6_K, min false,
    |d, w, cell, group| {
        let low = word(d, w, cell / 4 * 16 + cell % 2 * 8 + group);
        let low = field(d, low, cell % 4 / 2 * 4, 0, 15);
        d.simd().ior(low, quarters(d, w, 32, cell, group, 4))
    },
    |d, w, index| {
        let word = word(d, w, 48 + index / 4);
        d.simd().isar(d.simd().ishl(word, (24 - 8 * (index % 4)) as u32), 24)
    },
    |d, w, index| number(d, word(d, w, index), 0, 0, 0)
);

format!(
    /// 16 x 16 codes of 2 bits, scales and minima of 4 bits.
    #[expect(non_camel_case_types, reason = "formats are spelled as GGUF spells them")]
    Q2_K, "q2_k", offset 0, words [(16, 16), (0, 4)], shorts [80, 82]
);
sixteenths!(
    Q2_K, min true,
    |d, w, cell, group| quarters(d, w, 0, cell, group, 0),
    |d, w, index| number(d, word(d, w, 16 + index / 4), index % 4, 0, 15),
    |d, w, index| number(d, word(d, w, 16 + index / 4), index % 4, 4, 15)
);

format!(
    /// 16 x 16 codes of 3 bits, scales of 6 bits.
    #[expect(non_camel_case_types, reason = "formats are spelled as GGUF spells them")]
    Q3_K, "q3_k", offset 4, words [(32, 16), (0, 8), (96, 3)], shorts [108]
);
sixteenths!(
    Q3_K, min false,
    |d, w, cell, group| {
        let third = field(d, word(d, w, 16 + group), cell, 2, 1);
        d.simd().ior(quarters(d, w, 0, cell, group, 0), third)
    },
    |d, w, index| {
        let s = d.simd();
        let low = number(d, word(d, w, 24 + index % 8 / 4), index % 4, index / 8 * 4, 15);
        let high = number(d, word(d, w, 26), index % 4, index / 4 * 2, 3);
        s.isub(s.ior(low, s.ishl(high, 4)), s.isplat(32))
    },
    |d, w, index| number(d, word(d, w, index), 0, 0, 0)
);

format!(
    /// 8 x 32 codes of 4 bits into a table of bytes, scales of 6 bits.
    #[expect(non_camel_case_types, reason = "formats are spelled as GGUF spells them")]
    IQ4_XS, "iq4_xs", offset 128, words [(8, 32), (4, 1)], shorts [0, 2]
);

impl Cells for IQ4_XS {
    geometry!(8);
    const HALVES: bool = false;
    const MIN: bool = false;
    const WIDE: bool = true;

    #[inline(always)]
    unsafe fn codes<D: Dot>(d: D, w: *const u8, cell: usize, group: usize) -> I<D> {
        // SAFETY: the caller guarantees the superblock.
        unsafe { d.lookup(&NONLINEAR, nibbles(d, w, cell * 4, group)) }
    }
    #[inline(always)]
    unsafe fn scale<D: Dot>(d: D, w: *const u8, h: *const u8, cell: usize, _half: usize) -> V<D> {
        let s = d.simd();
        // SAFETY: the caller guarantees the superblock.
        unsafe {
            let low = number(d, word(d, w, 32), cell / 2, cell % 2 * 4, 15);
            // The second short is no number: two more bits of each of the eight scales, from bit 16 on here.
            let high = s.bits(s.load_bf16(h.wrapping_add(SHORTS_BYTES).cast()));
            let high = s.iand(s.ishr(high, (16 + 2 * cell) as u32), s.isplat(3));
            let code = s.isub(s.ior(low, s.ishl(high, 4)), s.isplat(32));
            s.mul(short(d, h, 0), s.to_float(code))
        }
    }
}

/// A strip unpacked into bytes and f32 scales: what many rows are multiplied with.
///
/// A cell is eight vectors of codes; then, for each half that has its own, `scale` and `-ANCHOR * scale`; then minima.
pub(super) struct Dense<const HALVES: bool, const MIN: bool, const WIDE: bool>;

/// Vectors of a dense cell.
pub(super) const fn dense_vectors(halves: bool, min: bool) -> usize {
    GROUPS + (if halves { 2 } else { 1 }) * (if min { 3 } else { 2 })
}

/// Where in a dense cell the vector of a half stands: `kind` 0 scale, 1 anchor, 2 minimum.
pub(super) const fn dense_at(halves: bool, half: usize, kind: usize) -> usize {
    (GROUPS + kind * (if halves { 2 } else { 1 }) + half) * WORDS_BYTES
}

impl<const HALVES: bool, const MIN: bool, const WIDE: bool> Cells for Dense<HALVES, MIN, WIDE> {
    const CELLS: usize = 1;
    const HALVES: bool = HALVES;
    const MIN: bool = MIN;
    const WIDE: bool = WIDE;
    const W_BYTES: usize = dense_vectors(HALVES, MIN) * WORDS_BYTES;
    const H_BYTES: usize = 0;
    const AHEAD: usize = 0;

    #[inline(always)]
    unsafe fn codes<D: Dot>(d: D, w: *const u8, _cell: usize, group: usize) -> I<D> {
        // SAFETY: the caller guarantees the cell.
        unsafe { word(d, w, group) }
    }
    #[inline(always)]
    unsafe fn scale<D: Dot>(d: D, w: *const u8, _h: *const u8, _cell: usize, half: usize) -> V<D> {
        // SAFETY: the caller guarantees the cell.
        unsafe { d.simd().load(w.wrapping_add(dense_at(HALVES, half, 0)).cast()) }
    }
    #[inline(always)]
    unsafe fn anchor<D: Dot>(d: D, w: *const u8, _cell: usize, half: usize, _scale: V<D>) -> V<D> {
        // SAFETY: the caller guarantees the cell.
        unsafe { d.simd().load(w.wrapping_add(dense_at(HALVES, half, 1)).cast()) }
    }
    #[inline(always)]
    unsafe fn min<D: Dot>(d: D, w: *const u8, _h: *const u8, _cell: usize, half: usize) -> V<D> {
        // SAFETY: the caller guarantees the cell.
        unsafe { d.simd().load(w.wrapping_add(dense_at(HALVES, half, 2)).cast()) }
    }
}
