//! What the verifier knows of tiles: where each lane puts, and that a barrier stands wherever a word passes between lanes.

use super::{ArgDef, BinaryFn, Inst, Kernel, Literal, Stmt, TileId, Value};
use std::collections::{HashMap, HashSet};

/// What lanes have done since the last barrier.
#[derive(Clone, Default)]
struct Phase {
    /// Words put, with the lane.
    put: HashMap<(TileId, i64), u32>,
    taken: HashSet<TileId>,
}

struct Tiles<'k> {
    kernel: &'k Kernel,
    insts: HashMap<Value, &'k Inst>,
}

/// Checks that lanes put different words inside their tiles, and that no word is taken or put again without a barrier after a put or take.
///
/// # Errors
/// The first thing that is wrong.
pub(super) fn check(kernel: &Kernel) -> Result<(), String> {
    if kernel.tiles.is_empty() {
        return Ok(());
    }
    let mut tiles = Tiles { kernel, insts: HashMap::new() };
    tiles.collect(&kernel.body);
    tiles.block(&kernel.body, &mut Phase::default())
}

fn take(tile: TileId, phase: &mut Phase) -> Result<(), String> {
    if phase.put.keys().any(|(put, _)| *put == tile) {
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
                Inst::Take { tile, .. } => take(*tile, phase)?,
                Inst::Mma { tiles, .. } => tiles.iter().try_for_each(|tile| take(*tile, phase))?,
                Inst::Loop(turn) => {
                    let before = phase.clone();
                    // A second turn begins with what the first has left; a third would with no more.
                    self.block(&turn.body, phase)?;
                    self.block(&turn.body, phase)?;
                    phase.put.extend(before.put);
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
        let words = i64::from(self.kernel.tiles[tile.0 as usize].words);
        for lane in 0..self.kernel.lanes {
            let first = self
                .of_lane(at, lane)
                .ok_or_else(|| format!("tile{}: %{} is no function of the lane alone", tile.0, at.0))?;
            if first < 0 || first + count as i64 > words || first % count as i64 != 0 {
                return Err(format!("tile{}: lane {lane} puts {count} words at {first} of {words}", tile.0));
            }
            for word in first..first + count as i64 {
                if phase.put.insert((tile, word), lane).is_some_and(|other| other != lane) {
                    return Err(format!("tile{}: two lanes put word {word}", tile.0));
                }
            }
        }
        Ok(())
    }

    /// The value in a lane, if nothing but constants and the lane's number decides it.
    fn of_lane(&self, value: Value, lane: u32) -> Option<i64> {
        Some(match self.insts.get(&value)? {
            Inst::Const(Literal::I32(value)) => i64::from(*value),
            Inst::Lane => i64::from(lane),
            Inst::Arg(arg) => match self.kernel.args[arg.0 as usize] {
                ArgDef::Known(value) => i64::from(value),
                _ => return None,
            },
            Inst::Binary(function, a, b) => {
                let (a, b) = (self.of_lane(*a, lane)?, self.of_lane(*b, lane)?);
                match function {
                    BinaryFn::Add => a.checked_add(b)?,
                    BinaryFn::Sub => a.checked_sub(b)?,
                    BinaryFn::Mul => a.checked_mul(b)?,
                    BinaryFn::Div => a.checked_div(b)?,
                    BinaryFn::Rem => a.checked_rem(b)?,
                    BinaryFn::And if a >= 0 && b >= 0 => a & b,
                    BinaryFn::ShiftRight if a >= 0 && (0..32).contains(&b) => a >> b,
                    _ => return None,
                }
            }
            _ => return None,
        })
    }
}
