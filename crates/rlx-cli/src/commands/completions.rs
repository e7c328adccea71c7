//! `rlx completions`.

use crate::args;
use crate::context::Context;
use crate::failure::{Failure, Result};
use crate::output;
use clap_complete::Shell;

/// Print completions for a shell
///
/// For bash: `source <(rlx completions bash)`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

impl Args {
    pub fn run(self, context: &Context) -> Result<()> {
        if context.shared.json {
            let advice = "leave --json out";
            return Err(Failure::usage("a completion script is not JSON", "rlx completions --json", advice));
        }
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut args::command(), "rlx", &mut script);
        output::print_bytes(&script)
    }
}
