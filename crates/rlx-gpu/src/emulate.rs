//! The interpreter of kernels as a device: every launch of a plan, one lane after another. Slow; it finds what a device would hide.

#![forbid(unsafe_code)]

use crate::device::DeviceBackend;
use crate::device::driver::{Batch, Driver, Limits, refused};
use crate::ir::gemm::{GemmCall, Matrix, Spot};
use crate::ir::interpret::Machine;
use crate::ir::{Binding, Kernel};
use crate::lower::library::Library;
use rlx::backend::cpu::Precision;
use rlx::backend::{Backend, BackendError};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// The interpreter with bindings of at most so many words, and with matrix units where they are asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Emulator {
    pub binding_words: usize,
    pub units: bool,
    /// A library that products are left to, if one is asked for.
    pub library: Option<Result<Library, &'static str>>,
}

impl Default for Emulator {
    fn default() -> Self {
        Emulator { binding_words: usize::MAX, units: false, library: None }
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

/// As [`emulated`], where products of two rows and more are left to a library, for which the interpreter stands: in f32, or in bf16 with matrix
/// units. Each call that the library would get is held to the kernel that it takes the place of.
pub fn emulated_by_library(precision: Precision) -> Arc<dyn Backend> {
    let library = Library { rows: 2, width: 8, workspace: 40, version: 0 };
    let units = precision == Precision::Bf16;
    backend(Emulator { units, library: Some(Ok(library)), ..Emulator::default() }, precision)
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

    fn library(&self) -> Option<Result<Library, String>> {
        self.library.map(|found| found.map_err(str::to_owned))
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
            let failed = |cause: &dyn std::fmt::Display| {
                refused(&self.name(), &format!("kernel {}", kernel.name), cause)
            };
            {
                let weights: Vec<_> = weights.iter().map(|words| words.read()).collect();
                let weights: Vec<&[u32]> =
                    weights.iter().map(|machine| machine.words(0, machine.len())).collect();
                let mut states: Vec<_> = states.iter().map(|words| words.write()).collect();
                let mut states: Vec<&mut Machine> = states.iter_mut().map(|machine| &mut **machine).collect();
                let programs = call.grid[0] * call.grid[1];
                let ran = batch.arena.write().run(kernel, &arguments, &weights, &mut states, programs);
                ran.map_err(|e| failed(&e))?;
            }
            if let Some(gemm) = &kernel.gemm {
                let told: Vec<i32> =
                    call.told(batch.table, kernel.told()).iter().map(|&w| w as i32).collect();
                let memory = Memory { arena: batch.arena, weights, states };
                let held =
                    gemm.call(kernel, &told).and_then(|gemm| gemm.map_or(Ok(()), |gemm| memory.hold(&gemm)));
                held.map_err(|e| failed(&e))?;
            }
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

/// What a launch reaches.
struct Memory<'m> {
    arena: &'m Words,
    weights: &'m [&'m Words],
    states: &'m [&'m Words],
}

impl Memory<'_> {
    fn words(&self, spot: Spot) -> Result<Vec<u32>, String> {
        let words = match spot.binding {
            Binding::Arena => Some(self.arena),
            Binding::Weight(at) => self.weights.get(at as usize).copied(),
            Binding::State(at) => self.states.get(at as usize).copied(),
        };
        let machine = words.ok_or("a matrix is not bound")?.read();
        Ok(machine.words(spot.word, machine.len() - spot.word).to_vec())
    }

    /// Holds what the kernel has computed to the call, counted as a library counts: a column-major result `n x m`, of `columns` with
    /// its lines as columns, or turned, and of `rows`.
    fn hold(&self, call: &GemmCall) -> Result<(), String> {
        let [m, n, k] = call.extents;
        let (rows, columns) = (self.words(call.rows.spot)?, self.words(call.columns.spot)?);
        let (result, addend) =
            (self.words(call.result.spot)?, call.addend.map(|of| self.words(of.spot)).transpose()?);
        let bias = call.bias.map(|spot| self.words(spot)).transpose()?;
        let float = |words: &[u32], at: usize| f64::from(f32::from_bits(words[at]));
        let element = |words: &[u32], of: &Matrix, matrix: usize, line: usize, p: usize| {
            let at = matrix * of.apart + if of.turned { line + p * of.lead } else { p + line * of.lead };
            match call.pairs {
                None => float(words, at),
                Some(_) => f64::from(f32::from_bits(words[at / 2] << (16 * (1 - at % 2)) & 0xffff_0000)),
            }
        };
        let (_, room) = call.workspace;
        if self.words(call.workspace.0)?.len() < room {
            return Err("the workspace ends beyond its binding".to_owned());
        }
        for at in 0..call.count * m * n {
            let (matrix, i, j) = (at / (m * n), at / n % m, at % n);
            let product = |p: usize| {
                element(&rows, &call.rows, matrix, i, p) * element(&columns, &call.columns, matrix, j, p)
            };
            let place = |of: &Matrix| matrix * of.apart + i * of.lead + j;
            let added = bias.iter().map(|bias| float(bias, j));
            let added =
                added.chain(addend.iter().zip(&call.addend).map(|(words, of)| float(words, place(of))));
            let terms = (0..k).map(product).chain(added);
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
            let found = float(&result, place(&call.result));
            let within = (k + 2) as f64 * f64::from(f32::EPSILON) * size;
            if (found - sum).abs() > within {
                return Err(format!(
                    "element {at} is {found} by the kernel, {sum} by the call that stands for it"
                ));
            }
        }
        Ok(())
    }
}
