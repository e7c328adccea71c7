//! A linear layer over a packed matrix whose rows may each have a low-rank update.

use super::linear::LinearStep;
use crate::gemm::LinearArgs;
use crate::isa::{Entry, Isa};
use crate::lora::{FactorType, Factors, LoraArgs, down_entry, up_entry};
use crate::pool::Team;
use crate::schedule::{Access, Operand, Run, Step, StepError};
use rlx_tensor::DType;
use std::any::Any;

/// Where one part of the layer has its factors and its scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoraPart {
    /// Column of the scales.
    pub site: usize,
    /// First column of the factors: A, then B.
    pub column: usize,
    /// Output columns of the part.
    pub n: usize,
}

/// Most adapters of a step.
pub const MAX_SLOTS: usize = 64;

/// [`LinearStep`] with each row's update added before the activation.
#[derive(Debug)]
pub struct LoraLinearStep {
    linear: LinearStep,
    parts: Vec<LoraPart>,
    down: Entry<LoraArgs>,
    up: Entry<LoraArgs>,
    slots: Operand,
    scales: Operand,
    adapters: Vec<Operand>,
}

/// Floats of a row of the scratch that workers share: inner values of each part, then the update.
fn row_floats(parts: usize, rank: usize, n: usize) -> usize {
    parts.saturating_mul(rank).saturating_add(n)
}

/// Bytes of scratch that workers share for `rows` rows, adapters of at most `rank` and `n` columns of all parts.
pub fn lora_shared_scratch(rows: usize, parts: usize, rank: usize, n: usize) -> usize {
    let floats = rows.saturating_mul(row_floats(parts, rank, n));
    floats.saturating_mul(size_of::<f32>()).saturating_add(63) / 64 * 64
}

impl LoraLinearStep {
    /// The step for an instruction set; `None` if it is not available, the parts are not the matrix's, or the adapters' dtypes
    /// differ or have no kernel.
    pub fn new(
        isa: Isa,
        linear: LinearStep,
        parts: Vec<LoraPart>,
        slots: Operand,
        scales: Operand,
        adapters: Vec<Operand>,
    ) -> Option<Self> {
        let dtype = adapters.first()?.dtype;
        let factors = match dtype {
            DType::F32 => FactorType::F32,
            DType::BF16 => FactorType::Bf16,
            _ => return None,
        };
        let columns: usize = parts.iter().map(|part| part.n).sum();
        let plain = |operand: &Operand, rank| operand.dims.len() == rank && operand.stride.is_none();
        let fits = !parts.is_empty()
            && columns == linear.columns()
            && adapters.len() <= MAX_SLOTS
            && adapters.iter().all(|a| a.dtype == dtype && plain(a, 2))
            && plain(&slots, 1)
            && plain(&scales, 2);
        if !fits {
            return None;
        }
        let (down, up) = (down_entry(isa, factors)?, up_entry(isa, factors)?);
        Some(Self { linear, parts, down, up, slots, scales, adapters })
    }

    fn columns(&self) -> usize {
        self.linear.columns()
    }

    /// Checks operands against each other, once a worker and before any barrier.
    fn check(&self, run: &Run<'_>, args: &LinearArgs) -> Result<usize, StepError> {
        let k = self.linear.inputs();
        let width = self.adapters.iter().map(|a| run.columns(a)).min().unwrap_or(0);
        let sites = run.columns(&self.scales);
        let fits = run.len(&self.slots) == args.m
            && run.rows(&self.scales) == self.adapters.len()
            && self.parts.iter().all(|p| {
                let end = p.column.checked_add(k).and_then(|end| end.checked_add(p.n));
                p.site < sites && end.is_some_and(|end| end <= width)
            });
        if !fits {
            return Err(StepError::Shape { step: self.name() });
        }
        // SAFETY: the operand is contiguous I32 (`new`, inference), in its region, and an input that nobody writes.
        let slots = unsafe { run.slice::<i32>(&self.slots) };
        let limit = self.adapters.len();
        for (position, &slot) in slots.iter().enumerate() {
            let known = usize::try_from(slot).is_ok_and(|s| s < limit && run.rows(&self.adapters[s]) > 0);
            if slot != -1 && !known {
                let (step, index) = (self.name(), i64::from(slot));
                return Err(StepError::Index { step, what: "adapter", index, position, limit });
            }
        }
        Ok(self.adapters.iter().map(|a| run.rows(a)).max().unwrap_or(0))
    }

    fn factors(&self, run: &Run<'_>) -> [Factors; MAX_SLOTS] {
        let mut factors = [Factors { rows: std::ptr::null(), rank: 0, stride: 0 }; MAX_SLOTS];
        for (factors, adapter) in factors.iter_mut().zip(&self.adapters) {
            let rows = run.pointer::<u8>(adapter).cast_const();
            *factors = Factors { rows, rank: run.rows(adapter), stride: run.columns(adapter) };
        }
        factors
    }
}

impl Step for LoraLinearStep {
    fn name(&self) -> String {
        format!("lora_{}", self.linear.name())
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        self.linear.operands(visit);
        visit(&self.slots, Access::Read);
        visit(&self.scales, Access::Read);
        self.adapters.iter().for_each(|adapter| visit(adapter, Access::Read));
    }

    fn worker_scratch(&self, sizes: &[usize]) -> usize {
        self.linear.worker_scratch(sizes)
    }

    fn shared_scratch(&self, sizes: &[usize], _workers: usize) -> usize {
        let rank = self.adapters.iter().map(|a| sizes[a.dims[0]]).max().unwrap_or(0);
        let rows = sizes[self.slots.dims[0]];
        let updates = lora_shared_scratch(rows, self.parts.len(), rank, self.columns());
        updates.saturating_add(self.linear.quantized_bytes(rows))
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let plain = self.linear.args(run)?;
        let rank = self.check(run, &plain)?;
        let (n, k) = (self.columns(), self.linear.inputs());
        let inner = run.shared_scratch::<f32>();
        let deltas = inner.wrapping_add(plain.m * self.parts.len() * rank);
        let factors = self.factors(run);
        let part_args = |at: usize| {
            let part = &self.parts[at];
            LoraArgs {
                x: plain.x,
                x_stride: plain.x_stride,
                m: plain.m,
                slots: run.pointer::<i32>(&self.slots).cast_const(),
                factors: factors.as_ptr(),
                scales: run.pointer::<f32>(&self.scales).wrapping_add(part.site).cast_const(),
                scales_stride: run.columns(&self.scales),
                a: part.column,
                k,
                b: part.column + k,
                n: part.n,
                t: inner.wrapping_add(plain.m * at * rank),
                t_stride: rank,
                delta: deltas.wrapping_add(self.parts[..at].iter().map(|p| p.n).sum()),
                delta_stride: n,
            }
        };
        // SAFETY: `args` and `check` compared rows, widths, slots and sites with the operands, whose bounds the launch checked;
        // shared scratch is as long as `lora_shared_scratch` says; what the down half writes the up half reads past a barrier,
        // and each tile is claimed by one worker.
        unsafe {
            let row_tiles = part_args(0).row_tiles();
            for tile in team.tiles(row_tiles * self.parts.len()) {
                (self.down)(&part_args(tile / row_tiles), tile % row_tiles);
            }
            team.barrier();
            let (mut at, mut base, mut args) = (0, 0, part_args(0));
            for tile in team.tiles((0..self.parts.len()).map(|at| part_args(at).up_tiles()).sum()) {
                while tile - base >= args.up_tiles() {
                    base += args.up_tiles();
                    at += 1;
                    args = part_args(at);
                }
                (self.up)(&args, tile - base);
            }
        }
        team.barrier();
        let args = LinearArgs { addend: deltas, addend_stride: n, ..plain };
        let updates = lora_shared_scratch(plain.m, self.parts.len(), rank, n);
        let quantized = run.shared_scratch::<u8>().wrapping_add(updates);
        // SAFETY: as for `LinearStep`; the addend has `n` values for each row, written before the barrier, and ends before the
        // quantised rows.
        unsafe { self.linear.run_pieces(team, &args, run.worker_scratch(team), quantized) };
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
