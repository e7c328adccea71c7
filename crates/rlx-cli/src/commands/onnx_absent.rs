//! ONNX files in a build without ONNX.

use super::compile::Made;
use super::sizes::Sizes;
use crate::context::Context;
use crate::failure::{Failure, Result};
use crate::output::Stage;
use rlx::config::ByteSize;
use rlx::devices::DeviceCandidate;
use std::path::{Path, PathBuf};

fn absent(file: &Path) -> Failure {
    Failure::usage(
        "this build cannot read ONNX models",
        file.display(),
        "build rlx-cli with its feature `onnx`",
    )
}

/// `rlx devices`.
pub fn devices(file: &Path, _sizes: &Sizes, _context: &Context) -> Result<Vec<DeviceCandidate>> {
    Err(absent(file))
}

/// `rlx compile`.
pub fn compile(file: &Path, _sizes: &Sizes, _output: &Path, _context: &Context) -> Result<Made> {
    Err(absent(file))
}

/// `rlx plan`.
pub fn plan(file: &Path, _sizes: &Sizes, _budget: Option<ByteSize>, _context: &Context) -> Result<()> {
    Err(absent(file))
}

/// `rlx explain`.
pub fn explain(
    file: &Path,
    _sizes: &Sizes,
    _stage: Option<Stage>,
    _svg: Option<&PathBuf>,
    _context: &Context,
) -> Result<()> {
    Err(absent(file))
}

/// `rlx bench`.
pub fn bench(file: &Path, _sizes: &Sizes, _steps: bool, _context: &Context) -> Result<()> {
    Err(absent(file))
}
