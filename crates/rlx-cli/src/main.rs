//! The rlx command line.
fn main() {}
