//! `rlx run` in a build without ONNX.

use crate::context::Context;
use crate::failure::{Failure, Result};

/// Run an ONNX model (left out of this build)
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Arguments of the full build
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

impl Args {
    pub fn run(self, _context: &Context) -> Result<()> {
        let what = format!("this build cannot run ONNX models ({} arguments given)", self.rest.len());
        Err(Failure::usage(what, "rlx run", "build rlx-cli with its feature `onnx`"))
    }
}
