//! From a legal graph to memory and order: template, specialisation, arena.
//!
//! A [`Template`] fixes order, lifetimes, views and size expressions once. [`Template::specialize`] evaluates the sizes at given
//! capacities and places every buffer in one arena; it walks no graph.

mod joins;
mod lifetimes;
mod lir;
mod manifest;
mod memory;
mod places;
mod svg;
mod template;
mod text;
mod verify;

pub use lir::Lir;
pub use manifest::{BindingManifest, ManifestEntry};
pub use memory::{ArenaPlan, Lifetime, live_bytes_bound, plan_arena};
pub use places::{Buffer, BufferId, BufferKind, Place};
pub use template::{InterfaceEntry, PlanError, PlanTarget, StepSpec, Template};
pub use text::{parse_lir, parse_lir_with};
pub use verify::PlanViolation;
