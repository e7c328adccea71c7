//! Kernels as the text of a language that a driver compiles.

#![forbid(unsafe_code)]

pub mod cuda;
pub mod wgsl;

use crate::ir::{Binding, Kernel, Value, ViewId};

/// What a binding's array of words is called.
fn array(binding: Binding) -> String {
    match binding {
        Binding::Arena => "arena".to_owned(),
        Binding::Weight(weight) => format!("weight{weight}"),
        Binding::State(state) => format!("state{state}"),
    }
}

/// The element of a view that coordinates name, as an index in any of the languages: values are called `v0`, arguments `a0`.
fn index(kernel: &Kernel, view: ViewId, at: &[Value]) -> String {
    let view = &kernel.views[view.0 as usize];
    let terms = at.iter().zip(&view.strides).map(|(at, stride)| format!(" + v{} * a{}", at.0, stride.0));
    format!("a{}{}", view.base.0, terms.collect::<String>())
}

/// A table of bytes in words.
fn words_of(table: &[i8; 16]) -> [u32; 4] {
    std::array::from_fn(|word| u32::from_le_bytes(std::array::from_fn(|i| table[4 * word + i] as u8)))
}
