//! Whether products of many rows are left to a device's library: where one was asked for, is there, and passes a test.

use super::driver::Driver;
use super::held::{Trial, numbers};
use super::words;
use crate::emulate::Emulator;
use crate::lower::library::Library;
use crate::lower::operands::Operands;
use crate::lower::schedules::Choices;
use half::bf16;
use rlx::backend::BackendError;
use rlx_tensor::DType;

const COLUMNS: usize = 72;
const DEPTH: usize = 136;
/// Pairs of matrices that are multiplied at once.
const COUNT: usize = 2;

/// The library that products are left to, and in words how it came to that, if one was asked for.
///
/// # Errors
/// What the device says, but not that the library refuses a product.
pub(super) fn choose<D: Driver>(
    driver: &D,
    operands: Operands,
) -> Result<(Option<Library>, Option<String>), BackendError> {
    let library = match driver.library() {
        None => return Ok((None, None)),
        Some(Err(reason)) => return Ok((None, Some(format!("no cuBLASLt: {reason}")))),
        Some(Ok(library)) => library,
    };
    match differs(driver, library, operands) {
        Ok(None) => Ok((Some(library), Some(told(&library)))),
        Ok(Some(cause)) | Err(BackendError::Unsupported { reason: cause, .. }) => {
            let cause = cause.lines().next().unwrap_or_default();
            Ok((None, Some(format!("no cuBLASLt: its test failed: {cause}"))))
        }
        Err(error) => Err(error),
    }
}

/// In words of reports, and of what decides results.
pub(super) fn told(library: &Library) -> String {
    format!("products of {} rows and more by cuBLASLt {}", library.rows, library.version)
}

/// A trial, and for each element of its result the sum of its terms' magnitudes.
struct Held<'h> {
    trial: &'h Trial,
    inputs: &'h [&'h [f32]],
    magnitude: &'h dyn Fn(usize) -> f32,
    count: usize,
}

/// How the device's results differ from the interpreter's, of products as this device would be asked for.
fn differs<D: Driver>(
    driver: &D,
    library: Library,
    operands: Operands,
) -> Result<Option<String>, BackendError> {
    let rows = library.rows + 2;
    let (x, w) = (numbers(COUNT * rows * DEPTH, 3), numbers(COUNT * DEPTH * COLUMNS, 7));
    let (bias, residual) = (numbers(COLUMNS, 5), numbers(rows * COLUMNS, 11));
    let matrix = &w[..COLUMNS * DEPTH];
    let brains: Vec<u8> = matrix.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
    let in_bf16 = matches!(operands, Operands::Units { .. });
    let (dtype, packed) = match in_bf16 {
        true => (DType::BF16, words::packed("w", DType::BF16, &brains)?),
        false => (DType::F32, matrix.iter().map(|x| x.to_bits()).collect()),
    };
    let vector = bias.iter().map(|x| x.to_bits()).collect();
    let layer = Trial::new("cuBLASLt", &layer(dtype), vec![packed, vector])?;
    let batch = Trial::new("cuBLASLt", &batch(), Vec::new())?;
    let with = Choices { operands, library: Some(library), ..Choices::default() };
    let without = Choices { library: None, ..with.clone() };
    let emulator = Emulator { units: true, ..Emulator::default() };
    let rounded = |x: f32| if in_bf16 { bf16::from_f32(x).to_f32() } else { x };
    let added = |at: usize| bias[at % COLUMNS].abs() + residual[at].abs();
    let of_layer = |at: usize| {
        let (row, column) = (&x[at / COLUMNS * DEPTH..], &w[at % COLUMNS * DEPTH..]);
        let products = row.iter().zip(column).take(DEPTH).map(|(x, w)| (rounded(*x) * rounded(*w)).abs());
        products.sum::<f32>() + added(at)
    };
    let of_batch = |at: usize| {
        let (row, own) = (&x[at / COLUMNS * DEPTH..], &w[at / COLUMNS / rows * DEPTH * COLUMNS..]);
        let column = own[at % COLUMNS..].iter().step_by(COLUMNS);
        row.iter().zip(column).take(DEPTH).map(|(x, w)| (x * w).abs()).sum::<f32>()
    };
    let trials = [
        Held {
            trial: &layer,
            inputs: &[&x[..rows * DEPTH], &residual],
            magnitude: &of_layer,
            count: rows * COLUMNS,
        },
        Held { trial: &batch, inputs: &[&x, &w], magnitude: &of_batch, count: COUNT * rows * COLUMNS },
    ];
    for Held { trial, inputs, magnitude, count } in trials {
        let expected = trial.run(&emulator, &without, rows, inputs, count)?;
        let found = trial.run(driver, &with, rows, inputs, count)?;
        // Two sums of as many terms in other orders, each of whose roundings is of a part of them all.
        let within = |at: usize| (DEPTH + 2) as f32 * f32::EPSILON * magnitude(at);
        // A result that is no number agrees with nothing.
        let agrees = |at: usize| (found[at] - expected[at]).abs() <= within(at);
        if let Some(at) = (0..count).find(|&at| !agrees(at)) {
            let (a, b) = (found[at], expected[at]);
            return Ok(Some(format!("element {at} of {} is {a} on the device, {b} is right", trial.name())));
        }
    }
    Ok(None)
}

/// A linear layer with everything that the library adds.
fn layer(dtype: DType) -> String {
    format!(
        "graph \"a layer\" {{
  input @x : f32[rows, {DEPTH}]
  input @r : f32[rows, {COLUMNS}]
  param @w : {dtype}[{COLUMNS}, {DEPTH}]
  param @b : f32[{COLUMNS}]
  %4 : f32[rows, {COLUMNS}] = linear(@x, @w, @b, @r) {{parts=1, transposed=false, bias=true, activation=identity, gated=false, residual=true}}
  return \"y\": %4
}}"
    )
}

/// Products at once, of columns that do not follow each other.
fn batch() -> String {
    format!(
        "graph \"a batch\" {{
  input @x : f32[{COUNT}, rows, {DEPTH}]
  input @w : f32[{COUNT}, {DEPTH}, {COLUMNS}]
  %2 : f32[{COUNT}, rows, {COLUMNS}] = matmul(@x, @w) {{transpose_a=false, transpose_b=false}}
  return \"y\": %2
}}"
    )
}
