//! What the verifier knows of tiles: where each lane puts, and that a barrier stands wherever a word passes between lanes.

use super::{ArgDef, BinaryFn, Inst, Kernel, Literal, Stmt, TileId, Value};
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;

/// What lanes have done since the last barrier.
#[derive(Clone, Default)]
struct Phase {
    /// For each word of a tile that was put to, the lane that put it.
    put: HashMap<TileId, Vec<Option<u32>>>,
    taken: HashSet<TileId>,
}

struct Tiles<'k> {
    kernel: &'k Kernel,
    insts: HashMap<Value, &'k Inst>,
    /// Values in every lane, where nothing but constants and the lane's number decides them.
    known: RefCell<HashMap<Value, Option<Rc<[i64]>>>>,
}

/// Checks that lanes put different words inside their tiles, and that no word is taken or put again without a barrier after a put or take.
///
/// # Errors
/// The first thing that is wrong.
pub(super) fn check(kernel: &Kernel) -> Result<(), String> {
    if kernel.tiles.is_empty() {
        return Ok(());
    }
    let mut tiles = Tiles { kernel, insts: HashMap::new(), known: RefCell::default() };
    tiles.collect(&kernel.body);
    tiles.block(&kernel.body, &mut Phase::default())
}

fn take(tile: TileId, phase: &mut Phase) -> Result<(), String> {
    if phase.put.contains_key(&tile) {
        return Err(format!("tile{} is taken from without a barrier after a put", tile.0));
    }
    phase.taken.insert(tile);
    Ok(())
}

impl<'k> Tiles<'k> {
    fn collect(&mut self, body: &'k [Stmt]) {
        for stmt in body {
            match &stmt.inst {
                Inst::Loop(turn) => self.collect(&turn.body),
                inst => self.insts.extend(stmt.results.iter().map(|&r| (r, inst))),
            }
        }
    }

    fn block(&self, body: &'k [Stmt], phase: &mut Phase) -> Result<(), String> {
        for stmt in body {
            match &stmt.inst {
                Inst::Barrier => *phase = Phase::default(),
                Inst::Put { tile, at, values } => self.put(*tile, *at, values.len(), phase)?,
                Inst::Take { tile, .. } | Inst::Fragment { tile, .. } => take(*tile, phase)?,
                Inst::Loop(turn) => {
                    let before = phase.clone();
                    // A second turn begins with what the first has left; a third would with no more.
                    self.block(&turn.body, phase)?;
                    self.block(&turn.body, phase)?;
                    for (tile, words) in before.put {
                        let of = phase.put.entry(tile).or_insert_with(|| vec![None; words.len()]);
                        of.iter_mut().zip(words).for_each(|(now, before)| *now = before.or(*now));
                    }
                    phase.taken.extend(before.taken);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn put(&self, tile: TileId, at: Value, count: usize, phase: &mut Phase) -> Result<(), String> {
        if phase.taken.contains(&tile) {
            return Err(format!("tile{} is put to without a barrier after it was taken from", tile.0));
        }
        let words = self.kernel.tiles[tile.0 as usize].words as usize;
        let firsts = self
            .in_lanes(at)
            .ok_or_else(|| format!("tile{}: %{} is no function of the lane alone", tile.0, at.0))?;
        let put = phase.put.entry(tile).or_insert_with(|| vec![None; words]);
        for (&first, lane) in firsts.iter().zip(0..) {
            let place = usize::try_from(first).ok().filter(|first| first.is_multiple_of(count));
            let Some(own) = place.and_then(|first| put.get_mut(first..first + count)) else {
                return Err(format!("tile{}: lane {lane} puts {count} words at {first} of {words}", tile.0));
            };
            if let Some(at) = own.iter().position(|word| word.is_some_and(|other| other != lane)) {
                return Err(format!("tile{}: two lanes put word {}", tile.0, first + at as i64));
            }
            own.fill(Some(lane));
        }
        Ok(())
    }

    fn in_lanes(&self, value: Value) -> Option<Rc<[i64]>> {
        if let Some(known) = self.known.borrow().get(&value) {
            return known.clone();
        }
        let found = self.of_lanes(value);
        self.known.borrow_mut().insert(value, found.clone());
        found
    }

    fn of_lanes(&self, value: Value) -> Option<Rc<[i64]>> {
        let lanes = self.kernel.lanes;
        let all = |value: i64| Some((0..lanes).map(|_| value).collect());
        match self.insts.get(&value)? {
            Inst::Const(Literal::I32(value)) => all(i64::from(*value)),
            Inst::Lane => Some((0..i64::from(lanes)).collect()),
            Inst::Arg(arg) => match self.kernel.args[arg.0 as usize] {
                ArgDef::Known(value) => all(i64::from(value)),
                _ => None,
            },
            Inst::Binary(function, a, b) => {
                let (a, b) = (self.in_lanes(*a)?, self.in_lanes(*b)?);
                a.iter().zip(b.iter()).map(|(&a, &b)| combined(*function, a, b)).collect()
            }
            _ => None,
        }
    }
}

fn combined(function: BinaryFn, a: i64, b: i64) -> Option<i64> {
    match function {
        BinaryFn::Add => a.checked_add(b),
        BinaryFn::Sub => a.checked_sub(b),
        BinaryFn::Mul => a.checked_mul(b),
        BinaryFn::Div => a.checked_div(b),
        BinaryFn::Rem => a.checked_rem(b),
        BinaryFn::And if a >= 0 && b >= 0 => Some(a & b),
        BinaryFn::ShiftRight if a >= 0 && (0..32).contains(&b) => Some(a >> b),
        _ => None,
    }
}
