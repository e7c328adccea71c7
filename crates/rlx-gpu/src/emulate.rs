//! The interpreter of kernels as a device: every launch of a plan, one lane after another. Slow; it finds what a device would hide.

#![forbid(unsafe_code)]

use crate::device::{DeviceBackend, Driver, Job};
use crate::ir::Kernel;
use crate::ir::interpret::Machine;
use rlx::backend::{Backend, BackendError};
use std::sync::Arc;

struct Emulator;

/// A backend that runs the kernels of devices by their interpreter, and fails where one reads or writes what it must not.
pub fn emulated() -> Arc<dyn Backend> {
    Arc::new(DeviceBackend::new(Emulator))
}

impl Driver for Emulator {
    type Weight = Vec<u32>;
    type Kernels = Vec<Arc<Kernel>>;
    type Memory = Machine;

    fn name(&self) -> String {
        "emulated gpu".to_owned()
    }

    fn capabilities(&self) -> Vec<String> {
        vec!["the interpreter of kernels".to_owned()]
    }

    fn fingerprint(&self) -> String {
        format!("emulated gpu {}", env!("CARGO_PKG_VERSION"))
    }

    fn binding_words(&self) -> usize {
        usize::MAX
    }

    fn weight(&self, _name: &str, words: &[u32]) -> Result<Vec<u32>, BackendError> {
        Ok(words.to_vec())
    }

    fn prepare(&self, kernels: &[Arc<Kernel>]) -> Result<Vec<Arc<Kernel>>, BackendError> {
        Ok(kernels.to_vec())
    }

    fn memory(&self, words: usize) -> Result<Machine, BackendError> {
        Ok(Machine::new(words))
    }

    fn run(
        &self,
        kernels: &Vec<Arc<Kernel>>,
        machine: &mut Machine,
        job: &Job<'_, Vec<u32>>,
    ) -> Result<Vec<Vec<u32>>, BackendError> {
        let fault = |op: &str, reason: String| BackendError::Unsupported {
            op: op.to_owned(),
            location: "the interpreter of kernels".to_owned(),
            reason,
        };
        machine.forget();
        for (at, words) in &job.uploads {
            machine.write(*at, words);
        }
        for dispatch in &job.dispatches {
            let kernel = &kernels[dispatch.kernel];
            let weights: Vec<&[u32]> = dispatch.weights.iter().map(|w| w.as_slice()).collect();
            let ran = machine.run(kernel, &dispatch.arguments, &weights, dispatch.programs);
            ran.map_err(|violation| fault(&kernel.name, violation.to_string()))?;
        }
        let mut read = Vec::with_capacity(job.downloads.len());
        for &(at, count) in &job.downloads {
            if !machine.is_written(at, count) {
                return Err(fault("download", format!("words {at} .. {} were not all written", at + count)));
            }
            read.push(machine.words(at, count).to_vec());
        }
        Ok(read)
    }
}
