//! In which precision a model's products are: what is asked for, what its device was opened with, what its checkpoint is.

use crate::error::{ModelError, Result};
use crate::model::OpenOptions;
use rlx::backend::Backend;
use rlx::backend::cpu::Precision;
use rlx::config::Config;
use rlx::weights::WeightLoader;
use rlx_kernels::isa::{CpuFeatures, Isa};
use rlx_tensor::DType;

/// The precision of the options, else of the settings.
///
/// # Errors
/// Settings that do not parse.
pub(crate) fn precision_asked(options: &OpenOptions) -> Result<Option<Precision>> {
    let settings = Config::global().map_err(rlx::SessionError::from)?;
    Ok(options.precision.or(settings.precision))
}

/// The precision asked for, else bf16 where the processor has an instruction for it and most of the checkpoint's bytes are bf16.
pub(crate) fn precision_on_cpu(
    options: &OpenOptions,
    weights: &dyn WeightLoader,
    isa: Isa,
) -> Result<Precision> {
    match precision_asked(options)? {
        Some(precision) => Ok(precision),
        None if isa != Isa::Avx512 || !CpuFeatures::detect().avx512_bf16 => Ok(Precision::F32),
        None => precision_of(weights),
    }
}

/// bf16 of a checkpoint most of whose bytes are bf16, else f32: what a device that multiplies such operands faster is asked for where
/// nobody asks for another precision.
///
/// # Errors
/// Weights that cannot be found.
pub fn precision_of(weights: &dyn WeightLoader) -> Result<Precision> {
    let (mut bf16, mut all) = (0, 0);
    for name in weights.names() {
        let Some(tensor) = weights.tensor(name)? else { continue };
        all += tensor.bytes.len();
        bf16 += if tensor.dtype == DType::BF16 { tensor.bytes.len() } else { 0 };
    }
    Ok(if bf16 > all / 2 { Precision::Bf16 } else { Precision::F32 })
}

/// Whether a backend of the caller's has the precision that is asked for. One that tells none computes in f32 or wider.
///
/// # Errors
/// [`ModelError::Setting`] if not.
pub(crate) fn has_precision(options: &OpenOptions, backend: &dyn Backend) -> Result<()> {
    let own = backend.precision().unwrap_or_default();
    match options.precision {
        Some(asked) if asked != own => {
            let (setting, expected) = ("precision", "the precision that the backend was opened with");
            Err(ModelError::Setting { setting, expected, found: format!("{asked}, opened with {own}") })
        }
        _ => Ok(()),
    }
}
