//! Choosing a device: by hint, by setting, by the cost model, by measured runs.

use super::run::{DeviceBenchResult, DeviceTimes};
use super::{GraphDevices, lock};
use crate::backend::DeviceProbe;
use crate::devices::candidate::DeviceCandidate;
use crate::devices::id::{Device, DeviceId};
use crate::devices::policy::{DeviceError, DevicePickStrategy};
use crate::session::{CompiledGraph, SessionError, TensorArg, rounding};
use rlx_graph::eval::to_f64;
use rlx_tensor::{DimBinding, Tensor};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A device picked by measured runs.
#[derive(Debug)]
pub struct DevicePick {
    /// The device.
    pub device: DeviceId,
    /// Its result agreed with the CPU's within what rounding explains; `None` if it was not compared, because the policy forbids the
    /// CPU or it cannot run the graph.
    pub verified: Option<bool>,
    /// What each candidate took; empty for a pick remembered from earlier or forced by hint or setting.
    pub measured: Vec<DeviceBenchResult>,
}

impl GraphDevices {
    /// The device to run on: `hint`, else `RLX_DEVICE`, else the first in the cost model's order. A hint or setting that is no
    /// candidate is an error, never a fall-through. The choice is remembered per graph, policy and sizes.
    ///
    /// # Errors
    /// [`DeviceError::NotViable`] lists the devices that would do; [`DeviceError::NoneViable`].
    pub fn resolve(&self, hint: Option<DeviceId>) -> Result<DeviceId, SessionError> {
        self.resolve_at(hint, &self.nominal_sizes())
    }

    /// As [`GraphDevices::resolve`], but before the cost model the first viable device of `RLX_DEVICE_CHAIN` is taken where it is set.
    ///
    /// # Errors
    /// As [`GraphDevices::resolve`]; [`DeviceError::NoneViable`] if no device of the chain is viable.
    pub fn resolve_chain(&self, hint: Option<DeviceId>) -> Result<DeviceId, SessionError> {
        let sizes = self.nominal_sizes();
        match (hint, &self.options.config.device_chain) {
            (None, Some(chain)) => {
                let viable = self.viable(&sizes);
                let found = chain.iter().find(|device| viable.contains(device));
                found.copied().ok_or_else(|| DeviceError::NoneViable { tried: chain.clone() }.into())
            }
            (hint, _) => self.resolve_at(hint, &sizes),
        }
    }

    /// As [`GraphDevices::resolve`], at the sizes of these inputs; under [`DevicePickStrategy::Benchmark`] by measured runs of them.
    ///
    /// # Errors
    /// As [`GraphDevices::resolve`]; inputs that no device takes.
    pub fn resolve_with_inputs(
        &self,
        hint: Option<DeviceId>,
        inputs: &[(&str, TensorArg<'_>)],
    ) -> Result<DeviceId, SessionError> {
        Ok(self.pick_with_inputs(hint, inputs)?.device)
    }

    /// As [`GraphDevices::resolve_with_inputs`], with what the pick rests on.
    ///
    /// # Errors
    /// As [`GraphDevices::resolve_with_inputs`].
    pub fn pick_with_inputs(
        &self,
        hint: Option<DeviceId>,
        inputs: &[(&str, TensorArg<'_>)],
    ) -> Result<DevicePick, SessionError> {
        let sizes = self.complete(&self.sizes_of(inputs));
        let forced = hint.or(self.options.config.device);
        match self.policy().pick_strategy() {
            DevicePickStrategy::Benchmark { runs } if forced.is_none() => {
                self.pick_by_runs(&sizes, inputs, runs)
            }
            _ => {
                let device = self.resolve_at(hint, &sizes)?;
                Ok(DevicePick { device, verified: None, measured: Vec::new() })
            }
        }
    }

    /// What [`GraphDevices::fastest`] chose earlier, in this process or another, as long as that holds: not expired, and the same devices are
    /// there. No device is opened.
    pub fn chosen_before(&self) -> Option<DeviceId> {
        let key = format!("{} by cost", self.key(&self.nominal_sizes()));
        self.store.decision(&key).map(|decision| decision.device)
    }

    pub(super) fn resolve_at(
        &self,
        hint: Option<DeviceId>,
        sizes: &DimBinding,
    ) -> Result<DeviceId, SessionError> {
        match hint.or(self.options.config.device) {
            Some(device) => self.require(device, sizes),
            None => self.decide(sizes),
        }
    }

    /// A device that was asked for, if it is a candidate.
    fn require(&self, device: DeviceId, sizes: &DimBinding) -> Result<DeviceId, SessionError> {
        let key = format!("{} asked for {device}", self.key(sizes));
        if self.remembered(&key).is_some() {
            return Ok(device);
        }
        let mut rows = self.candidates(sizes);
        if !rows.iter().any(|row| row.device == device) && self.policy().allows(device.kind) {
            let mut row = DeviceCandidate::unknown(device, &self.policy());
            self.examine(&mut row, sizes);
            rows.push(row);
        }
        let row = rows.iter().find(|row| row.device == device);
        if row.is_some_and(DeviceCandidate::is_viable) {
            self.store.keep_decision(&key, device, false, None);
            return Ok(device);
        }
        let forbidden = || "forbidden by the policy (RLX_DEVICES, RLX_DENY_DEVICES)".to_owned();
        let reason = row.and_then(|row| row.blocker.clone()).unwrap_or_else(forbidden);
        let viable = rows.iter().filter(|row| row.device != device && row.is_viable());
        let viable = viable.map(|row| row.device).collect();
        Err(DeviceError::NotViable { device, reason, viable }.into())
    }

    /// The cost model's choice, remembered.
    pub(super) fn decide(&self, sizes: &DimBinding) -> Result<DeviceId, SessionError> {
        let key = format!("{} by cost", self.key(sizes));
        if let Some(device) = self.remembered(&key) {
            return Ok(device);
        }
        self.decisions.fetch_add(1, Ordering::Relaxed);
        let mut rows = self.candidates(sizes);
        self.predict_rows(&mut rows, sizes);
        let device = self.choose(&rows)?;
        self.store.keep_decision(&key, device, false, None);
        Ok(device)
    }

    /// A decision that still holds: not expired, and the device can be used now.
    fn remembered(&self, key: &str) -> Option<DeviceId> {
        let device = self.store.decision(key)?.device;
        self.compile(device).is_ok().then_some(device)
    }

    /// What decides which device is taken: another graph, policy, set of devices or size is another decision.
    fn key(&self, sizes: &DimBinding) -> String {
        let sizes: Vec<String> = sizes.iter().map(|(symbol, value)| format!("{symbol}={value}")).collect();
        format!(
            "{} {} on [{}] at [{}] version {}",
            self.digest,
            self.policy(),
            self.machine(),
            sizes.join(", "),
            env!("CARGO_PKG_VERSION")
        )
    }

    /// The devices of each kind that there were when this was first asked.
    fn machine(&self) -> &str {
        self.machine.get_or_init(|| {
            let backends = &self.options.backends;
            let of = |kind: Device| match backends.probe(kind) {
                Ok(DeviceProbe::Present(count)) => format!("{} x{count}", kind.name()),
                _ => format!("no {}", kind.name()),
            };
            backends.kinds().into_iter().map(of).collect::<Vec<_>>().join(", ")
        })
    }

    /// The first preferred device, else the one predicted to be fastest.
    pub(super) fn choose(&self, rows: &[DeviceCandidate]) -> Result<DeviceId, SessionError> {
        let policy = self.policy();
        let viable = || rows.iter().filter(|row| row.is_viable());
        let time = |row: &DeviceCandidate| row.predicted_s.unwrap_or(f64::INFINITY);
        let preferred = viable().filter(|row| policy.prefers(row.device.kind).is_some());
        let preferred = preferred.min_by_key(|row| (policy.prefers(row.device.kind), row.device.index));
        let best = preferred.or_else(|| viable().min_by(|a, b| time(a).total_cmp(&time(b))));
        let tried = || rows.iter().filter(|row| row.registered).map(|row| row.device).collect();
        best.map(|row| row.device).ok_or_else(|| DeviceError::NoneViable { tried: tried() }.into())
    }

    fn viable(&self, sizes: &DimBinding) -> Vec<DeviceId> {
        let rows = self.candidates(sizes);
        rows.into_iter().filter(DeviceCandidate::is_viable).map(|row| row.device).collect()
    }

    /// Values of the symbols that inputs give as they stand; what they leave open stays open.
    pub(super) fn sizes_of(&self, inputs: &[(&str, TensorArg<'_>)]) -> DimBinding {
        let mut sizes = DimBinding::new();
        for (_, value) in self.graph.inputs() {
            let given = inputs.iter().find(|(name, _)| Some(*name) == value.name.as_deref());
            let Some((_, given)) = given else { continue };
            let length = [given.bytes.len() / given.dtype.element_bytes().unwrap_or(1)];
            let dims = given.dims.unwrap_or(&length);
            for (dim, &extent) in value.shape.dims().iter().zip(dims) {
                if let Some((symbol, offset)) = dim.as_symbol_plus() {
                    // Two extents that contradict each other are reported by the run itself.
                    let _ = sizes.bind(symbol, extent.saturating_sub(offset));
                }
            }
        }
        sizes
    }

    fn pick_by_runs(
        &self,
        sizes: &DimBinding,
        inputs: &[(&str, TensorArg<'_>)],
        runs: NonZeroUsize,
    ) -> Result<DevicePick, SessionError> {
        let key = format!("{} measured", self.key(sizes));
        if let Some(device) = self.remembered(&key) {
            let verified = self.store.decision(&key).and_then(|d| d.verified);
            return Ok(DevicePick { device, verified, measured: Vec::new() });
        }
        self.decisions.fetch_add(1, Ordering::Relaxed);
        let measured = self.benchmark_at(sizes, inputs, runs.get())?;
        let policy = self.policy();
        let able = measured.iter().filter_map(|result| Some((result.device, result.outcome.as_ref().ok()?)));
        let able = able.filter(|(_, times)| times.verified != Some(false));
        let rank = |device: DeviceId| policy.prefers(device.kind).unwrap_or(usize::MAX);
        let best = able.min_by_key(|(device, times)| (rank(*device), times.median));
        let tried = || measured.iter().map(|result| result.device).collect();
        let (device, verified) = match best {
            Some((device, times)) => (device, times.verified),
            None => return Err(DeviceError::NoneViable { tried: tried() }.into()),
        };
        self.store.keep_decision(&key, device, true, verified);
        Ok(DevicePick { device, verified, measured })
    }

    /// What the CPU makes of the inputs, to hold other devices' results against; `None` where the policy or the graph forbids it.
    pub(super) fn oracle(
        &self,
        viable: &[DeviceId],
        inputs: &[(&str, TensorArg<'_>)],
    ) -> Result<Option<Vec<(String, Tensor)>>, SessionError> {
        if !viable.contains(&DeviceId::CPU) {
            return Ok(None);
        }
        match self.run(DeviceId::CPU, inputs) {
            Ok(results) => Ok(Some(results)),
            Err(error) if error.is_device_fault() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Marks in `times` whether results agree with the CPU's.
    pub(super) fn verify(
        &self,
        compiled: &Arc<CompiledGraph>,
        sizes: &DimBinding,
        results: &[(String, Tensor)],
        oracle: Option<&[(String, Tensor)]>,
        times: &mut DeviceTimes,
    ) {
        times.verified = oracle.map(|oracle| agree(compiled, sizes, results, oracle));
    }

    /// Whether a device holds an executable now.
    pub fn is_compiled(&self, device: impl Into<DeviceId>) -> bool {
        let slot = lock(&self.slots).get(&device.into()).cloned();
        slot.is_some_and(|slot| lock(&slot).compiled.is_some())
    }
}

/// Whether two devices' outputs differ by no more than rounding explains: the unit roundoff, times the operations on the way to an
/// element, times the largest magnitude. Integers must be equal.
fn agree(
    compiled: &CompiledGraph,
    sizes: &DimBinding,
    found: &[(String, Tensor)],
    wanted: &[(String, Tensor)],
) -> bool {
    let work = operations_per_element(compiled, sizes);
    found.len() == wanted.len()
        && found.iter().zip(wanted).all(|((_, found), (_, wanted))| {
            if !wanted.dtype().is_float() || found.dims() != wanted.dims() {
                return found.bits_eq(wanted);
            }
            let (Ok(a), Ok(b)) = (to_f64(found), to_f64(wanted)) else { return false };
            let largest = b.iter().copied().filter(|v| v.is_finite()).fold(0.0f64, |m, v| m.max(v.abs()));
            let tolerance = rounding(wanted.dtype()) * work * largest.max(1e-6);
            a.iter().zip(&b).all(|(a, b)| match a.is_finite() && b.is_finite() {
                true => (a - b).abs() <= tolerance,
                false => a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()),
            })
        })
}

/// Operations that an element of an output has behind it at most: those of every step, for an element of its result each.
fn operations_per_element(compiled: &CompiledGraph, sizes: &DimBinding) -> f64 {
    let template = compiled.template();
    let of = |step: &crate::plan::StepSpec| {
        let inputs: Vec<_> = step.inputs.iter().map(|p| template.shape(p)).collect();
        let outputs: Vec<_> = step.outputs.iter().map(|p| template.shape(p)).collect();
        let cost =
            step.op.def().cost(&inputs.iter().collect::<Vec<_>>(), &outputs.iter().collect::<Vec<_>>());
        let elements = outputs.first().and_then(|s| s.elements().eval(sizes).ok()).unwrap_or(1).max(1);
        cost.flops.eval(sizes).map_or(1.0, |flops| flops as f64 / elements as f64)
    };
    template.steps().iter().map(of).sum::<f64>() + 8.0
}
