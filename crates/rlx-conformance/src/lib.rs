//! Test data shared by every backend: what each op must compute, as data, and the runner for the reference evaluation.

mod case;
mod decompose;

pub use case::{Case, CaseError, Difference, cases};
pub use decompose::decomposed;

#[cfg(test)]
mod reference;
