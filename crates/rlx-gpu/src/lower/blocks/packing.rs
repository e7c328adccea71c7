//! Block types that stay packed on a device, each described once: where its bits stand in a block, and what its codes mean.
//!
//! A weight is uploaded in planes, one after another: the bits of codes, lowest first; scales (and minima) in bytes, of the types that
//! have them; binary16 numbers, one or two a block. A word of a plane of codes holds the bits of those that follow each other, code `i` in
//! byte `i % 4`: so a shift and a mask make a word of four codes that follow each other, and fields of several planes make whole codes.

use rlx_tensor::DType;

/// Bits that codes have in common: where a block holds those of each element.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bits {
    /// How many of a code: a power of two.
    pub width: u32,
    /// The first byte.
    at: usize,
    /// Elements whose bits stand equally high in bytes that follow each other.
    span: usize,
}

impl Bits {
    /// Elements of a word.
    pub fn per(self) -> u32 {
        32 / self.width
    }

    /// The byte that holds an element's bits, and below which they begin.
    fn place(self, element: usize) -> (usize, u32) {
        let spans = 8 / self.width;
        let (number, own) = (element >> self.span.trailing_zeros(), element & (self.span - 1));
        let before = number >> spans.trailing_zeros() << self.span.trailing_zeros();
        (self.at + before + own, (number as u32 & (spans - 1)) * self.width)
    }

    /// The bits of an element, a multiple of four, and of the next three, in a byte each.
    fn four(self, block: &[u8], element: usize) -> u32 {
        let mask = (1 << self.width) - 1;
        if self.span < 4 {
            let one = |i: usize| {
                let (at, shift) = self.place(element + i);
                ((u32::from(block[at]) >> shift) & mask) << (8 * i)
            };
            return (0..4).fold(0, |word, i| word | one(i));
        }
        let (at, shift) = self.place(element);
        let word = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
        (word >> shift) & (mask * 0x0101_0101)
    }
}

const fn bits(width: u32, at: usize, span: usize) -> Bits {
    Bits { width, at, span }
}

/// What a code stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    /// The signed number that its byte is.
    Signed,
    /// Itself less so much.
    Less(u8),
    /// An entry of [`NONLINEAR`].
    Nonlinear,
}

/// The values of codes of IQ4_NL and IQ4_XS.
pub(super) const NONLINEAR: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Small numbers that scale codes, in a plane of their own.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fields {
    /// Of each: a signed byte, or of types with minima one unsigned number above the other.
    pub width: u32,
    /// Those of a group of a block.
    read: fn(&[u8], usize) -> u32,
}

/// How a block type is packed.
#[derive(Debug)]
pub(super) struct Packing {
    dtype: DType,
    pub codes: &'static [Bits],
    pub meaning: Meaning,
    /// Elements that share a scale, and a minimum if there are some.
    pub per: u32,
    pub fields: Option<Fields>,
    /// Where a block holds its binary16 numbers: what scales, then what minima are multiplied by or, without fields, are.
    halves: &'static [usize],
}

const fn simple(dtype: DType, codes: &'static [Bits], meaning: Meaning, halves: &'static [usize]) -> Packing {
    Packing { dtype, codes, meaning, per: 32, fields: None, halves }
}

const PAIRS: Option<Fields> =
    Some(Fields { width: 16, read: |block, group| scale_and_min(&block[4..16], group) });

static PACKINGS: &[Packing] = &[
    simple(DType::Q8_0, &[bits(8, 2, 32)], Meaning::Signed, &[0]),
    simple(DType::Q4_0, &[bits(4, 2, 16)], Meaning::Less(8), &[0]),
    simple(DType::Q4_1, &[bits(4, 4, 16)], Meaning::Less(0), &[0, 2]),
    simple(DType::Q5_0, &[bits(4, 6, 16), bits(1, 2, 1)], Meaning::Less(16), &[0]),
    simple(DType::Q5_1, &[bits(4, 8, 16), bits(1, 4, 1)], Meaning::Less(0), &[0, 2]),
    simple(DType::IQ4_NL, &[bits(4, 2, 16)], Meaning::Nonlinear, &[0]),
    Packing {
        dtype: DType::IQ4_XS,
        codes: &[bits(4, 8, 16)],
        meaning: Meaning::Nonlinear,
        per: 32,
        fields: Some(Fields { width: 8, read: split_six_bits }),
        halves: &[0],
    },
    Packing {
        dtype: DType::Q2_K,
        codes: &[bits(2, 16, 32)],
        meaning: Meaning::Less(0),
        per: 16,
        fields: Some(Fields { width: 8, read: |block, group| u32::from(block[group]) }),
        halves: &[80, 82],
    },
    Packing {
        dtype: DType::Q3_K,
        codes: &[bits(2, 32, 32), bits(1, 0, 32)],
        meaning: Meaning::Less(4),
        per: 16,
        fields: Some(Fields { width: 8, read: |block, group| six_bits(&block[96..108], group) }),
        halves: &[108],
    },
    Packing {
        dtype: DType::Q4_K,
        codes: &[bits(4, 16, 32)],
        meaning: Meaning::Less(0),
        per: 32,
        fields: PAIRS,
        halves: &[0, 2],
    },
    Packing {
        dtype: DType::Q5_K,
        codes: &[bits(4, 48, 32), bits(1, 16, 32)],
        meaning: Meaning::Less(0),
        per: 32,
        fields: PAIRS,
        halves: &[0, 2],
    },
    Packing {
        dtype: DType::Q6_K,
        codes: &[bits(4, 0, 64), bits(2, 128, 32)],
        meaning: Meaning::Less(32),
        per: 16,
        fields: Some(Fields { width: 8, read: |block, group| u32::from(block[192 + group]) }),
        halves: &[208],
    },
];

/// Scale, and above it minimum, of one of the 8 groups of a block of Q4_K or Q5_K: six bits each in 12 bytes.
fn scale_and_min(packed: &[u8], group: usize) -> u32 {
    let (scale, min) = match group {
        0..4 => (packed[group] & 63, packed[group + 4] & 63),
        _ => {
            let low = packed[group + 4];
            ((low & 15) | (packed[group - 4] >> 6 << 4), (low >> 4) | (packed[group] >> 6 << 4))
        }
    };
    u32::from(scale) | u32::from(min) << 8
}

/// The scale of one of the 16 groups of a block of Q3_K as a signed byte: six bits in 12 bytes, less 32.
fn six_bits(packed: &[u8], group: usize) -> u32 {
    let low = packed[group % 8] >> (group / 8 * 4) & 15;
    let top = packed[8 + group % 4] >> (group / 4 * 2) & 3;
    u32::from((low | top << 4).wrapping_sub(32))
}

/// The scale of one of the 8 groups of a block of IQ4_XS as a signed byte: six bits less 32, the lower four apart from the upper two.
fn split_six_bits(block: &[u8], group: usize) -> u32 {
    let low = block[4 + group / 2] >> (group % 2 * 4) & 15;
    let top = block[2 + group / 4] >> (group % 4 * 2) & 3;
    u32::from((low | top << 4).wrapping_sub(32))
}

/// How a type is packed, if it stays packed.
pub(super) fn packing(dtype: DType) -> Option<&'static Packing> {
    PACKINGS.iter().find(|packing| packing.dtype == dtype)
}

/// A plane: how many elements share so many bits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plane {
    pub per: usize,
    pub bits: usize,
}

impl Plane {
    fn words(self, elements: usize) -> usize {
        (elements / self.per * self.bits).div_ceil(32)
    }
}

impl Packing {
    /// The planes, each at the end of those before it.
    pub fn planes(&self) -> impl Iterator<Item = Plane> {
        let codes = self.codes.iter().map(|bits| Plane { per: 1, bits: bits.width as usize });
        let fields = self.fields.iter().map(|f| Plane { per: self.per as usize, bits: f.width as usize });
        let halves = Plane { per: self.dtype.block().0, bits: 16 * self.halves.len() };
        codes.chain(fields).chain([halves])
    }

    /// Whether elements are scaled codes and a minimum.
    pub fn has_minima(&self) -> bool {
        self.halves.len() > 1
    }

    /// Elements of a binary16 number.
    pub fn whole(&self) -> u32 {
        self.dtype.block().0 as u32
    }

    /// Words of the first planes.
    pub fn start(&self, planes: usize, elements: usize) -> usize {
        self.planes().take(planes).map(|plane| plane.words(elements)).sum()
    }

    /// Words of an uploaded weight.
    pub fn words(&self, elements: usize) -> usize {
        self.start(usize::MAX, elements)
    }

    /// Blocks as words of a device.
    pub fn upload(&self, bytes: &[u8]) -> Vec<u32> {
        let (per, size) = self.dtype.block();
        let elements = bytes.len() / size * per;
        let mut all = vec![0; self.words(elements)];
        let mut rest = all.as_mut_slice();
        let mut planes = self.planes();
        let mut next = || {
            let words = planes.next().map_or(0, |plane| plane.words(elements));
            let (own, after) = std::mem::take(&mut rest).split_at_mut(words);
            rest = after;
            own
        };
        let blocks = || bytes.chunks_exact(size);
        for bits in self.codes {
            let each = per / bits.per() as usize;
            for (words, block) in next().chunks_exact_mut(each).zip(blocks()) {
                for (word, first) in words.iter_mut().zip((0..).step_by(bits.per() as usize)) {
                    let four = |i: u32| bits.four(block, first + 4 * i as usize) << (i * bits.width);
                    *word = (0..8 / bits.width).fold(0, |word, i| word | four(i));
                }
            }
        }
        if let Some(fields) = &self.fields {
            let in_word = 32 / fields.width as usize;
            let each = per / self.per as usize / in_word;
            for (words, block) in next().chunks_exact_mut(each).zip(blocks()) {
                for (at, word) in words.iter_mut().enumerate() {
                    let field =
                        |i: usize| (fields.read)(block, at * in_word + i) << (i as u32 * fields.width);
                    *word = (0..in_word).fold(0, |word, i| word | field(i));
                }
            }
        }
        let words = next();
        let halves = blocks().flat_map(|block| self.halves.iter().map(|&at| [block[at], block[at + 1]]));
        for (at, half) in halves.enumerate() {
            words[at / 2] |= u32::from(u16::from_le_bytes(half)) << (at % 2 * 16);
        }
        all
    }
}
