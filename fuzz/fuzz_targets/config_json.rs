//! Any text: readers return, and what `finish` passes has been read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rlx::import::hf::{ConfigReader, GenerationConfig, PoolingConfig};

fuzz_target!(|text: &[u8]| {
    for _ in 0..2 {
        let Ok(cfg) = ConfigReader::from_bytes("fuzz", text) else { return };
        let _ = GenerationConfig::read(&cfg);
    }
    if let Ok(cfg) = ConfigReader::from_bytes("fuzz", text) {
        let _ = PoolingConfig::read(&cfg);
    }
    if let Ok(cfg) = ConfigReader::from_bytes("fuzz", text) {
        let read_nothing = cfg.field_names().all(|name| !cfg.has(name));
        assert_eq!(cfg.finish().is_ok(), read_nothing);
    }
});
