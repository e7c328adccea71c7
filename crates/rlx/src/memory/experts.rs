//! Experts that are not all in memory: how many fit, what that saves, and the pool that loads them as the router asks.

mod pool;
mod residency;
mod trace;

pub use pool::{ExpertPool, ExpertStats, LayerExperts};
pub(crate) use pool::{ExpertWeight, ExpertWeights};
pub use residency::{ExpertPolicy, Residency, Wave};
pub use trace::{ExpertTrace, ReplayStats, TraceError, replay};

use super::MemoryEstimate;

/// A mixture of experts with some of the experts of each layer in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MoeOffloadEstimate {
    /// Bytes of one expert.
    pub expert_param_bytes: u64,
    /// Layers that have experts.
    pub num_moe_layers: usize,
    /// Experts of a layer.
    pub num_experts: usize,
    /// Experts of each layer in memory; 0 if not even one of each fits.
    pub gpu_expert_budget_per_layer: usize,
    /// Bytes of all experts of all layers.
    pub all_expert_weight_bytes: u64,
    /// Bytes of the experts in memory.
    pub resident_expert_weight_bytes: u64,
}

/// Sizes that describe no mixture of experts.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ExpertError {
    /// A size of zero.
    #[error("{what} is 0: expected at least 1")]
    Zero {
        /// Which.
        what: &'static str,
    },
    /// A fraction outside [0, 1).
    #[error("reserve fraction {found}: expected at least 0 and below 1")]
    Fraction {
        /// The fraction.
        found: f64,
    },
    /// The experts take more than the weights that hold them.
    #[error("the experts take {expert_bytes} bytes, the model's weights {weight_bytes}")]
    LargerThanWeights {
        /// Bytes of all experts.
        expert_bytes: u64,
        /// Bytes of all weights.
        weight_bytes: u64,
    },
    /// A layer was registered twice with other experts.
    #[error("layer {layer} has other experts already")]
    Layer {
        /// The layer.
        layer: usize,
    },
}

/// How many experts of each layer fit into `budget_bytes`, of which a fraction stays free; at most `max_per_layer`.
///
/// # Errors
/// [`ExpertError`] for a size of zero or a fraction outside [0, 1).
pub fn gpu_expert_budget_from_vram(
    expert_param_bytes: u64,
    num_moe_layers: usize,
    num_experts: usize,
    max_per_layer: usize,
    budget_bytes: u64,
    reserve_fraction: f64,
) -> Result<usize, ExpertError> {
    let sizes = [
        ("expert_param_bytes", expert_param_bytes),
        ("num_moe_layers", num_moe_layers as u64),
        ("num_experts", num_experts as u64),
        ("max_per_layer", max_per_layer as u64),
    ];
    if let Some((what, _)) = sizes.iter().find(|(_, size)| *size == 0) {
        return Err(ExpertError::Zero { what });
    }
    if !(0.0..1.0).contains(&reserve_fraction) {
        return Err(ExpertError::Fraction { found: reserve_fraction });
    }
    let usable = (budget_bytes as f64 * (1.0 - reserve_fraction)) as u64;
    let one_of_each = expert_param_bytes.saturating_mul(num_moe_layers as u64);
    let fit = usable.min(budget_bytes) / one_of_each;
    Ok(usize::try_from(fit).unwrap_or(usize::MAX).min(num_experts).min(max_per_layer))
}

/// The experts in memory under `budget_bytes`, which is what remains for them beside everything else.
///
/// # Errors
/// As [`gpu_expert_budget_from_vram`].
pub fn estimate_moe_offload(
    expert_param_bytes: u64,
    num_moe_layers: usize,
    num_experts: usize,
    max_per_layer: usize,
    budget_bytes: u64,
    reserve_fraction: f64,
) -> Result<MoeOffloadEstimate, ExpertError> {
    let gpu_expert_budget_per_layer = gpu_expert_budget_from_vram(
        expert_param_bytes,
        num_moe_layers,
        num_experts,
        max_per_layer,
        budget_bytes,
        reserve_fraction,
    )?;
    let of_each =
        |count: usize| expert_param_bytes.saturating_mul(num_moe_layers as u64).saturating_mul(count as u64);
    Ok(MoeOffloadEstimate {
        expert_param_bytes,
        num_moe_layers,
        num_experts,
        gpu_expert_budget_per_layer,
        all_expert_weight_bytes: of_each(num_experts),
        resident_expert_weight_bytes: of_each(gpu_expert_budget_per_layer),
    })
}

impl MoeOffloadEstimate {
    /// As [`estimate_moe_offload`], where `budget_bytes` is for the whole model and `base` is its estimate with all experts in memory.
    ///
    /// # Errors
    /// As [`gpu_expert_budget_from_vram`]; [`ExpertError::LargerThanWeights`].
    pub fn beside(
        base: &MemoryEstimate,
        expert_param_bytes: u64,
        num_moe_layers: usize,
        num_experts: usize,
        max_per_layer: usize,
        budget_bytes: u64,
        reserve_fraction: f64,
    ) -> Result<Self, ExpertError> {
        let estimate = |budget_bytes| {
            estimate_moe_offload(
                expert_param_bytes,
                num_moe_layers,
                num_experts,
                max_per_layer,
                budget_bytes,
                reserve_fraction,
            )
        };
        let expert_bytes = estimate(0)?.all_expert_weight_bytes;
        let weight_bytes = base.weight_bytes.saturating_add(base.packed_bytes).min(base.peak_bytes());
        if expert_bytes > weight_bytes {
            return Err(ExpertError::LargerThanWeights { expert_bytes, weight_bytes });
        }
        estimate(budget_bytes.saturating_sub(base.peak_bytes() - expert_bytes))
    }

    /// The same model with `count` experts of each layer in memory, at most all.
    #[must_use]
    pub fn with_budget(self, count: usize) -> Self {
        let gpu_expert_budget_per_layer = count.min(self.num_experts);
        let one_of_each = self.expert_param_bytes.saturating_mul(self.num_moe_layers as u64);
        Self {
            gpu_expert_budget_per_layer,
            resident_expert_weight_bytes: one_of_each.saturating_mul(gpu_expert_budget_per_layer as u64),
            ..self
        }
    }

    /// The peak with these experts in memory, where `base` is the estimate with all of them.
    pub fn peak_with_offload(&self, base: &MemoryEstimate) -> u64 {
        let others = base.peak_bytes().saturating_sub(self.all_expert_weight_bytes);
        others.saturating_add(self.resident_expert_weight_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_experts_as_fit_beside_the_reserve() {
        let budget = |bytes, reserve| gpu_expert_budget_from_vram(100, 4, 8, 6, bytes, reserve).unwrap();
        assert_eq!((budget(399, 0.0), budget(400, 0.0), budget(400, 0.1)), (0, 1, 0));
        assert_eq!((budget(2000, 0.2), budget(1 << 40, 0.5), budget(0, 0.0)), (4, 6, 0));
        let estimate = estimate_moe_offload(100, 4, 8, 6, 2000, 0.2).unwrap();
        assert_eq!(estimate.gpu_expert_budget_per_layer, 4);
        assert_eq!((estimate.all_expert_weight_bytes, estimate.resident_expert_weight_bytes), (3200, 1600));
    }

    #[test]
    fn the_budget_is_what_remains_beside_the_base_and_the_peak_is_exact() {
        let base = MemoryEstimate { packed_bytes: 4000, state_bytes: 500, ..Default::default() };
        let estimate = MoeOffloadEstimate::beside(&base, 100, 4, 8, 8, 2500, 0.0).unwrap();
        assert_eq!((estimate.gpu_expert_budget_per_layer, estimate.peak_with_offload(&base)), (3, 2500));
        assert_eq!(estimate.with_budget(8).peak_with_offload(&base), base.peak_bytes());
        assert_eq!(estimate.with_budget(1).peak_with_offload(&base), 1700);
        let none = MoeOffloadEstimate::beside(&base, 100, 4, 8, 8, 1000, 0.0).unwrap();
        assert_eq!((none.gpu_expert_budget_per_layer, none.resident_expert_weight_bytes), (0, 0));
    }

    #[test]
    fn zero_sizes_are_errors_by_name() {
        for (expert, layers, experts, most, name) in [
            (0, 1, 1, 1, "expert_param_bytes"),
            (1, 0, 1, 1, "num_moe_layers"),
            (1, 1, 0, 1, "num_experts"),
            (1, 1, 1, 0, "max_per_layer"),
        ] {
            let error = estimate_moe_offload(expert, layers, experts, most, 10, 0.0).unwrap_err();
            assert_eq!(error, ExpertError::Zero { what: name });
        }
    }

    #[test]
    fn fractions_outside_zero_to_one_are_errors() {
        for found in [-0.1, 1.0, 1.5, f64::NAN, f64::INFINITY] {
            let error = estimate_moe_offload(1, 1, 1, 1, 10, found).unwrap_err();
            assert!(matches!(error, ExpertError::Fraction { .. }), "{found}: {error}");
        }
    }

    #[test]
    fn experts_larger_than_the_weights_that_hold_them_are_an_error() {
        let base = MemoryEstimate { packed_bytes: 799, ..Default::default() };
        let error = MoeOffloadEstimate::beside(&base, 100, 1, 8, 8, 1000, 0.0).unwrap_err();
        assert_eq!(error, ExpertError::LargerThanWeights { expert_bytes: 800, weight_bytes: 799 });
    }

    #[test]
    fn huge_sizes_saturate() {
        let estimate = estimate_moe_offload(u64::MAX, usize::MAX, 8, 8, u64::MAX, 0.0).unwrap();
        assert_eq!((estimate.all_expert_weight_bytes, estimate.gpu_expert_budget_per_layer), (u64::MAX, 1));
    }
}
