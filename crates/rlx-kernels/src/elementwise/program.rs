use std::fmt;

use super::ops::{Binary, Unary};

/// Values per register.
pub(super) const STRIP: usize = 256;
/// Most registers of a program, those that hold widened inputs and outputs to be narrowed included.
pub const MAX_REGISTERS: usize = 24;
/// Most inputs and most outputs of a program.
pub const MAX_OPERANDS: usize = 16;

/// Storage of a program's input or output; arithmetic is in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// One byte: 0 or 1 when written, nonzero is true when read.
    Bool,
    /// A whole number in a byte; what is written is truncated and saturated, a NaN is 0.
    U8,
    /// The same with a sign.
    I8,
}

impl Kind {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Kind::F32 => 4,
            Kind::F16 | Kind::Bf16 => 2,
            Kind::Bool | Kind::U8 | Kind::I8 => 1,
        }
    }
}

/// Where an instruction reads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Operand {
    /// A register written before.
    Register(u8),
    /// An input.
    Input(u8),
    /// A constant.
    Constant(f32),
}

/// Where an instruction writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A register.
    Register(u8),
    /// An output.
    Output(u8),
}

/// What an instruction computes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Work {
    /// One operand.
    Unary(Unary, Operand),
    /// Two operands.
    Binary(Binary, Operand, Operand),
    /// `a * b + c` with one rounding.
    Fma(Operand, Operand, Operand),
    /// `mask != 0 ? a : b`.
    Select(Operand, Operand, Operand),
}

impl Work {
    fn operands(&self) -> [Option<Operand>; 3] {
        match *self {
            Work::Unary(_, a) => [Some(a), None, None],
            Work::Binary(_, a, b) => [Some(a), Some(b), None],
            Work::Fma(a, b, c) | Work::Select(a, b, c) => [Some(a), Some(b), Some(c)],
        }
    }
}

/// One instruction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Instr {
    /// What is computed.
    pub work: Work,
    /// Where the result goes.
    pub to: Target,
}

/// A checked program of elementwise instructions.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    pub(super) instrs: Vec<Instr>,
    pub(super) inputs: Vec<Kind>,
    pub(super) outputs: Vec<Kind>,
    /// Register of each input that is widened first.
    pub(super) input_registers: Vec<Option<u8>>,
    /// Register of each output that is narrowed last.
    pub(super) output_registers: Vec<Option<u8>>,
}

/// Why a program is refused; `at` is the number of the instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProgramError {
    /// A register is read before it is written.
    Unwritten {
        /// Instruction.
        at: usize,
        /// Register.
        register: u8,
    },
    /// An input or output that was not declared.
    Undeclared {
        /// Instruction.
        at: usize,
        /// Number of the input or output.
        operand: u8,
    },
    /// More than [`MAX_REGISTERS`] registers or [`MAX_OPERANDS`] inputs or outputs.
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How many are needed.
        needed: usize,
    },
    /// An output that no instruction, or more than one, writes.
    Output {
        /// Number of the output.
        output: usize,
        /// Instructions that write it.
        writers: usize,
    },
}

impl fmt::Display for ProgramError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProgramError::Unwritten { at, register } => {
                write!(f, "instruction {at} reads register {register}, which nothing wrote before")
            }
            ProgramError::Undeclared { at, operand } => {
                write!(f, "instruction {at} names operand {operand}, which the program does not declare")
            }
            ProgramError::TooMany { what, needed } => write!(f, "the program needs {needed} {what}"),
            ProgramError::Output { output, writers } => {
                write!(f, "output {output} is written by {writers} instructions, expected 1")
            }
        }
    }
}

impl std::error::Error for ProgramError {}

impl Program {
    /// Checks a program.
    ///
    /// # Errors
    /// See [`ProgramError`].
    pub fn build(inputs: &[Kind], outputs: &[Kind], instrs: &[Instr]) -> Result<Program, ProgramError> {
        for (what, needed) in [("inputs", inputs.len()), ("outputs", outputs.len())] {
            if needed > MAX_OPERANDS {
                return Err(ProgramError::TooMany { what, needed });
            }
        }
        let mut written = [false; 256];
        let mut writers = vec![0; outputs.len()];
        let mut registers = 0usize;
        for (at, instr) in instrs.iter().enumerate() {
            for operand in instr.work.operands().into_iter().flatten() {
                match operand {
                    Operand::Register(r) if !written[r as usize] => {
                        return Err(ProgramError::Unwritten { at, register: r });
                    }
                    Operand::Input(i) if i as usize >= inputs.len() => {
                        return Err(ProgramError::Undeclared { at, operand: i });
                    }
                    _ => {}
                }
            }
            match instr.to {
                Target::Register(r) => {
                    written[r as usize] = true;
                    registers = registers.max(r as usize + 1);
                }
                Target::Output(o) => {
                    *writers.get_mut(o as usize).ok_or(ProgramError::Undeclared { at, operand: o })? += 1;
                }
            }
        }
        if let Some(output) = writers.iter().position(|n| *n != 1) {
            return Err(ProgramError::Output { output, writers: writers[output] });
        }
        let mut hidden = |kind: &Kind| {
            (*kind != Kind::F32).then(|| {
                registers += 1;
                (registers - 1).min(255) as u8
            })
        };
        let input_registers = inputs.iter().map(&mut hidden).collect();
        let output_registers = outputs.iter().map(&mut hidden).collect();
        if registers > MAX_REGISTERS {
            return Err(ProgramError::TooMany { what: "registers", needed: registers });
        }
        Ok(Program {
            instrs: instrs.to_vec(),
            inputs: inputs.to_vec(),
            outputs: outputs.to_vec(),
            input_registers,
            output_registers,
        })
    }

    /// A program of one unary operation.
    pub fn unary(op: Unary) -> Program {
        let instr = Instr { work: Work::Unary(op, Operand::Input(0)), to: Target::Output(0) };
        Program::build(&[Kind::F32], &[Kind::F32], &[instr]).expect("one instruction on one input is valid")
    }

    /// A program of one binary operation.
    pub fn binary(op: Binary) -> Program {
        let work = Work::Binary(op, Operand::Input(0), Operand::Input(1));
        let instr = Instr { work, to: Target::Output(0) };
        Program::build(&[Kind::F32; 2], &[Kind::F32], &[instr])
            .expect("one instruction on two inputs is valid")
    }

    /// Kinds of the inputs.
    pub fn inputs(&self) -> &[Kind] {
        &self.inputs
    }

    /// Kinds of the outputs.
    pub fn outputs(&self) -> &[Kind] {
        &self.outputs
    }

    /// The instructions.
    pub fn instrs(&self) -> &[Instr] {
        &self.instrs
    }

    /// Whether `output` may be stored over `input` when both lie in the same place with the same strides: nothing reads
    /// the input after the output is written.
    pub fn allows_in_place(&self, input: usize, output: usize) -> bool {
        let (from, to) = (self.inputs[input], self.outputs[output]);
        if from != Kind::F32 || to != Kind::F32 {
            // Both have registers: a strip is read before any of it is written.
            return from != Kind::F32 && to != Kind::F32 && from.bytes() == to.bytes();
        }
        let Some(writer) = self.instrs.iter().position(|i| i.to == Target::Output(output as u8)) else {
            return false;
        };
        let reads = |i: &Instr| i.work.operands().contains(&Some(Operand::Input(input as u8)));
        !self.instrs[writer + 1..].iter().any(reads)
    }
}
