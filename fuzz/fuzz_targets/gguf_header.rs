//! Any file: either an error, or tensors that lie in the file, do not overlap, and have the size of their shape.
#![no_main]

#[path = "../recipes/gguf.rs"]
mod recipe;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    recipe::run(input);
});
