//! Products of rows that each have a matrix of their own: rows are brought into groups of one matrix, and a program takes rows of one
//! group, so that one launch serves all matrices and reads each as often as its rows ask for.
//!
//! What stands where the groups are is made on the device (`moe.rs`), in tables: a *place* is a row with one of its matrices, a *position* a
//! place in the order of groups, a *block* the positions of one program.

use super::few;
use super::lines::scaled;
use super::mma;
use super::operands::Operands;
use super::product::{Finish, Product, Spot, Stands};
use super::quantise::Codes;
use super::schedules::{Choice, FEW, Schedule};
use super::{Amount, Draft, LowerCx, Operand};
use crate::ir::{BinaryFn, Value, ViewId};
use rlx::backend::BackendError;

/// Rows of a block.
pub(super) const BLOCK: u32 = Schedule::PAIR.rows;
const _: () = assert!(Schedule::SMALL.rows == BLOCK);

/// Where groups stand.
pub(super) struct Tables {
    /// The matrix of each place.
    pub chosen: Operand,
    /// The place at each position.
    pub sorted: Operand,
    /// Of each block its matrix (-1 for a block that is none), its first position and the one behind its last.
    pub blocks: [Operand; 3],
}

/// A product of places, whose result has a row for each position, or for each place where there are few.
pub(super) struct Grouped<'g> {
    pub product: Product<'g>,
    /// Of how many rows each row stands for, if the first operand has one for so many places; positions have rows of their own otherwise.
    pub shared: Option<usize>,
    /// Lines of each matrix.
    pub lines: usize,
    /// The first matrix that is bound, and how many are.
    pub matrices: [usize; 2],
    /// How it was timed to run, if it was.
    pub timed: Option<Choice>,
}

/// Rows up to which a program takes a place.
pub(super) fn few_of(timed: Option<Choice>) -> usize {
    timed.map_or(FEW, |choice| choice.few)
}

/// Blocks that so many places of so many matrices fill at most.
pub(super) fn blocks(places: &Amount, matrices: usize) -> Amount {
    Amount::sum(&places.ceil_div(BLOCK as usize), &Amount::Known(matrices))
}

fn entry(d: &mut Draft<'_>, table: &Operand, at: Value, mask: Value) -> Value {
    let view = d.read(table);
    d.b.load(view, &[at], Some(mask))
}

impl Grouped<'_> {
    fn schedule(&self) -> Schedule {
        match (self.timed, &self.product.dims[1]) {
            (Some(choice), _) => Schedule::TABLE[choice.schedule.min(Schedule::TABLE.len() - 1)],
            (None, Amount::Known(n)) if *n <= Schedule::SMALL.columns as usize => Schedule::SMALL,
            _ => Schedule::PAIR,
        }
    }

    fn by_units(&self) -> bool {
        matches!(self.product.operands, Operands::Units { .. })
    }

    /// The quantised rows, if matrix units multiply blocks of them.
    fn bytes_by_units(&self) -> Option<&Codes> {
        self.product.codes.filter(|codes| codes.units.is_some())
    }

    /// Columns and lanes of a program of a block, then of a place.
    fn sides(&self) -> [[u32; 2]; 2] {
        if self.by_units() {
            let block = mma::Form::GROUP;
            return [[block.columns, block.lanes()], [mma::FEW_COLUMNS, mma::FEW_LANES]];
        }
        let schedule = self.schedule();
        let block = match self.bytes_by_units() {
            Some(_) => [mma::Form::GROUP.columns, mma::Form::GROUP.lanes()],
            None => [schedule.columns, schedule.lanes()],
        };
        [block, [few::COLUMNS, few::LANES]]
    }

    /// A program's block, its first column, and whether there is such a program.
    fn program(&self, d: &mut Draft<'_>, blocks: &Amount, columns: u32) -> (Value, Value, Value) {
        let grid = [blocks.clone(), self.product.dims[1].ceil_div(columns as usize)];
        let program = d.b.program();
        let (at, inside) = d.coordinates(program, &grid);
        (at[0], scaled(d, at[1], columns), inside)
    }

    /// What a program stands for, given its matrix, its rows and its first column. One without rows goes over no products.
    fn spot<'s>(
        &self,
        d: &mut Draft<'_>,
        matrix: Value,
        [first, last]: [Value; 2],
        column: Value,
        inside: Value,
        stands: &'s Stands<'s>,
    ) -> Spot<'s> {
        let [begin, count] = self.matrices.map(Amount::Known);
        let (begin, count) = (d.size(&begin), d.size(&count));
        let begin = d.b.arg(begin);
        let own = d.b.sub(matrix, begin);
        let bound = d.b.within(own, count);
        let inside = d.b.and(inside, bound);
        let line = scaled(d, own, self.lines as u32);
        let line = d.b.add(line, column);
        let k = d.size(self.product.k);
        let (k, zero) = (d.b.arg(k), d.b.int(0));
        let end = d.b.select(inside, k, zero);
        // The same in every lane, which the fold makes known.
        let end = d.b.fold(BinaryFn::Max, end);
        Spot {
            lead: Vec::new(),
            firsts: [first, column],
            line,
            inside,
            last: Some(last),
            end,
            stands: Some(stands),
        }
    }

    /// Programs of a block each.
    fn many(&self, d: &mut Draft<'_>, tables: &Tables, blocks: &Amount, finish: &Finish<'_>) {
        let (block, column, inside) = self.program(d, blocks, self.sides()[0][0]);
        let [matrix, first, last] = [0, 1, 2].map(|i| entry(d, &tables.blocks[i], block, inside));
        let sorted = self.shared.map(|_| d.read(&tables.sorted));
        let positions = d.size(&tables.sorted.dims[0]);
        let stands = |d: &mut Draft<'_>, position: Value| {
            let none = d.b.int(-1);
            let before = d.b.less(position, last);
            let within = d.b.within(position, positions);
            let there = d.b.and(before, within);
            let there = d.b.and(there, inside);
            let row = match (sorted, self.shared) {
                (Some(sorted), Some(each)) => {
                    let place = d.b.load(sorted, &[position], Some(there));
                    let each = d.b.int(each as i32);
                    d.b.div(place, each)
                }
                _ => position,
            };
            d.b.select(there, row, none)
        };
        let spot = self.spot(d, matrix, [first, last], column, inside, &stands);
        let (product, form) = (&self.product, mma::Form::GROUP);
        match (self.by_units(), self.bytes_by_units()) {
            (true, _) => product.many_by_units(d, form, &spot, finish),
            (_, Some(codes)) => product.many_dots_by_units(d, codes, form, &spot, finish),
            _ => product.many(d, self.schedule(), &spot, finish),
        }
    }

    /// Programs of a place each.
    fn few(&self, d: &mut Draft<'_>, tables: &Tables, finish: &Finish<'_>) {
        let (place, column, inside) = self.program(d, &tables.chosen.dims[0], self.sides()[1][0]);
        let matrix = entry(d, &tables.chosen, place, inside);
        let one = d.b.int(1);
        let last = d.b.add(place, one);
        let stands = |d: &mut Draft<'_>, place: Value| {
            let none = d.b.int(-1);
            let there = d.b.less(place, last);
            let row = match self.shared {
                Some(each) => {
                    let each = d.b.int(each as i32);
                    d.b.div(place, each)
                }
                None => place,
            };
            d.b.select(there, row, none)
        };
        let spot = self.spot(d, matrix, [place, last], column, inside, &stands);
        match self.by_units() {
            true => self.product.few_by_units(d, mma::FEW[0], &spot, finish),
            false => self.product.few(d, self.product.few_forms()[0], &spot, finish),
        }
    }

    /// Launches for every number of `rows`; `prepare` makes what finishes an element in each kernel.
    pub fn launch(
        &self,
        cx: &mut LowerCx<'_>,
        name: &str,
        rows: &Amount,
        tables: &Tables,
        prepare: &dyn Fn(&mut Draft<'_>) -> Box<Finish<'static>>,
    ) -> Result<(), BackendError> {
        let columns = &self.product.dims[1];
        let blocks = tables.blocks[0].dims[0].clone();
        let [block, place] = self.sides();
        let by = if self.by_units() { "_mma" } else { self.product.by() };
        let of_block = if self.bytes_by_units().is_some() { "_mma_q8" } else { by };
        let programs = Amount::product(&[blocks.clone(), columns.ceil_div(block[0] as usize)]);
        let few = few_of(self.timed);
        if let Some(programs) = rows.when(few + 1, usize::MAX, programs) {
            let mut d = cx.draft_of(format!("{name}_grouped{of_block}"), block[1]);
            let finish = prepare(&mut d);
            self.many(&mut d, tables, &blocks, &*finish);
            cx.launch(d, programs)?;
        }
        let programs = Amount::product(&[tables.chosen.dims[0].clone(), columns.ceil_div(place[0] as usize)]);
        if let Some(programs) = rows.when(1, few, programs).filter(|_| few > 0) {
            let mut d = cx.draft_of(format!("{name}_few{by}"), place[1]);
            let finish = prepare(&mut d);
            self.few(&mut d, tables, &*finish);
            cx.launch(d, programs)?;
        }
        Ok(())
    }
}

/// What stores a group's element as it is.
pub(super) fn stored(write: ViewId) -> Box<Finish<'static>> {
    Box::new(move |d, at, mask, sums| d.b.store(write, at, sums[0], Some(mask)))
}
