//! Matrix products too small to be staged: each lane sums a small block of the result in registers.

use super::lines::MadeElement;
use super::product::{Finish, Product, Rows};
use super::{Amount, Draft, LANES};
use crate::ir::{Value, ViewId};
use std::rc::Rc;

/// Lanes along the rows of a program's block; as many along its columns.
const SIDE: i32 = 8;
const _: () = assert!(SIDE * SIDE == LANES as i32);
/// Rows and columns that a lane sums.
const EACH: i32 = 4;
const BLOCK: u32 = (SIDE * EACH) as u32;

/// The place of a lane's results.
struct Block {
    lead: Vec<Value>,
    rows: Vec<(Value, Value)>,
    columns: Vec<(Value, Value)>,
}

impl Product<'_> {
    fn block(&self, d: &mut Draft<'_>) -> Block {
        let lead = self.dims.len() - 2;
        let program = d.b.program();
        let (mut at, inside) = d.coordinates(program, &self.grid(BLOCK, BLOCK));
        let (lane, side, size) = (d.b.lane(), d.b.int(SIDE), d.b.int(BLOCK as i32));
        let (down, across) = (d.b.div(lane, side), d.b.binary(crate::ir::BinaryFn::Rem, lane, side));
        let spread = |d: &mut Draft<'_>, tile: Value, own: Value, extent: &Amount| {
            let first = d.b.mul(tile, size);
            let first = d.b.add(first, own);
            let extent = d.size(extent);
            let one = |i: i32, d: &mut Draft<'_>| {
                let offset = d.b.int(i * SIDE);
                let at = d.b.add(first, offset);
                let there = d.b.within(at, extent);
                (at, d.b.and(inside, there))
            };
            (0..EACH).map(|i| one(i, d)).collect::<Vec<_>>()
        };
        let rows = spread(d, at[lead], down, &self.dims[lead]);
        let columns = spread(d, at[lead + 1], across, &self.dims[lead + 1]);
        at.truncate(lead);
        Block { lead: at, rows, columns }
    }

    /// The sums of a block, rows by columns, for each matrix.
    fn sums(&self, d: &mut Draft<'_>, block: &Block) -> Vec<Vec<Value>> {
        let a: Rc<MadeElement<'static>> = match self.a {
            Rows::Made(make) => make(d),
            Rows::Stored(operand) => {
                let view = d.read(operand);
                Rc::new(move |d, lead, [row, k], mask| {
                    let at: Vec<Value> = lead.iter().copied().chain([row, k]).collect();
                    d.b.load(view, &at, Some(mask))
                })
            }
        };
        let b: Vec<ViewId> = self.b.iter().map(|o| d.read(o)).collect();
        let k = d.size(self.k);
        let (zero, first, end) = (d.b.float(0.0), d.b.int(0), d.b.arg(k));
        let each = (EACH * EACH) as usize;
        let firsts = vec![zero; each * b.len()];
        let load = |d: &mut Draft<'_>, view: ViewId, at: &(Value, Value), p: Value| {
            let coordinates: Vec<Value> = block.lead.iter().copied().chain([at.0, p]).collect();
            let w = d.b.load(view, &coordinates, Some(at.1));
            self.operands.element(d, w)
        };
        let sums = d.repeat([first, end], 1, &firsts, |d, p, carried| {
            let left: Vec<Value> = block
                .rows
                .iter()
                .map(|row| {
                    let x = a(d, &block.lead, [row.0, p], row.1);
                    self.operands.element(d, x)
                })
                .collect();
            let mut next = Vec::with_capacity(carried.len());
            for (matrix, sums) in b.iter().zip(carried.chunks(each)) {
                let right: Vec<Value> = block.columns.iter().map(|c| load(d, *matrix, c, p)).collect();
                for (at, &sum) in sums.iter().enumerate() {
                    let (i, j) = (at / EACH as usize, at % EACH as usize);
                    next.push(d.b.fma(left[i], right[j], sum));
                }
            }
            next
        });
        sums.chunks(each).map(<[Value]>::to_vec).collect()
    }

    /// A product of any number of rows and any strides, which stages nothing.
    pub fn plain(&self, d: &mut Draft<'_>, finish: &Finish<'_>) {
        let block = self.block(d);
        let sums = self.sums(d, &block);
        for at in 0..(EACH * EACH) as usize {
            let (row, column) = (block.rows[at / EACH as usize], block.columns[at % EACH as usize]);
            let coordinates: Vec<Value> = block.lead.iter().copied().chain([row.0, column.0]).collect();
            let mask = d.b.and(row.1, column.1);
            let values: Vec<Value> = sums.iter().map(|s| s[at]).collect();
            finish(d, &coordinates, mask, &values);
        }
    }

    /// Launches of it.
    pub fn plain_programs(&self) -> Amount {
        Amount::product(&self.grid(BLOCK, BLOCK))
    }
}
