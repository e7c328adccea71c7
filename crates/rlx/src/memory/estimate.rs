//! The peak of a model's memory in parts, and whether it fits.

use crate::backend::Backend;
use crate::plan::{BufferKind, Lir};
use crate::session::SessionError;
use crate::weights::WeightRegistry;
use std::collections::HashSet;
use std::fmt;

/// What a part of the memory holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum MemoryPart {
    /// Weights as stored that stay in memory while running.
    Weights,
    /// Weights in the layout of the kernels.
    Packed,
    /// The arena.
    Activation,
    /// State, such as a KV cache.
    State,
    /// Scratch memory of kernels outside the arena.
    Workspace,
    /// Inputs.
    Inputs,
    /// Outputs.
    Outputs,
    /// Adapters.
    Adapters,
    /// Everything beside tensors: tokenizer, stacks of the threads, slack of the allocator.
    Host,
}

impl MemoryPart {
    /// The name in reports and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            MemoryPart::Weights => "weights",
            MemoryPart::Packed => "packed",
            MemoryPart::Activation => "activation",
            MemoryPart::State => "state",
            MemoryPart::Workspace => "workspace",
            MemoryPart::Inputs => "inputs",
            MemoryPart::Outputs => "outputs",
            MemoryPart::Adapters => "adapters",
            MemoryPart::Host => "host",
        }
    }
}

/// The peak of a model's memory, known before a weight is read. All figures are bytes at the capacities.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// The arena.
    pub activation_bytes: u64,
    /// Weights as stored that stay in memory while running; each storage once.
    pub weight_bytes: u64,
    /// Weights and constants of the graph in the layout of the kernels.
    pub packed_bytes: u64,
    /// Inputs.
    pub input_bytes: u64,
    /// Outputs.
    pub output_bytes: u64,
    /// State, such as a KV cache.
    pub state_bytes: u64,
    /// Scratch memory of kernels outside the arena.
    pub workspace_bytes: u64,
    /// Adapters.
    pub adapter_bytes: u64,
    /// Everything beside tensors.
    pub host_bytes: u64,
    /// How much of the weights, packed weights and adapters are pages of mapped files, which the system can drop and read again.
    pub mapped_bytes: u64,
}

impl MemoryEstimate {
    /// The parts a plan alone decides: arena, weights as stored (all of them anonymous), inputs, outputs and state.
    ///
    /// The rest is zero: packed weights, workspace, adapters and host depend on what runs the plan.
    pub fn of_plan(lir: &Lir) -> MemoryEstimate {
        let mut estimate =
            MemoryEstimate { activation_bytes: lir.arena_bytes() as u64, ..Default::default() };
        for (id, buffer) in lir.template().buffer_ids() {
            let bytes = lir.buffer_bytes(id) as u64;
            let part = match buffer.kind {
                BufferKind::Arena => continue,
                BufferKind::Input(_) => &mut estimate.input_bytes,
                BufferKind::Output(_) => &mut estimate.output_bytes,
                BufferKind::State(_) => &mut estimate.state_bytes,
                BufferKind::Param(_) | BufferKind::Const(_) => &mut estimate.weight_bytes,
            };
            *part = part.saturating_add(bytes);
        }
        estimate
    }

    /// The parts of [`MemoryEstimate::of_plan`] with what a backend adds, and weights by storage.
    fn with_backend(
        lir: &Lir,
        backend: &dyn Backend,
        weights: &WeightRegistry,
        counted: &mut HashSet<u64>,
    ) -> Result<Self, SessionError> {
        let mut estimate = Self::of_plan(lir);
        estimate.weight_bytes = 0;
        for buffer in lir.template().buffers() {
            if let BufferKind::Const(tensor) = &buffer.kind {
                estimate.weight_bytes = estimate.weight_bytes.saturating_add(tensor.bytes().len() as u64);
            }
        }
        let raw = backend.raw_params(lir.template());
        for param in lir.template().params() {
            let Some(handle) = weights.lookup(&param.name) else {
                let bytes = lir.buffer_bytes(param.place.buffer) as u64;
                estimate.weight_bytes = estimate.weight_bytes.saturating_add(bytes);
                continue;
            };
            let placement = weights.placement(handle)?;
            // Packing gives the pages of a file back; bytes in memory stay with the registry.
            let only_packed = raw.as_ref().is_some_and(|raw| !raw.contains(&param.name));
            if only_packed && (placement.mapped || placement.lazy) {
                continue;
            }
            if !counted.insert(placement.storage) {
                continue;
            }
            let part = match placement.adapter {
                true => &mut estimate.adapter_bytes,
                false => &mut estimate.weight_bytes,
            };
            *part = part.saturating_add(placement.bytes);
            if placement.mapped {
                estimate.mapped_bytes = estimate.mapped_bytes.saturating_add(placement.bytes);
            }
        }
        let packed = backend.packed_bytes(lir.template())? as u64;
        estimate.packed_bytes = packed.saturating_add(backend.own_bytes(lir.template()) as u64);
        let mapped = backend.packed_mapped_bytes(lir.template(), weights)?.min(packed);
        estimate.mapped_bytes = estimate.mapped_bytes.saturating_add(mapped);
        let template = lir.template();
        let saved = template.overwritten_states().map(|at| template.states()[at].place.buffer);
        let saved: u64 = saved.map(|buffer| lir.buffer_bytes(buffer) as u64).sum();
        estimate.workspace_bytes = (backend.workspace_bytes(lir)? as u64).saturating_add(saved);
        Ok(estimate)
    }

    /// The parts of both, saturating.
    #[must_use]
    pub fn plus(&self, other: &MemoryEstimate) -> MemoryEstimate {
        let sum = |part: fn(&MemoryEstimate) -> u64| part(self).saturating_add(part(other));
        MemoryEstimate {
            activation_bytes: sum(|e| e.activation_bytes),
            weight_bytes: sum(|e| e.weight_bytes),
            packed_bytes: sum(|e| e.packed_bytes),
            input_bytes: sum(|e| e.input_bytes),
            output_bytes: sum(|e| e.output_bytes),
            state_bytes: sum(|e| e.state_bytes),
            workspace_bytes: sum(|e| e.workspace_bytes),
            adapter_bytes: sum(|e| e.adapter_bytes),
            host_bytes: sum(|e| e.host_bytes),
            mapped_bytes: sum(|e| e.mapped_bytes),
        }
    }

    /// Every part with its bytes, in the order of reports.
    pub fn parts(&self) -> [(MemoryPart, u64); 9] {
        [
            (MemoryPart::Weights, self.weight_bytes),
            (MemoryPart::Packed, self.packed_bytes),
            (MemoryPart::Activation, self.activation_bytes),
            (MemoryPart::State, self.state_bytes),
            (MemoryPart::Workspace, self.workspace_bytes),
            (MemoryPart::Inputs, self.input_bytes),
            (MemoryPart::Outputs, self.output_bytes),
            (MemoryPart::Adapters, self.adapter_bytes),
            (MemoryPart::Host, self.host_bytes),
        ]
    }

    /// The sum of the parts, mapped pages included, saturating.
    pub fn total_bytes(&self) -> u64 {
        self.parts().into_iter().fold(0, |sum, (_, bytes)| sum.saturating_add(bytes))
    }

    /// The peak of what the system cannot take back: the sum of the parts without mapped pages.
    pub fn peak_bytes(&self) -> u64 {
        self.total_bytes().saturating_sub(self.mapped_bytes)
    }

    /// Whether the peak is at most `budget_bytes`.
    pub fn fits_in(&self, budget_bytes: u64) -> Result<(), MemoryDeficit> {
        if self.peak_bytes() <= budget_bytes {
            return Ok(());
        }
        Err(MemoryDeficit { budget_bytes, peak_bytes: self.peak_bytes(), estimate: *self })
    }
}

/// The peak of memory of runs of a plan on a backend, with each storage of the registry once. No weight is read: shapes and headers
/// alone count. What belongs to the process and not to the plan (tokenizer, thread stacks) is for the caller to add as `host_bytes`.
///
/// # Errors
/// [`SessionError::Backend`] if the backend cannot size its copies or scratch memory.
pub fn estimate_with(
    lir: &Lir,
    backend: &dyn Backend,
    weights: &WeightRegistry,
) -> Result<MemoryEstimate, SessionError> {
    MemoryEstimate::with_backend(lir, backend, weights, &mut HashSet::new())
}

/// The same for plans that run beside each other on one registry: a storage that several read as it is stored counts once.
///
/// # Errors
/// As [`estimate_with`].
pub fn estimate_together(
    plans: &[(&Lir, &dyn Backend)],
    weights: &WeightRegistry,
) -> Result<MemoryEstimate, SessionError> {
    let (mut counted, mut sum) = (HashSet::new(), MemoryEstimate::default());
    for (lir, backend) in plans {
        sum = sum.plus(&MemoryEstimate::with_backend(lir, *backend, weights, &mut counted)?);
    }
    Ok(sum)
}

/// A peak that does not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct MemoryDeficit {
    /// What may be used.
    pub budget_bytes: u64,
    /// What is needed.
    pub peak_bytes: u64,
    /// The parts of the need.
    pub estimate: MemoryEstimate,
}

impl MemoryDeficit {
    /// How much is lacking.
    pub fn shortfall_bytes(&self) -> u64 {
        self.peak_bytes.saturating_sub(self.budget_bytes)
    }
}

impl fmt::Display for MemoryDeficit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / (1u64 << 20) as f64;
        write!(
            f,
            "needs {:.1} MiB, {:.1} MiB more than the budget of {:.1} MiB (",
            mib(self.peak_bytes),
            mib(self.shortfall_bytes()),
            mib(self.budget_bytes)
        )?;
        let parts = self.estimate.parts().into_iter().filter(|(_, bytes)| *bytes > 0);
        for (at, (part, bytes)) in parts.enumerate() {
            let comma = if at == 0 { "" } else { ", " };
            write!(f, "{comma}{} {:.1}", part.name(), mib(bytes))?;
        }
        f.write_str(" MiB)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn estimate() -> MemoryEstimate {
        MemoryEstimate {
            weight_bytes: 3 << 20,
            packed_bytes: 5 << 19,
            state_bytes: 1 << 19,
            ..Default::default()
        }
    }

    #[test]
    fn a_peak_equal_to_the_budget_fits() {
        assert_eq!(estimate().peak_bytes(), 6 << 20);
        assert_eq!(estimate().fits_in(6 << 20), Ok(()));
        let deficit = estimate().fits_in((6 << 20) - (1 << 19)).expect_err("half a MiB is lacking");
        assert_eq!(deficit.shortfall_bytes(), 1 << 19);
        assert_eq!(
            deficit.to_string(),
            "needs 6.0 MiB, 0.5 MiB more than the budget of 5.5 MiB (weights 3.0, packed 2.5, state 0.5 MiB)"
        );
    }

    #[test]
    fn parts_add_up_without_wrapping() {
        let full = MemoryEstimate { host_bytes: u64::MAX, input_bytes: 2, ..estimate() };
        assert_eq!(full.peak_bytes(), u64::MAX);
        let mapped = MemoryEstimate { mapped_bytes: 3 << 20, ..estimate() };
        assert_eq!((mapped.peak_bytes(), mapped.total_bytes()), (3 << 20, 6 << 20));
        let names: std::collections::BTreeSet<_> = full.parts().iter().map(|(part, _)| part.name()).collect();
        assert_eq!(names.len(), 9);
    }
}
