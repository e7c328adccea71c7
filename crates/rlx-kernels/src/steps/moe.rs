//! A mixture of gated experts over packed weights.

use crate::gather::{Ids, RowArgs, gather_entry};
use crate::gemm::{Activation, LinearArgs, LinearKernel, PackedMatrix};
use crate::isa::{Entry, Isa};
use crate::moe::{CombineArgs, GroupArgs, RouteArgs, Routing, combine_entry, group_entry, route_entry};
use crate::pool::Team;
use crate::schedule::{Access, Operand, Run, Step, StepError};
use std::any::Any;
use std::ptr::null;

/// What a mixture computes, apart from weights and operands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MoeForm {
    /// Experts of a row.
    pub top_k: usize,
    /// A row's weights are divided by their sum.
    pub renormalize: bool,
    /// Applied to the gate.
    pub activation: Activation,
}

/// The weights of one expert with the kernels that read them.
#[derive(Debug)]
pub struct Expert {
    /// Gate and up, interleaved.
    pub gate_up: (LinearKernel, PackedMatrix),
    /// Down.
    pub down: (LinearKernel, PackedMatrix),
}

/// Each row through its experts, whose outputs are summed from the most probable down. Rows are grouped by expert, so that each
/// expert's weights are read once; what a row gets does not depend on the other rows.
#[derive(Debug)]
pub struct MoeStep {
    isa: Isa,
    form: MoeForm,
    experts: Vec<Expert>,
    width: usize,
    inner: usize,
    route: Entry<RouteArgs>,
    group: Entry<GroupArgs>,
    gather: Entry<RowArgs>,
    combine: Entry<CombineArgs>,
    x: Operand,
    logits: Operand,
    out: Operand,
}

/// Byte offsets into the scratch that workers share.
#[derive(Debug, Clone, Copy)]
struct Layout {
    weights: usize,
    chosen: usize,
    starts: usize,
    row_of_place: usize,
    place_of: usize,
    /// Gathered rows, later the experts' results.
    rows: usize,
    inner: usize,
    end: usize,
}

impl Layout {
    fn new(rows: usize, top_k: usize, experts: usize, width: usize, inner: usize) -> Self {
        let places = rows.saturating_mul(top_k);
        let mut end = 0usize;
        let mut take = |elements: usize| {
            let start = end;
            end = end.saturating_add(elements.saturating_mul(4).saturating_add(63) / 64 * 64);
            start
        };
        let (weights, chosen, starts) = (take(places), take(places), take(experts + 1));
        let (row_of_place, place_of) = (take(places), take(places));
        let (rows, inner) = (take(places.saturating_mul(width)), take(places.saturating_mul(inner)));
        Self { weights, chosen, starts, row_of_place, place_of, rows, inner, end }
    }
}

/// Bytes of scratch that workers share for up to `rows` rows, experts of `width` columns and at most `inner` inner columns.
pub fn moe_shared_scratch(rows: usize, top_k: usize, experts: usize, width: usize, inner: usize) -> usize {
    Layout::new(rows, top_k, experts, width, inner).end
}

impl MoeStep {
    /// The step for an instruction set; `None` if it is not available, or the weights do not fit each other or the kernels.
    pub fn new(
        isa: Isa,
        form: MoeForm,
        experts: Vec<Expert>,
        x: Operand,
        logits: Operand,
        out: Operand,
    ) -> Option<Self> {
        let width = experts.first()?.gate_up.1.layout().k();
        let fits = |expert: &Expert| {
            let (gate_up, down) = (expert.gate_up.1.layout(), expert.down.1.layout());
            let kernels = expert.gate_up.0.layout() == gate_up && expert.down.0.layout() == down;
            let plain = gate_up.gated() && !down.gated();
            kernels && plain && gate_up.k() == width && down.n() == width && gate_up.outputs() == down.k()
        };
        let routed = (1..=experts.len()).contains(&form.top_k) && logits.dims.len() == 2;
        if !routed || !experts.iter().all(fits) {
            return None;
        }
        let inner = experts.iter().map(|e| e.down.1.layout().k()).max()?;
        let (route, group) = (route_entry(isa)?, group_entry(isa)?);
        let (gather, combine) = (gather_entry(isa)?, combine_entry(isa)?);
        Some(Self { isa, form, experts, width, inner, route, group, gather, combine, x, logits, out })
    }

    fn fits(&self, run: &Run<'_>, rows: usize) -> bool {
        run.rows(&self.logits) == rows
            && run.rows(&self.out) == rows
            && run.columns(&self.x) == self.width
            && run.columns(&self.out) == self.width
            && run.columns(&self.logits) == self.experts.len()
    }

    fn layout(&self, rows: usize) -> Layout {
        Layout::new(rows, self.form.top_k, self.experts.len(), self.width, self.inner)
    }

    /// Runs one linear layer of every expert on its group of rows. Tiles of all experts are claimed from one ticket.
    ///
    /// # Safety
    /// `starts` has a value more than there are experts and ascends; `args` gives operands valid for the rows of an expert's
    /// group and the kernel that `pick` gives.
    unsafe fn every_expert<'s>(
        &'s self,
        team: &Team<'_>,
        starts: &[i32],
        scratch: *mut f32,
        pick: impl Fn(&'s Expert) -> &'s LinearKernel,
        args: impl Fn(&'s Expert, usize, usize) -> LinearArgs,
    ) {
        let rows = |e: usize| (starts[e + 1] - starts[e]) as usize;
        let grid = |e: usize| pick(&self.experts[e]).grid(rows(e), team.count());
        let total = (0..self.experts.len()).map(|e| grid(e).tiles()).sum();
        let (mut expert, mut base, mut current) = (0, 0, grid(0));
        for tile in team.tiles(total) {
            while tile - base >= current.tiles() {
                base += current.tiles();
                expert += 1;
                current = grid(expert);
            }
            let of = &self.experts[expert];
            let args = args(of, starts[expert] as usize, rows(expert));
            // SAFETY: passed on to the caller; each tile is claimed by one worker.
            unsafe { pick(of).run_tile(&args, &current, tile - base, scratch) };
        }
    }
}

fn linear_args(x: *const f32, x_stride: usize, out: *mut f32, out_stride: usize) -> LinearArgs {
    LinearArgs {
        m: 0,
        x,
        x_stride,
        w: null(),
        bias: null(),
        residual: null(),
        residual_stride: 0,
        out,
        out_stride,
        activation: Activation::None,
    }
}

impl Step for MoeStep {
    fn name(&self) -> String {
        format!("moe_{}", self.experts[0].gate_up.0.name(64))
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        visit(&self.x, Access::Read);
        visit(&self.logits, Access::Read);
        visit(&self.out, Access::Write);
    }

    fn worker_scratch(&self, _sizes: &[usize]) -> usize {
        let floats = |e: &Expert| e.gate_up.0.scratch_len().max(e.down.0.scratch_len());
        self.experts.iter().map(floats).max().unwrap_or(0) * size_of::<f32>()
    }

    fn shared_scratch(&self, sizes: &[usize], _workers: usize) -> usize {
        self.layout(sizes[self.logits.dims[0]]).end
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let rows = run.rows(&self.x);
        if !self.fits(run, rows) {
            return Err(StepError::Shape { step: format!("moe_{}", self.isa) });
        }
        let (k, width, inner) = (self.form.top_k, self.width, self.inner);
        let layout = self.layout(rows);
        let shared = run.shared_scratch::<u8>();
        let at = |offset: usize| shared.wrapping_add(offset);
        let route = RouteArgs {
            logits: run.pointer::<f32>(&self.logits).cast_const(),
            logits_stride: run.stride(&self.logits),
            experts: self.experts.len(),
            k,
            routing: Routing::SoftmaxThenTop { renormalise: self.form.renormalize },
            weights: at(layout.weights).cast(),
            chosen: at(layout.chosen).cast(),
        };
        let group = GroupArgs {
            chosen: route.chosen,
            rows,
            k,
            experts: self.experts.len(),
            starts: at(layout.starts).cast(),
            row_of_place: at(layout.row_of_place).cast(),
            place_of: at(layout.place_of).cast(),
        };
        let gather = RowArgs {
            from: run.pointer::<u8>(&self.x).cast_const(),
            from_stride: run.stride(&self.x) * size_of::<f32>(),
            to: at(layout.rows),
            to_stride: width * size_of::<f32>(),
            row_bytes: width * size_of::<f32>(),
            ids: Ids::I32(group.row_of_place),
            rows: rows * k,
            rows_per_tile: 8,
        };
        // SAFETY: sizes were checked above, and regions by the launch; shared scratch is as long as `Layout` says for these rows or
        // more; routing chooses experts below their number, so groups cover every place once. What one phase writes another reads
        // only past a barrier, and in a phase each row, place or tile is written by the worker that claimed it.
        unsafe {
            for row in team.tiles(rows) {
                (self.route)(&route, row);
            }
            team.barrier();
            if team.index() == 0 {
                (self.group)(&group, 0);
            }
            team.barrier();
            for tile in team.tiles(gather.tiles()) {
                (self.gather)(&gather, tile);
            }
            team.barrier();
            let starts = std::slice::from_raw_parts(group.starts, self.experts.len() + 1);
            let (gathered, hidden) = (at(layout.rows).cast::<f32>(), at(layout.inner).cast::<f32>());
            let scratch = run.worker_scratch(team);
            let up = |e: &Expert, start: usize, m: usize| LinearArgs {
                m,
                w: e.gate_up.1.bytes().as_ptr(),
                activation: self.form.activation,
                ..linear_args(
                    gathered.wrapping_add(start * width),
                    width,
                    hidden.wrapping_add(start * inner),
                    inner,
                )
            };
            self.every_expert(team, starts, scratch, |e| &e.gate_up.0, up);
            team.barrier();
            let down = |e: &Expert, start: usize, m: usize| LinearArgs {
                m,
                w: e.down.1.bytes().as_ptr(),
                ..linear_args(
                    hidden.wrapping_add(start * inner),
                    inner,
                    gathered.wrapping_add(start * width),
                    width,
                )
            };
            self.every_expert(team, starts, scratch, |e| &e.down.0, down);
            team.barrier();
            let combine = CombineArgs {
                y: gathered,
                y_stride: width,
                weights: route.weights,
                place_of: group.place_of,
                k,
                cols: width,
                residual: null(),
                residual_stride: 0,
                out: run.pointer(&self.out),
                out_stride: run.stride(&self.out),
            };
            for row in team.tiles(rows) {
                (self.combine)(&combine, row);
            }
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
