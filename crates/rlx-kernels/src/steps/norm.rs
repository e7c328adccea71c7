//! Norms of rows.

use crate::isa::{Entry, Isa};
use crate::norm::{NormArgs, l2_norm_entry, layer_norm_entry, rms_norm_entry};
use crate::pool::Team;
use crate::schedule::{Access, Operand, Run, Step, StepError};
use rlx_tensor::DType;
use std::any::Any;
use std::ptr::{null, null_mut};
use std::sync::Arc;

/// Which norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// `(x - mean) / sqrt(variance + eps) * weight + bias`
    Layer,
    /// `x / sqrt(mean(x^2) + eps) * (weight + offset)`
    Rms,
    /// `x / max(sqrt(sum(x^2)), eps)`
    L2,
}

/// A norm without its operands.
#[derive(Debug, Clone)]
pub struct NormForm {
    /// Which.
    pub kind: NormKind,
    /// Added to the variance or mean square; for L2 the least divisor.
    pub eps: f32,
    /// Slices of a row that are normalised on their own.
    pub groups: usize,
    /// One factor a column of a slice.
    pub weight: Option<NormVector>,
    /// Added to every factor.
    pub weight_offset: f32,
    /// One term a column of a slice.
    pub bias: Option<NormVector>,
}

/// Numbers of the columns.
#[derive(Debug, Clone)]
pub enum NormVector {
    /// Known before a run.
    Known(Arc<[f32]>),
    /// A value of F32 of the run.
    Run(Operand),
}

impl NormVector {
    fn operand(&self) -> Option<&Operand> {
        match self {
            NormVector::Known(_) => None,
            NormVector::Run(operand) => Some(operand),
        }
    }

    fn len(&self, run: &Run<'_>) -> usize {
        match self {
            NormVector::Known(values) => values.len(),
            NormVector::Run(operand) => run.len(operand),
        }
    }

    fn pointer(&self, run: &Run<'_>) -> *const f32 {
        match self {
            NormVector::Known(values) => values.as_ptr(),
            NormVector::Run(operand) => run.pointer::<f32>(operand).cast_const(),
        }
    }
}

/// `y = norm(x)`, or `sum = x + residual; y = norm(sum)`.
#[derive(Debug)]
pub struct NormStep {
    isa: Isa,
    entry: Entry<NormArgs>,
    form: NormForm,
    x: Operand,
    residual: Option<(Operand, Operand)>,
    y: Operand,
}

/// Elements one tile covers, about.
const TILE_ELEMENTS: usize = 4096;

impl NormStep {
    /// The step for an instruction set; `None` if it is not available, or vectors are not adjacent floats. `residual` comes with the operand that takes the sum.
    pub fn new(
        isa: Isa,
        form: NormForm,
        x: Operand,
        residual: Option<(Operand, Operand)>,
        y: Operand,
    ) -> Option<Self> {
        let entry = match form.kind {
            NormKind::Layer => layer_norm_entry(isa)?,
            NormKind::Rms => rms_norm_entry(isa)?,
            NormKind::L2 => l2_norm_entry(isa)?,
        };
        let vectors = form.weight.iter().chain(&form.bias).filter_map(NormVector::operand);
        let fits = vectors.into_iter().all(|o| o.dtype == DType::F32 && o.stride.is_none());
        fits.then_some(Self { isa, entry, form, x, residual, y })
    }
}

impl Step for NormStep {
    fn name(&self) -> String {
        let kind = match self.form.kind {
            NormKind::Layer => "layer_norm",
            NormKind::Rms => "rms_norm",
            NormKind::L2 => "l2_norm",
        };
        format!("{kind}_f32_{}", self.isa)
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        visit(&self.x, Access::Read);
        let vectors = self.form.weight.iter().chain(&self.form.bias);
        vectors.filter_map(NormVector::operand).for_each(|operand| visit(operand, Access::Read));
        if let Some((residual, sum)) = &self.residual {
            visit(residual, Access::Read);
            visit(sum, Access::WriteInPlace);
        }
        visit(&self.y, Access::WriteInPlace);
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let (rows, columns) = (run.rows(&self.x), run.columns(&self.x));
        let groups = self.form.groups.max(1);
        let cols = columns / groups;
        let same = |operand: &Operand| run.rows(operand) == rows && run.columns(operand) == columns;
        let fits = |values: &Option<NormVector>| values.as_ref().is_none_or(|v| v.len(run) == cols);
        let operands = same(&self.y) && self.residual.as_ref().is_none_or(|(r, s)| same(r) && same(s));
        if !operands || cols * groups != columns || !fits(&self.form.weight) || !fits(&self.form.bias) {
            return Err(StepError::Shape { step: self.name() });
        }
        let residual = self.residual.as_ref();
        let vector = |values: &Option<NormVector>| values.as_ref().map_or(null(), |v| v.pointer(run));
        let args = NormArgs {
            x: run.pointer(&self.x),
            x_stride: run.stride(&self.x),
            residual: residual.map_or(null(), |(r, _)| run.pointer::<f32>(r).cast_const()),
            residual_stride: residual.map_or(0, |(r, _)| run.stride(r)),
            sum: residual.map_or(null_mut(), |(_, s)| run.pointer(s)),
            sum_stride: residual.map_or(0, |(_, s)| run.stride(s)),
            y: run.pointer(&self.y),
            y_stride: run.stride(&self.y),
            weight: vector(&self.form.weight),
            weight_offset: self.form.weight_offset,
            bias: vector(&self.form.bias),
            rows,
            groups,
            group_stride: cols,
            cols,
            eps: self.form.eps,
            rows_per_tile: (TILE_ELEMENTS / columns.max(1)).max(1),
        };
        for tile in team.tiles(args.tiles()) {
            // SAFETY: the launch checked that operands lie in their regions and overlap only where a norm may (`y` over `x`, `sum`
            // over `x` or `residual`); widths were checked above; tiles are disjoint rows.
            unsafe { (self.entry)(&args, tile) };
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
