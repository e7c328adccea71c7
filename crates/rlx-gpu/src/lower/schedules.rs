//! Which schedules kernels have: by shape, or as they were timed on a device. Every schedule sums in one order, so a choice decides how
//! fast a kernel is and never what it gives.

use super::Amount;
use super::classes::Class;
use super::library::Library;
use super::operands::Operands;
use std::collections::HashMap;

/// Rows that forms for few rows take at most, without matrix units: those of products, of a place's expert, and of attention over a cache, where each unit
/// of keys has programs of its own.
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

/// How a class of kernels runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Choice {
    /// Position in the table of the class's family: [`Schedule::TABLE`], [`LARGE_FROM`] or [`QUERIES`].
    pub schedule: usize,
    /// Rows up to which the form for few serves; 0 for never.
    pub few: usize,
}

/// Rows from which products by matrix units take programs of the large form.
pub(crate) const LARGE_FROM: [usize; 4] = [usize::MAX, 2048, 512, 128];

/// Rows times heads that programs of attention for many rows have room for.
pub(crate) const QUERIES: [usize; 3] = [16, 8, 4];

impl Choice {
    /// Of little text.
    const COMPACT: Choice = Choice { schedule: Schedule::TABLE.len() - 1, few: 0 };

    /// What the shape of a product alone decides.
    pub fn by_shape(columns: &Amount, matrices: usize) -> Choice {
        let schedule = match columns {
            Amount::Known(n) if *n <= 64 => Schedule::SMALL,
            _ if matrices > 1 => Schedule::PAIR,
            _ => Schedule::LARGE,
        };
        let schedule = Schedule::TABLE.iter().position(|known| *known == schedule).unwrap_or(0);
        Choice { schedule, few: FEW }
    }
}

const _: () = assert!(Schedule::TABLE[Choice::COMPACT.schedule].turns == 1);

/// Bytes of tiles that every device has for a program.
const ROOM: u32 = 16 << 10;

impl Schedule {
    /// Positions of those that a program of so many matrices has room for.
    pub fn fitting(matrices: usize) -> impl Iterator<Item = usize> {
        let fits = move |(at, of): (usize, &Schedule)| (of.tile_words(matrices) * 4 <= ROOM).then_some(at);
        Schedule::TABLE.iter().enumerate().filter_map(fits)
    }
}

/// What was chosen: what products multiply, and how classes of kernels run; shapes decide about others.
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
    /// What products of many rows are left to.
    pub library: Option<Library>,
}

impl Choices {
    /// What was timed for a class.
    pub fn timed(&self, class: Option<Class>) -> Option<Choice> {
        class.and_then(|class| self.classes.get(&class)).copied()
    }

    /// How a product of so many matrices and columns runs without matrix units.
    pub fn of(&self, class: Option<Class>, matrices: usize, columns: &Amount) -> Choice {
        match self.timed(class) {
            Some(choice) => choice,
            None if self.compact => Choice::COMPACT,
            None => Choice::by_shape(columns, matrices),
        }
    }
}
