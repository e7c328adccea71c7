//! Kernels run one statement at a time, all lanes together: the oracle of every printer. It finds accesses outside a binding, reads of
//! words that nothing has written, and words that two lanes touch of which one writes: in the arena within a launch, in a tile within a
//! program between two barriers. So what it accepts gives the same results in whatever order lanes run.

use super::{
    Arg, BinaryFn, Binding, Element, Inst, Kernel, Literal, Loop, Pairs, Stmt, Storage, TileId, UnaryFn,
    Value, View,
};

/// What a kernel did that it must not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("kernel {kernel}, {place}, word {word}: {what}")]
pub struct Violation {
    /// The kernel.
    pub kernel: String,
    /// The view or tile.
    pub place: String,
    /// The word of the binding or tile.
    pub word: u64,
    /// What was done.
    pub what: &'static str,
}

/// Many lanes.
const MANY: u32 = u32::MAX;

/// The memory of a device.
#[derive(Debug, Default)]
pub struct Machine {
    arena: Vec<u32>,
    written_ever: Vec<bool>,
    /// For each word, the launch and the lane that wrote it last.
    writer: Vec<(u32, u32)>,
    reader: Vec<(u32, u32)>,
    launch: u32,
}

impl Machine {
    /// An arena in which nothing has been written.
    pub fn new(words: usize) -> Self {
        Self {
            arena: vec![0x7fc0_dead; words],
            written_ever: vec![false; words],
            writer: vec![(0, 0); words],
            reader: vec![(0, 0); words],
            launch: 0,
        }
    }

    /// Words of the arena, in number.
    #[expect(clippy::len_without_is_empty, reason = "an arena of no words is as good as any")]
    pub fn len(&self) -> usize {
        self.arena.len()
    }

    /// Words of the arena.
    pub fn words(&self, at: usize, count: usize) -> &[u32] {
        &self.arena[at..at + count]
    }

    /// Whether all of these words have been written.
    pub fn is_written(&self, at: usize, count: usize) -> bool {
        self.written_ever[at..at + count].iter().all(|&w| w)
    }

    /// Writes words of the arena.
    pub fn write(&mut self, at: usize, words: &[u32]) {
        self.arena[at..at + words.len()].copy_from_slice(words);
        self.written_ever[at..at + words.len()].fill(true);
    }

    /// Forgets what the arena holds: nothing has been written.
    pub fn forget(&mut self) {
        self.written_ever.fill(false);
        self.arena.fill(0x7fc0_dead);
    }

    /// A word that a lane of the running launch reads, or why it must not.
    fn load(&mut self, at: usize, who: u32) -> Result<u32, &'static str> {
        let bits = *self.arena.get(at).ok_or("outside the binding")?;
        if !self.written_ever[at] {
            return Err("read before anything was written");
        }
        let (launch, writer) = self.writer[at];
        if launch == self.launch && writer != who {
            return Err("read while another lane writes it");
        }
        let (launch, reader) = self.reader[at];
        let again = launch == self.launch && reader != who;
        self.reader[at] = (self.launch, if again { MANY } else { who });
        Ok(bits)
    }

    /// Writes a word for a lane of the running launch, or says why it must not.
    fn store(&mut self, at: usize, who: u32, bits: u32) -> Result<(), &'static str> {
        let word = self.arena.get_mut(at).ok_or("outside the binding")?;
        for (launch, other) in [self.writer[at], self.reader[at]] {
            if launch == self.launch && other != who {
                return Err("written while another lane uses it");
            }
        }
        (self.writer[at], self.written_ever[at]) = ((self.launch, who), true);
        *word = bits;
        Ok(())
    }

    /// Runs a kernel as `programs` programs.
    ///
    /// # Errors
    /// What it did that it must not.
    pub fn run(
        &mut self,
        kernel: &Kernel,
        arguments: &[i32],
        weights: &[&[u32]],
        states: &mut [&mut Machine],
        programs: usize,
    ) -> Result<(), Violation> {
        self.launch += 1;
        states.iter_mut().for_each(|state| state.launch += 1);
        let lanes = kernel.lanes as usize;
        for program in 0..programs {
            let values = vec![0; kernel.types.len() * lanes];
            let tiles = kernel.tiles.iter().map(|t| vec![Shared::default(); t.words as usize]).collect();
            let (machine, phase, states) = (&mut *self, 1, &mut *states);
            let mut run =
                Run { machine, kernel, arguments, weights, states, program, lanes, values, tiles, phase };
            run.block(&kernel.body)?;
        }
        Ok(())
    }
}

/// A word of a tile.
#[derive(Debug, Clone, Default)]
struct Shared {
    bits: Option<u32>,
    /// The phase and the lane that put it last, and that took it last.
    put: (u32, u32),
    taken: (u32, u32),
}

struct Run<'m, 's> {
    machine: &'m mut Machine,
    kernel: &'m Kernel,
    arguments: &'m [i32],
    weights: &'m [&'m [u32]],
    states: &'m mut [&'s mut Machine],
    program: usize,
    lanes: usize,
    values: Vec<u32>,
    tiles: Vec<Vec<Shared>>,
    /// Barriers so far and one.
    phase: u32,
}

fn f(bits: u32) -> f32 {
    f32::from_bits(bits)
}

impl Run<'_, '_> {
    fn at(&self, value: Value, lane: usize) -> u32 {
        self.values[value.0 as usize * self.lanes + lane]
    }

    fn set(&mut self, value: Value, of: impl Fn(&Self, usize) -> u32) {
        for lane in 0..self.lanes {
            let bits = of(self, lane);
            self.values[value.0 as usize * self.lanes + lane] = bits;
        }
    }

    fn argument(&self, arg: Arg) -> i32 {
        self.arguments[arg.0 as usize]
    }

    fn block(&mut self, body: &[Stmt]) -> Result<(), Violation> {
        body.iter().try_for_each(|stmt| self.stmt(stmt))
    }

    fn stmt(&mut self, stmt: &Stmt) -> Result<(), Violation> {
        let result = stmt.results.first().copied().unwrap_or(Value(0));
        match &stmt.inst {
            Inst::Const(literal) => {
                let bits = match *literal {
                    Literal::Bool(value) => u32::from(value),
                    Literal::I32(value) => value as u32,
                    Literal::F32(bits) => bits,
                };
                self.set(result, |_, _| bits);
            }
            Inst::Arg(arg) => self.set(result, |run, _| run.argument(*arg) as u32),
            Inst::Program => self.set(result, |run, _| run.program as u32),
            Inst::Lane => self.set(result, |_, lane| lane as u32),
            Inst::Unary(function, x) => {
                let element = self.kernel.ty(*x).element;
                self.set(result, |run, lane| unary(*function, element, run.at(*x, lane)));
            }
            Inst::Binary(function, a, b) => {
                let element = self.kernel.ty(*a).element;
                self.set(result, |run, lane| binary(*function, element, run.at(*a, lane), run.at(*b, lane)));
            }
            Inst::Select(condition, a, b) => self.set(result, |run, lane| {
                if run.at(*condition, lane) != 0 { run.at(*a, lane) } else { run.at(*b, lane) }
            }),
            Inst::Fma(a, b, c) => self.set(result, |run, lane| {
                f(run.at(*a, lane)).mul_add(f(run.at(*b, lane)), f(run.at(*c, lane))).to_bits()
            }),
            Inst::Lookup(x, table) => self.set(result, |run, lane| entries(table, run.at(*x, lane))),
            Inst::Dot4(a, b, c) => self.set(result, |run, lane| {
                run.at(*c, lane).wrapping_add(dot4(run.at(*a, lane), run.at(*b, lane)))
            }),
            Inst::Digit { linear, extents, axis } => self.set(result, |run, lane| {
                let after = &extents[*axis as usize + 1..];
                let after: i64 = after.iter().map(|e| i64::from(run.argument(*e))).product();
                let rest = i64::from(run.at(*linear, lane) as i32).checked_div(after).unwrap_or(0);
                let extent = i64::from(run.argument(extents[*axis as usize]));
                (if *axis == 0 { rest } else { rest.checked_rem(extent).unwrap_or(0) }) as u32
            }),
            Inst::Load { view, at, mask } => {
                for lane in 0..self.lanes {
                    let on = mask.is_none_or(|m| self.at(m, lane) != 0);
                    for (along, result) in stmt.results.iter().enumerate() {
                        let bits = if on { self.load(view.0, at, lane, along)? } else { 0 };
                        self.values[result.0 as usize * self.lanes + lane] = bits;
                    }
                }
            }
            Inst::Store { view, at, value, mask } => {
                for lane in 0..self.lanes {
                    if mask.is_none_or(|m| self.at(m, lane) != 0) {
                        self.store(view.0, at, self.at(*value, lane), lane)?;
                    }
                }
            }
            Inst::Fold(function, x) => {
                let (element, mut half) = (self.kernel.ty(*x).element, self.lanes / 2);
                let mut folded: Vec<u32> = (0..self.lanes).map(|lane| self.at(*x, lane)).collect();
                while half > 0 {
                    for lane in 0..half {
                        folded[lane] = binary(*function, element, folded[lane], folded[lane + half]);
                    }
                    half /= 2;
                }
                self.set(result, |_, _| folded[0]);
            }
            Inst::Stage(x) => self.set(result, |run, lane| run.at(*x, lane)),
            Inst::Peek { tile, at } => {
                self.set(result, |run, lane| run.at(*tile, run.at(*at, lane) as usize))
            }
            Inst::Check { holds, mask, slot } => {
                let slot = self.argument(*slot) as usize;
                if (0..self.lanes).any(|l| self.at(*mask, l) != 0 && self.at(*holds, l) == 0) {
                    self.machine.arena[slot] = 1;
                }
            }
            Inst::Put { tile, at, values } => {
                for lane in 0..self.lanes {
                    for (along, value) in values.iter().enumerate() {
                        self.put(*tile, self.at(*at, lane) as usize + along, lane, self.at(*value, lane))?;
                    }
                }
            }
            Inst::Take { tile, at } => {
                for lane in 0..self.lanes {
                    for (along, result) in stmt.results.iter().enumerate() {
                        let bits = self.take(*tile, self.at(*at, lane) as usize + along, lane)?;
                        self.values[result.0 as usize * self.lanes + lane] = bits;
                    }
                }
            }
            Inst::Fragment { .. } => self.fragment(stmt)?,
            Inst::Mma { .. } => self.mma(stmt),
            Inst::MmaBytes { .. } => self.mma_bytes(stmt),
            Inst::Barrier => self.phase += 1,
            Inst::Loop(turn) => self.repeat(&stmt.results, turn)?,
        }
        Ok(())
    }

    fn fragment(&mut self, stmt: &Stmt) -> Result<(), Violation> {
        let Inst::Fragment { tile, at, pitch, lines } = &stmt.inst else { return Ok(()) };
        for lane in 0..self.lanes {
            let (group, place) = (lane % 32 / 4, lane % 4);
            for (i, &result) in stmt.results.iter().enumerate() {
                let line = (group + i % 2 * 8) % *lines as usize;
                let word = self.at(*at, lane) as usize + line * *pitch as usize + place + i / 2 * 4;
                self.values[result.0 as usize * self.lanes + lane] = self.take(*tile, word, lane)?;
            }
        }
        Ok(())
    }

    /// Products in order, each added to the sum; a device may add them otherwise.
    fn mma(&mut self, stmt: &Stmt) {
        let Inst::Mma { pairs, rows, columns, sums } = &stmt.inst else { return };
        for lane in 0..self.lanes {
            let (warp, group, place) = (lane / 32 * 32, lane % 32 / 4, lane % 4);
            for (i, (&sum, &result)) in sums.iter().zip(&stmt.results).enumerate() {
                let mut total = f(self.at(sum, lane));
                for word in 0..8 {
                    let row = self.at(rows[i / 2 + word / 4 * 2], warp + group * 4 + word % 4);
                    let column = self.at(columns[word / 4], warp + (2 * place + i % 2) * 4 + word % 4);
                    for shift in [0, 16] {
                        let [a, b] = [row, column].map(|bits| pair_of(*pairs, bits >> shift));
                        total = f(a).mul_add(f(b), total);
                    }
                }
                self.values[result.0 as usize * self.lanes + lane] = total.to_bits();
            }
        }
    }

    fn mma_bytes(&mut self, stmt: &Stmt) {
        let Inst::MmaBytes { rows, columns, sums } = &stmt.inst else { return };
        for lane in 0..self.lanes {
            let (warp, group, place) = (lane / 32 * 32, lane % 32 / 4, lane % 4);
            for (i, (&sum, &result)) in sums.iter().zip(&stmt.results).enumerate() {
                let mut total = self.at(sum, lane);
                for word in 0..4 * columns.len() {
                    let row = self.at(rows[i / 2 + word / 4 * 2], warp + group * 4 + word % 4);
                    let column = self.at(columns[word / 4], warp + (2 * place + i % 2) * 4 + word % 4);
                    total = total.wrapping_add(dot4(row, column));
                }
                self.values[result.0 as usize * self.lanes + lane] = total;
            }
        }
    }

    fn shared(&mut self, tile: TileId, word: usize) -> Result<&mut Shared, Violation> {
        let outside = self.misuse(tile, word, "outside the tile");
        self.tiles[tile.0 as usize].get_mut(word).ok_or(outside)
    }

    fn misuse(&self, tile: TileId, word: usize, what: &'static str) -> Violation {
        let (kernel, place) = (self.kernel.name.clone(), format!("tile{}", tile.0));
        Violation { kernel, place, word: word as u64, what }
    }

    fn put(&mut self, tile: TileId, word: usize, lane: usize, bits: u32) -> Result<(), Violation> {
        let (phase, lane) = (self.phase, lane as u32);
        let shared = self.shared(tile, word)?;
        let apart = |(at, other): (u32, u32)| at != phase || other == lane;
        let alone = apart(shared.put) && apart(shared.taken);
        (shared.bits, shared.put) = (Some(bits), (phase, lane));
        alone.then_some(()).ok_or_else(|| self.misuse(tile, word, "put while another lane uses it"))
    }

    fn take(&mut self, tile: TileId, word: usize, lane: usize) -> Result<u32, Violation> {
        let (phase, lane) = (self.phase, lane as u32);
        let shared = self.shared(tile, word)?;
        let (bits, (at, other)) = (shared.bits, shared.put);
        let again = shared.taken.0 == phase && shared.taken.1 != lane;
        shared.taken = (phase, if again { MANY } else { lane });
        if at == phase && other != lane {
            return Err(self.misuse(tile, word, "taken while another lane puts it"));
        }
        bits.ok_or_else(|| self.misuse(tile, word, "taken before anything was put"))
    }

    fn repeat(&mut self, results: &[Value], turn: &Loop) -> Result<(), Violation> {
        for carried in &turn.carried {
            self.set(carried.param, |run, lane| run.at(carried.first, lane));
        }
        let (mut index, to) = (self.at(turn.from, 0) as i32, self.at(turn.to, 0) as i32);
        while index < to {
            self.set(turn.index, |_, _| index as u32);
            self.block(&turn.body)?;
            let next: Vec<u32> = turn
                .carried
                .iter()
                .flat_map(|c| (0..self.lanes).map(|lane| self.at(c.next, lane)).collect::<Vec<_>>())
                .collect();
            for (at, carried) in turn.carried.iter().enumerate() {
                self.set(carried.param, |run, lane| next[at * run.lanes + lane]);
            }
            index = index.saturating_add(turn.step as i32);
        }
        for (&result, carried) in results.iter().zip(&turn.carried) {
            self.set(result, |run, lane| run.at(carried.param, lane));
        }
        Ok(())
    }

    fn violation(&self, view: u32, word: i64, what: &'static str) -> Violation {
        Violation { kernel: self.kernel.name.clone(), place: format!("view{view}"), word: word as u64, what }
    }

    /// The element that coordinates name, each of which must be below its extent.
    fn element(&self, id: u32, view: &View, at: &[Value], lane: usize) -> Result<i64, Violation> {
        let mut element = i64::from(self.argument(view.base));
        for ((&at, &extent), &stride) in at.iter().zip(&view.extents).zip(&view.strides) {
            let coordinate = i64::from(self.at(at, lane) as i32);
            if !(0..i64::from(self.argument(extent))).contains(&coordinate) {
                return Err(self.violation(id, coordinate, "a coordinate beyond its extent"));
            }
            element += coordinate * i64::from(self.argument(stride));
        }
        Ok(element)
    }

    /// What is read and written of a binding.
    fn memory(&mut self, binding: Binding) -> &mut Machine {
        match binding {
            Binding::State(state) => self.states[state as usize],
            Binding::Arena | Binding::Weight(_) => self.machine,
        }
    }

    fn load(&mut self, id: u32, at: &[Value], lane: usize, along: usize) -> Result<u32, Violation> {
        let view = &self.kernel.views[id as usize];
        let element = self.element(id, view, at, lane)? + along as i64;
        let word = if view.storage == Storage::HalfPair || view.storage == Storage::BrainPair {
            element / 2
        } else {
            element
        };
        let outside = || self.violation(id, word, "outside the binding");
        let at = usize::try_from(word).map_err(|_| outside())?;
        let bits = match view.binding {
            Binding::Weight(weight) => *self.weights[weight as usize].get(at).ok_or_else(outside)?,
            binding => {
                let who = (self.program * self.lanes + lane) as u32;
                let loaded = self.memory(binding).load(at, who);
                loaded.map_err(|what| self.violation(id, word, what))?
            }
        };
        Ok(match view.storage {
            Storage::Word(_) => bits,
            Storage::HalfPair => half_of(bits >> (16 * (element & 1))),
            Storage::BrainPair => (bits >> (16 * (element & 1))) << 16,
        })
    }

    fn store(&mut self, id: u32, at: &[Value], bits: u32, lane: usize) -> Result<(), Violation> {
        let view = &self.kernel.views[id as usize];
        let word = self.element(id, view, at, lane)?;
        let at = usize::try_from(word).map_err(|_| self.violation(id, word, "outside the binding"))?;
        let who = (self.program * self.lanes + lane) as u32;
        let stored = self.memory(view.binding).store(at, who, bits);
        stored.map_err(|what| self.violation(id, word, what))
    }
}

/// The entries of a table that the bytes of a word name.
fn entries(table: &[i8; 16], word: u32) -> u32 {
    u32::from_le_bytes(word.to_le_bytes().map(|byte| table[usize::from(byte & 15)] as u8))
}

/// The products of four signed bytes, added.
fn dot4(a: u32, b: u32) -> u32 {
    let [a, b] = [a, b].map(|word| word.to_le_bytes().map(|byte| i32::from(byte as i8)));
    a.iter().zip(&b).map(|(a, b)| a * b).sum::<i32>() as u32
}

fn pair_of(pairs: Pairs, word: u32) -> u32 {
    match pairs {
        Pairs::Half => half_of(word),
        Pairs::Brain => word << 16,
    }
}

/// The binary16 of the low bits.
fn half_of(word: u32) -> u32 {
    half::f16::from_bits(word as u16).to_f32().to_bits()
}

fn unary(function: UnaryFn, element: Element, x: u32) -> u32 {
    let float = |y: f32| y.to_bits();
    match (function, element) {
        (UnaryFn::Neg, Element::I32) => (x as i32).wrapping_neg() as u32,
        (UnaryFn::Abs, Element::I32) => (x as i32).wrapping_abs() as u32,
        (UnaryFn::Not, _) => u32::from(x == 0),
        (UnaryFn::IsNan, _) => u32::from(f(x).is_nan()),
        (UnaryFn::ToFloat, _) => float(x as i32 as f32),
        (UnaryFn::ToInt, _) => f(x) as i32 as u32,
        (UnaryFn::Bits | UnaryFn::FromBits, _) => x,
        (UnaryFn::LowHalf, _) => half_of(x),
        (UnaryFn::HighHalf, _) => half_of(x >> 16),
        (function, _) => float(unary_float(function, f(x))),
    }
}

fn unary_float(function: UnaryFn, x: f32) -> f32 {
    match function {
        UnaryFn::Neg => -x,
        UnaryFn::Abs => x.abs(),
        UnaryFn::Exp => x.exp(),
        UnaryFn::Log => x.ln(),
        UnaryFn::Sqrt => x.sqrt(),
        UnaryFn::Sin => x.sin(),
        UnaryFn::Cos => x.cos(),
        UnaryFn::Floor => x.floor(),
        UnaryFn::Ceil => x.ceil(),
        UnaryFn::RoundEven => x.round_ties_even(),
        _ => x.trunc(),
    }
}

fn binary(function: BinaryFn, element: Element, a: u32, b: u32) -> u32 {
    match element {
        Element::F32 => binary_float(function, f(a), f(b)),
        Element::I32 => binary_int(function, a as i32, b as i32) as u32,
        Element::Bool => match function {
            BinaryFn::And => a & b,
            BinaryFn::Or => a | b,
            BinaryFn::Xor => a ^ b,
            _ => u32::from(a == b),
        },
    }
}

fn binary_float(function: BinaryFn, a: f32, b: f32) -> u32 {
    let truth = u32::from;
    let pick = |y: f32| if a.is_nan() || b.is_nan() { f32::NAN } else { y };
    match function {
        BinaryFn::Add => (a + b).to_bits(),
        BinaryFn::Sub => (a - b).to_bits(),
        BinaryFn::Mul => (a * b).to_bits(),
        BinaryFn::Div => (a / b).to_bits(),
        BinaryFn::Pow => a.powf(b).to_bits(),
        BinaryFn::Min => pick(a.min(b)).to_bits(),
        BinaryFn::Max => pick(a.max(b)).to_bits(),
        BinaryFn::Less => truth(a < b),
        BinaryFn::LessEqual => truth(a <= b),
        BinaryFn::PackHalves => {
            let [a, b] = [a, b].map(|x| u32::from(half::f16::from_f32(x).to_bits()));
            a | b << 16
        }
        BinaryFn::PackBrains => {
            let [a, b] = [a, b].map(|x| u32::from(half::bf16::from_f32(x).to_bits()));
            a | b << 16
        }
        _ => truth(a == b),
    }
}

fn binary_int(function: BinaryFn, a: i32, b: i32) -> i32 {
    let truth = i32::from;
    match function {
        BinaryFn::Add => a.wrapping_add(b),
        BinaryFn::Sub => a.wrapping_sub(b),
        BinaryFn::Mul => a.wrapping_mul(b),
        BinaryFn::Div if b == 0 => 0,
        BinaryFn::Div => a.wrapping_div(b),
        BinaryFn::Rem if b == 0 => 0,
        BinaryFn::Rem => a.wrapping_rem(b),
        BinaryFn::Min => a.min(b),
        BinaryFn::Max => a.max(b),
        BinaryFn::And => a & b,
        BinaryFn::Or => a | b,
        BinaryFn::Xor => a ^ b,
        BinaryFn::ShiftRight => ((a as u32) >> (b as u32 & 31)) as i32,
        BinaryFn::Less => truth(a < b),
        BinaryFn::LessEqual => truth(a <= b),
        BinaryFn::Equal | BinaryFn::Pow => truth(a == b),
        BinaryFn::PackHalves | BinaryFn::PackBrains => 0,
    }
}
