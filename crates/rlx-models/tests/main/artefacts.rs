//! Every golden checkpoint as a compiled file: the same bits and tokens as the folder, and nothing of a broken or foreign file.

use crate::goldens::{folders, name_of, open_folder};
use rlx::aot::AotCacheError;
use rlx::aot::container::{Container, LargeSection, OpenContainer, Section};
use rlx::backend::Backend;
use rlx::backend::cpu::CpuBackend;
use rlx_kernels::isa::Isa;
use rlx_models::gguf::GgufModel;
use rlx_models::gguf::export::{Scheme, export};
use rlx_models::{Built, Model, ModelError, OpenOptions, TextOptions};
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn cpu(isa: Isa) -> Arc<dyn Backend> {
    Arc::new(CpuBackend::new(isa, 2))
}

fn options() -> OpenOptions {
    OpenOptions { threads: Some(2), ..OpenOptions::default() }
}

fn temporary(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("rlx-artefact-{}-{name}.rlx", std::process::id()))
}

/// What a model answers: bits of embeddings, or text and tokens.
fn answer(model: &Model) -> (Vec<u32>, String) {
    match model.built() {
        Built::Encoder(_) => {
            let rows = model.embed(&["one fine day", "the cat sat on the mat, twice"]).unwrap();
            (rows.concat().iter().map(|value| value.to_bits()).collect(), String::new())
        }
        Built::Decoder(_) => {
            let wanted = TextOptions { max_tokens: 6, ..TextOptions::default() };
            let mut generation = model.generate("the cat sat", &wanted).unwrap();
            let text = generation.by_ref().map(|piece| piece.unwrap()).collect();
            ([generation.prompt_ids(), generation.token_ids()].concat(), text)
        }
        other => panic!("the test knows no {other:?}"),
    }
}

fn refusal(path: &Path, backend: Arc<dyn Backend>) -> AotCacheError {
    let opened = Model::open_artefact(path, &options(), backend).and_then(|model| {
        model.compiled().program()?;
        Ok(model)
    });
    match opened.err() {
        Some(ModelError::Session(rlx::SessionError::Aot(error))) => error,
        other => panic!("expected a refusal of the file, found {other:?}"),
    }
}

#[test]
fn every_checkpoint_answers_from_its_compiled_file_as_from_its_folder() {
    for folder in folders() {
        let name = name_of(&folder);
        let backend = cpu(Isa::detect());
        let fresh = Model::on_backend(open_folder(&folder), &options(), Arc::clone(&backend)).unwrap();
        let path = temporary(&name);
        fresh.write_artefact(&path, 2).unwrap_or_else(|error| panic!("{name}: {error}"));
        let compiled = Model::open_artefact(&path, &options(), cpu(Isa::detect()))
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(answer(&compiled), answer(&fresh), "{name}");
        assert_eq!(compiled.stop(), fresh.stop(), "{name}");
        let uses = |model: &Model| model.compiled().program().unwrap().weight_uses().cloned();
        assert_eq!(uses(&compiled), uses(&fresh), "{name}");
        let limits = |model: &Model| (model.context_limit(), model.tokenizer().max_tokens());
        assert_eq!(limits(&compiled), limits(&fresh), "{name}");
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn a_gguf_file_answers_from_its_compiled_file_as_it_does_itself() {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo");
    let golden = |wanted: &str| folders().into_iter().find(|folder| name_of(folder) == wanted).unwrap();
    let cases = [(demo, "Q8_0"), (golden("llama"), "F32"), (golden("llama-linear"), "F32")];
    let cases = cases.into_iter().chain([(golden("qwen3-moe"), "F32"), (golden("bert-mean"), "F32")]);
    for (folder, scheme) in cases {
        let (file, path) = (temporary("source").with_extension("gguf"), temporary("from-gguf"));
        export(&open_folder(&folder), &file, Scheme::named(scheme).unwrap(), |_, _| {}).unwrap();
        let source = GgufModel::open(&file).unwrap();
        let fresh = Model::gguf_on_backend(&source, &options(), cpu(Isa::detect())).unwrap();
        fresh.write_artefact(&path, 2).unwrap();
        let compiled = Model::open_artefact(&path, &options(), cpu(Isa::detect())).unwrap();
        assert_eq!(answer(&compiled), answer(&fresh), "{}", folder.display());
        assert_eq!(compiled.stop(), fresh.stop());
        for text in crate::gguf::HOSTILE {
            let ids = |model: &Model| model.tokenizer().encode(text, true).unwrap();
            assert_eq!(ids(&compiled), ids(&fresh), "{}: {text:?}", folder.display());
        }
        [file, path].into_iter().for_each(|path| std::fs::remove_file(path).unwrap());
    }
}

#[test]
fn a_file_for_another_instruction_set_is_refused_by_name() {
    let llama = folders().into_iter().find(|folder| name_of(folder) == "llama").unwrap();
    // The scalar kernels are in every build, so there is another set wherever there is a better one.
    let Some(other) = Isa::available().into_iter().find(|&isa| isa != Isa::detect()) else { return };
    let fresh = Model::on_backend(open_folder(&llama), &options(), cpu(Isa::detect())).unwrap();
    let path = temporary("isa");
    fresh.write_artefact(&path, 1).unwrap();
    let error = refusal(&path, cpu(other));
    assert!(matches!(error, AotCacheError::Mismatch { what: "instruction set", .. }), "{error}");
    std::fs::remove_file(path).unwrap();
}

/// What a file holds, as whoever writes one with right checksums might change it.
fn rewritten(path: &Path, change: impl Fn(&str, &mut Vec<u8>)) {
    let opened = OpenContainer::open(path).unwrap();
    let mut small: Vec<(String, Vec<u8>)> =
        opened.small_names().map(|name| (name.to_owned(), opened.small(name).unwrap().to_vec())).collect();
    small.iter_mut().for_each(|(name, bytes)| change(name, bytes));
    let large = opened.large().unwrap();
    let small: Vec<Section<'_>> =
        small.iter().map(|(name, bytes)| Section { name, about: &[], bytes }).collect();
    let section = |section: &LargeSection<'_>| {
        (section.name.to_owned(), section.about.to_vec(), section.content.clone())
    };
    let held: Vec<_> = large.iter().map(section).collect();
    let large = held.iter().map(|(name, about, content)| Section { name, about, bytes: content.bytes() });
    let large: Vec<Section<'_>> = large.collect();
    let container = Container { stamp: opened.stamp(), key: opened.key(), small: &small, large: &large };
    container.write(path, 1).unwrap();
}

#[test]
fn a_forged_plan_with_right_checksums_is_stopped_by_the_verifier() {
    let llama = folders().into_iter().find(|folder| name_of(folder) == "llama").unwrap();
    let fresh = Model::on_backend(open_folder(&llama), &options(), cpu(Isa::detect())).unwrap();
    let path = temporary("forged");
    fresh.write_artefact(&path, 1).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let forge = |from: &str, to: &str| {
        std::fs::write(&path, &whole).unwrap();
        rewritten(&path, |name, bytes| {
            if name == "plan" {
                let text = String::from_utf8(bytes.clone()).unwrap();
                assert!(text.contains(from), "the plan has no {from:?}");
                *bytes = text.replace(from, to).into_bytes();
            }
        });
        refusal(&path, cpu(Isa::detect()))
    };
    let plan = {
        let opened = OpenContainer::open(&path).unwrap();
        String::from_utf8(opened.small("plan").unwrap().to_vec()).unwrap()
    };
    let arena = plan.lines().find(|line| line.trim_start().starts_with("arena ")).unwrap();
    for (from, to) in [(arena, "  arena 64"), (", at 0\n", ", at 64\n"), ("  step ", "  stop ")] {
        let error = forge(from, to);
        assert!(matches!(error, AotCacheError::Refused { .. }), "{from:?} -> {to:?}: {error}");
    }
    std::fs::remove_file(path).unwrap();
}

#[test]
fn no_flipped_bit_and_no_lost_byte_of_a_compiled_file_is_overlooked() {
    let llama = folders().into_iter().find(|folder| name_of(folder) == "llama").unwrap();
    let fresh = Model::on_backend(open_folder(&llama), &options(), cpu(Isa::detect())).unwrap();
    let path = temporary("flips");
    fresh.write_artefact(&path, 1).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = |below: usize| {
        seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (seed >> 33) as usize % below
    };
    let verified = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        OpenContainer::open(&path).and_then(|opened| opened.verify_body(1))
    };
    for _ in 0..300 {
        let mut bytes = whole.clone();
        let at = random(bytes.len());
        bytes[at] ^= 1 << random(8);
        assert!(verified(&bytes).is_err(), "a flip at byte {at} passed");
        verified(&whole).unwrap();
        let len = random(whole.len());
        assert!(verified(&whole[..len]).is_err(), "a file cut to {len} bytes passed");
        verified(&whole).unwrap();
    }
    std::fs::remove_file(path).unwrap();
}
