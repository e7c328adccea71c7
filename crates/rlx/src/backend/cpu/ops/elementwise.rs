//! What elementwise ops share: the kernels' names of functions, and programs as kernels run them.

use crate::backend::cpu::lower::LowerCx;
use crate::plan::StepSpec;
use rlx_graph::ops::activation::ActivationKind;
use rlx_graph::ops::binary::BinaryOp;
use rlx_graph::ops::fused_elementwise::{Arg, Function, FusedElementwise, Program, Step};
use rlx_graph::ops::unary::UnaryOp;
use rlx_kernels::elementwise::{
    Binary, Instr, Kind, MAX_OPERANDS, MAX_REGISTERS, Operand, Program as KernelProgram, Target, Unary, Work,
};
use rlx_kernels::schedule::Step as ScheduleStep;
use rlx_kernels::steps::MAX_RANK;
use rlx_kernels::steps::elementwise::{MapStep, kind_of};
use rlx_tensor::{DType, Shape};

/// Functions that the kernels spell differently.
const UNARY_NAMES: &[(&str, &str)] =
    &[("reciprocal", "recip"), ("identity", "copy"), ("gelu", "gelu_erf"), ("quick_gelu", "gelu_quick")];

fn unary(name: &str) -> Option<Unary> {
    let name = UNARY_NAMES.iter().find(|(graph, _)| *graph == name).map_or(name, |(_, kernel)| kernel);
    Unary::ALL.iter().copied().find(|op| op.name() == name)
}

fn binary(kind: BinaryOp) -> Option<Binary> {
    Binary::ALL.iter().copied().find(|op| op.name() == kind.name())
}

/// The kernels' program of a graph's program on operands of these dtypes; `None` where a function or dtype has no kernel, or the
/// program needs too many registers.
fn program(steps: &[Step], inputs: &[DType], output: DType) -> Option<KernelProgram> {
    let kinds: Vec<Kind> = inputs.iter().map(|&d| kind_of(d)).collect::<Option<_>>()?;
    // Codes come from numbers, whatever the operands: functions of codes themselves are those of whole numbers.
    let coded = matches!(steps.last()?.function, Function::Code(_));
    if coded != matches!(output, DType::U8 | DType::I8) {
        return None;
    }
    let mut last_use = vec![0; steps.len()];
    for (at, step) in steps.iter().enumerate() {
        for arg in &step.args {
            if let Arg::Step(used) = arg {
                last_use[*used] = at;
            }
        }
    }
    let mut free: Vec<u8> = (0..MAX_REGISTERS as u8).rev().collect();
    let mut registers: Vec<u8> = Vec::with_capacity(steps.len());
    let mut instrs = Vec::with_capacity(steps.len());
    for (at, step) in steps.iter().enumerate() {
        let mut operands = Vec::with_capacity(step.args.len());
        for arg in &step.args {
            operands.push(match arg {
                Arg::Operand(i) => Operand::Input(u8::try_from(*i).ok()?),
                Arg::Step(i) => Operand::Register(registers[*i]),
                Arg::Number(value) => Operand::Constant(*value as f32),
            });
        }
        let mut ended: Vec<usize> = Vec::new();
        for arg in &step.args {
            match arg {
                Arg::Step(i) if last_use[*i] == at && !ended.contains(i) => ended.push(*i),
                _ => {}
            }
        }
        free.extend(ended.iter().map(|&i| registers[i]));
        let work = match (step.function, operands.as_slice()) {
            (Function::Unary(kind), &[a]) => Work::Unary(unary(kind.name())?, a),
            (Function::Activation(kind), &[a]) => Work::Unary(unary(kind.name())?, a),
            (Function::Binary(kind), &[a, b]) => Work::Binary(binary(kind)?, a, b),
            (Function::Code(_), &[a]) => Work::Unary(Unary::Copy, a),
            (Function::Select, &[condition, a, b]) => Work::Select(condition, a, b),
            _ => return None,
        };
        let last = at + 1 == steps.len();
        let register = if last { 0 } else { free.pop()? };
        registers.push(register);
        let to = if last { Target::Output(0) } else { Target::Register(register) };
        if !last && last_use[at] == 0 {
            free.push(register);
        }
        instrs.push(Instr { work, to });
    }
    KernelProgram::build(&kinds, &[kind_of(output)?], &instrs).ok()
}

/// A program of one function on all operands in order.
fn one(function: Function) -> Vec<Step> {
    vec![Step { function, args: (0..function.arity()).map(Arg::Operand).collect() }]
}

/// The program of one unary function.
pub(super) fn of_unary(kind: UnaryOp) -> Vec<Step> {
    one(Function::Unary(kind))
}

/// The program of one binary function.
pub(super) fn of_binary(kind: BinaryOp) -> Vec<Step> {
    one(Function::Binary(kind))
}

/// The program of one activation.
pub(super) fn of_activation(kind: ActivationKind) -> Vec<Step> {
    one(Function::Activation(kind))
}

/// `activation(gate) * up`.
pub(super) fn of_gated(kind: ActivationKind) -> Vec<Step> {
    let act = Step { function: Function::Activation(kind), args: vec![Arg::Operand(0)] };
    let product =
        Step { function: Function::Binary(BinaryOp::Mul), args: vec![Arg::Step(0), Arg::Operand(1)] };
    vec![act, product]
}

/// The statements of a fused op; none if its text is no program.
pub(super) fn of_text(op: &FusedElementwise) -> Vec<Step> {
    op.parse().map_or(Vec::new(), |program| program.steps)
}

/// Whether the kernels run a program on these shapes.
pub(super) fn supported(steps: &[Step], inputs: &[&Shape], outputs: &[&Shape]) -> bool {
    let dtypes: Vec<DType> = inputs.iter().map(|s| s.dtype()).collect();
    let [output] = outputs else { return false };
    inputs.len() <= MAX_OPERANDS
        && output.rank() <= MAX_RANK
        && program(steps, &dtypes, output.dtype()).is_some()
}

/// Whether a program of this result may write over an operand as large: it writes once, last, and needs nothing but f32 registers
/// and results of a dtype that the kernels have.
pub(super) fn in_place(steps: &[Step], result: &Shape) -> bool {
    let dtypes = vec![result.dtype(); operands(steps)];
    result.dtype() != DType::Bool && supported_as(steps, &dtypes, result)
}

fn supported_as(steps: &[Step], dtypes: &[DType], result: &Shape) -> bool {
    result.rank() <= MAX_RANK && program(steps, dtypes, result.dtype()).is_some()
}

fn operands(steps: &[Step]) -> usize {
    Program { steps: steps.to_vec() }.operands()
}

/// The schedule step of a program; `None` where no kernel runs it.
pub(super) fn lower(cx: &LowerCx<'_>, steps: &[Step], step: &StepSpec) -> Option<Box<dyn ScheduleStep>> {
    let dtypes: Vec<DType> = step.inputs.iter().map(|p| p.dtype).collect();
    let output = step.outputs.first()?;
    let program = program(steps, &dtypes, output.dtype)?;
    let inputs = step.inputs.iter().map(|p| cx.operand(p)).collect();
    let lowered = MapStep::new(cx.isa(), step.op.def().name(), program, inputs, cx.operand(output))?;
    Some(Box::new(lowered))
}
