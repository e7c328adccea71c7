//! A chain of elementwise functions as one op.
//!
//! The program is text, so that it prints, parses, compares and hashes like any attribute: statements separated by `"; "`,
//!
//! ```text
//! t0=mul i0 i1; t1=gelu t0; t2=add t1 0.5; t3=select i2 t2 t0
//! ```
//!
//! Statement n defines `tn`; the last is the result. A function is the name of a [`UnaryOp`], [`BinaryOp`], [`ActivationKind`], or
//! `select condition a b`; the last may be `u8 x` or `i8 x`, the number as a code, truncated and saturated. An argument is `iN` (operand N), `tN` (an earlier statement) or a number in Rust's spelling, which takes
//! the dtype of the floats. Operands are floats of one dtype, codes (U8 and I8, which stand for F32), or Bool; they broadcast with each
//! other to the result.

use crate::attrs::op_struct;
use crate::eval::{broadcast_dims, broadcast_indices, from_f64, to_f64};
use crate::expand::Expand;
use crate::graph::{Graph, GraphError};
use crate::ids::ValueId;
use crate::integer::is_code;
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, Props, op_boilerplate};
use crate::ops::activation::{Activation, ActivationKind};
use crate::ops::binary::BinaryOp;
use crate::ops::cast::to_dtype;
use crate::ops::unary::UnaryOp;
use rlx_tensor::{DType, Dim, Shape, Tensor};
use std::fmt;
use std::str::FromStr;

op_struct! {
    /// Runs a [`Program`] on each element of its operands. Each statement's result is rounded to F32, to F64 for operands of that.
    pub struct FusedElementwise = "fused_elementwise" {
        /// The program's text.
        program: String,
    }
}

/// Statements in a program at most.
pub const MAX_STEPS: usize = 256;

/// A parsed program; `Display` prints what `FromStr` reads.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Program {
    /// The statements in order; the last is the result.
    pub steps: Vec<Step>,
}

/// One statement.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// What is applied.
    pub function: Function,
    /// To what; as many as the function takes.
    pub args: Vec<Arg>,
}

/// A function of elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Function {
    /// Of one element.
    Unary(UnaryOp),
    /// Of two.
    Binary(BinaryOp),
    /// Of one.
    Activation(ActivationKind),
    /// `condition ? a : b`
    Select,
    /// A number as U8 or I8: the last statement of a program.
    Code(DType),
}

/// An argument of a statement.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arg {
    /// The element of an operand.
    Operand(usize),
    /// The result of an earlier statement.
    Step(usize),
    /// A number.
    Number(f64),
}

/// Text that is no program.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("statement {statement}: {reason}")]
pub struct ProgramError {
    /// Which statement, from 0.
    pub statement: usize,
    /// What is wrong.
    pub reason: String,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Float,
    Truth,
    Code(DType),
}

impl Kind {
    fn dtype(self, float: DType) -> DType {
        match self {
            Kind::Float => float,
            Kind::Truth => DType::Bool,
            Kind::Code(dtype) => dtype,
        }
    }
}

impl Function {
    /// The name in program text.
    pub fn name(self) -> &'static str {
        match self {
            Function::Unary(kind) => kind.name(),
            Function::Binary(kind) => kind.name(),
            Function::Activation(kind) => kind.name(),
            Function::Select => "select",
            Function::Code(dtype) => dtype.name(),
        }
    }

    /// The function of a name.
    pub fn from_name(name: &str) -> Option<Function> {
        let unary = UnaryOp::ALL.iter().find(|k| k.name() == name).map(|&k| Function::Unary(k));
        let binary = || BinaryOp::ALL.iter().find(|k| k.name() == name).map(|&k| Function::Binary(k));
        let activation = || {
            let kind = ActivationKind::ALL.iter().find(|k| k.name() == name);
            kind.map(|&k| Function::Activation(k))
        };
        let select = || (name == "select").then_some(Function::Select);
        let code = || {
            let dtype = [DType::U8, DType::I8].into_iter().find(|dtype| dtype.name() == name);
            dtype.map(Function::Code)
        };
        unary.or_else(binary).or_else(activation).or_else(select).or_else(code)
    }

    /// Number of arguments.
    pub fn arity(self) -> usize {
        match self {
            Function::Unary(_) | Function::Activation(_) | Function::Code(_) => 1,
            Function::Binary(_) => 2,
            Function::Select => 3,
        }
    }

    /// The function on f64; `args` has [`Function::arity`] elements, and truth is 0 or 1.
    pub fn eval(self, args: &[f64]) -> f64 {
        match (self, args) {
            (Function::Unary(kind), &[x]) => kind.eval(x),
            (Function::Activation(kind), &[x]) => kind.eval(x),
            (Function::Code(_), &[x]) => x,
            (Function::Binary(kind), &[a, b]) => kind.eval(a, b),
            (Function::Select, &[condition, a, b]) => {
                if condition != 0.0 {
                    a
                } else {
                    b
                }
            }
            _ => f64::NAN,
        }
    }

    fn kind(self, args: &[Kind]) -> Result<Kind, String> {
        let wants = |expected: &[Kind], result: Kind| match args == expected {
            true => Ok(result),
            false => Err(format!("{} does not take these kinds of arguments", self.name())),
        };
        use Kind::{Float, Truth};
        match self {
            Function::Unary(UnaryOp::Not) => wants(&[Truth], Truth),
            Function::Unary(_) | Function::Activation(_) => wants(&[Float], Float),
            Function::Binary(kind) if kind.is_logical() => wants(&[Truth, Truth], Truth),
            Function::Binary(BinaryOp::Equal) if args == [Truth, Truth] => Ok(Truth),
            Function::Binary(kind) if kind.is_comparison() => wants(&[Float, Float], Truth),
            Function::Binary(_) => wants(&[Float, Float], Float),
            Function::Code(dtype) => wants(&[Float], Kind::Code(dtype)),
            Function::Select if args == [Truth, Truth, Truth] => Ok(Truth),
            Function::Select => wants(&[Truth, Float, Float], Float),
        }
    }
}

impl fmt::Display for Arg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Arg::Operand(i) => write!(f, "i{i}"),
            Arg::Step(i) => write!(f, "t{i}"),
            Arg::Number(value) => write!(f, "{value:?}"),
        }
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, step) in self.steps.iter().enumerate() {
            write!(f, "{}t{i}={}", if i == 0 { "" } else { "; " }, step.function.name())?;
            step.args.iter().try_for_each(|arg| write!(f, " {arg}"))?;
        }
        Ok(())
    }
}

fn parse_arg(word: &str, statement: usize) -> Result<Arg, String> {
    let index = |digits: &str| digits.parse::<usize>().ok().filter(|_| !digits.starts_with('+'));
    if let Some(operand) = word.strip_prefix('i').and_then(index) {
        return Ok(Arg::Operand(operand));
    }
    if let Some(step) = word.strip_prefix('t').and_then(index) {
        return match step < statement {
            true => Ok(Arg::Step(step)),
            false => Err(format!("{word} is not defined yet")),
        };
    }
    word.parse().map(Arg::Number).map_err(|_| format!("{word:?} is no operand, statement or number"))
}

fn parse_step(text: &str, statement: usize) -> Result<Step, String> {
    let (target, expression) = text.split_once('=').ok_or("has no `=`")?;
    if target.trim() != format!("t{statement}") {
        return Err(format!("defines {:?}, expected t{statement}", target.trim()));
    }
    let mut words = expression.split_whitespace();
    let name = words.next().ok_or("names no function")?;
    let function = Function::from_name(name).ok_or_else(|| format!("unknown function {name:?}"))?;
    let args = words.map(|word| parse_arg(word, statement)).collect::<Result<Vec<_>, _>>()?;
    if args.len() != function.arity() {
        return Err(format!("{name} takes {} arguments, found {}", function.arity(), args.len()));
    }
    Ok(Step { function, args })
}

impl FromStr for Program {
    type Err = ProgramError;

    fn from_str(text: &str) -> Result<Program, ProgramError> {
        let mut steps = Vec::new();
        for (statement, part) in text.split(';').enumerate() {
            let fail = |reason: String| ProgramError { statement, reason };
            if statement >= MAX_STEPS {
                return Err(fail(format!("more than {MAX_STEPS} statements")));
            }
            steps.push(parse_step(part, statement).map_err(fail)?);
        }
        Ok(Program { steps })
    }
}

impl Program {
    /// Number of operands that the program reads: one more than the largest.
    pub fn operands(&self) -> usize {
        let operand = |arg: &Arg| match arg {
            Arg::Operand(i) => i.saturating_add(1),
            _ => 0,
        };
        self.steps.iter().flat_map(|s| &s.args).map(operand).max().unwrap_or(0)
    }

    /// The result for one element of each operand; truth is 0 or 1. Each statement's result goes through `rounded`.
    pub fn eval(&self, operands: &[f64], rounded: impl Fn(f64) -> f64) -> f64 {
        self.results(operands, rounded).last().copied().unwrap_or(f64::NAN)
    }

    /// The results of all statements.
    pub(crate) fn results(&self, operands: &[f64], rounded: impl Fn(f64) -> f64) -> Vec<f64> {
        let mut results: Vec<f64> = Vec::with_capacity(self.steps.len());
        for step in &self.steps {
            let args: Vec<f64> = step
                .args
                .iter()
                .map(|arg| match arg {
                    Arg::Operand(i) => operands[*i],
                    Arg::Step(i) => results[*i],
                    Arg::Number(value) => *value,
                })
                .collect();
            results.push(rounded(step.function.eval(&args)));
        }
        results
    }

    fn kind(&self, operands: &[Kind]) -> Result<Kind, ProgramError> {
        let mut kinds: Vec<Kind> = Vec::with_capacity(self.steps.len());
        for (statement, step) in self.steps.iter().enumerate() {
            let args: Vec<Kind> = step
                .args
                .iter()
                .map(|arg| match arg {
                    Arg::Operand(i) => operands[*i],
                    Arg::Step(i) => kinds[*i],
                    Arg::Number(_) => Kind::Float,
                })
                .collect();
            let kind = step.function.kind(&args).map_err(|reason| ProgramError { statement, reason })?;
            kinds.push(kind);
        }
        kinds.last().copied().ok_or_else(|| ProgramError { statement: 0, reason: "is empty".into() })
    }
}

impl FusedElementwise {
    /// The op that runs a program.
    pub fn new(program: &Program) -> Self {
        Self { program: program.to_string() }
    }

    /// The parsed program.
    pub fn parse(&self) -> Result<Program, ProgramError> {
        self.program.parse()
    }

    fn parse_or_attribute(&self) -> Result<Program, InferError> {
        self.parse().map_err(|e| InferError::Attribute { name: "program", reason: e.to_string() })
    }
}

fn float_dtype<'t>(mut dtypes: impl Iterator<Item = &'t DType>) -> DType {
    dtypes.find(|d| d.is_float()).copied().unwrap_or(DType::F32)
}

impl OpDef for FusedElementwise {
    op_boilerplate!();

    fn infer(&self, cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        let program = self.parse_or_attribute()?;
        InferError::arity(program.operands(), inputs)?;
        let dtypes: Vec<DType> = inputs.iter().map(|s| s.dtype()).collect();
        let float = float_dtype(dtypes.iter());
        for (operand, &found) in dtypes.iter().enumerate() {
            let stands = float == DType::F32 && is_code(found);
            if found != float && found != DType::Bool && !stands {
                return Err(InferError::DType { operand, expected: format!("{float} or bool"), found });
            }
        }
        let kinds: Vec<Kind> =
            dtypes.iter().map(|&d| if d == DType::Bool { Kind::Truth } else { Kind::Float }).collect();
        let kind = program
            .kind(&kinds)
            .map_err(|e| InferError::Attribute { name: "program", reason: e.to_string() })?;
        let mut dims: Vec<Dim> = Vec::new();
        for shape in inputs {
            dims = cx.broadcast(&dims, shape.dims())?;
        }
        Ok(vec![Shape::from_dims(dims, kind.dtype(float))])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let bad = |reason: String| EvalError::Value { operand: 0, reason };
        let program = self.parse().map_err(|e| bad(e.to_string()))?;
        let mut dims = Vec::new();
        for input in inputs {
            dims = broadcast_dims(&dims, input.dims()).ok_or_else(|| bad("does not broadcast".into()))?;
        }
        let dtypes: Vec<DType> = inputs.iter().map(|t| t.dtype()).collect();
        let kinds: Vec<Kind> =
            dtypes.iter().map(|&d| if d == DType::Bool { Kind::Truth } else { Kind::Float }).collect();
        let kind = program.kind(&kinds).map_err(|e| bad(e.to_string()))?;
        let float = float_dtype(dtypes.iter());
        let dtype = kind.dtype(float);
        let values = inputs.iter().map(|t| to_f64(t)).collect::<Result<Vec<_>, _>>()?;
        let indices: Vec<Vec<usize>> = inputs.iter().map(|t| broadcast_indices(&dims, t.dims())).collect();
        let element = |at: usize| {
            let operands: Vec<f64> = values.iter().zip(&indices).map(|(v, i)| v[i[at]]).collect();
            match float {
                DType::F64 => program.eval(&operands, |v| v),
                _ => program.eval(&operands, |v| f64::from(v as f32)),
            }
        };
        let count = dims.iter().product();
        Ok(vec![from_f64(&dims, dtype, &(0..count).map(element).collect::<Vec<_>>())?])
    }

    fn props(&self) -> Props {
        let operands = self.parse().map_or(0, |program| program.operands().min(MAX_STEPS));
        Props { composite: true, elementwise: true, in_place: (0..operands).collect(), ..Props::default() }
    }

    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        let steps = self.parse().map_or(0, |program| program.steps.len());
        Cost::with_flops(outputs[0].elements() * Dim::Known(steps), inputs, outputs)
    }

    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Option<Result<Vec<ValueId>, GraphError>> {
        let program = self.parse().ok()?;
        Some(self.expand(&program, Expand { graph }, inputs).map(|y| vec![y]))
    }
}

impl FusedElementwise {
    fn expand(
        &self,
        program: &Program,
        mut to: Expand<'_>,
        inputs: &[ValueId],
    ) -> Result<ValueId, GraphError> {
        let dtypes: Vec<DType> = inputs.iter().map(|&v| to.graph.shape(v).dtype()).collect();
        let float = float_dtype(dtypes.iter());
        let mut results: Vec<ValueId> = Vec::with_capacity(program.steps.len());
        for step in &program.steps {
            let mut args = Vec::with_capacity(step.args.len());
            for arg in &step.args {
                args.push(match arg {
                    Arg::Operand(i) if is_code(dtypes[*i]) => to_dtype(to.graph, inputs[*i], float)?,
                    Arg::Operand(i) => inputs[*i],
                    Arg::Step(i) => results[*i],
                    Arg::Number(value) => to.number(*value, float)?,
                });
            }
            results.push(match (step.function, args.as_slice()) {
                (Function::Unary(kind), &[x]) => to.unary(kind, x)?,
                (Function::Activation(kind), &[x]) => Activation::apply(to.graph, kind, x)?,
                (Function::Binary(kind), &[a, b]) => to.binary(kind, a, b)?,
                (Function::Code(dtype), &[x]) => to_dtype(to.graph, x, dtype)?,
                (_, args) => to.graph.add_one(crate::ops::select::Select {}, args)?,
            });
        }
        let last = *results.last().unwrap_or(&inputs[0]);
        match inputs.is_empty() {
            true => Ok(last),
            false => self.widen(&mut to, last, inputs),
        }
    }

    /// The result broadcast to what all operands broadcast to, which the last statement alone may not reach.
    fn widen(&self, to: &mut Expand<'_>, y: ValueId, inputs: &[ValueId]) -> Result<ValueId, GraphError> {
        let shapes: Vec<Shape> = inputs.iter().map(|&v| to.graph.shape(v).clone()).collect();
        let mut cx = InferCx::default();
        let whole = self.infer(&mut cx, &shapes.iter().collect::<Vec<_>>());
        match whole.as_deref() {
            Ok([whole]) if whole.dims() != to.graph.shape(y).dims() => to.broadcast(y, whole.dims()),
            _ => Ok(y),
        }
    }
}
