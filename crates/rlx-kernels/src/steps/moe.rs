//! A mixture of gated experts over packed weights.

use crate::gather::{Ids, RowArgs, gather_entry};
use crate::gemm::{Activation, LinearArgs, LinearKernel, PackedMatrix, RowsReady};
use crate::isa::{Entry, Isa};
use crate::moe::{CombineArgs, GroupArgs, RouteArgs, Routing, combine_entry, group_entry, route_entry};
use crate::pool::Team;
use crate::schedule::{Access, Operand, Run, Step, StepError};
use std::any::Any;
use std::fmt;
use std::ptr::{null, null_mut};
use std::sync::Arc;

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

/// The kernels of one expert, and its weights if they stay in memory.
#[derive(Debug)]
pub struct Expert {
    /// Gate and up, interleaved.
    pub gate_up: (LinearKernel, Option<PackedMatrix>),
    /// Down.
    pub down: (LinearKernel, Option<PackedMatrix>),
}

/// An expert whose weights are in memory.
#[derive(Debug, Clone, Copy)]
pub struct LoadedExpert<'e> {
    /// Its number.
    pub expert: usize,
    /// Gate and up, interleaved.
    pub gate_up: &'e PackedMatrix,
    /// Down.
    pub down: &'e PackedMatrix,
}

/// Brings experts into memory as they are needed.
pub trait ExpertSource: Send + Sync + fmt::Debug {
    /// Calls `each` with groups of the `needed` experts, ascending, so that every one of them is in one group. What a group holds
    /// stays in memory until `each` returns.
    ///
    /// # Errors
    /// In words, if an expert cannot be loaded; groups before it have run.
    fn visit(&self, needed: &[usize], each: &mut dyn FnMut(&[LoadedExpert<'_>])) -> Result<(), String>;
}

/// Each row through its experts, whose outputs are summed from the most probable down. Rows are grouped by expert, so that each
/// expert's weights are read once; what a row gets does not depend on the other rows.
#[derive(Debug)]
pub struct MoeStep {
    isa: Isa,
    form: MoeForm,
    experts: Vec<Expert>,
    source: Option<Arc<dyn ExpertSource>>,
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
    /// See [`Grouped::loaded`].
    loaded: usize,
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
        let loaded = take((2 * experts + 1) * (size_of::<usize>() / 4));
        let (rows, inner) = (take(places.saturating_mul(width)), take(places.saturating_mul(inner)));
        Self { weights, chosen, starts, row_of_place, place_of, loaded, rows, inner, end }
    }
}

/// Bytes of scratch that workers share for up to `rows` rows, experts of `width` columns and at most `inner` inner columns.
pub fn moe_shared_scratch(rows: usize, top_k: usize, experts: usize, width: usize, inner: usize) -> usize {
    Layout::new(rows, top_k, experts, width, inner).end
}

impl MoeStep {
    /// The step for an instruction set; `None` if it is not available, or the weights do not fit each other or the kernels. Experts
    /// without weights come from `source`.
    pub fn new(
        isa: Isa,
        form: MoeForm,
        experts: Vec<Expert>,
        source: Option<Arc<dyn ExpertSource>>,
        x: Operand,
        logits: Operand,
        out: Operand,
    ) -> Option<Self> {
        let width = experts.first()?.gate_up.0.layout().k();
        let held = |(kernel, matrix): &(LinearKernel, Option<PackedMatrix>)| match matrix {
            Some(matrix) => matrix.layout() == kernel.layout(),
            None => source.is_some(),
        };
        let fits = |expert: &Expert| {
            let (gate_up, down) = (expert.gate_up.0.layout(), expert.down.0.layout());
            let kernels = held(&expert.gate_up) && held(&expert.down);
            let plain = gate_up.gated() && !down.gated();
            kernels && plain && gate_up.k() == width && down.n() == width && gate_up.outputs() == down.k()
        };
        let routed = (1..=experts.len()).contains(&form.top_k) && logits.dims.len() == 2;
        if !routed || !experts.iter().all(fits) {
            return None;
        }
        let inner = experts.iter().map(|e| e.down.0.layout().k()).max()?;
        let (route, group) = (route_entry(isa)?, group_entry(isa)?);
        let (gather, combine) = (gather_entry(isa)?, combine_entry(isa)?);
        Some(Self { isa, form, experts, source, width, inner, route, group, gather, combine, x, logits, out })
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

    /// Runs one linear layer of every expert on its rows. Tiles of all experts are claimed from one ticket.
    ///
    /// # Safety
    /// `args` gives operands valid for that many rows of an expert and the kernel that `pick` gives.
    unsafe fn every_expert<'s>(
        &'s self,
        team: &Team<'_>,
        rows: impl Fn(usize) -> usize,
        scratch: *mut f32,
        pick: impl Fn(&'s Expert) -> &'s LinearKernel,
        args: impl Fn(usize) -> LinearArgs,
    ) {
        let grid = |e: usize| pick(&self.experts[e]).grid(rows(e), team.count());
        let total = (0..self.experts.len()).map(|e| grid(e).tiles()).sum();
        let (mut expert, mut base, mut current) = (0, 0, grid(0));
        let mut ready = RowsReady::default();
        for tile in team.tiles(total) {
            while tile - base >= current.tiles() {
                base += current.tiles();
                expert += 1;
                (current, ready) = (grid(expert), RowsReady::default());
            }
            // SAFETY: passed on to the caller; each tile is claimed by one worker.
            unsafe {
                let kernel = pick(&self.experts[expert]);
                kernel.run_tile(&args(expert), &current, tile - base, scratch, &mut ready);
            }
        }
    }

    /// Runs the experts that are in memory on their rows, and ends with a barrier.
    ///
    /// # Safety
    /// `grouped` is of this run, past the barrier after the gather; `scratch` is this worker's.
    unsafe fn run_loaded(&self, team: &Team<'_>, grouped: &Grouped<'_>, scratch: *mut f32) {
        let (width, inner) = (self.width, self.inner);
        let rows = |e: usize| match grouped.weights(&self.experts[e], e) {
            [gate_up, _] if gate_up.is_null() => 0,
            _ => grouped.rows(e),
        };
        let up = |e: usize| {
            let start = grouped.starts[e] as usize;
            let (from, to) =
                (grouped.gathered.wrapping_add(start * width), grouped.hidden.wrapping_add(start * inner));
            let [w, _] = grouped.weights(&self.experts[e], e);
            LinearArgs {
                m: rows(e),
                w,
                activation: self.form.activation,
                ..linear_args(from, width, to, inner)
            }
        };
        let down = |e: usize| {
            let start = grouped.starts[e] as usize;
            let (from, to) =
                (grouped.hidden.wrapping_add(start * inner), grouped.gathered.wrapping_add(start * width));
            let [_, w] = grouped.weights(&self.experts[e], e);
            LinearArgs { m: rows(e), w, ..linear_args(from, inner, to, width) }
        };
        // SAFETY: the caller's; an expert's rows are apart from those of others, and the weights of those that run are held.
        unsafe {
            self.every_expert(team, rows, scratch, |e| &e.gate_up.0, up);
            team.barrier();
            self.every_expert(team, rows, scratch, |e| &e.down.0, down);
            team.barrier();
        }
    }

    /// Worker 0's part of a run over a source: it loads, tells the others what is there, and runs with them.
    ///
    /// # Safety
    /// As for [`MoeStep::run_loaded`].
    unsafe fn lead(
        &self,
        source: &dyn ExpertSource,
        team: &Team<'_>,
        grouped: &Grouped<'_>,
        scratch: *mut f32,
    ) -> Result<(), StepError> {
        let needed: Vec<usize> = (0..self.experts.len()).filter(|&e| grouped.rows(e) > 0).collect();
        let result = source.visit(&needed, &mut |loaded| {
            let fits = |l: &LoadedExpert<'_>| {
                self.experts.get(l.expert).is_some_and(|e| {
                    e.gate_up.0.layout() == l.gate_up.layout() && e.down.0.layout() == l.down.layout()
                })
            };
            // SAFETY: the others wait at the barrier, so nobody reads the table; weights have the kernels' layouts and are held until
            // this closure returns.
            unsafe {
                grouped.loaded.write_bytes(0, 2 * self.experts.len());
                for expert in loaded.iter().filter(|l| fits(l)) {
                    *grouped.loaded.add(2 * expert.expert) = expert.gate_up.bytes().as_ptr();
                    *grouped.loaded.add(2 * expert.expert + 1) = expert.down.bytes().as_ptr();
                }
                *grouped.more() = 1;
                team.barrier();
                self.run_loaded(team, grouped, scratch);
            }
        });
        // SAFETY: as above.
        unsafe { *grouped.more() = 0 };
        team.barrier();
        result.map_err(|reason| StepError::Value { step: self.name(), reason })
    }
}

/// The rows of a run by expert.
struct Grouped<'g> {
    experts: usize,
    starts: &'g [i32],
    gathered: *mut f32,
    hidden: *mut f32,
    /// Two pointers for each expert, null for those not in memory, and a word that says whether there is another group; null if all
    /// experts stay in memory.
    loaded: *mut *const u8,
}

impl Grouped<'_> {
    fn rows(&self, expert: usize) -> usize {
        (self.starts[expert + 1] - self.starts[expert]) as usize
    }

    fn more(&self) -> *mut usize {
        self.loaded.wrapping_add(2 * self.experts).cast()
    }

    fn weights(&self, of: &Expert, expert: usize) -> [*const u8; 2] {
        let held = |matrix: &Option<PackedMatrix>| matrix.as_ref().map_or(null(), |m| m.bytes().as_ptr());
        if self.loaded.is_null() {
            return [held(&of.gate_up.1), held(&of.down.1)];
        }
        // SAFETY: the table has two pointers for each expert, written before the barrier that this worker has passed.
        unsafe { [*self.loaded.add(2 * expert), *self.loaded.add(2 * expert + 1)] }
    }
}

fn linear_args(x: *const f32, x_stride: usize, out: *mut f32, out_stride: usize) -> LinearArgs {
    LinearArgs {
        m: 0,
        x,
        x_stride,
        w: null(),
        bias: null(),
        addend: null(),
        addend_stride: 0,
        residual: null(),
        residual_stride: 0,
        out,
        out_stride,
        activation: Activation::None,
        quantized: null(),
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
        let (k, width) = (self.form.top_k, self.width);
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
            let (gathered, hidden) = (at(layout.rows).cast::<f32>(), at(layout.inner).cast::<f32>());
            let grouped = Grouped {
                experts: self.experts.len(),
                starts: std::slice::from_raw_parts(group.starts, self.experts.len() + 1),
                gathered,
                hidden,
                loaded: if self.source.is_some() { at(layout.loaded).cast() } else { null_mut() },
            };
            let scratch = run.worker_scratch(team);
            match &self.source {
                None => self.run_loaded(team, &grouped, scratch),
                Some(source) if team.index() == 0 => self.lead(source.as_ref(), team, &grouped, scratch)?,
                Some(_) => {
                    team.barrier();
                    while *grouped.more() != 0 {
                        self.run_loaded(team, &grouped, scratch);
                        team.barrier();
                    }
                }
            }
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
