//! Any file: either an error, or tensors whose bytes have the size of their shape.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rlx::weights::{BytesWeightLoader, WeightLoader};

fuzz_target!(|file: &[u8]| {
    let Ok(loader) = BytesWeightLoader::from_npz(file) else { return };
    for name in loader.names() {
        let view = loader.tensor(name).expect("memory does not fail").expect("the name was listed");
        assert_eq!(rlx_tensor::byte_count(view.dims, view.dtype), Some(view.bytes.len()));
    }
});
