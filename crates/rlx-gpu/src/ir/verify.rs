//! What must hold of a kernel before it is printed: one definition before each use, fitting types, loops that run equally often in every
//! lane, and coordinates that are below their extents.

use super::{
    Access, Arg, ArgDef, BinaryFn, Binding, Element, Inst, Kernel, Literal, Loop, Stmt, Storage, TileId,
    Type, UnaryFn, Value, ViewId,
};
use std::collections::HashMap;

/// What is wrong with a kernel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("kernel {kernel}: {reason}")]
pub struct KernelFault {
    /// The kernel.
    pub kernel: String,
    /// What is wrong.
    pub reason: String,
}

/// How a value came to be.
#[derive(Clone, Copy)]
enum Origin<'k> {
    Stmt(&'k Inst),
    Index(&'k Loop),
    Carried,
}

struct Verifier<'k> {
    kernel: &'k Kernel,
    known: HashMap<Value, Origin<'k>>,
}

/// Checks a kernel.
///
/// # Errors
/// The first thing that is wrong.
pub fn verify(kernel: &Kernel) -> Result<(), KernelFault> {
    let fault = |reason: String| KernelFault { kernel: kernel.name.clone(), reason };
    if !kernel.lanes.is_power_of_two() || kernel.lanes > 256 {
        return Err(fault(format!("{} lanes are no power of two up to 256", kernel.lanes)));
    }
    for view in &kernel.views {
        let narrow = !matches!(view.storage, Storage::Word(_));
        if (narrow || matches!(view.binding, Binding::Weight(_))) && view.access != Access::Read {
            return Err(fault("a weight is written".to_owned()));
        }
        if view.extents.len() != view.strides.len() {
            return Err(fault("a view has extents and strides of two ranks".to_owned()));
        }
        if !matches!(view.wide, 1 | 2 | 4) || (view.wide > 1 && narrow) {
            return Err(fault(format!("a view is loaded from by {}", view.wide)));
        }
    }
    if kernel.tiles.iter().any(|t| t.element == Element::Bool || t.words > 1 << 16) {
        return Err(fault("a tile is of truths or too large".to_owned()));
    }
    let mut verifier = Verifier { kernel, known: HashMap::new() };
    verifier.block(&kernel.body).and_then(|_| super::tiles::check(kernel)).map_err(fault)
}

impl<'k> Verifier<'k> {
    /// Checks statements; what they define stays known.
    fn block(&mut self, body: &'k [Stmt]) -> Result<Vec<Value>, String> {
        let mut own = Vec::new();
        for stmt in body {
            self.stmt(stmt)?;
            for &result in &stmt.results {
                if self.known.insert(result, Origin::Stmt(&stmt.inst)).is_some() {
                    return Err(format!("%{} is defined twice", result.0));
                }
                own.push(result);
            }
        }
        Ok(own)
    }

    fn ty(&self, value: Value) -> Result<Type, String> {
        match self.known.contains_key(&value) {
            true => Ok(self.kernel.ty(value)),
            false => Err(format!("%{} is used where it is not defined", value.0)),
        }
    }

    /// A value that is no staged tile.
    fn plain(&self, value: Value) -> Result<Type, String> {
        let ty = self.ty(value)?;
        if ty.staged { Err(format!("%{} is staged", value.0)) } else { Ok(ty) }
    }

    fn wants(&self, value: Value, element: Element) -> Result<Type, String> {
        let ty = self.plain(value)?;
        match ty.element == element {
            true => Ok(ty),
            false => Err(format!("%{} is {:?}, expected {element:?}", value.0, ty.element)),
        }
    }

    fn gives(&self, stmt: &Stmt, element: Element, uniform: bool) -> Result<(), String> {
        let of_warp = matches!(stmt.inst, Inst::Fragment { .. } | Inst::Mma { .. } | Inst::MmaBytes { .. });
        let wide = of_warp || matches!(stmt.inst, Inst::Load { .. } | Inst::Take { .. });
        if !matches!(stmt.results.len(), 1 | 2 | 4) || (stmt.results.len() > 1 && !wide) {
            return Err(format!("a statement has {} results", stmt.results.len()));
        }
        let staged = matches!(stmt.inst, Inst::Stage(_));
        for result in &stmt.results {
            let ty = self.kernel.ty(*result);
            if ty.element != element || (!uniform && ty.uniform) || ty.staged != staged {
                return Err(format!("%{} is typed {ty:?}, computed as {element:?}", result.0));
            }
        }
        Ok(())
    }

    fn tile(&self, tile: TileId) -> Result<(Element, i64), String> {
        let known = self.kernel.tiles.get(tile.0 as usize).ok_or("no such tile")?;
        Ok((known.element, i64::from(known.words)))
    }

    fn stmt(&mut self, stmt: &'k Stmt) -> Result<(), String> {
        match &stmt.inst {
            Inst::Const(literal) => {
                let element = match literal {
                    Literal::Bool(_) => Element::Bool,
                    Literal::I32(_) => Element::I32,
                    Literal::F32(_) => Element::F32,
                };
                self.gives(stmt, element, true)
            }
            Inst::Arg(arg) if arg.0 as usize >= self.kernel.args.len() => Err("no such argument".to_owned()),
            Inst::Arg(_) | Inst::Program => self.gives(stmt, Element::I32, true),
            Inst::Lane => self.gives(stmt, Element::I32, false),
            Inst::Unary(function, x) => self.unary(stmt, *function, *x),
            Inst::Binary(function, a, b) => self.binary(stmt, *function, *a, *b),
            Inst::Select(condition, a, b) => {
                let (c, a) = (self.wants(*condition, Element::Bool)?, self.plain(*a)?);
                let b = self.wants(*b, a.element)?;
                self.gives(stmt, a.element, c.uniform && a.uniform && b.uniform)
            }
            Inst::Fma(a, b, c) => self.three(stmt, [*a, *b, *c], Element::F32),
            Inst::Dot4(a, b, c) => self.three(stmt, [*a, *b, *c], Element::I32),
            Inst::Lookup(x, _) => {
                let uniform = self.wants(*x, Element::I32)?.uniform;
                self.gives(stmt, Element::I32, uniform)
            }
            Inst::Digit { linear, extents, axis } => {
                let ty = self.wants(*linear, Element::I32)?;
                if *axis as usize >= extents.len() || !self.nonnegative(*linear) {
                    return Err(format!("%{} is no linear index", linear.0));
                }
                self.gives(stmt, Element::I32, ty.uniform)
            }
            Inst::Load { view, at, mask } => {
                self.access(*view, at, *mask, Access::Write)?;
                self.wide(*view, at, stmt.results.len())?;
                self.gives(stmt, self.kernel.views[view.0 as usize].storage.element(), false)
            }
            Inst::Store { view, at, value, mask } => {
                self.access(*view, at, *mask, Access::Read)?;
                let element = self.kernel.views[view.0 as usize].storage.element();
                self.wants(*value, element).map(drop)
            }
            Inst::Fold(function, x) => {
                let ty = self.plain(*x)?;
                let folds = matches!(function, BinaryFn::Add | BinaryFn::Mul | BinaryFn::Min | BinaryFn::Max);
                if !folds || ty.element == Element::Bool {
                    return Err(format!("{function:?} does not fold"));
                }
                self.gives(stmt, ty.element, true)
            }
            Inst::Stage(x) => {
                let ty = self.plain(*x)?;
                if ty.element == Element::Bool {
                    return Err("truths are not staged".to_owned());
                }
                self.gives(stmt, ty.element, false)
            }
            Inst::Peek { tile, at } => {
                let ty = self.ty(*tile)?;
                if !ty.staged || !self.is_lane(*at) {
                    return Err(format!("%{} is not known to be a lane of %{}", at.0, tile.0));
                }
                self.gives(stmt, ty.element, false)
            }
            Inst::Check { holds, mask, slot } => {
                self.wants(*holds, Element::Bool)?;
                self.wants(*mask, Element::Bool)?;
                match self.kernel.args.get(slot.0 as usize) {
                    Some(ArgDef::Size(_)) => Ok(()),
                    _ => Err("a check names no slot of the host's".to_owned()),
                }
            }
            Inst::Put { tile, at, values } => {
                let (element, _) = self.tile(*tile)?;
                self.wants(*at, Element::I32)?;
                if !matches!(values.len(), 1 | 2 | 4) {
                    return Err(format!("{} words are put at once", values.len()));
                }
                values.iter().try_for_each(|&v| self.wants(v, element).map(drop))
            }
            Inst::Take { tile, at } => {
                let ((element, words), count) = (self.tile(*tile)?, stmt.results.len());
                self.wants(*at, Element::I32)?;
                let inside =
                    self.range(*at).is_some_and(|(low, high)| low >= 0 && high + count as i64 <= words);
                if !inside || !self.is_multiple(*at, count as i64) {
                    return Err(format!("%{} is not known to be {count} words of tile{}", at.0, tile.0));
                }
                self.gives(stmt, element, false)
            }
            Inst::Fragment { tile, at, pitch, lines } => self.fragment(stmt, *tile, *at, *pitch, *lines),
            Inst::Mma { rows, columns, sums, .. } => self.mma(stmt, [rows, columns], sums, Element::F32),
            Inst::MmaBytes { rows, columns, sums } => self.mma(stmt, [rows, columns], sums, Element::I32),
            Inst::Barrier => Ok(()),
            Inst::Loop(turn) => self.repeat(stmt, turn),
        }
    }

    /// A function of three values of one element, which it gives.
    fn three(&self, stmt: &Stmt, values: [Value; 3], element: Element) -> Result<(), String> {
        let mut uniform = true;
        for value in values {
            uniform &= self.wants(value, element)?.uniform;
        }
        self.gives(stmt, element, uniform)
    }

    fn of_warps(&self, stmt: &Stmt) -> Result<(), String> {
        match self.kernel.lanes.is_multiple_of(32) && stmt.results.len() == 4 {
            true => Ok(()),
            false => Err("what warps do together is not of whole warps".to_owned()),
        }
    }

    fn mma(
        &self,
        stmt: &Stmt,
        [rows, columns]: [&[Value]; 2],
        sums: &[Value; 4],
        element: Element,
    ) -> Result<(), String> {
        if !matches!((rows.len(), columns.len()), (4, 2) | (2, 1)) {
            return Err(format!("{} words of rows do not meet {} of columns", rows.len(), columns.len()));
        }
        rows.iter().chain(columns).try_for_each(|&word| self.wants(word, Element::I32).map(drop))?;
        sums.iter().try_for_each(|&sum| self.wants(sum, element).map(drop))?;
        self.of_warps(stmt)?;
        self.gives(stmt, element, false)
    }

    fn fragment(&self, stmt: &Stmt, id: TileId, at: Value, pitch: u32, lines: u32) -> Result<(), String> {
        let (element, words) = self.tile(id)?;
        self.wants(at, Element::I32)?;
        self.of_warps(stmt)?;
        let last = i64::from(lines.saturating_sub(1)) * i64::from(pitch) + 7;
        let inside = self.range(at).is_some_and(|(low, high)| low >= 0 && high + last < words);
        let whole = pitch.is_multiple_of(4) && self.is_multiple(at, 4);
        let counted = lines.is_power_of_two() && lines <= 16;
        if element != Element::I32 || !inside || !whole || !counted || !self.is_of_warp(at) {
            return Err(format!("%{} is not known to be {lines} lines of tile{}", at.0, id.0));
        }
        self.gives(stmt, Element::I32, false)
    }

    /// Whether an integer is the same in each 32 lanes.
    fn is_of_warp(&self, value: Value) -> bool {
        if self.kernel.ty(value).uniform {
            return true;
        }
        match self.inst(value) {
            Some(Inst::Binary(BinaryFn::ShiftRight, a, bits)) => {
                let lane = matches!(self.inst(*a), Some(Inst::Lane));
                (lane && self.literal(*bits).is_some_and(|b| (5..32).contains(&b))) || self.is_of_warp(*a)
            }
            Some(Inst::Binary(_, a, b)) => self.is_of_warp(*a) && self.is_of_warp(*b),
            _ => false,
        }
    }

    /// Whether so many elements from a coordinate on are below the extent, and stand where a load may begin.
    fn wide(&self, id: ViewId, at: &[Value], count: usize) -> Result<(), String> {
        let (view, count) = (&self.kernel.views[id.0 as usize], count as i64);
        if count == 1 {
            return Ok(());
        }
        let whole = at.last().zip(view.extents.last()).is_some_and(|(&at, extent)| {
            let known = match self.kernel.args[extent.0 as usize] {
                ArgDef::Known(extent) => i64::from(extent) % count == 0,
                _ => false,
            };
            known && self.is_multiple(at, count)
        });
        match whole && count <= i64::from(view.wide) {
            true => Ok(()),
            false => Err(format!("view{} is not known to have {count} elements there", id.0)),
        }
    }

    /// Bounds of an integer, both within.
    fn range(&self, value: Value) -> Option<(i64, i64)> {
        if let Some(Origin::Index(turn)) = self.known.get(&value) {
            let (from, to) = (self.range(turn.from)?, self.range(turn.to)?);
            let (first, end, step) = (from.0, to.1, i64::from(turn.step));
            let known = from.0 == from.1 && end > first;
            return Some((first, if known { first + (end - 1 - first) / step * step } else { end - 1 }));
        }
        Some(match self.inst(value)? {
            Inst::Const(_) | Inst::Arg(_) => self.literal(value).map(|v| (i64::from(v), i64::from(v)))?,
            Inst::Lane => (0, i64::from(self.kernel.lanes) - 1),
            Inst::Binary(BinaryFn::And, _, b) => (0, self.range(*b).filter(|b| b.0 == b.1 && b.0 >= 0)?.0),
            Inst::Binary(BinaryFn::Min, a, b) => match (self.range(*a), self.range(*b)) {
                (Some(a), Some(b)) => (a.0.min(b.0), a.1.min(b.1)),
                // A loop's bound of which only the most matters: such a loop has no turn below it.
                (Some(known), None) | (None, Some(known)) => (i64::from(i32::MIN), known.1),
                (None, None) => return None,
            },
            Inst::Binary(function, a, b) => {
                let (a, b) = (self.range(*a)?, self.range(*b)?);
                match function {
                    BinaryFn::Add => (a.0 + b.0, a.1 + b.1),
                    BinaryFn::Sub => (a.0 - b.1, a.1 - b.0),
                    BinaryFn::Mul if a.0 >= 0 && b.0 >= 0 => (a.0 * b.0, a.1 * b.1),
                    BinaryFn::Div if a.0 >= 0 && b.0 == b.1 && b.0 > 0 => (a.0 / b.0, a.1 / b.0),
                    BinaryFn::Rem if a.0 >= 0 && b.0 == b.1 && b.0 > 0 => (0, a.1.min(b.0 - 1)),
                    BinaryFn::ShiftRight if a.0 >= 0 && b.0 == b.1 && (0..32).contains(&b.0) => {
                        (a.0 >> b.0, a.1 >> b.0)
                    }
                    _ => return None,
                }
            }
            _ => return None,
        })
    }

    /// Whether an integer is a multiple of a power of two.
    fn is_multiple(&self, value: Value, of: i64) -> bool {
        if of == 1 {
            return true;
        }
        if let Some(Origin::Index(turn)) = self.known.get(&value) {
            return i64::from(turn.step) % of == 0 && self.is_multiple(turn.from, of);
        }
        match self.inst(value) {
            Some(Inst::Binary(BinaryFn::Add | BinaryFn::Sub, a, b)) => {
                self.is_multiple(*a, of) && self.is_multiple(*b, of)
            }
            Some(Inst::Binary(BinaryFn::Mul, a, b)) => self.is_multiple(*a, of) || self.is_multiple(*b, of),
            Some(Inst::Select(_, a, b)) => self.is_multiple(*a, of) && self.is_multiple(*b, of),
            Some(Inst::Binary(BinaryFn::ShiftRight, a, bits)) => {
                self.literal(*bits).is_some_and(|b| (0..16).contains(&b) && self.is_multiple(*a, of << b))
            }
            _ => self.literal(value).is_some_and(|v| i64::from(v) % of == 0),
        }
    }

    fn unary(&self, stmt: &Stmt, function: UnaryFn, x: Value) -> Result<(), String> {
        let ty = self.plain(x)?;
        use Element::{Bool, F32, I32};
        let (takes, result) = match function {
            UnaryFn::Neg | UnaryFn::Abs if ty.element != Bool => (ty.element, ty.element),
            UnaryFn::Not => (Bool, Bool),
            UnaryFn::ToFloat | UnaryFn::FromBits | UnaryFn::LowHalf | UnaryFn::HighHalf => (I32, F32),
            UnaryFn::ToInt | UnaryFn::Bits => (F32, I32),
            UnaryFn::IsNan => (F32, Bool),
            _ => (F32, F32),
        };
        self.wants(x, takes)?;
        self.gives(stmt, result, ty.uniform)
    }

    fn binary(&self, stmt: &Stmt, function: BinaryFn, a: Value, b: Value) -> Result<(), String> {
        let x = self.plain(a)?;
        let y = self.wants(b, x.element)?;
        let fits = match function {
            BinaryFn::Pow | BinaryFn::PackHalves | BinaryFn::PackBrains => x.element == Element::F32,
            BinaryFn::Rem | BinaryFn::ShiftRight => x.element == Element::I32,
            BinaryFn::And | BinaryFn::Or | BinaryFn::Xor => x.element != Element::F32,
            BinaryFn::Equal => true,
            _ => x.element != Element::Bool,
        };
        if !fits {
            return Err(format!("{function:?} is not defined for {:?}", x.element));
        }
        let element = match function {
            BinaryFn::PackHalves | BinaryFn::PackBrains => Element::I32,
            _ if function.compares() => Element::Bool,
            _ => x.element,
        };
        self.gives(stmt, element, x.uniform && y.uniform)
    }

    fn repeat(&mut self, stmt: &Stmt, turn: &'k Loop) -> Result<(), String> {
        for bound in [turn.from, turn.to] {
            if !self.wants(bound, Element::I32)?.uniform {
                return Err(format!("the loop over %{} may run differently in each lane", turn.index.0));
            }
        }
        if turn.step == 0 || stmt.results.len() != turn.carried.len() {
            return Err(format!("the loop over %{} is malformed", turn.index.0));
        }
        for carried in &turn.carried {
            let (first, param) = (self.plain(carried.first)?, self.kernel.ty(carried.param));
            if first.element != param.element || (param.uniform && !first.uniform) {
                return Err(format!("%{} does not take %{}", carried.param.0, carried.first.0));
            }
            self.known.insert(carried.param, Origin::Carried);
        }
        self.known.insert(turn.index, Origin::Index(turn));
        let own = self.block(&turn.body)?;
        for (carried, &result) in turn.carried.iter().zip(&stmt.results) {
            let (next, param) = (self.plain(carried.next)?, self.kernel.ty(carried.param));
            if next.element != param.element || (param.uniform && !next.uniform) {
                return Err(format!("%{} does not take %{}", carried.param.0, carried.next.0));
            }
            if self.kernel.ty(result) != param {
                return Err(format!("%{} is not typed as what the loop carries", result.0));
            }
            self.known.remove(&carried.param);
        }
        self.known.remove(&turn.index);
        for value in &own {
            self.known.remove(value);
        }
        Ok(())
    }

    fn access(&self, id: ViewId, at: &[Value], mask: Option<Value>, not: Access) -> Result<(), String> {
        let view = self.kernel.views.get(id.0 as usize).ok_or("no such view")?;
        if view.access == not || at.len() != view.extents.len() {
            return Err(format!("view{} is not accessed as it is declared", id.0));
        }
        let mut conjuncts = Vec::new();
        if let Some(mask) = mask {
            self.wants(mask, Element::Bool)?;
            self.split(mask, &mut conjuncts);
        }
        for (&coordinate, &extent) in at.iter().zip(&view.extents) {
            self.wants(coordinate, Element::I32)?;
            if !self.below(coordinate, extent, &conjuncts) {
                let (view, v, e) = (id.0, coordinate.0, extent.0);
                return Err(format!("view{view}: %{v} is not known to be below arg {e}"));
            }
        }
        Ok(())
    }

    fn inst(&self, value: Value) -> Option<&'k Inst> {
        match self.known.get(&value) {
            Some(Origin::Stmt(inst)) => Some(inst),
            _ => None,
        }
    }

    /// What must be true for a mask to be.
    fn split(&self, mask: Value, conjuncts: &mut Vec<Value>) {
        match self.inst(mask) {
            Some(Inst::Binary(BinaryFn::And, a, b)) => {
                self.split(*a, conjuncts);
                self.split(*b, conjuncts);
            }
            _ => conjuncts.push(mask),
        }
    }

    fn is_arg(&self, value: Value, arg: Arg) -> bool {
        matches!(self.inst(value), Some(Inst::Arg(found)) if *found == arg)
    }

    fn literal(&self, value: Value) -> Option<i32> {
        match self.inst(value)? {
            Inst::Const(Literal::I32(value)) => Some(*value),
            Inst::Arg(arg) => match self.kernel.args[arg.0 as usize] {
                ArgDef::Known(value) => Some(value),
                _ => None,
            },
            _ => None,
        }
    }

    fn below(&self, value: Value, extent: Arg, conjuncts: &[Value]) -> bool {
        let known_extent = match self.kernel.args[extent.0 as usize] {
            ArgDef::Known(extent) => Some(extent),
            _ => None,
        };
        if let (Some(value), Some(extent)) = (self.literal(value), known_extent) {
            return (0..extent).contains(&value);
        }
        let reaches = |limit: Value| {
            let fits = self.literal(limit).zip(known_extent).is_some_and(|(limit, extent)| limit <= extent);
            self.is_arg(limit, extent) || fits
        };
        if let Some(Origin::Index(turn)) = self.known.get(&value)
            && self.nonnegative(turn.from)
            && reaches(turn.to)
        {
            return true;
        }
        if let Some(Inst::Digit { linear, extents, axis }) = self.inst(value)
            && extents[*axis as usize] == extent
        {
            let product =
                if extents.len() == 1 { ArgDef::Known(-1) } else { ArgDef::Product(extents.clone()) };
            let whole = |limit: Value| match self.inst(limit) {
                Some(Inst::Arg(arg)) => match extents.as_slice() {
                    [one] => arg == one,
                    _ => self.kernel.args[arg.0 as usize] == product,
                },
                _ => false,
            };
            return *axis > 0 || conjuncts.iter().any(|&c| self.is_less(c, *linear).is_some_and(whole));
        }
        if let Some(Inst::Binary(BinaryFn::And, _, bits)) = self.inst(value)
            && let Some((bits, extent)) = self.literal(*bits).zip(known_extent)
        {
            return bits >= 0 && bits < extent;
        }
        if let Some(((low, high), extent)) = self.range(value).zip(known_extent)
            && low >= 0
            && high < i64::from(extent)
        {
            return true;
        }
        let masked = conjuncts.iter().any(|&c| self.is_less(c, value).is_some_and(reaches));
        let zero = |c: &Value| matches!(self.inst(*c), Some(Inst::Binary(BinaryFn::LessEqual, z, v)) if *v == value && self.literal(*z).is_some_and(|z| z >= 0));
        masked && (self.nonnegative(value) || conjuncts.iter().any(zero))
    }

    /// The limit, if a condition says that `value` is less than one.
    fn is_less(&self, condition: Value, value: Value) -> Option<Value> {
        match self.inst(condition) {
            Some(Inst::Binary(BinaryFn::Less, v, limit)) if *v == value => Some(*limit),
            _ => None,
        }
    }

    fn nonnegative(&self, value: Value) -> bool {
        match self.known.get(&value) {
            Some(Origin::Index(turn)) => self.nonnegative(turn.from),
            Some(Origin::Stmt(inst)) => match inst {
                Inst::Const(Literal::I32(value)) => *value >= 0,
                Inst::Arg(_) => self.literal(value).is_none_or(|v| v >= 0),
                Inst::Program | Inst::Lane | Inst::Digit { .. } => true,
                Inst::Select(_, a, b) => self.nonnegative(*a) && self.nonnegative(*b),
                Inst::Binary(BinaryFn::Add | BinaryFn::Mul | BinaryFn::Div | BinaryFn::Rem, a, b) => {
                    self.nonnegative(*a) && self.nonnegative(*b)
                }
                Inst::Binary(BinaryFn::ShiftRight, a, _) => self.nonnegative(*a),
                Inst::Binary(BinaryFn::And, a, b) => self.nonnegative(*a) || self.nonnegative(*b),
                _ => false,
            },
            _ => false,
        }
    }

    fn is_lane(&self, value: Value) -> bool {
        let lanes = self.kernel.lanes as i32;
        match self.known.get(&value) {
            Some(Origin::Index(turn)) => {
                self.nonnegative(turn.from) && self.literal(turn.to).is_some_and(|to| to <= lanes)
            }
            Some(Origin::Stmt(Inst::Lane)) => true,
            _ => self.literal(value).is_some_and(|v| (0..lanes).contains(&v)),
        }
    }
}
