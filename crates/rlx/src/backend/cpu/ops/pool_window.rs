//! Pooling over windows of images whose channels are adjacent.

use super::CpuOp;
use super::conv::{numbers, pair};
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::StepSpec;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::pool_window::{PoolWindow, WindowPool};
use rlx_graph::{Op, OpDef};
use rlx_kernels::conv::ConvLayer;
use rlx_kernels::pooling::WindowPooling;
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::conv::PoolWindowStep;
use rlx_tensor::{DType, Shape};

/// `pool_window`.
pub(in super::super) struct CpuPoolWindow;

/// How the kernels spell an op and its window; `None` where none takes it.
fn kernel_of(op: &PoolWindow) -> Option<(WindowPooling, ConvLayer)> {
    let pooling = match op.kind {
        WindowPool::Max => WindowPooling::Max,
        WindowPool::Mean if op.count_added => WindowPooling::MeanOfAll,
        WindowPool::Mean => WindowPooling::Mean,
        _ => return None,
    };
    let layer = ConvLayer {
        window: pair(&op.window, 1)?,
        strides: pair(&op.strides, 1)?,
        dilations: pair(&op.dilations, 1)?,
        before: pair(&numbers(&op.before)?, 0)?,
        after: pair(&numbers(&op.after)?, 0)?,
        groups: 1,
        channels: 1,
        outputs: 1,
    };
    (op.channels_last && !op.indices).then_some((pooling, layer))
}

impl CpuOp for CpuPoolWindow {
    fn name(&self) -> &'static str {
        PoolWindow::NAME
    }

    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], _outputs: &[&Shape]) -> bool {
        let op = op.as_any().downcast_ref::<PoolWindow>();
        let native = |op| match kernel_of(op) {
            Some((WindowPooling::Max, _)) => matches!(inputs[0].dtype(), DType::F32 | DType::U8 | DType::I8),
            Some(_) => inputs[0].dtype() == DType::F32,
            None => false,
        };
        op.is_some_and(|op| !op.channels_last || native(op))
    }

    fn accepts_strided(&self, op: &Op, operand: usize) -> bool {
        operand == 0 && op.downcast::<PoolWindow>().is_some_and(|op| kernel_of(op).is_some())
    }

    fn writes_strided(&self, op: &Op) -> bool {
        op.downcast::<PoolWindow>().is_some_and(|op| kernel_of(op).is_some())
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<PoolWindow>() else { return Ok(None) };
        let Some((pooling, layer)) = kernel_of(op) else { return Ok(None) };
        let (x, out) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
        let step = PoolWindowStep::new(cx.isa(), pooling, layer, x, out);
        Ok(step.map(|s| Box::new(s) as Box<dyn Step>))
    }
}
