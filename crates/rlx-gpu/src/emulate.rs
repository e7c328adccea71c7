//! The interpreter of kernels as a device: every launch of a plan, one lane after another. Slow; it finds what a device would hide.

#![forbid(unsafe_code)]

use crate::device::DeviceBackend;
use crate::device::driver::{Batch, Driver, Limits, refused};
use crate::ir::Kernel;
use crate::ir::interpret::Machine;
use rlx::backend::cpu::Precision;
use rlx::backend::{Backend, BackendError};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// The interpreter with bindings of at most so many words, and with matrix units where they are asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Emulator {
    pub binding_words: usize,
    pub units: bool,
}

impl Default for Emulator {
    fn default() -> Self {
        Emulator { binding_words: usize::MAX, units: false }
    }
}

/// A backend that runs the kernels of devices by their interpreter, and fails where one reads or writes what it must not.
pub fn emulated() -> Arc<dyn Backend> {
    backend(Emulator::default(), Precision::F32)
}

/// As [`emulated`], where one binding has at most so many bytes: a thousand words or more.
pub fn emulated_within(bytes: usize) -> Arc<dyn Backend> {
    let emulator = Emulator { binding_words: (bytes / 4).max(1000), ..Emulator::default() };
    backend(emulator, Precision::F32)
}

/// As [`emulated`] for products in this precision, with matrix units or without.
#[cfg(test)]
pub(crate) fn emulated_in(precision: Precision, units: bool) -> Arc<dyn Backend> {
    backend(Emulator { units, ..Emulator::default() }, precision)
}

fn backend(emulator: Emulator, precision: Precision) -> Arc<dyn Backend> {
    match DeviceBackend::set_up(emulator, None, precision) {
        Ok(backend) => Arc::new(backend),
        Err(error) => unreachable!("the interpreter agrees with itself: {error}"),
    }
}

/// Words with what has been done to them.
pub(crate) struct Words(RwLock<Machine>);

impl Words {
    fn read(&self) -> RwLockReadGuard<'_, Machine> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Machine> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Driver for Emulator {
    type Buffer = Words;
    type Kernel = Kernel;
    type Work = ();
    type Pending = Vec<u32>;

    fn name(&self) -> String {
        "emulated gpu".to_owned()
    }

    fn capabilities(&self) -> Vec<String> {
        vec!["the interpreter of kernels".to_owned()]
    }

    fn fingerprint(&self) -> String {
        format!("emulated gpu {}", env!("CARGO_PKG_VERSION"))
    }

    fn matrix_units(&self) -> bool {
        self.units
    }

    fn limits(&self) -> Limits {
        Limits {
            binding_words: self.binding_words,
            argument_words: 1,
            grid: usize::MAX,
            compact: false,
            dots: true,
        }
    }

    fn allocate(&self, _what: &str, words: usize) -> Result<Words, BackendError> {
        Ok(Words(RwLock::new(Machine::new(words))))
    }

    fn upload(&self, _what: &str, to: &Words, at: usize, words: &[u32]) -> Result<(), BackendError> {
        to.write().write(at, words);
        Ok(())
    }

    fn download(&self, _what: &str, from: &Words, at: usize, count: usize) -> Result<Vec<u32>, BackendError> {
        Ok(from.read().words(at, count).to_vec())
    }

    fn compile(&self, kernel: &Kernel) -> Result<Kernel, BackendError> {
        Ok(kernel.clone())
    }

    fn work(&self) -> Result<(), BackendError> {
        Ok(())
    }

    fn submit(&self, _work: &mut (), batch: &Batch<'_, Self>) -> Result<Vec<u32>, BackendError> {
        batch.arenas().for_each(|arena| arena.write().forget());
        for write in &batch.writes {
            write.to.write().write(write.at, &write.words);
        }
        for call in &batch.calls {
            let kernel = call.kernel;
            let arguments: Vec<i32> = {
                let table = batch.arguments.read();
                table.words(call.arguments, kernel.args.len()).iter().map(|&word| word as i32).collect()
            };
            let (weights, states) = call.bound.split_at(kernel.weights() as usize);
            let weights: Vec<_> = weights.iter().map(|words| words.read()).collect();
            let weights: Vec<&[u32]> =
                weights.iter().map(|machine| machine.words(0, machine.len())).collect();
            let mut states: Vec<_> = states.iter().map(|words| words.write()).collect();
            let mut states: Vec<&mut Machine> = states.iter_mut().map(|machine| &mut **machine).collect();
            let programs = call.grid[0] * call.grid[1];
            let ran = batch.arena.write().run(kernel, &arguments, &weights, &mut states, programs);
            ran.map_err(|e| refused(&self.name(), &format!("kernel {}", kernel.name), e))?;
        }
        let mut words = Vec::with_capacity(batch.words_read());
        for read in &batch.reads {
            let from = read.from.read();
            if !from.is_written(read.at, read.count) {
                let range = format!("words {} .. {} were not all written", read.at, read.at + read.count);
                return Err(refused(&self.name(), batch.graph, range));
            }
            words.extend_from_slice(from.words(read.at, read.count));
        }
        Ok(words)
    }

    fn read(&self, _work: &mut (), pending: Vec<u32>) -> Result<Vec<u32>, BackendError> {
        Ok(pending)
    }
}
