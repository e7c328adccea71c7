//! Any file: either an error, or tensors that lie in the file, cover it, and have the size of their shape.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use rlx::import::safetensors::parse_header;
use rlx::weights::{BytesWeightLoader, WeightLoader};

fuzz_target!(|file: &[u8]| {
    let Ok(header) = parse_header(Path::new("fuzz"), file) else {
        assert!(BytesWeightLoader::from_safetensors(file).is_err());
        return;
    };
    let covered: usize = header.tensors.iter().map(|tensor| tensor.bytes).sum();
    assert!(covered <= file.len());
    for tensor in &header.tensors {
        assert!(tensor.offset + tensor.bytes <= file.len());
        assert_eq!(rlx_tensor::byte_count(&tensor.dims, tensor.dtype), Some(tensor.bytes));
    }
    let loader = BytesWeightLoader::from_safetensors(file).expect("the header was accepted");
    assert_eq!(loader.len(), header.tensors.len());
    for name in loader.names() {
        assert!(loader.tensor(name).is_ok_and(|tensor| tensor.is_some()));
    }
});
