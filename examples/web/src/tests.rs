use super::{Loaded, Place, Request};
use rlx_kernels::isa::Isa;
use rlx_models::Model;
use rlx_tensor::storage::AlignedBytes;
use std::path::{Path, PathBuf};

fn checkpoint(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../crates/rlx-conformance/data/models").join(name)
}

type Files = Vec<(String, AlignedBytes)>;

/// All files below a folder, named from it.
fn fetched(folder: &Path, within: &str) -> Files {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder.join(within)).unwrap() {
        let name = format!("{within}{}", entry.unwrap().file_name().to_string_lossy());
        match folder.join(&name).is_dir() {
            true => files.extend(fetched(folder, &format!("{name}/"))),
            false => files
                .push((name.clone(), AlignedBytes::copied_from(&std::fs::read(folder.join(name)).unwrap()))),
        }
    }
    files
}

fn story(model: &Loaded, max_tokens: usize, pieces: usize) -> (String, super::Report) {
    let prompt = "Once upon a time, Mia and her dog Rex".to_owned();
    let request = Request { prompt, max_tokens, temperature: 0.0, seed: 0 };
    let (mut text, mut left) = (String::new(), pieces);
    let report = model.generate(&request, |piece| {
        text.push_str(piece);
        left -= 1;
        left > 0
    });
    (text, report.unwrap())
}

#[test]
fn the_demo_tells_one_story_and_stops_when_told() {
    let scalar = Loaded::demo(&Place::Cpu(Some(Isa::Scalar))).unwrap();
    let best = Loaded::demo(&Place::Cpu(None)).unwrap();
    let (text, report) = story(&best, 40, usize::MAX);
    assert_eq!(story(&scalar, 40, usize::MAX).0, text);
    assert_eq!((report.tokens, report.finish), (40, "the limit of new tokens was reached"));
    let (start, report) = story(&best, 40, 3);
    assert!(text.starts_with(&start) && start.len() < text.len(), "{start:?} of {text:?}");
    assert_eq!(report.finish, "stopped");
    let told = best.describe();
    assert_eq!((told.task, told.parameters), ("generate", 918_656));
    assert!(best.embed("a").unwrap_err().to_string().contains("demo"));
}

#[test]
fn fetched_files_give_the_bits_of_the_folder_on_disk() {
    let path = checkpoint("bert-mean");
    let model = Loaded::open("fetched", fetched(&path, ""), &Place::Cpu(None)).unwrap();
    assert_eq!(model.describe().task, "embed");
    let wanted = Model::open(&path).unwrap().embed(&["some words to embed"]).unwrap().swap_remove(0);
    let found = model.embed("some words to embed").unwrap();
    let bits = |vector: &[f32]| vector.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&found), bits(&wanted));
}

#[test]
fn what_a_folder_lacks_or_has_broken_is_named() {
    let path = checkpoint("bert-mean");
    let refused = |change: &dyn Fn(&mut Files)| {
        let mut files = fetched(&path, "");
        change(&mut files);
        Loaded::open("fetched", files, &Place::Cpu(None)).err().unwrap().to_string()
    };
    for lacking in ["config.json", "model.safetensors", "tokenizer.json"] {
        let text = refused(&|files| files.retain(|(name, _)| name != lacking));
        assert!(text.contains(lacking), "{text}");
    }
    let text = refused(&|files| {
        let weights = files.iter_mut().find(|(name, _)| name == "model.safetensors").unwrap();
        weights.1 = AlignedBytes::copied_from(&weights.1.as_slice()[..100]);
    });
    assert!(text.contains("header") || text.contains("bytes"), "{text}");
}
