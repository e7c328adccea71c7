//! Convolutions and window pooling of images whose channels are adjacent.

use crate::conv::{
    ConvArgs, ConvKernel, ConvLayer, DepthwiseArgs, DepthwiseCut, Images, depthwise_entry, line_tiles,
};
use crate::gemm::{Activation, PackedMatrix};
use crate::isa::{Entry, Isa, fetch_lines};
use crate::pool::Team;
use crate::pooling::{WindowArgs, WindowPooling, WindowValues, window_entry};
use crate::schedule::{Access, Operand, Run, Step, StepError};
use rlx_tensor::DType;
use std::any::Any;
use std::ptr::null;
use std::sync::Arc;

/// Bytes of packed weights that are read ahead at a time.
const READ_AHEAD_BYTES: usize = 2048;

/// Weights in the form their kernel reads.
#[derive(Debug)]
enum Weights {
    Packed(Box<ConvKernel>, PackedMatrix),
    Depthwise(Isa, Entry<DepthwiseArgs>, Arc<[f32]>),
}

/// `out = act(x * w + bias + addend)` over `[batch, spatial.., channels]`, of one spatial axis or two.
#[derive(Debug)]
pub struct ConvStep {
    layer: ConvLayer,
    weights: Weights,
    bias: Option<Arc<[f32]>>,
    activation: Activation,
    x: Operand,
    addend: Option<Operand>,
    out: Operand,
}

/// What surrounds the sum of a convolution.
#[derive(Debug)]
pub struct Surroundings {
    /// A number for each output.
    pub bias: Option<Arc<[f32]>>,
    /// Applied last.
    pub activation: Activation,
    /// The images.
    pub x: Operand,
    /// What is added before the activation.
    pub addend: Option<Operand>,
    /// The result.
    pub out: Operand,
}

impl Surroundings {
    fn fits(&self, layer: &ConvLayer) -> bool {
        let image = |o: &Operand| o.dtype == DType::F32 && matches!(o.dims.len(), 3 | 4);
        let bias = self.bias.as_ref().is_none_or(|b| b.len() == layer.groups * layer.outputs);
        bias && image(&self.x) && image(&self.out) && self.addend.as_ref().is_none_or(image)
    }

    fn step(self, layer: ConvLayer, weights: Weights) -> Option<ConvStep> {
        let fits = self.fits(&layer);
        let Surroundings { bias, activation, x, addend, out } = self;
        fits.then_some(ConvStep { layer, weights, bias, activation, x, addend, out })
    }
}

impl ConvStep {
    /// A convolution over packed weights; `None` if the parts do not fit each other.
    pub fn packed(kernel: ConvKernel, weights: PackedMatrix, around: Surroundings) -> Option<Self> {
        let fits = kernel.layout() == weights.layout();
        let layer = *kernel.layer();
        fits.then(|| around.step(layer, Weights::Packed(Box::new(kernel), weights)))?
    }

    /// A convolution of each channel by itself, over weights in `depthwise_order`; `None` if the parts do not fit each other.
    pub fn depthwise(isa: Isa, layer: ConvLayer, weights: Arc<[f32]>, around: Surroundings) -> Option<Self> {
        let fits = layer.is_depthwise() && weights.len() == layer.groups * layer.window[0] * layer.window[1];
        let entry = depthwise_entry(isa).filter(|_| fits)?;
        around.step(layer, Weights::Depthwise(isa, entry, weights))
    }

    fn images(&self, size: &dyn Fn(usize) -> usize) -> Images {
        let pair = |o: &Operand| match o.dims.len() {
            4 => [size(o.dims[1]), size(o.dims[2])],
            _ => [1, size(o.dims[1])],
        };
        Images { batch: size(self.x.dims[0]), extents: pair(&self.x), positions: pair(&self.out) }
    }

    fn check(&self, run: &Run<'_>, images: &Images) -> Result<(), StepError> {
        let layer = &self.layer;
        let positions = [0, 1].map(|axis| layer.positions(axis, images.extents[axis]));
        let same = |o: &Operand| run.extents(o).eq(run.extents(&self.out));
        let fits = run.columns(&self.x) == layer.groups * layer.channels
            && run.columns(&self.out) == layer.groups * layer.outputs
            && run.extents(&self.out).next() == Some(images.batch)
            && positions == images.positions.map(Some)
            && self.addend.as_ref().is_none_or(same);
        if fits { Ok(()) } else { Err(StepError::Shape { step: self.name() }) }
    }
}

/// This worker's share of a layer, after what it reads has been picked, where that pays.
///
/// # Safety
/// The pointers of `args` are valid as [`ConvArgs`] says for the kernel's layer, and the weights have its layout.
unsafe fn run_packed(kernel: &ConvKernel, mut args: ConvArgs, run: &Run<'_>, team: &Team<'_>) {
    let mut kernel = *kernel;
    if let Some((whole, images)) = kernel.picked(&args.images) {
        let (picked, x) = (run.shared_scratch::<f32>(), (args.x, args.x_stride));
        for line in team.near_tiles(images.batch * images.positions[0]) {
            // SAFETY: the caller guarantees `x`; the shared scratch is as long as asked, and a line is one worker's.
            unsafe { kernel.pick_line(&args.images, x, line, picked) };
        }
        team.barrier();
        args = ConvArgs { images, x: picked, x_stride: kernel.channels(), ..args };
        kernel = whole;
    }
    let grid = kernel.grid(&args.images, team.count());
    let scratch: *mut u8 = run.worker_scratch(team);
    let mut held = usize::MAX;
    for tile in team.near_tiles(grid.tiles()) {
        // SAFETY: the caller guarantees the operands; the scratch is this worker's and as long as asked.
        unsafe { kernel.run_tile(&args, &grid, tile, scratch, &mut held) };
    }
}

impl Step for ConvStep {
    fn name(&self) -> String {
        match &self.weights {
            Weights::Packed(kernel, _) => format!("conv_f32_{}", kernel.isa()),
            Weights::Depthwise(isa, ..) => format!("conv_depthwise_f32_{isa}"),
        }
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        visit(&self.x, Access::Read);
        if let Some(addend) = &self.addend {
            visit(addend, Access::Read);
        }
        visit(&self.out, if self.addend.is_some() { Access::WriteInPlace } else { Access::Write });
    }

    fn worker_scratch(&self, sizes: &[usize]) -> usize {
        match &self.weights {
            Weights::Packed(kernel, _) => kernel.scratch_bytes(&self.images(&|d| sizes[d])),
            Weights::Depthwise(..) => 0,
        }
    }

    fn shared_scratch(&self, sizes: &[usize], _workers: usize) -> usize {
        match &self.weights {
            Weights::Packed(kernel, _) => kernel.picked_bytes(&self.images(&|d| sizes[d])),
            Weights::Depthwise(..) => 0,
        }
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let images = self.images(&|d| run.size(d));
        self.check(run, &images)?;
        let (x, x_stride) = (run.pointer::<f32>(&self.x).cast_const(), run.stride(&self.x));
        let (out, out_stride) = (run.pointer::<f32>(&self.out), run.stride(&self.out));
        let bias = self.bias.as_ref().map_or(null(), |b| b.as_ptr());
        let addend = self.addend.as_ref().map_or(null(), |a| run.pointer::<f32>(a).cast_const());
        let addend_stride = self.addend.as_ref().map_or(0, |a| run.stride(a));
        let activation = self.activation;
        match &self.weights {
            Weights::Packed(kernel, weights) => {
                let w = weights.bytes().as_ptr();
                let args = ConvArgs {
                    images,
                    x,
                    x_stride,
                    w,
                    bias,
                    addend,
                    addend_stride,
                    out,
                    out_stride,
                    activation,
                };
                // SAFETY: the launch checked bounds and overlap; sizes were checked above; the weights have the kernel's layout
                // and the bias its length (checked in `packed`).
                unsafe { run_packed(kernel, args, run, team) };
            }
            Weights::Depthwise(_, entry, weights) => {
                let cut = DepthwiseCut::new(&images, self.layer.groups, team.count());
                let (layer, w) = (self.layer, weights.as_ptr());
                let args = DepthwiseArgs {
                    layer,
                    images,
                    x,
                    x_stride,
                    w,
                    bias,
                    addend,
                    addend_stride,
                    out,
                    out_stride,
                    activation,
                    cut,
                };
                for tile in team.near_tiles(cut.tiles) {
                    // SAFETY: as above; the weights are as long as the layer asks (checked in `depthwise`).
                    unsafe { entry(&args, tile) };
                }
            }
        }
        Ok(())
    }

    fn reads_ahead(&self) -> bool {
        matches!(self.weights, Weights::Packed(..))
    }

    fn read_ahead(&self, run: &Run<'_>, team: &Team<'_>, part: usize) -> bool {
        let Weights::Packed(kernel, weights) = &self.weights else { return false };
        let images = self.images(&|d| run.size(d));
        let (kernel, images) = kernel.picked(&images).unwrap_or((**kernel, images));
        let range = kernel.first_weights(&images, team.count(), team.index());
        let rest = weights.bytes().get(range).and_then(|bytes| bytes.get(part * READ_AHEAD_BYTES..));
        let Some(rest) = rest else { return false };
        fetch_lines(&rest[..rest.len().min(READ_AHEAD_BYTES)]);
        rest.len() > READ_AHEAD_BYTES
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// The elements of windows combined, over `[batch, spatial.., channels]`, of one spatial axis or two.
#[derive(Debug)]
pub struct PoolWindowStep {
    isa: Isa,
    entry: Entry<WindowArgs>,
    pooling: WindowPooling,
    values: WindowValues,
    layer: ConvLayer,
    x: Operand,
    out: Operand,
}

impl PoolWindowStep {
    /// The step for an instruction set; the layer's groups, channels and outputs are not read. `None` for a dtype other than F32, and U8 and I8 of
    /// which the largest is taken.
    pub fn new(isa: Isa, pooling: WindowPooling, layer: ConvLayer, x: Operand, out: Operand) -> Option<Self> {
        let values = match x.dtype {
            DType::F32 => WindowValues::F32,
            DType::U8 if pooling == WindowPooling::Max => WindowValues::U8,
            DType::I8 if pooling == WindowPooling::Max => WindowValues::I8,
            _ => return None,
        };
        let entry = window_entry(isa).filter(|_| x.dtype == out.dtype && matches!(x.dims.len(), 3 | 4))?;
        Some(Self { isa, entry, pooling, values, layer, x, out })
    }
}

impl Step for PoolWindowStep {
    fn name(&self) -> String {
        format!("pool_window_{:?}_{:?}_{}", self.pooling, self.values, self.isa).to_lowercase()
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        visit(&self.x, Access::Read);
        visit(&self.out, Access::Write);
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let pair = |o: &Operand| match o.dims.len() {
            4 => [run.size(o.dims[1]), run.size(o.dims[2])],
            _ => [1, run.size(o.dims[1])],
        };
        let batch = run.size(self.x.dims[0]);
        let images = Images { batch, extents: pair(&self.x), positions: pair(&self.out) };
        let channels = run.columns(&self.x);
        if run.columns(&self.out) != channels || run.size(self.out.dims[0]) != batch {
            return Err(StepError::Shape { step: self.name() });
        }
        let (tiles, lines) = line_tiles(&images, team.count());
        let args = WindowArgs {
            pooling: self.pooling,
            layer: self.layer,
            images,
            channels,
            values: self.values,
            x: run.pointer::<u8>(&self.x).cast_const(),
            x_stride: run.stride(&self.x),
            out: run.pointer(&self.out),
            out_stride: run.stride(&self.out),
            lines,
        };
        for tile in team.near_tiles(tiles) {
            // SAFETY: the launch checked bounds and overlap; windows are clipped to the image; each line of the result is written
            // by the worker that claimed its tile.
            unsafe { (self.entry)(&args, tile) };
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
