//! Running on a device, on the first of several that does, on all of them.

use super::GraphDevices;
use crate::devices::fallback::{DeviceAttempt, DeviceFallbackError};
use crate::devices::id::DeviceId;
use crate::devices::policy::DeviceError;
use crate::session::{CompiledGraph, SessionError, TensorArg};
use rlx_tensor::time::Instant;
use rlx_tensor::{DimBinding, Tensor};
use std::sync::Arc;
use std::time::Duration;

/// What one device took.
#[derive(Debug)]
pub struct DeviceBenchResult {
    /// The device.
    pub device: DeviceId,
    /// Its times, or why it has none.
    pub outcome: Result<DeviceTimes, SessionError>,
}

/// Times of one device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeviceTimes {
    /// From the graph to a program with its weights loaded.
    pub compile: Duration,
    /// Median of the measured runs; zero if none was asked for.
    pub median: Duration,
    /// From the first to the ninth decile of the measured runs.
    pub spread: Duration,
    /// Measured runs.
    pub runs: usize,
    /// Whether the result agreed with the CPU's; `None` if it was not compared.
    pub verified: Option<bool>,
}

type Outputs = Vec<(String, Tensor)>;

impl GraphDevices {
    /// As [`GraphDevices::compile`], for [`GraphDevices::fastest`].
    ///
    /// # Errors
    /// As both.
    pub fn compile_fastest(&self) -> Result<Arc<CompiledGraph>, SessionError> {
        self.compile(self.fastest()?)
    }

    /// As [`GraphDevices::compile`], for [`GraphDevices::resolve`].
    ///
    /// # Errors
    /// As both.
    pub fn compile_resolved(&self, hint: Option<DeviceId>) -> Result<Arc<CompiledGraph>, SessionError> {
        self.compile(self.resolve(hint)?)
    }

    /// As [`GraphDevices::compile`], for [`GraphDevices::resolve_chain`].
    ///
    /// # Errors
    /// As both.
    pub fn compile_chain(&self, hint: Option<DeviceId>) -> Result<Arc<CompiledGraph>, SessionError> {
        self.compile(self.resolve_chain(hint)?)
    }

    /// As [`GraphDevices::compile`], for [`GraphDevices::resolve_with_inputs`].
    ///
    /// # Errors
    /// As both.
    pub fn compile_resolved_with_inputs(
        &self,
        hint: Option<DeviceId>,
        inputs: &[(&str, TensorArg<'_>)],
    ) -> Result<Arc<CompiledGraph>, SessionError> {
        self.compile(self.resolve_with_inputs(hint, inputs)?)
    }

    /// Runs on this device, on fresh state.
    ///
    /// # Errors
    /// As [`GraphDevices::compile`] and [`CompiledGraph::run`].
    pub fn run(
        &self,
        device: impl Into<DeviceId>,
        inputs: &[(&str, TensorArg<'_>)],
    ) -> Result<Outputs, SessionError> {
        let device = device.into();
        let compiled = self.compile(device)?;
        let result = compiled.run(inputs);
        if let Err(error) = &result {
            self.note_fault(device, &compiled, error);
        }
        result
    }

    /// Runs on the device of [`GraphDevices::resolve`], at the sizes of the inputs.
    ///
    /// # Errors
    /// As both.
    pub fn run_resolved(
        &self,
        hint: Option<DeviceId>,
        inputs: &[(&str, TensorArg<'_>)],
    ) -> Result<Outputs, SessionError> {
        let sizes = self.complete(&self.sizes_of(inputs));
        self.run(self.resolve_at(hint, &sizes)?, inputs)
    }

    /// Runs on the device that the cost model puts first at the sizes of the inputs.
    ///
    /// # Errors
    /// As [`GraphDevices::fastest`] and [`GraphDevices::run`].
    pub fn run_fastest(&self, inputs: &[(&str, TensorArg<'_>)]) -> Result<Outputs, SessionError> {
        let sizes = self.complete(&self.sizes_of(inputs));
        self.run(self.decide(&sizes)?, inputs)
    }

    /// Runs on the device of [`GraphDevices::resolve_with_inputs`].
    ///
    /// # Errors
    /// As both.
    pub fn run_resolved_with_inputs(
        &self,
        hint: Option<DeviceId>,
        inputs: &[(&str, TensorArg<'_>)],
    ) -> Result<Outputs, SessionError> {
        self.run(self.resolve_with_inputs(hint, inputs)?, inputs)
    }

    /// Runs on the first device of the chain that compiles and runs. A fault of the device (lost, out of memory, an op it does not run, a
    /// panic of its backend, denied by the policy) moves on; a fault of the caller, such as a bad input, returns at once.
    ///
    /// # Errors
    /// [`SessionError::Fallback`] with every attempt; [`DeviceError::EmptyChain`]; the caller's own fault.
    pub fn run_try(
        &self,
        chain: &[DeviceId],
        inputs: &[(&str, TensorArg<'_>)],
    ) -> Result<(DeviceId, Outputs), SessionError> {
        if chain.is_empty() {
            return Err(DeviceError::EmptyChain.into());
        }
        let mut attempts = Vec::new();
        for &device in chain {
            match self.run(device, inputs) {
                Ok(outputs) => return Ok((device, outputs)),
                Err(cause) if cause.is_device_fault() => attempts.push(DeviceAttempt { device, cause }),
                Err(error) => return Err(error),
            }
        }
        Err(DeviceFallbackError { attempts }.into())
    }

    /// Runs on the hint, and only there; else along `RLX_DEVICE_CHAIN`; else on the resolved device.
    ///
    /// # Errors
    /// As [`GraphDevices::run`], [`GraphDevices::run_try`], [`GraphDevices::run_resolved`].
    pub fn run_chain(
        &self,
        hint: Option<DeviceId>,
        inputs: &[(&str, TensorArg<'_>)],
    ) -> Result<(DeviceId, Outputs), SessionError> {
        match (hint, &self.options.config.device_chain) {
            (Some(device), _) => Ok((device, self.run(device, inputs)?)),
            (None, Some(chain)) => self.run_try(chain, inputs),
            (None, None) => {
                let sizes = self.complete(&self.sizes_of(inputs));
                let device = self.resolve_at(None, &sizes)?;
                Ok((device, self.run(device, inputs)?))
            }
        }
    }

    /// As [`GraphDevices::run_chain`], but after the hint the chain is tried: `RLX_DEVICE_CHAIN`, else every device that can run the
    /// graph.
    ///
    /// # Errors
    /// As [`GraphDevices::run_try`].
    pub fn run_chain_lenient(
        &self,
        hint: Option<DeviceId>,
        inputs: &[(&str, TensorArg<'_>)],
    ) -> Result<(DeviceId, Outputs), SessionError> {
        let rest = self.options.config.device_chain.clone().unwrap_or_else(|| self.devices());
        let rest = rest.into_iter().filter(|device| Some(*device) != hint);
        let chain: Vec<DeviceId> = hint.into_iter().chain(rest).collect();
        self.run_try(&chain, inputs)
    }

    /// Compiles for every allowed device that is there and loads the weights. A device that fails does not stop the others.
    pub fn warm_all(&self) -> Vec<DeviceBenchResult> {
        let warm = |device| DeviceBenchResult { device, outcome: self.warm(device).map(|(_, times)| times) };
        self.present().into_iter().map(warm).collect()
    }

    /// Measures the inputs on every allowed device that is there, `runs` times after a warm-up. A device that fails does not stop the
    /// others; one whose result differs from the CPU's says so.
    ///
    /// # Errors
    /// The caller's own fault: inputs that do not fit the graph, params without a value.
    pub fn benchmark(
        &self,
        inputs: &[(&str, TensorArg<'_>)],
        runs: usize,
    ) -> Result<Vec<DeviceBenchResult>, SessionError> {
        self.benchmark_at(&self.complete(&self.sizes_of(inputs)), inputs, runs)
    }

    /// Allowed devices that are there, whether they can run the graph or not.
    fn present(&self) -> Vec<DeviceId> {
        let rows = crate::devices::candidate::rows(&self.options.backends, &self.policy());
        rows.into_iter().filter(|row| row.available && row.allowed).map(|row| row.device).collect()
    }

    fn warm(&self, device: DeviceId) -> Result<(Arc<CompiledGraph>, DeviceTimes), SessionError> {
        let started = Instant::now();
        let compiled = self.compile(device)?;
        if let Err(error) = compiled.program() {
            self.note_fault(device, &compiled, &error);
            return Err(error);
        }
        Ok((compiled, DeviceTimes { compile: started.elapsed(), ..DeviceTimes::default() }))
    }

    pub(super) fn benchmark_at(
        &self,
        sizes: &DimBinding,
        inputs: &[(&str, TensorArg<'_>)],
        runs: usize,
    ) -> Result<Vec<DeviceBenchResult>, SessionError> {
        let rows = self.candidates(sizes);
        let present: Vec<_> = rows.into_iter().filter(|row| row.available && row.allowed).collect();
        let viable: Vec<DeviceId> =
            present.iter().filter(|row| row.is_viable()).map(|row| row.device).collect();
        let oracle = self.oracle(&viable, inputs)?;
        let mut results = Vec::with_capacity(present.len());
        for row in present {
            let device = row.device;
            let outcome = match row.blocker {
                Some(reason) => Err(DeviceError::Absent { device, reason }.into()),
                None => self.measure(device, sizes, inputs, runs, oracle.as_deref()),
            };
            match outcome {
                Err(error) if !error.is_device_fault() => return Err(error),
                outcome => results.push(DeviceBenchResult { device, outcome }),
            }
        }
        Ok(results)
    }

    fn measure(
        &self,
        device: DeviceId,
        sizes: &DimBinding,
        inputs: &[(&str, TensorArg<'_>)],
        runs: usize,
        oracle: Option<&[(String, Tensor)]>,
    ) -> Result<DeviceTimes, SessionError> {
        let (compiled, mut times) = self.warm(device)?;
        let results = self.run(device, inputs)?;
        self.verify(&compiled, sizes, &results, oracle, &mut times);
        let mut taken = Vec::with_capacity(runs);
        for _ in 0..runs {
            let started = Instant::now();
            self.run(device, inputs)?;
            taken.push(started.elapsed());
        }
        taken.sort();
        let at = |tenths: usize| taken.get((taken.len().saturating_sub(1) * tenths + 5) / 10).copied();
        times.median = at(5).unwrap_or_default();
        times.spread = at(9).zip(at(1)).map_or(Duration::ZERO, |(high, low)| high.saturating_sub(low));
        times.runs = runs;
        Ok(times)
    }
}
