//! Any bytes as an ONNX model: imported or refused, never a crash. What is imported is not run: running is bounded by the caller.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rlx::Session;
use rlx::backend::reference::ReferenceBackend;
use std::sync::{Arc, OnceLock};

static SESSION: OnceLock<Session> = OnceLock::new();

fuzz_target!(|data: &[u8]| {
    let session = SESSION.get_or_init(|| Session::with_backend(Arc::new(ReferenceBackend::default())));
    let _ = rlx_onnx::OnnxModel::from_bytes(data, session);
});
