//! Elementwise work: small programs over strips of 256 elements, and integer operations.
//!
//! A program's registers are strips that stay in the first-level cache; each instruction runs over a whole strip, reading
//! inputs and writing outputs in place where they are f32. Results do not depend on tiles or strips.

mod chain;
pub(crate) mod codes;
mod integer;
mod layout;
mod ops;
mod program;
#[cfg(test)]
mod tests;

use std::mem::MaybeUninit;

use crate::isa::{Entry, Isa, Kernel, LANES, Row, Rows, Simd, select};
pub use chain::{CHAIN, Chain, ChainArgs, Table, chain_entry};
pub use integer::{
    INTEGER, IntegerArgs, IntegerOp, IntegerType, SELECT, SelectArgs, integer_entry, select_entry,
};
pub use layout::{Layout, LayoutError, MAX_OUTER};
pub(crate) use layout::{offset_of, tile_of, tiles_of};
use ops::Source;
pub use ops::{Binary, Unary};
use program::STRIP;
pub use program::{Instr, Kind, MAX_OPERANDS, MAX_REGISTERS, Operand, Program, ProgramError, Target, Work};

/// One operand in memory: element `[i0, i1, ...][j]` at `sum(ik * strides[k]) + j * inner`.
#[derive(Clone, Copy, Debug)]
pub struct Placed {
    /// First element.
    pub at: *mut u8,
    /// Elements between steps of the outer dimensions.
    pub strides: [isize; MAX_OUTER],
    /// 1 when the innermost run is contiguous, 0 when it is one element (inputs only).
    pub inner: u8,
}

/// Arguments of a program. An output may lie exactly over an input where [`Program::allows_in_place`] says so.
#[derive(Clone, Copy, Debug)]
pub struct MapArgs {
    /// The program.
    pub program: *const Program,
    /// One per input of the program; only read.
    pub inputs: *const Placed,
    /// One per output of the program; `inner` is 1.
    pub outputs: *const Placed,
    /// Outer extents.
    pub outer: [usize; MAX_OUTER],
    /// Elements of the innermost run.
    pub cols: usize,
}

impl MapArgs {
    /// Number of tiles.
    pub fn tiles(&self) -> usize {
        tiles_of(self.outer.iter().product(), self.cols)
    }
}

/// Instances of the program interpreter.
pub static MAP: Rows<MapArgs> = Row::all_of::<MapF32>();

/// The program interpreter for `isa`.
pub fn map_entry(isa: Isa) -> Option<Entry<MapArgs>> {
    select(&MAP, isa)
}

#[repr(align(64))]
struct Registers([[MaybeUninit<f32>; STRIP]; MAX_REGISTERS]);

impl Registers {
    #[inline(always)]
    fn at(&mut self, register: u8) -> *mut f32 {
        self.0[register as usize].as_mut_ptr().cast()
    }
}

struct MapF32;

impl Kernel for MapF32 {
    type Args = MapArgs;
    const OP: &'static str = "map";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &MapArgs, tile: usize) {
        let (runs, cols) = tile_of(args.outer.iter().product(), args.cols, tile);
        let mut registers = Registers([[MaybeUninit::uninit(); STRIP]; MAX_REGISTERS]);
        let mut constants = [0.0; 3];
        // SAFETY: the caller guarantees the program and its operands.
        unsafe {
            let program = &*args.program;
            let mut places = [(std::ptr::null_mut::<u8>(), 0u8); 2 * MAX_OPERANDS];
            for run in runs {
                for (i, kind) in program.inputs.iter().enumerate() {
                    let placed = &*args.inputs.add(i);
                    let offset = offset_of(&args.outer, &placed.strides, run) * kind.bytes() as isize;
                    places[i] = (placed.at.offset(offset), placed.inner);
                }
                for (o, kind) in program.outputs.iter().enumerate() {
                    let placed = &*args.outputs.add(o);
                    let offset = offset_of(&args.outer, &placed.strides, run) * kind.bytes() as isize;
                    places[MAX_OPERANDS + o] = (placed.at.offset(offset), 1);
                }
                for first in cols.clone().step_by(STRIP) {
                    let strip = Strip { program, places: &places, first, n: STRIP.min(cols.end - first) };
                    run_strip(s, &strip, &mut registers, &mut constants);
                }
            }
        }
    }
}

/// `n` elements from `first` on of a run whose operands start at `places`.
struct Strip<'a> {
    program: &'a Program,
    places: &'a [(*mut u8, u8); 2 * MAX_OPERANDS],
    first: usize,
    n: usize,
}

impl Strip<'_> {
    #[inline(always)]
    unsafe fn input(&self, i: usize) -> (*mut u8, bool) {
        let (at, inner) = self.places[i];
        // SAFETY: the caller guarantees the operand.
        unsafe { (at.add(self.first * inner as usize * self.program.inputs[i].bytes()), inner == 0) }
    }

    #[inline(always)]
    unsafe fn output(&self, o: usize) -> *mut u8 {
        // SAFETY: the caller guarantees the operand.
        unsafe { self.places[MAX_OPERANDS + o].0.add(self.first * self.program.outputs[o].bytes()) }
    }
}

#[inline(always)]
unsafe fn run_strip<S: Simd>(s: S, strip: &Strip, registers: &mut Registers, constants: &mut [f32; 3]) {
    let program = strip.program;
    // SAFETY: the caller guarantees the operands; the program was checked when it was built.
    unsafe {
        for (i, register) in program.input_registers.iter().enumerate() {
            if let Some(register) = register {
                let (at, repeated) = strip.input(i);
                widen(s, program.inputs[i], at, repeated, registers.at(*register), strip.n);
            }
        }
        for instr in &program.instrs {
            let to = match instr.to {
                Target::Register(r) => registers.at(r),
                Target::Output(o) => match program.output_registers[o as usize] {
                    Some(register) => registers.at(register),
                    None => strip.output(o as usize).cast(),
                },
            };
            let mut sources = [Source { at: constants.as_ptr(), repeated: true }; 3];
            let (operands, count) = match instr.work {
                Work::Unary(_, a) => ([a, a, a], 1),
                Work::Binary(_, a, b) => ([a, b, b], 2),
                Work::Fma(a, b, c) | Work::Select(a, b, c) => ([a, b, c], 3),
            };
            for k in 0..count {
                sources[k] = match operands[k] {
                    Operand::Register(r) => Source { at: registers.at(r), repeated: false },
                    Operand::Input(i) => match program.input_registers[i as usize] {
                        Some(register) => Source { at: registers.at(register), repeated: false },
                        None => {
                            let (at, repeated) = strip.input(i as usize);
                            Source { at: at.cast(), repeated }
                        }
                    },
                    Operand::Constant(x) => {
                        constants[k] = x;
                        Source { at: constants.as_ptr().add(k), repeated: true }
                    }
                };
            }
            match instr.work {
                Work::Unary(op, _) => ops::apply_unary(s, op, sources[0], to, strip.n),
                Work::Binary(op, _, _) => ops::apply_binary(s, op, sources[0], sources[1], to, strip.n),
                Work::Fma(..) => ops::apply_fma(s, sources, to, strip.n),
                Work::Select(..) => ops::apply_select(s, sources, to, strip.n),
            }
        }
        for (o, register) in program.output_registers.iter().enumerate() {
            if let Some(register) = register {
                narrow(s, program.outputs[o], registers.at(*register), strip.output(o), strip.n);
            }
        }
    }
}

#[inline(always)]
unsafe fn widen<S: Simd>(s: S, kind: Kind, from: *const u8, repeated: bool, to: *mut f32, n: usize) {
    let available = if repeated { 1 } else { n };
    // SAFETY: the caller guarantees `n` elements, or one that is repeated, and a register.
    unsafe {
        for i in (0..available).step_by(LANES) {
            let left = (available - i).min(LANES);
            match kind {
                Kind::F32 => s.store_part(to.add(i), left, s.load_part(from.cast::<f32>().add(i), left)),
                Kind::F16 => s.store_part(to.add(i), left, s.load_f16_part(from.cast::<u16>().add(i), left)),
                Kind::Bf16 => {
                    s.store_part(to.add(i), left, s.load_bf16_part(from.cast::<u16>().add(i), left))
                }
                Kind::Bool => {
                    for j in i..i + left {
                        *to.add(j) = if *from.add(j) != 0 { 1.0 } else { 0.0 };
                    }
                }
                Kind::U8 | Kind::I8 => {
                    s.store_part(to.add(i), left, codes::read(s, from.add(i), kind == Kind::U8, left))
                }
            }
        }
        if repeated {
            let x = s.splat(*to);
            for i in (0..n).step_by(LANES) {
                s.store(to.add(i), x);
            }
        }
    }
}

#[inline(always)]
unsafe fn narrow<S: Simd>(s: S, kind: Kind, from: *const f32, to: *mut u8, n: usize) {
    // SAFETY: the caller guarantees a register and `n` elements.
    unsafe {
        for i in (0..n).step_by(LANES) {
            let left = (n - i).min(LANES);
            let x = s.load(from.add(i));
            match kind {
                Kind::F32 => s.store_part(to.cast::<f32>().add(i), left, x),
                Kind::F16 => s.store_f16_part(to.cast::<u16>().add(i), left, x),
                Kind::Bf16 => s.store_bf16_part(to.cast::<u16>().add(i), left, x),
                Kind::Bool => {
                    for j in i..i + left {
                        *to.add(j) = u8::from(*from.add(j) != 0.0);
                    }
                }
                Kind::U8 | Kind::I8 => {
                    // The larger of a NaN and a number is the number.
                    let (low, high) = if kind == Kind::U8 { (0.0, 255.0) } else { (-128.0, 127.0) };
                    let whole = s.select(s.is_nan(x), s.zero(), s.trunc(x));
                    let code = s.min(s.max(whole, s.splat(low)), s.splat(high));
                    codes::write(s, to.add(i), kind == Kind::U8, left, code);
                }
            }
        }
    }
}
