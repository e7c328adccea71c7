//! Elementwise steps: programs over floats and truth values, integer operations, choices, conversions.

use super::walk::{MAX_RANK, Walk, broadcast_steps, extents};
use crate::cast::{CastArgs, ElementType, cast_entry};
use crate::elementwise::{
    Chain, ChainArgs, IntegerArgs, IntegerOp, IntegerType, Kind, MAX_OPERANDS, MapArgs, Placed, Program,
    SelectArgs, Table, chain_entry, integer_entry, map_entry, select_entry,
};
use crate::isa::{Entry, Isa};
use crate::pool::Team;
use crate::schedule::{Access, Operand, Run, Step, StepError};
use rlx_tensor::DType;
use std::any::Any;

/// The kernels' kind of a dtype in a program.
pub fn kind_of(dtype: DType) -> Option<Kind> {
    match dtype {
        DType::F32 => Some(Kind::F32),
        DType::F16 => Some(Kind::F16),
        DType::BF16 => Some(Kind::Bf16),
        DType::Bool => Some(Kind::Bool),
        DType::U8 => Some(Kind::U8),
        DType::I8 => Some(Kind::I8),
        _ => None,
    }
}

/// The kernels' type of an integer dtype.
pub fn integer_type_of(dtype: DType) -> Option<IntegerType> {
    match dtype {
        DType::I32 => Some(IntegerType::I32),
        DType::I64 => Some(IntegerType::I64),
        DType::U8 => Some(IntegerType::U8),
        _ => None,
    }
}

/// The kernels' type of a dtype in a conversion.
pub fn element_type_of(dtype: DType) -> Option<ElementType> {
    match dtype {
        DType::F64 => Some(ElementType::F64),
        DType::F32 => Some(ElementType::F32),
        DType::F16 => Some(ElementType::F16),
        DType::BF16 => Some(ElementType::Bf16),
        DType::I64 => Some(ElementType::I64),
        DType::I32 => Some(ElementType::I32),
        DType::I8 => Some(ElementType::I8),
        DType::U8 => Some(ElementType::U8),
        DType::Bool => Some(ElementType::Bool),
        _ => None,
    }
}

/// Whether operands share elements; those in different columns of the same rows do not, which a frame checks.
fn same_place(a: &Operand, b: &Operand) -> bool {
    let columns = a.stride.is_some() && a.stride == b.stride && a.offset != b.offset;
    a.region == b.region && !columns
}

fn walkable(out: &Operand, inputs: &[Operand]) -> bool {
    inputs.iter().chain([out]).all(|o| o.dims.len() <= MAX_RANK)
}

/// The walk of inputs and, last, the output.
fn walk_of<const N: usize>(run: &Run<'_>, inputs: &[Operand], out: &Operand) -> Option<Walk<N>> {
    let (shape, rank) = extents(run, out);
    let shape = &shape[..rank];
    let mut steps = [[0; MAX_RANK]; N];
    for (steps, operand) in steps.iter_mut().zip(inputs.iter().chain([out])) {
        *steps = broadcast_steps(run, operand, shape)?;
    }
    Some(Walk::new(shape, inputs.len() + 1, &steps))
}

/// How a program runs: all ways give the same bits.
#[derive(Debug)]
enum Way {
    Interpreted(Entry<MapArgs>),
    Chain(Entry<ChainArgs>, Chain),
    Table(Box<Table>),
}

/// Instructions of a program of one byte from which on a table is faster than what they compute.
const TABLE_INSTRUCTIONS: usize = 9;

impl Way {
    fn of(isa: Isa, program: &Program) -> Option<Way> {
        let chain = Chain::of(program);
        let long = chain.is_none() || program.instrs().len() >= TABLE_INSTRUCTIONS;
        if let Some(table) = Table::of(isa, program).filter(|_| long) {
            return Some(Way::Table(Box::new(table)));
        }
        Some(match chain {
            Some(chain) => Way::Chain(chain_entry(isa)?, chain),
            None => Way::Interpreted(map_entry(isa)?),
        })
    }

    fn name(&self) -> &'static str {
        match self {
            Way::Interpreted(_) => "",
            Way::Chain(..) => "chain_",
            Way::Table(_) => "table_",
        }
    }
}

/// A program over operands that broadcast to the result.
#[derive(Debug)]
pub struct MapStep {
    name: String,
    way: Way,
    program: Program,
    inputs: Vec<Operand>,
    out: Operand,
}

impl MapStep {
    /// The step for an instruction set; `op` is for its name. `None` if the program does not fit the operands, writes over an
    /// operand it still reads, or an operand has more dims than [`MAX_RANK`].
    pub fn new(isa: Isa, op: &str, program: Program, inputs: Vec<Operand>, out: Operand) -> Option<Self> {
        let kinds: Option<Vec<Kind>> = inputs.iter().map(|o| kind_of(o.dtype)).collect();
        let fits = kinds.as_deref() == Some(program.inputs())
            && program.outputs() == [kind_of(out.dtype)?]
            && walkable(&out, &inputs);
        let in_place = |(i, input): (usize, &Operand)| {
            let same = input.offset == out.offset && input.stride == out.stride;
            !same_place(input, &out) || (program.allows_in_place(i, 0) && same)
        };
        if !fits || !inputs.iter().enumerate().all(in_place) {
            return None;
        }
        let way = Way::of(isa, &program)?;
        let name = format!("{op}_{}_{}{isa}", out.dtype, way.name());
        Some(Self { name, way, program, inputs, out })
    }
}

impl Step for MapStep {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        self.inputs.iter().for_each(|operand| visit(operand, Access::Read));
        visit(&self.out, Access::WriteInPlace);
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let walk: Option<Walk<{ MAX_OPERANDS + 1 }>> = walk_of(run, &self.inputs, &self.out);
        let walk = walk.ok_or_else(|| StepError::Shape { step: self.name.clone() })?;
        let mut placed = [walk.placed(0, std::ptr::null_mut()); MAX_OPERANDS + 1];
        for (i, operand) in self.inputs.iter().chain([&self.out]).enumerate() {
            placed[i] = walk.placed(i, run.pointer(operand));
        }
        let args = MapArgs {
            program: &self.program,
            inputs: placed.as_ptr(),
            outputs: placed[self.inputs.len()..].as_ptr(),
            outer: walk.outer,
            cols: walk.cols,
        };
        for tile in team.near_tiles(args.tiles()) {
            // SAFETY: the launch checked that operands lie in their regions and overlap only where they are the same range, which
            // `new` allowed where the program does; the walk stays inside them; kinds were checked in `new`; tiles are disjoint.
            unsafe {
                match &self.way {
                    Way::Interpreted(entry) => entry(&args, tile),
                    Way::Chain(entry, chain) => entry(&ChainArgs { map: args, chain }, tile),
                    Way::Table(table) => table.run_tile(&args, tile),
                }
            }
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// An operation on two integers, with broadcasting.
#[derive(Debug)]
pub struct IntegerStep {
    name: String,
    entry: Entry<IntegerArgs>,
    op: IntegerOp,
    dtype: IntegerType,
    inputs: [Operand; 2],
    out: Operand,
}

impl IntegerStep {
    /// The step for an instruction set; `None` if dtypes do not fit the operation or there are too many dims.
    pub fn new(isa: Isa, op: IntegerOp, a: Operand, b: Operand, out: Operand) -> Option<Self> {
        let dtype = integer_type_of(a.dtype)?;
        let result = if op.compares() { DType::Bool } else { a.dtype };
        let apart = !same_place(&a, &out) && !same_place(&b, &out);
        let name = format!("{op:?}_{}_{isa}", a.dtype).to_lowercase();
        let inputs = [a, b];
        if inputs[1].dtype != inputs[0].dtype || out.dtype != result || !apart || !walkable(&out, &inputs) {
            return None;
        }
        Some(Self { name, entry: integer_entry(isa)?, op, dtype, inputs, out })
    }
}

impl Step for IntegerStep {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        self.inputs.iter().for_each(|operand| visit(operand, Access::Read));
        visit(&self.out, Access::Write);
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let walk: Option<Walk<3>> = walk_of(run, &self.inputs, &self.out);
        let walk = walk.ok_or_else(|| StepError::Shape { step: self.name.clone() })?;
        let [a, b] = &self.inputs;
        let args = IntegerArgs {
            op: self.op,
            dtype: self.dtype,
            a: walk.placed(0, run.pointer(a)),
            b: walk.placed(1, run.pointer(b)),
            out: walk.placed(2, run.pointer(&self.out)),
            outer: walk.outer,
            cols: walk.cols,
        };
        for tile in team.tiles(args.tiles()) {
            // SAFETY: the launch checked that operands lie in their regions and do not overlap the output; the walk stays inside
            // them; dtypes were checked in `new`; tiles are disjoint.
            unsafe { (self.entry)(&args, tile) };
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// `mask ? a : b`, with broadcasting, for elements of 1, 2, 4 or 8 bytes.
#[derive(Debug)]
pub struct SelectStep {
    name: String,
    entry: Entry<SelectArgs>,
    inputs: [Operand; 3],
    out: Operand,
}

impl SelectStep {
    /// The step for an instruction set; `None` if dtypes differ or there are too many dims.
    pub fn new(isa: Isa, mask: Operand, a: Operand, b: Operand, out: Operand) -> Option<Self> {
        let fits = mask.dtype == DType::Bool
            && a.dtype == out.dtype
            && b.dtype == out.dtype
            && matches!(out.dtype.element_bytes(), Some(1 | 2 | 4 | 8));
        let inputs = [mask, a, b];
        if !fits || inputs.iter().any(|i| same_place(i, &out)) || !walkable(&out, &inputs) {
            return None;
        }
        let name = format!("select_{}_{isa}", out.dtype);
        Some(Self { name, entry: select_entry(isa)?, inputs, out })
    }
}

impl Step for SelectStep {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        self.inputs.iter().for_each(|operand| visit(operand, Access::Read));
        visit(&self.out, Access::Write);
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let walk: Option<Walk<4>> = walk_of(run, &self.inputs, &self.out);
        let walk = walk.ok_or_else(|| StepError::Shape { step: self.name.clone() })?;
        let place = |i: usize, operand: &Operand| -> Placed { walk.placed(i, run.pointer(operand)) };
        let args = SelectArgs {
            element_bytes: self.out.element_bytes(),
            mask: place(0, &self.inputs[0]),
            a: place(1, &self.inputs[1]),
            b: place(2, &self.inputs[2]),
            out: place(3, &self.out),
            outer: walk.outer,
            cols: walk.cols,
        };
        for tile in team.tiles(args.tiles()) {
            // SAFETY: as for integer operations.
            unsafe { (self.entry)(&args, tile) };
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Elements as another dtype.
#[derive(Debug)]
pub struct CastStep {
    isa: Isa,
    entry: Entry<CastArgs>,
    types: (ElementType, ElementType),
    from: Operand,
    to: Operand,
}

impl CastStep {
    /// The step for an instruction set; `None` for a dtype without kernel or rows that are not adjacent.
    pub fn new(isa: Isa, from: Operand, to: Operand) -> Option<Self> {
        let types = (element_type_of(from.dtype)?, element_type_of(to.dtype)?);
        if from.stride.is_some() || to.stride.is_some() {
            return None;
        }
        Some(Self { isa, entry: cast_entry(isa)?, types, from, to })
    }
}

impl Step for CastStep {
    fn name(&self) -> String {
        format!("cast_{}_{}_{}", self.from.dtype, self.to.dtype, self.isa)
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        visit(&self.from, Access::Read);
        visit(&self.to, Access::Write);
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let n = run.len(&self.from);
        if run.len(&self.to) != n {
            return Err(StepError::Shape { step: self.name() });
        }
        let args = CastArgs {
            from: run.pointer::<u8>(&self.from).cast_const(),
            from_type: self.types.0,
            to: run.pointer(&self.to),
            to_type: self.types.1,
            n,
        };
        for tile in team.tiles(args.tiles()) {
            // SAFETY: the launch checked that both operands lie in their regions and do not overlap; lengths were checked above and
            // dtypes in `new`; tiles are disjoint.
            unsafe { (self.entry)(&args, tile) };
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
