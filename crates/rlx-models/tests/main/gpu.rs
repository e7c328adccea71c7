//! Golden checkpoints on GPU backends: by the interpreter of kernels, and on the first adapter if this build has devices.

use crate::cpu::{check_decoder, check_encoder, open};
use crate::goldens::{Golden, folders, name_of};
use rlx::backend::{Backend, DeviceProbe};
use rlx::config::{ByteSize, Config};
use rlx_models::Built;
use std::sync::Arc;

#[test]
fn an_encoder_by_the_interpreter_of_kernels() {
    let folder = folders().into_iter().find(|folder| name_of(folder) == "bert-mean").unwrap();
    let model = open(&folder, &rlx_gpu::emulated());
    let Built::Encoder(encoder) = model.built() else { panic!("bert-mean is an encoder") };
    check_encoder("bert-mean by the interpreter", &model, encoder, &Golden::open(&folder));
}

#[test]
fn every_family_on_the_first_adapter() {
    let Some(provider) = rlx_gpu::provider() else {
        println!("skipped: this build has no devices (`--features rlx-gpu/wgpu`)");
        return;
    };
    let found = provider.probe();
    assert!(matches!(found, DeviceProbe::Present(count) if count > 0), "{found:?}");
    let mut config = Config::default();
    // Nothing is kept of this run.
    config.cache_bytes = Some(ByteSize(0));
    let backend: Arc<dyn Backend> = provider.open(0, &config).unwrap();
    for folder in folders() {
        let (golden, label) = (Golden::open(&folder), format!("{} on {}", name_of(&folder), backend.name()));
        let model = open(&folder, &backend);
        match model.built() {
            Built::Decoder(decoder) => drop(check_decoder(&label, &model, decoder, &golden)),
            Built::Encoder(encoder) => drop(check_encoder(&label, &model, encoder, &golden)),
            _ => unreachable!("a model is a decoder or an encoder"),
        }
        assert!(model.compiled().report().unwrap().steps.iter().all(|step| step.native), "{label}");
    }
}
