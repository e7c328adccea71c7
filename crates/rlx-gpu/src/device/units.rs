//! Whether a device's matrix units are used: where products are in bf16, and for packed weights, if the device has such units and they pass
//! a test.

use super::driver::{Driver, refused};
use super::held::{Trial, numbers};
use super::words;
use crate::emulate::Emulator;
use crate::lower::operands::Operands;
use crate::lower::schedules::Choices;
use rlx::backend::BackendError;
use rlx::backend::cpu::Precision;
use rlx_tensor::DType;

/// Programs that a device is taken to run at once.
const WAVE: usize = 128;
const COLUMNS: usize = 128;
/// Products of an element: two chunks, and no whole number of instructions.
const DEPTH: usize = 136;
/// Of packed weights: a block of either type.
const DEPTH_OF_BYTES: usize = 256;
/// A type whose scales cover 32 elements, and one where they cover 16, which takes another instruction.
const PACKED: [DType; 2] = [DType::Q8_0, DType::Q6_K];
/// Numbers of rows that each take another form, the most first.
const ROWS: [usize; 4] = [130, 20, 7, 3];
/// How far sums of so many products of numbers between -1 and 1 may be apart, summed in other orders.
const APART: f32 = 2e-3;

/// What products multiply on a device that was asked for a precision, and that in words.
///
/// # Errors
/// What the device says, but not that it refuses a kernel for matrix units.
pub(super) fn choose<D: Driver>(
    driver: &D,
    precision: Precision,
) -> Result<(Operands, String), BackendError> {
    let told = |operands: Operands| Ok((operands, operands.told().to_owned()));
    match precision {
        Precision::F32 => return told(Operands::Floats),
        Precision::Bf16 if !driver.matrix_units() => return told(Operands::Rounded),
        Precision::Bf16 => {}
    }
    match differs(driver) {
        Ok(None) => told(Operands::Units { wave: WAVE }),
        Ok(Some(cause)) | Err(BackendError::Unsupported { reason: cause, .. }) => {
            let (operands, cause) = (Operands::Rounded, cause.lines().next().unwrap_or_default().to_owned());
            Ok((operands, format!("{}, whose test failed: {cause}", operands.told())))
        }
        Err(error) => Err(error),
    }
}

/// Programs that a device runs at once, if its matrix units multiply packed weights, and in words whether they do; nothing of a device
/// without such units. Their results have the bits of the form without, so no precision asks for them.
///
/// # Errors
/// As [`choose`].
pub(super) fn choose_bytes<D: Driver>(driver: &D) -> Result<(Option<usize>, Option<String>), BackendError> {
    if !driver.matrix_units() || !driver.limits().dots {
        return Ok((None, None));
    }
    match bytes_differ(driver) {
        Ok(None) => Ok((Some(WAVE), Some("packed weights by matrix units".to_owned()))),
        Ok(Some(cause)) | Err(BackendError::Unsupported { reason: cause, .. }) => {
            let cause = cause.lines().next().unwrap_or_default();
            Ok((None, Some(format!("packed weights without matrix units, whose test failed: {cause}"))))
        }
        Err(error) => Err(error),
    }
}

/// Where packed weights have other bits by matrix units than without.
fn bytes_differ<D: Driver>(driver: &D) -> Result<Option<String>, BackendError> {
    for dtype in PACKED {
        let trial = Layer::new(dtype, DEPTH_OF_BYTES)?;
        for rows in [ROWS[0], ROWS[1]] {
            let run = |byte_units| trial.run(driver, rows, &Choices { byte_units, ..Choices::default() });
            let (without, with) = (run(None)?, run(Some(1))?);
            if let Some(at) = with.iter().zip(&without).position(|(a, b)| a != b) {
                let [a, b] = [&with, &without].map(|words| f32::from_bits(words[at]));
                return Ok(Some(format!("element {at} of {rows} rows by {dtype} is {a}, {b} without")));
            }
        }
    }
    Ok(None)
}

/// How the device's results differ from the interpreter's, or those of one form from another's.
fn differs<D: Driver>(driver: &D) -> Result<Option<String>, BackendError> {
    let trial = Layer::new(DType::BF16, DEPTH)?;
    let choices = Choices { operands: Operands::Units { wave: 1 }, ..Choices::default() };
    let [most, rest @ ..] = ROWS;
    let right = Emulator { units: true, ..Emulator::default() };
    let (expected, found) = (trial.run(&right, most, &choices)?, trial.run(driver, most, &choices)?);
    let floats = |words: &[u32]| words.iter().map(|&w| f32::from_bits(w)).collect::<Vec<_>>();
    let pairs = floats(&found).into_iter().zip(floats(&expected));
    // A result that is no number agrees with nothing.
    let agrees = |(a, b): (f32, f32)| (a - b).abs() <= APART;
    if let Some((at, (a, b))) = pairs.enumerate().find(|&(_, pair)| !agrees(pair)) {
        return Ok(Some(format!("element {at} is {a} on the device, {b} is right")));
    }
    for rows in rest {
        let few = trial.run(driver, rows, &choices)?;
        if let Some(at) = few.iter().zip(&found).position(|(a, b)| a != b) {
            let text = format!("element {at} has other bits among {rows} rows than among {most}");
            return Ok(Some(text));
        }
    }
    Ok(None)
}

/// A linear layer, with its rows.
struct Layer {
    trial: Trial,
    depth: usize,
    rows: Vec<f32>,
}

impl Layer {
    fn new(dtype: DType, depth: usize) -> Result<Self, BackendError> {
        const WHAT: &str = "matrix units";
        let text = format!(
            "graph \"a test of matrix units\" {{
  input @x : f32[rows, {depth}]
  param @w : {dtype}[{COLUMNS}, {depth}]
  %2 : f32[rows, {COLUMNS}] = linear(@x, @w) {{parts=1, transposed=false, bias=false, activation=identity, gated=false, residual=false}}
  return \"y\": %2
}}"
        );
        let weight = numbers(COLUMNS * depth, 7);
        let mut bytes = vec![0; dtype.bytes_for(weight.len()).unwrap_or_default()];
        let encoded = rlx_tensor::quant::encode(dtype, &weight, &mut bytes);
        encoded.map_err(|e| refused("the self-test", WHAT, e))?;
        let trial = Trial::new(WHAT, &text, vec![words::packed("w", dtype, &bytes)?])?;
        Ok(Layer { trial, depth, rows: numbers(ROWS[0] * depth, 3) })
    }

    /// The results of so many rows.
    fn run<D: Driver>(&self, driver: &D, rows: usize, choices: &Choices) -> Result<Vec<u32>, BackendError> {
        let x = &self.rows[..rows * self.depth];
        let found = self.trial.run(driver, choices, rows, &[x], rows * COLUMNS)?;
        Ok(found.into_iter().map(f32::to_bits).collect())
    }
}
