//! Models go through the pipeline: executables by capacities, made once, kept within bounds.

use crate::goldens::{folders, name_of, open_folder};
use rlx::aot::AotCache;
use rlx::backend::Backend;
use rlx::backend::cpu::CpuBackend;
use rlx::session::CompileOptions;
use rlx_kernels::isa::Isa;
use rlx_models::runtime::{self, DecoderRunner, EncoderRunner};
use rlx_models::{Built, Model, OpenOptions, TextOptions};
use std::path::Path;
use std::sync::Arc;

fn open(name: &str) -> Model {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../rlx-conformance/data/models").join(name);
    let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(Isa::detect(), 2));
    Model::on_backend(open_folder(&folder), &OpenOptions::default(), backend).unwrap()
}

fn tokens(model: &Model, new: usize) -> Vec<u32> {
    let options = TextOptions { max_tokens: new, ..TextOptions::default() };
    let mut generation = model.generate_tokens(&[1, 5, 9], &options).unwrap();
    generation.by_ref().for_each(|piece| drop(piece.unwrap()));
    generation.token_ids().to_vec()
}

#[test]
fn a_model_specialises_once_for_each_capacity_and_keeps_the_executables_used_last() {
    let model = open("llama");
    let pipeline = model.pipeline();
    assert_eq!((pipeline.specialisations(), pipeline.len()), (1, 1), "the plan that it was opened with");
    let first = tokens(&model, 4);
    assert_eq!((pipeline.specialisations(), pipeline.len()), (2, 2));
    assert_eq!(tokens(&model, 4), first, "a context that was used before gives the same text");
    assert_eq!(pipeline.specialisations(), 2, "none for a hit");
    assert_eq!(tokens(&model, 9)[..4], first[..]);
    assert_eq!((pipeline.specialisations(), pipeline.len()), (3, 2), "and no more than two are kept");
    let program = model.load().unwrap();
    let runner = model.decoder_runner(12).unwrap();
    assert!(Arc::ptr_eq(&runner.compiled().program().unwrap(), &program), "all of them run one program");
    drop(runner);
    pipeline.clear();
    assert!(pipeline.is_empty() && pipeline.bytes() == 0);
    assert_eq!(tokens(&model, 4), first);
}

#[test]
fn two_runners_of_one_capacity_share_a_plan_and_no_memory() {
    let model = open("llama");
    let pipeline = model.pipeline();
    let before = pipeline.specialisations();
    let (one, two) = (model.decoder_runner(16).unwrap(), model.decoder_runner(16).unwrap());
    assert_eq!(pipeline.specialisations(), before + 1);
    assert!(std::ptr::eq(one.lir(), two.lir()));
    let generated: Vec<Vec<u32>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| tokens(&model, 6))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(generated.iter().all(|tokens| *tokens == generated[0]));
}

#[test]
fn an_encoder_keeps_its_executable() {
    let model = open("bert-mean");
    let vectors = model.embed(&["one fine day"]).unwrap();
    let specialised = model.pipeline().specialisations();
    assert_eq!(model.embed(&["one fine day"]).unwrap(), vectors);
    assert_eq!(model.pipeline().specialisations(), specialised);
}

#[test]
fn the_plan_of_every_checkpoint_is_found_again_by_the_next_process() {
    let cache = tempfile::tempdir().unwrap();
    for folder in folders() {
        let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(Isa::detect(), 1));
        let model =
            Model::on_backend(open_folder(&folder), &OpenOptions::default(), Arc::clone(&backend)).unwrap();
        let (graph, options) = (model.built().graph(), CompileOptions::default());
        let binding = match model.built() {
            Built::Decoder(model) => DecoderRunner::binding(&model.info, 8, 8).0,
            Built::Encoder(model) => EncoderRunner::binding(&model.info, 8).0,
            other => panic!("the test knows no {other:?}"),
        };
        let plan = |found: u64| {
            let cache = Some(AotCache::new(cache.path(), 1 << 30));
            let pipeline = runtime::pipeline(graph, model.weights(), &backend, cache, None).unwrap();
            let executable = pipeline.get_or_specialize_aot("x", graph, &options, &binding).unwrap();
            assert_eq!(pipeline.plans_found(), found, "{}", name_of(&folder));
            executable.lir().to_string()
        };
        assert_eq!(plan(0), plan(1), "{}", name_of(&folder));
    }
}
