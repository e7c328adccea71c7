//! Programs that are one chain of cheap functions, over one or two operands of bytes or floats: values stay in registers from load to store.
//!
//! Each function is that of the interpreter, so results are the same to the bit.

use super::codes;
use super::layout::{offset_of, tile_of};
use super::ops::{Binary, Unary};
use super::program::{Instr, Kind, MAX_REGISTERS, Operand, Program, Target, Work};
use super::{MapArgs, Placed};
use crate::isa::{Entry, Isa, Kernel, LANES, Row, Rows, Simd, select};
use crate::math;

/// Vectors that take each function together.
const GROUP: usize = 4;

/// What the functions of a chain are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Function {
    Add,
    Sub,
    Mul,
    Div,
    Max,
    Min,
    Round,
    Relu,
}

/// A function of a value and, but for the last two, a number.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Link {
    function: Function,
    number: f32,
}

/// Functions in a row.
type Links = Vec<Link>;

/// An operand and what becomes of it.
#[derive(Clone, Debug, PartialEq)]
struct Strand {
    input: u8,
    links: Links,
}

/// A program whose value at any time is one chain, or two before they meet.
#[derive(Clone, Debug, PartialEq)]
pub struct Chain {
    first: Strand,
    /// What joins the second strand to the first: a sum, or a product.
    second: Option<(Function, Strand)>,
    links: Links,
    inputs: Vec<Kind>,
    output: Kind,
    /// The end of the way to codes, if the program ends so.
    step: Option<Step>,
}

/// Values rounded, moved by a whole number and bounded by two within the output's bytes. Bounded first, which is the same, they are rounded while
/// they become integers.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Step {
    /// Bounds of values.
    low: f32,
    high: f32,
    zero: i32,
    /// Whether a NaN, whose code is 0, is another than the smallest.
    nan: bool,
}

/// A value while a program is read.
#[derive(Clone)]
enum Value {
    Strand(Strand),
    Joined(Chain),
}

impl Chain {
    /// The chain that a program is; `None` if it is none, or neither reads nor writes bytes.
    pub fn of(program: &Program) -> Option<Chain> {
        let [output] = program.outputs() else { return None };
        let byte = |kind: &Kind| matches!(kind, Kind::U8 | Kind::I8);
        let known = |kind: &Kind| byte(kind) || *kind == Kind::F32;
        let kinds = || program.inputs().iter().chain([output]);
        if !kinds().all(known) || !kinds().any(byte) || program.inputs().len() > 2 {
            return None;
        }
        let mut registers: [Option<Value>; MAX_REGISTERS] = [const { None }; MAX_REGISTERS];
        let mut last = None;
        for instr in program.instrs() {
            let value = Self::value(program, *output, instr, &mut registers)?;
            match instr.to {
                Target::Register(r) => registers[r as usize] = Some(value),
                Target::Output(_) if last.is_none() => last = Some(value),
                Target::Output(_) => return None,
            }
        }
        let mut chain = match last? {
            Value::Strand(first) => Self::joined(program, *output, first, None),
            Value::Joined(chain) => chain,
        };
        chain.step = chain.take_step();
        Some(chain)
    }

    fn joined(program: &Program, output: Kind, first: Strand, second: Option<(Function, Strand)>) -> Chain {
        let inputs = program.inputs().to_vec();
        Chain { first, second, links: Vec::new(), inputs, output, step: None }
    }

    /// The value of an instruction, whose registers are used up.
    fn value(
        program: &Program,
        output: Kind,
        instr: &Instr,
        registers: &mut [Option<Value>; MAX_REGISTERS],
    ) -> Option<Value> {
        let mut take = |operand: Operand| match operand {
            // A register that is read twice is no chain: it is gone by then.
            Operand::Register(r) => registers[r as usize].take(),
            Operand::Input(input) => Some(Value::Strand(Strand { input, links: Vec::new() })),
            Operand::Constant(_) => None,
        };
        let (function, value, number) = match instr.work {
            Work::Unary(Unary::Copy, a) => return take(a),
            Work::Unary(Unary::Round, a) => (Function::Round, take(a)?, 0.0),
            Work::Unary(Unary::Relu, a) => (Function::Relu, take(a)?, 0.0),
            Work::Binary(op, a, Operand::Constant(number)) => (Self::function(op)?, take(a)?, number),
            Work::Binary(op @ (Binary::Add | Binary::Mul), Operand::Constant(number), a) => {
                (Self::function(op)?, take(a)?, number)
            }
            Work::Binary(op @ (Binary::Add | Binary::Mul), a, b) => {
                let (Value::Strand(a), Value::Strand(b)) = (take(a)?, take(b)?) else { return None };
                let second = Some((Self::function(op)?, b));
                return Some(Value::Joined(Self::joined(program, output, a, second)));
            }
            _ => return None,
        };
        if number.is_nan() {
            return None;
        }
        let mut value = value;
        match &mut value {
            Value::Strand(strand) => strand.links.push(Link { function, number }),
            Value::Joined(chain) => chain.links.push(Link { function, number }),
        }
        Some(value)
    }

    fn function(op: Binary) -> Option<Function> {
        Some(match op {
            Binary::Add => Function::Add,
            Binary::Sub => Function::Sub,
            Binary::Mul => Function::Mul,
            Binary::Div => Function::Div,
            Binary::Max => Function::Max,
            Binary::Min => Function::Min,
            _ => return None,
        })
    }

    /// Takes the last links if they are a step to codes.
    fn take_step(&mut self) -> Option<Step> {
        let (low, high) = match self.output {
            Kind::U8 => (0.0, 255.0),
            Kind::I8 => (-128.0, 127.0),
            _ => return None,
        };
        let links = match self.second {
            None if self.links.is_empty() => &mut self.first.links,
            _ => &mut self.links,
        };
        let (rest, &[below, above]) = links.split_last_chunk()?;
        let moved = |link: &&Link| {
            link.function == Function::Add && link.number.fract() == 0.0 && link.number.abs() <= 256.0
        };
        let zero = rest.last().filter(moved).map(|link| link.number);
        let rounded = &rest[..rest.len() - usize::from(zero.is_some())];
        let bottom = match below.function {
            Function::Relu => 0.0,
            Function::Max => below.number,
            _ => return None,
        };
        let inside = |number: f32| number.fract() == 0.0 && (low..=high).contains(&number);
        let fits = rounded.last().is_some_and(|link| link.function == Function::Round)
            && above.function == Function::Min
            && inside(bottom)
            && inside(above.number)
            && bottom <= above.number;
        let kept = rounded.len().checked_sub(1).filter(|_| fits)?;
        links.truncate(kept);
        let zero = zero.unwrap_or(0.0);
        Some(Step { low: bottom - zero, high: above.number - zero, zero: zero as i32, nan: bottom != 0.0 })
    }
}

/// Arguments of a chain: those of its program, and the chain.
#[derive(Clone, Copy, Debug)]
pub struct ChainArgs {
    /// Operands and extents; the program is not read.
    pub map: MapArgs,
    /// The chain.
    pub chain: *const Chain,
}

/// Instances of the chain kernel.
pub static CHAIN: Rows<ChainArgs> = Row::all_of::<ChainF32>();

/// The chain kernel for `isa`.
pub fn chain_entry(isa: Isa) -> Option<Entry<ChainArgs>> {
    select(&CHAIN, isa)
}

struct ChainF32;

/// Where an operand's run starts.
#[derive(Clone, Copy)]
struct Stream {
    at: *mut u8,
    kind: Kind,
    repeated: bool,
}

impl Stream {
    /// # Safety
    /// The operand is valid for the run.
    #[inline(always)]
    unsafe fn of(placed: &Placed, kind: Kind, outer: &[usize; super::MAX_OUTER], run: usize) -> Stream {
        let offset = offset_of(outer, &placed.strides, run) * kind.bytes() as isize;
        // SAFETY: the caller guarantees the operand.
        Stream { at: unsafe { placed.at.offset(offset) }, kind, repeated: placed.inner == 0 }
    }

    /// `n` values from `first` on, at most a group.
    ///
    /// # Safety
    /// They are readable.
    #[inline(always)]
    unsafe fn load<S: Simd, const WHOLE: bool>(self, s: S, first: usize, n: usize) -> [S::V; GROUP] {
        let mut values = [s.zero(); GROUP];
        // SAFETY: the caller guarantees the values.
        unsafe {
            for (k, value) in values.iter_mut().enumerate() {
                let i = k * LANES;
                if !WHOLE && i >= n {
                    continue;
                }
                let left = if WHOLE { LANES } else { (n - i).min(LANES) };
                let i = first + i;
                *value = match (self.kind, self.repeated) {
                    (Kind::U8, false) => codes::read(s, self.at.add(i), true, left),
                    (Kind::I8, false) => codes::read(s, self.at.add(i), false, left),
                    (_, false) => s.load_to(self.at.cast::<f32>().add(i), left),
                    (Kind::U8, true) => s.splat(f32::from(*self.at)),
                    (Kind::I8, true) => s.splat(f32::from(*self.at as i8)),
                    (_, true) => s.splat(*self.at.cast::<f32>()),
                };
            }
        }
        values
    }

    /// # Safety
    /// `n` values from `first` on are writable.
    #[inline(always)]
    unsafe fn store<S: Simd, const WHOLE: bool>(
        self,
        s: S,
        first: usize,
        n: usize,
        values: [S::V; GROUP],
        step: Option<Step>,
    ) {
        // SAFETY: the caller guarantees the values.
        unsafe {
            for (k, &value) in values.iter().enumerate() {
                let i = k * LANES;
                if !WHOLE && i >= n {
                    continue;
                }
                let left = if WHOLE { LANES } else { (n - i).min(LANES) };
                if self.kind == Kind::F32 {
                    s.store_to(self.at.cast::<f32>().add(first + i), left, value);
                    continue;
                }
                let (to, unsigned) = (self.at.add(first + i), self.kind == Kind::U8);
                if let Some(step) = step {
                    let y = s.min(s.max(value, s.splat(step.low)), s.splat(step.high));
                    let mut code = s.iadd(s.to_int(y), s.isplat(step.zero));
                    if step.nan {
                        code = s.iand(code, s.bits(s.select(s.is_nan(value), s.zero(), ones(s))));
                    }
                    codes::write_whole(s, to, unsigned, left, code);
                    continue;
                }
                let (low, high) = if unsigned { (0.0, 255.0) } else { (-128.0, 127.0) };
                let code = s.select(s.is_nan(value), s.zero(), s.trunc(value));
                codes::write(s, to, unsigned, left, s.min(s.max(code, s.splat(low)), s.splat(high)));
            }
        }
    }
}

/// All bits of all lanes.
#[inline(always)]
fn ones<S: Simd>(s: S) -> S::V {
    s.with_bits(s.isplat(-1))
}

#[inline(always)]
fn apply<S: Simd>(s: S, links: &[Link], mut values: [S::V; GROUP]) -> [S::V; GROUP] {
    macro_rules! each {
        ($x:ident => $body:expr) => {
            for k in 0..GROUP {
                let $x = values[k];
                values[k] = $body;
            }
        };
    }
    for link in links {
        let y = s.splat(link.number);
        match link.function {
            Function::Add => each!(x => s.add(x, y)),
            Function::Sub => each!(x => s.sub(x, y)),
            Function::Mul => each!(x => s.mul(x, y)),
            Function::Div => each!(x => s.div(x, y)),
            Function::Max => each!(x => s.select(s.is_nan(x), x, s.max(x, y))),
            Function::Min => each!(x => s.select(s.is_nan(x), x, s.min(x, y))),
            Function::Round => each!(x => s.round(x)),
            Function::Relu => each!(x => math::relu(s, x)),
        }
    }
    values
}

impl Kernel for ChainF32 {
    type Args = ChainArgs;
    const OP: &'static str = "chain";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &ChainArgs, tile: usize) {
        let map = &args.map;
        let (runs, cols) = tile_of(map.outer.iter().product(), map.cols, tile);
        // SAFETY: the caller guarantees the chain and its operands.
        unsafe {
            let chain = &*args.chain;
            let stream = |placed: &Placed, kind: Kind, run: usize| Stream::of(placed, kind, &map.outer, run);
            for run in runs {
                let input = |i: u8| stream(&*map.inputs.add(i as usize), chain.inputs[i as usize], run);
                let first = input(chain.first.input);
                let second = chain.second.as_ref().map(|(_, strand)| input(strand.input));
                let out = stream(&*map.outputs, chain.output, run);
                let mut at = cols.start;
                while at + GROUP * LANES <= cols.end {
                    group::<S, true>(s, chain, (first, second, out), at, GROUP * LANES);
                    at += GROUP * LANES;
                }
                if at < cols.end {
                    group::<S, false>(s, chain, (first, second, out), at, cols.end - at);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn group<S: Simd, const WHOLE: bool>(
    s: S,
    chain: &Chain,
    (first, second, out): (Stream, Option<Stream>, Stream),
    at: usize,
    n: usize,
) {
    // SAFETY: the caller guarantees the operands.
    unsafe {
        let mut values = apply(s, &chain.first.links, first.load::<S, WHOLE>(s, at, n));
        if let (Some((joins, strand)), Some(stream)) = (&chain.second, second) {
            let others = apply(s, &strand.links, stream.load::<S, WHOLE>(s, at, n));
            for k in 0..GROUP {
                let (x, y) = (values[k], others[k]);
                values[k] = if *joins == Function::Mul { s.mul(x, y) } else { s.add(x, y) };
            }
        }
        out.store::<S, WHOLE>(s, at, n, apply(s, &chain.links, values), chain.step);
    }
}

/// The bytes that a program makes of each byte.
#[derive(Clone, Debug, PartialEq)]
pub struct Table([u8; 256]);

impl Table {
    /// The table of a program of one operand of bytes whose result is bytes, by its kernel for `isa`; `None` for any other.
    pub fn of(isa: Isa, program: &Program) -> Option<Table> {
        let byte = |kinds: &[Kind]| matches!(kinds, [Kind::U8 | Kind::I8]);
        if !byte(program.inputs()) || !byte(program.outputs()) {
            return None;
        }
        let mut codes: [u8; 256] = std::array::from_fn(|code| code as u8);
        let mut results = [0u8; 256];
        let placed = |at: *mut u8| Placed { at, strides: [0; super::MAX_OUTER], inner: 1 };
        let (input, output) = (placed(codes.as_mut_ptr()), placed(results.as_mut_ptr()));
        let args = MapArgs {
            program,
            inputs: &input,
            outputs: &output,
            outer: [1; super::MAX_OUTER],
            cols: codes.len(),
        };
        let entry = super::map_entry(isa)?;
        for tile in 0..args.tiles() {
            // SAFETY: both operands have the elements of the one run.
            unsafe { entry(&args, tile) };
        }
        Some(Table(results))
    }

    /// Computes one tile of the output of a program that this is the table of.
    ///
    /// # Safety
    /// As that of the program's kernel.
    pub unsafe fn run_tile(&self, args: &MapArgs, tile: usize) {
        let (runs, cols) = tile_of(args.outer.iter().product(), args.cols, tile);
        // SAFETY: the caller guarantees the operands.
        unsafe {
            let (input, output) = (&*args.inputs, &*args.outputs);
            for run in runs {
                let from = input.at.offset(offset_of(&args.outer, &input.strides, run));
                let to = output.at.offset(offset_of(&args.outer, &output.strides, run));
                if input.inner == 0 {
                    to.add(cols.start).write_bytes(self.0[*from as usize], cols.len());
                    continue;
                }
                let mut at = cols.start;
                while at + 8 <= cols.end {
                    let codes = from.add(at).cast::<[u8; 8]>().read_unaligned();
                    let mut results = 0u64;
                    for (k, &code) in codes.iter().enumerate() {
                        results |= u64::from(self.0[code as usize]) << (8 * k);
                    }
                    to.add(at).cast::<[u8; 8]>().write_unaligned(results.to_le_bytes());
                    at += 8;
                }
                for at in at..cols.end {
                    *to.add(at) = self.0[*from.add(at) as usize];
                }
            }
        }
    }
}
