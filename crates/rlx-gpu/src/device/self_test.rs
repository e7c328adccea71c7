//! What a device must compute right before anything is run on it: small kernels held to the interpreter's results.

use super::driver::{Batch, Call, Driver, Read, Write, refused};
use crate::ir::build::Builder;
use crate::ir::interpret::Machine;
use crate::ir::{Access, BinaryFn, Binding, Element, Kernel, Placement, Storage, UnaryFn, Value};
use rlx::backend::BackendError;

const LANES: u32 = 64;
/// Elements of each operand: more than one program has lanes, and not a multiple.
const COUNT: usize = 150;
const PROGRAMS: usize = COUNT.div_ceil(LANES as usize);
const FLOAT: Storage = Storage::Word(Element::F32);
const INTEGER: Storage = Storage::Word(Element::I32);
/// Where operands and results stand in the arena.
const PLACES: [usize; 3] = [64, 256, 448];
const WORDS: usize = 640;

/// The lane's element and whether there is one.
fn element(b: &mut Builder) -> (Value, Value) {
    let count = b.known(COUNT as i32);
    let (program, lane, lanes) = (b.program(), b.lane(), b.int(LANES as i32));
    let first = b.mul(program, lanes);
    let i = b.add(first, lane);
    let inside = b.within(i, count);
    (i, inside)
}

/// `out[i] = exp(x[i] * w[i]) / (1 + |x[i]|)`, of weights that stand in pairs of 16 bits.
fn floats() -> Kernel {
    let mut b = Builder::new("self_test_floats", LANES);
    let count = b.known(COUNT as i32);
    let x = b.view(Binding::Arena, FLOAT, Access::Read, &[count]);
    let w = b.view(Binding::Weight(0), Storage::BrainPair, Access::Read, &[count]);
    let out = b.view(Binding::Arena, FLOAT, Access::Write, &[count]);
    let (i, inside) = element(&mut b);
    let (x, w) = (b.load(x, &[i], Some(inside)), b.load(w, &[i], Some(inside)));
    let product = b.mul(x, w);
    let power = b.unary(UnaryFn::Exp, product);
    let (size, one) = (b.unary(UnaryFn::Abs, x), b.float(1.0));
    let below = b.add(one, size);
    let y = b.div(power, below);
    b.store(out, &[i], y, Some(inside));
    b.finish()
}

/// `out[i] = x[i] / 7 + x[i] % 5 ^ (x[i] >> 3)`, of integers.
fn integers() -> Kernel {
    let mut b = Builder::new("self_test_integers", LANES);
    let count = b.known(COUNT as i32);
    let x = b.view(Binding::Arena, INTEGER, Access::Read, &[count]);
    let out = b.view(Binding::Arena, INTEGER, Access::Write, &[count]);
    let (i, inside) = element(&mut b);
    let x = b.load(x, &[i], Some(inside));
    let (seven, five, three) = (b.int(7), b.int(5), b.int(3));
    let quotient = b.div(x, seven);
    let rest = b.binary(BinaryFn::Rem, x, five);
    let sum = b.add(quotient, rest);
    let shifted = b.binary(BinaryFn::ShiftRight, x, three);
    let y = b.binary(BinaryFn::Xor, sum, shifted);
    b.store(out, &[i], y, Some(inside));
    b.finish()
}

/// `out[i]` is `x[i]` and the products of its bytes with those of `!x[i]`.
fn bytes() -> Kernel {
    let mut b = Builder::new("self_test_bytes", LANES);
    let count = b.known(COUNT as i32);
    let x = b.view(Binding::Arena, INTEGER, Access::Read, &[count]);
    let out = b.view(Binding::Arena, INTEGER, Access::Write, &[count]);
    let (i, inside) = element(&mut b);
    let x = b.load(x, &[i], Some(inside));
    let all = b.int(-1);
    let other = b.binary(BinaryFn::Xor, x, all);
    let y = b.dot4(x, other, x);
    b.store(out, &[i], y, Some(inside));
    b.finish()
}

/// `out[i]` is the lane's element less those of all lanes by their numbers, plus the sum and the largest of a program's elements.
fn lanes() -> Kernel {
    let mut b = Builder::new("self_test_lanes", LANES);
    let count = b.known(COUNT as i32);
    let x = b.view(Binding::Arena, FLOAT, Access::Read, &[count]);
    let out = b.view(Binding::Arena, FLOAT, Access::Write, &[count]);
    let (i, inside) = element(&mut b);
    let x = b.load(x, &[i], Some(inside));
    let (sum, most) = (b.fold(BinaryFn::Add, x), b.fold(BinaryFn::Max, x));
    let tile = b.stage(x);
    let (from, to) = (b.int(0), b.int(LANES as i32));
    let (turn, carried) = b.open_loop(&[x]);
    let other = b.peek(tile, turn);
    let factor = b.unary(UnaryFn::ToFloat, turn);
    let scaled = b.mul(other, factor);
    let next = b.sub(carried[0], scaled);
    let y = b.close_loop([from, to], 1, turn, &[x], &carried, &[next]);
    let y = b.add(y[0], sum);
    let y = b.add(y, most);
    b.store(out, &[i], y, Some(inside));
    b.finish()
}

/// A kernel with its operand, its weight and its results.
struct Trial {
    kernel: Kernel,
    arguments: Vec<i32>,
    operand: Vec<u32>,
    weight: Vec<u32>,
}

/// The trials; `dots` for a device that multiplies bytes.
fn trials(dots: bool) -> Vec<Trial> {
    let float = |i: usize| ((i * 37 % 101) as f32 / 25.0 - 2.0).to_bits();
    let integer = |i: usize| (i as u32).wrapping_mul(2_654_435_761) ^ 0x5a5a;
    let pair = |i: usize| (float(2 * i) >> 16) | (float(2 * i + 1) & 0xffff_0000);
    let of = |kernel: Kernel, operand: Vec<u32>, weight: Vec<u32>| {
        let strides = vec![1];
        let mut arena = PLACES.into_iter();
        let place = |view: &crate::ir::View| match view.binding {
            Binding::Arena => arena.next().unwrap_or_default(),
            _ => 0,
        };
        let bases: Vec<usize> = kernel.views.iter().map(place).collect();
        let places = bases.into_iter().map(|base| Placement { base, strides: strides.clone() });
        let arguments = kernel.arguments(&[], &places.collect::<Vec<_>>()).unwrap_or_default();
        Trial { kernel, arguments, operand, weight }
    };
    let floats_in: Vec<u32> = (0..COUNT).map(float).collect();
    let integers_in: Vec<u32> = (0..COUNT).map(integer).collect();
    let bytes = dots.then(|| of(bytes(), integers_in.clone(), Vec::new()));
    let trials = [
        of(floats(), floats_in.clone(), (0..COUNT / 2).map(pair).collect()),
        of(integers(), integers_in, Vec::new()),
        of(lanes(), floats_in, Vec::new()),
    ];
    trials.into_iter().chain(bytes).collect()
}

/// The interpreter's results.
fn expected(trial: &Trial) -> Result<Vec<u32>, String> {
    let mut machine = Machine::new(WORDS);
    machine.write(PLACES[0], &trial.operand);
    let weights = [trial.weight.as_slice()];
    let weights = &weights[..trial.kernel.weights() as usize];
    machine.run(&trial.kernel, &trial.arguments, weights, &mut [], PROGRAMS).map_err(|e| e.to_string())?;
    Ok(machine.words(PLACES[1], COUNT).to_vec())
}

/// The device's results, which two runs must give.
fn found<D: Driver>(driver: &D, trial: &Trial, kernel: &D::Kernel) -> Result<Vec<u32>, BackendError> {
    let (arena, weight) = (driver.allocate("a self-test", WORDS)?, &trial.weight);
    let bound = match weight.is_empty() {
        true => None,
        false => Some(driver.allocate("a self-test's weight", weight.len())?),
    };
    if let Some(buffer) = &bound {
        driver.upload("a self-test's weight", buffer, 0, weight)?;
    }
    let pitch = trial.arguments.len().next_multiple_of(driver.limits().argument_words.max(1));
    let arguments = driver.allocate("a self-test's arguments", pitch)?;
    let mut work = driver.work()?;
    let table = trial.arguments.iter().map(|&a| a as u32).collect();
    let batch = Batch {
        graph: "the self-test",
        arena: &arena,
        further: &[],
        arguments: &arguments,
        table: &[],
        pitch,
        writes: vec![
            Write { to: &arguments, at: 0, words: table },
            Write { to: &arena, at: PLACES[0], words: trial.operand.clone() },
        ],
        calls: vec![Call { kernel, arguments: 0, bound: bound.iter().collect(), grid: [PROGRAMS, 1] }],
        reads: vec![Read { from: &arena, at: PLACES[1], count: COUNT }],
    };
    let pending = driver.submit(&mut work, &batch)?;
    driver.read(&mut work, pending)
}

/// Whether two words are one value, up to what rounding and other functions of a device's own explain.
fn agrees(element: Element, found: u32, expected: u32) -> bool {
    let [a, b] = [found, expected].map(f32::from_bits);
    match element {
        Element::F32 => (a - b).abs() <= 1e-4 * b.abs().max(1.0),
        _ => found == expected,
    }
}

/// Holds the device to the interpreter.
///
/// # Errors
/// [`BackendError::Unsupported`] names the kernel, an element, and both values; what the device says against it.
pub(super) fn run<D: Driver>(driver: &D) -> Result<(), BackendError> {
    let device = driver.name();
    let trials = trials(driver.limits().dots);
    let kernels = driver.compile_all(&trials.iter().map(|trial| &trial.kernel).collect::<Vec<_>>())?;
    for (trial, kernel) in trials.iter().zip(&kernels) {
        let name = format!("kernel {}", trial.kernel.name);
        let expected = expected(trial).map_err(|e| refused(&device, &name, e))?;
        let found = found(driver, trial, kernel)?;
        let element = trial.kernel.views.last().map_or(Element::F32, |view| view.storage.element());
        let differs = |(a, b): &(&u32, &u32)| !agrees(element, **a, **b);
        if let Some(at) = found.iter().zip(&expected).position(|pair| differs(&pair)) {
            let (a, b) = (found[at], expected[at]);
            let cause =
                format!("the self-test's element {at} is {a:#010x} on the device, {b:#010x} is right");
            return Err(refused(&device, &name, cause));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::verify::verify;

    #[test]
    fn the_kernels_are_valid_and_their_results_vary() {
        for trial in trials(true) {
            verify(&trial.kernel).unwrap();
            let words = expected(&trial).unwrap();
            let distinct: std::collections::BTreeSet<u32> = words.iter().copied().collect();
            assert!(distinct.len() > COUNT / 3, "{}: {}", trial.kernel.name, distinct.len());
        }
    }
}
