//! The verbs, one file each.

mod bench;
mod cache;
mod chat;
mod compile;
mod completions;
mod constrained;
mod devices;
mod doctor;
mod drafting;
mod embed;
mod explain;
mod footprint;
mod generate;
#[cfg_attr(not(feature = "onnx"), path = "onnx_absent.rs")]
mod onnx;
mod plan;
mod quantize;
#[cfg_attr(not(feature = "onnx"), path = "run_absent.rs")]
mod run;
mod sampling;
mod sizes;

use crate::context::Context;
use crate::failure::Result;

/// Declares the verbs: one line makes a subcommand of a module's `Args`.
macro_rules! verbs {
    ($($(#[$attribute:meta])* $verb:ident: $module:ident,)+) => {
        /// What to do.
        #[derive(Debug, clap::Subcommand)]
        pub enum Verb {
            $($(#[$attribute])* $verb($module::Args),)+
        }

        impl Verb {
            /// Does it.
            pub fn run(self, context: &Context) -> Result<()> {
                match self {
                    $(Verb::$verb(args) => args.run(context),)+
                }
            }
        }
    };
}

verbs! {
    Generate: generate,
    Chat: chat,
    Embed: embed,
    Run: run,
    Plan: plan,
    Compile: compile,
    Explain: explain,
    Quantize: quantize,
    Bench: bench,
    Devices: devices,
    Doctor: doctor,
    #[command(hide = true)]
    Footprint: footprint,
    Cache: cache,
    Completions: completions,
}
