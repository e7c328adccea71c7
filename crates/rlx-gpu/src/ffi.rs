//! Calls whose safety the compiler cannot see.

pub(crate) mod trusted;
