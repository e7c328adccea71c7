//! Test data shared by every backend: what each op must compute, as data, and the runner for the reference evaluation.

mod case;

pub use case::{Case, CaseError, Difference, cases};

#[cfg(test)]
mod reference;
