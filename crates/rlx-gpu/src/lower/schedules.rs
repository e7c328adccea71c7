//! Which schedules products have: by shape, or as they were timed on a device. Every schedule sums in one order, so a choice decides how
//! fast a product is and never what it gives.

use super::operands::Operands;
use super::{Amount, Operand};
use rlx_tensor::DType;
use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;

/// Rows that the form for few rows takes at most.
pub(crate) const FEW: usize = 8;

/// How programs and lanes share a product of many rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Schedule {
    /// Rows of a program.
    pub rows: u32,
    /// Columns of a program.
    pub columns: u32,
    /// Products of each element that stand in tiles at once.
    pub depth: u32,
    /// Rows and columns of a lane.
    pub each: [u32; 2],
    /// Products of each element that are written out one after another.
    pub turns: u32,
}

impl Schedule {
    pub const LARGE: Schedule = Schedule { rows: 64, columns: 64, depth: 16, each: [8, 4], turns: 4 };
    pub const PAIR: Schedule = Schedule { rows: 32, columns: 64, depth: 16, each: [4, 4], turns: 4 };
    pub const SMALL: Schedule = Schedule { rows: 32, columns: 32, depth: 16, each: [4, 4], turns: 4 };
    /// Of little text, for a device that takes long to compile it.
    pub const COMPACT: Schedule = Schedule { rows: 16, columns: 32, depth: 16, each: [4, 2], turns: 1 };

    /// All that may be chosen.
    pub const TABLE: [Schedule; 6] = [
        Self::LARGE,
        Self::PAIR,
        Self::SMALL,
        Schedule { rows: 64, columns: 32, depth: 16, each: [8, 4], turns: 4 },
        Schedule { rows: 32, columns: 32, depth: 32, each: [4, 4], turns: 4 },
        Self::COMPACT,
    ];

    /// Words of the tiles of a product of so many matrices.
    pub fn tile_words(&self, matrices: usize) -> u32 {
        self.depth * (self.rows + 4 + matrices as u32 * (self.columns + 4))
    }

    pub fn down(self) -> u32 {
        self.rows / self.each[0]
    }

    pub fn across(self) -> u32 {
        self.columns / self.each[1]
    }

    pub fn lanes(self) -> u32 {
        self.down() * self.across()
    }
}

/// Products that are timed as one: of alike weights, and of a width and depth between the same powers of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Class {
    /// One matrix, or gate and up.
    pub matrices: usize,
    pub dtype: DType,
    /// Powers of two that are not below columns and products of an element.
    pub columns: u32,
    pub depth: u32,
}

/// Sizes beyond this power of two are timed as it.
const LARGEST: u32 = 11;

impl Class {
    /// Of matrices `[columns, k]`; `None` for sizes that only a run knows.
    pub fn of(matrices: &[Operand]) -> Option<Class> {
        let first = matrices.first()?;
        let ([.., Amount::Known(columns), Amount::Known(k)], true) =
            (first.dims.as_slice(), first.dims.len() == 2)
        else {
            return None;
        };
        let power = |n: usize| n.max(1).next_power_of_two().trailing_zeros().min(LARGEST);
        Some(Class {
            matrices: matrices.len(),
            dtype: first.dtype,
            columns: power(*columns),
            depth: power(*k),
        })
    }

    /// Columns and products of an element that stand for it.
    pub fn dims(self) -> [usize; 2] {
        let depth = 1usize << self.depth;
        [1 << self.columns, depth.next_multiple_of(self.dtype.block().0)]
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "product {} {} {} {}", self.matrices, self.dtype, self.columns, self.depth)
    }
}

impl FromStr for Class {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut words = text.split(' ');
        let mut word = || words.next().ok_or(());
        if word()? != "product" {
            return Err(());
        }
        let matrices = word()?.parse().map_err(drop)?;
        let dtype = word()?.parse().map_err(drop)?;
        let [columns, depth] = [word()?, word()?].map(|w| w.parse::<u32>().map_err(drop));
        let class = Class { matrices, dtype, columns: columns?, depth: depth? };
        let known = (1..=2).contains(&class.matrices) && class.columns <= LARGEST && class.depth <= LARGEST;
        if known && words.next().is_none() { Ok(class) } else { Err(()) }
    }
}

/// How a class of products runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Choice {
    /// Position in [`Schedule::TABLE`].
    pub schedule: usize,
    /// Rows up to which lanes stand along k; 0 for never.
    pub few: usize,
}

impl Choice {
    /// Of little text.
    const COMPACT: Choice = Choice { schedule: Schedule::TABLE.len() - 1, few: 0 };

    /// What the shape alone decides.
    pub fn by_shape(columns: &Amount, matrices: usize) -> Choice {
        let schedule = match columns {
            Amount::Known(n) if *n <= 64 => Schedule::SMALL,
            _ if matrices > 1 => Schedule::PAIR,
            _ => Schedule::LARGE,
        };
        let schedule = Schedule::TABLE.iter().position(|known| *known == schedule).unwrap_or(0);
        Choice { schedule, few: FEW }
    }

    /// Every schedule of many rows that a program of so many matrices has room for.
    pub fn candidates(matrices: usize) -> impl Iterator<Item = Choice> {
        let fits = move |(schedule, of): (usize, &Schedule)| {
            (of.tile_words(matrices) * 4 <= ROOM).then_some(Choice { schedule, few: FEW })
        };
        Schedule::TABLE.iter().enumerate().filter_map(fits)
    }

    /// Whether a product of so many matrices may run so.
    #[cfg(any(feature = "wgpu", feature = "cuda", test))]
    pub fn is_one_of(self, matrices: usize) -> bool {
        let same = |known: Choice| known.schedule == self.schedule;
        self.few <= FEW && Choice::candidates(matrices).any(same)
    }
}

const _: () = assert!(Schedule::TABLE[Choice::COMPACT.schedule].turns == 1);

/// Bytes of tiles that every device has for a program.
const ROOM: u32 = 16 << 10;

/// What was chosen for products: what they multiply, and how classes of them run; shapes decide about others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Choices {
    pub operands: Operands,
    pub classes: HashMap<Class, Choice>,
    /// Kernels of little text, for a device that takes long to compile them.
    pub compact: bool,
    /// Packed weights as floats, for a device that has no product of bytes.
    pub without_dots: bool,
    /// Programs that a device runs at once, if its matrix units multiply bytes: many rows of packed weights take them.
    pub byte_units: Option<usize>,
}

impl Choices {
    pub fn of(&self, matrices: &[Operand], columns: &Amount) -> Choice {
        let known = Class::of(matrices).and_then(|class| self.classes.get(&class));
        if self.compact && known.is_none() {
            return Choice::COMPACT;
        }
        known.copied().unwrap_or_else(|| Choice::by_shape(columns, matrices.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_is_read_as_it_is_written() {
        let class = Class { matrices: 2, dtype: DType::Q4_K, columns: 9, depth: 11 };
        assert_eq!(class.to_string(), "product 2 Q4_K 9 11");
        assert_eq!(class.to_string().parse(), Ok(class));
        assert_eq!(class.dims(), [512, 2048]);
        for wrong in [
            "",
            "product",
            "product 3 f32 1 1",
            "product 1 f33 1 1",
            "product 1 f32 1 60",
            "product 1 f32 1 1 1",
        ] {
            assert_eq!(wrong.parse::<Class>(), Err(()), "{wrong}");
        }
    }

    #[test]
    fn what_shapes_decide_is_among_the_candidates() {
        for matrices in [1, 2] {
            for columns in [8, 65, 4096] {
                let choice = Choice::by_shape(&Amount::Known(columns), matrices);
                assert!(choice.is_one_of(matrices), "{choice:?}");
            }
        }
        assert!(!Choice { schedule: 99, few: 0 }.is_one_of(1));
        assert!(!Choice { schedule: 0, few: 9 }.is_one_of(1));
    }
}
