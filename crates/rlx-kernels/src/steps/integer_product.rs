//! Products of codes with packed weights: of rows, and of windows of images whose channels are adjacent.

use crate::conv::Images;
use crate::integer_product::{IntegerArgs, IntegerKernel, IntegerMatrix, Outcome};
use crate::pool::Team;
use crate::schedule::{Access, Operand, Run, Step, StepError};
use rlx_tensor::DType;
use std::any::Any;

/// Operands of a product of codes.
#[derive(Debug)]
pub struct IntegerOperands {
    /// `[.., k]`, or images with channels last.
    pub x: Operand,
    /// The zero point of x.
    pub x_zero: Operand,
    /// Scales of the outputs, or one; none for sums.
    pub scale: Option<Operand>,
    /// The scale of a result of codes.
    pub result_scale: Option<Operand>,
    /// I32 or F32: a number for each output, or one.
    pub bias: Option<Operand>,
    /// The result.
    pub out: Operand,
}

/// Rows or images of codes by packed weights of codes.
#[derive(Debug)]
pub struct IntegerProductStep {
    kernel: IntegerKernel,
    weights: IntegerMatrix,
    images: bool,
    outcome: Outcome,
    codes: [f32; 3],
    at: IntegerOperands,
}

impl IntegerProductStep {
    /// The step; `images` tells those from rows, `codes` are zero point, smallest and largest code of a result of codes. `None` if the parts
    /// do not fit each other.
    pub fn new(
        kernel: IntegerKernel,
        weights: IntegerMatrix,
        images: bool,
        codes: [i64; 3],
        at: IntegerOperands,
    ) -> Option<Self> {
        let outcome = match at.out.dtype {
            DType::I32 => Outcome::I32,
            DType::F32 => Outcome::F32,
            DType::U8 => Outcome::U8,
            DType::I8 => Outcome::I8,
            _ => return None,
        };
        let code = |o: &Operand| matches!(o.dtype, DType::U8 | DType::I8);
        let float =
            |o: &Option<Operand>| o.as_ref().is_none_or(|o| o.dtype == DType::F32 && o.stride.is_none());
        let bias =
            at.bias.as_ref().is_none_or(|b| matches!(b.dtype, DType::I32 | DType::F32) && b.stride.is_none());
        let coded = matches!(outcome, Outcome::U8 | Outcome::I8);
        let ranked = !images || matches!(at.x.dims.len(), 3 | 4) && at.x.dims.len() == at.out.dims.len();
        let fits = kernel.takes(&weights)
            && code(&at.x)
            && at.x_zero.dtype == at.x.dtype
            && float(&at.scale)
            && float(&at.result_scale)
            && bias
            && ranked
            && at.scale.is_some() == (outcome != Outcome::I32)
            && at.result_scale.is_some() == coded;
        let codes = codes.map(|code| code as f32);
        fits.then_some(Self { kernel, weights, images, outcome, codes, at })
    }

    fn sizes(&self, run: &Run<'_>) -> Images {
        if !self.images {
            let rows = run.rows(&self.at.x);
            return Images { batch: 1, extents: [1, rows], positions: [1, run.rows(&self.at.out)] };
        }
        let pair = |o: &Operand| match o.dims.len() {
            4 => [run.size(o.dims[1]), run.size(o.dims[2])],
            _ => [1, run.size(o.dims[1])],
        };
        Images {
            batch: run.size(self.at.x.dims[0]),
            extents: pair(&self.at.x),
            positions: pair(&self.at.out),
        }
    }

    fn check(&self, run: &Run<'_>, images: &Images) -> Result<(), StepError> {
        let layer = self.kernel.layer();
        let positions = [0, 1].map(|axis| layer.positions(axis, images.extents[axis]));
        let pixels = images.batch * images.positions[0] * images.positions[1];
        let numbers =
            |o: &Option<Operand>| o.as_ref().is_none_or(|o| run.len(o) == 1 || run.len(o) == layer.outputs);
        let fits = run.columns(&self.at.x) == layer.channels
            && run.columns(&self.at.out) == layer.outputs
            && run.rows(&self.at.out) == pixels
            && positions == images.positions.map(Some)
            && run.len(&self.at.x_zero) == 1
            && self.at.result_scale.as_ref().is_none_or(|o| run.len(o) == 1)
            && numbers(&self.at.scale)
            && numbers(&self.at.bias);
        if fits { Ok(()) } else { Err(StepError::Shape { step: self.name() }) }
    }
}

impl Step for IntegerProductStep {
    fn name(&self) -> String {
        let op = if self.images { "integer_conv" } else { "integer_linear" };
        format!("{op}_{}", self.kernel.name())
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        let at = &self.at;
        visit(&at.x, Access::Read);
        visit(&at.x_zero, Access::Read);
        for operand in [&at.scale, &at.result_scale, &at.bias].into_iter().flatten() {
            visit(operand, Access::Read);
        }
        visit(&at.out, Access::Write);
    }

    fn worker_scratch(&self, _sizes: &[usize]) -> usize {
        self.kernel.scratch_bytes()
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let images = self.sizes(run);
        self.check(run, &images)?;
        let at = &self.at;
        // SAFETY: the launch checked the operands' bounds; dtypes were checked in `new`; nothing writes them while this step runs.
        let floats = |o: &Option<Operand>| o.as_ref().map_or(&[][..], |o| unsafe { run.slice::<f32>(o) });
        let whole = at.bias.as_ref().filter(|b| b.dtype == DType::I32);
        let args = IntegerArgs {
            images,
            x: run.pointer::<u8>(&at.x).cast_const(),
            x_stride: run.stride(&at.x),
            x_signed: at.x.dtype == DType::I8,
            // SAFETY: as above; there is one element, as was checked.
            x_zero: unsafe { *run.pointer::<u8>(&at.x_zero) },
            weights: &self.weights,
            scale: floats(&at.scale),
            step: floats(&at.result_scale).first().copied().unwrap_or(1.0),
            // SAFETY: as above.
            whole_bias: whole.map_or(&[][..], |o| unsafe { run.slice::<i32>(o) }),
            bias: if whole.is_some() { &[] } else { floats(&at.bias) },
            outcome: self.outcome,
            codes: self.codes,
            out: run.pointer(&at.out),
            out_stride: run.stride(&at.out),
        };
        let grid = self.kernel.grid(&args, team.count());
        let scratch: *mut u8 = run.worker_scratch(team);
        let mut held = usize::MAX;
        for tile in team.near_tiles(grid.tiles()) {
            // SAFETY: the launch checked bounds and overlap; sizes were checked above; the weights are the kernel's (checked in `new`); the
            // scratch is this worker's and as long as asked.
            unsafe { self.kernel.run_tile(&args, &grid, tile, scratch, &mut held) };
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
