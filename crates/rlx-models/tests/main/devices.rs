//! Devices that fail in the middle of a text: it goes on with the next one as if nothing had happened, and says so.

use crate::goldens::{Golden, folders, name_of, open_folder};
use rlx::backend::cpu::{CpuBackend, Precision};
use rlx::backend::{
    Backend, BackendError, Context, Io, KernelChoice, PackedStorage, Program, Traffic, WeightUses,
};
use rlx::devices::{Device, DeviceId};
use rlx::plan::{Lir, PlanTarget, Template};
use rlx::weights::WeightRegistry;
use rlx_graph::passes::Target;
use rlx_kernels::isa::Isa;
use rlx_models::sampling::SamplingOptions;
use rlx_models::{Draft, Fallback, Model, ModelDevices, ModelError, OpenOptions, Result, TextOptions};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// What fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Weights find no room.
    Load,
    /// A run's memory finds no room.
    Memory,
    /// The device is lost when a run has done its work.
    MidRun,
}

/// What fails next, after how many calls of that sort have succeeded. A device that failed stays so.
#[derive(Debug, Default)]
struct Script(Mutex<Option<(Fault, usize)>>);

impl Script {
    fn fail(&self, fault: Fault, after: usize) {
        *self.0.lock().unwrap() = Some((fault, after));
    }

    fn strikes(&self, kind: Fault) -> std::result::Result<(), BackendError> {
        let reason = "it fell off the bus".to_owned();
        match &mut *self.0.lock().unwrap() {
            Some((fault, 0)) if *fault == kind => Err(match kind {
                Fault::MidRun => BackendError::Lost { reason },
                _ => BackendError::OutOfMemory { bytes: 1 << 40, what: "all of it".to_owned() },
            }),
            Some((fault, left)) if *fault == kind => {
                *left -= 1;
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// A device that fails as a script says, and is another one otherwise.
struct Failing(Arc<dyn Backend>, Arc<Script>);

#[derive(Debug)]
struct FailingProgram(Arc<dyn Program>, Arc<Script>);

#[derive(Debug)]
struct FailingContext(Box<dyn Context>, Arc<Script>);

impl Backend for Failing {
    fn name(&self) -> &str {
        "failing"
    }

    fn precision(&self) -> Option<Precision> {
        self.0.precision()
    }

    fn traffic(&self) -> Option<Traffic> {
        self.0.traffic()
    }

    fn target(&self) -> &dyn Target {
        self.0.target()
    }

    fn plan_target(&self) -> &dyn PlanTarget {
        self.0.plan_target()
    }

    fn packed_bytes(&self, template: &Template) -> std::result::Result<usize, BackendError> {
        self.0.packed_bytes(template)
    }

    fn own_bytes(&self, template: &Template) -> usize {
        self.0.own_bytes(template)
    }

    fn raw_params(&self, template: &Template) -> Option<BTreeSet<String>> {
        self.0.raw_params(template)
    }

    fn storage(&self) -> Option<&dyn PackedStorage> {
        self.0.storage()
    }

    fn workspace_bytes(&self, lir: &Lir) -> std::result::Result<usize, BackendError> {
        self.0.workspace_bytes(lir)
    }

    fn load(
        &self,
        template: &Arc<Template>,
        weights: &WeightRegistry,
    ) -> std::result::Result<Arc<dyn Program>, BackendError> {
        self.1.strikes(Fault::Load)?;
        Ok(Arc::new(FailingProgram(self.0.load(template, weights)?, Arc::clone(&self.1))))
    }
}

impl Program for FailingProgram {
    fn context(&self, lir: &Lir) -> std::result::Result<Box<dyn Context>, BackendError> {
        self.1.strikes(Fault::Memory)?;
        Ok(Box::new(FailingContext(self.0.context(lir)?, Arc::clone(&self.1))))
    }

    fn kernels(&self) -> Vec<KernelChoice> {
        self.0.kernels()
    }

    fn own_bytes(&self) -> usize {
        self.0.own_bytes()
    }

    fn weight_uses(&self) -> Option<&WeightUses> {
        self.0.weight_uses()
    }
}

impl Context for FailingContext {
    fn run(&mut self, io: Io<'_, '_>) -> std::result::Result<(), BackendError> {
        self.0.run(io)?;
        self.1.strikes(Fault::MidRun)
    }

    fn bytes(&self) -> (usize, usize) {
        self.0.bytes()
    }
}

const CUDA: DeviceId = DeviceId { kind: Device::Cuda, index: 0 };
const GPU: DeviceId = DeviceId { kind: Device::Gpu, index: 0 };

fn golden(name: &str) -> PathBuf {
    folders().into_iter().find(|folder| name_of(folder) == name).unwrap()
}

fn cpu() -> Arc<dyn Backend> {
    Arc::new(CpuBackend::new(Isa::detect(), 1))
}

fn open(folder: &Path, backend: Arc<dyn Backend>) -> Result<Model> {
    Model::on_backend(open_folder(folder), &OpenOptions::default(), backend)
}

/// A model on devices that are `first` and fail by a script each, and on the CPU if it is in the chain.
fn chained(
    folder: &Path,
    chain: &[DeviceId],
    first: fn() -> Arc<dyn Backend>,
) -> (ModelDevices, Vec<Arc<Script>>) {
    let scripts: Vec<Arc<Script>> = chain.iter().map(|_| Arc::default()).collect();
    let (folder, at) = (folder.to_path_buf(), chain.to_vec());
    let of = scripts.clone();
    let open = move |device| {
        let script = &of[at.iter().position(|&other| other == device).unwrap()];
        let backend = if device == DeviceId::CPU { cpu() } else { first() };
        open(&folder, Arc::new(Failing(backend, Arc::clone(script))))
    };
    (ModelDevices::open(chain, open, |_| ()).unwrap(), scripts)
}

/// Text and tokens.
fn said(devices: &ModelDevices, prompt: &[u32], options: &TextOptions) -> Result<(String, Vec<u32>)> {
    let (mut text, mut pieces) = (devices.generate_tokens(prompt, options)?, String::new());
    while let Some(piece) = devices.next_piece(&mut text) {
        pieces.push_str(&piece?);
    }
    assert!(devices.next_piece(&mut text).is_none());
    Ok((pieces, text.token_ids().to_vec()))
}

/// What an unbroken device says.
fn expected(folder: &Path, prompt: &[u32], options: &TextOptions) -> (String, Vec<u32>) {
    said(&chained(folder, &[DeviceId::CPU], cpu).0, prompt, options).unwrap()
}

fn moved(fallbacks: &[Fallback]) -> Vec<(DeviceId, DeviceId)> {
    let pair = |fallback: &Fallback| match fallback {
        Fallback::Moved { from, to, .. } => (*from, *to),
        other => panic!("{other:?}"),
    };
    fallbacks.iter().map(pair).collect()
}

fn sampled() -> SamplingOptions {
    SamplingOptions { temperature: 0.9, seed: 5, repetition_penalty: 1.2, ..SamplingOptions::greedy() }
}

/// A plain model, one with windows, and two whose rotation depends on the text's length, one of which begins anew in mid-text.
#[test]
fn a_text_goes_on_where_its_device_was_lost_as_on_one_that_was_not() {
    for (name, prompt) in [("qwen2", 5), ("gemma2", 13), ("llama-dynamic", 70), ("phi3-longrope", 60)] {
        let folder = golden(name);
        let mut ids = Golden::open(&folder).ids("prompts").into_iter().max_by_key(Vec::len).unwrap();
        ids.truncate(prompt);
        for sampling in [SamplingOptions::greedy(), sampled()] {
            let options = TextOptions { max_tokens: 12, sampling, ..TextOptions::default() };
            let (text, tokens) = expected(&folder, &ids, &options);
            for after in [0, 1, 3, 8] {
                let (devices, scripts) = chained(&folder, &[CUDA, DeviceId::CPU], cpu);
                scripts[0].fail(Fault::MidRun, after);
                let found = said(&devices, &ids, &options).unwrap();
                assert_eq!(found, (text.clone(), tokens.clone()), "{name} lost after {after} steps");
                assert_eq!(moved(&devices.fallbacks()), [(CUDA, DeviceId::CPU)], "{name}");
                assert_eq!(devices.device(), DeviceId::CPU);
            }
        }
    }
}

/// From device to device, and not for the last time.
#[test]
fn a_text_goes_on_along_the_whole_chain_and_past_its_context() {
    let folder = golden("qwen2");
    let prompt: Vec<u32> = (0..9).map(|i| 3 + 5 * i % 40).collect();
    let shifts = TextOptions { context: Some(24), context_shift: Some(2), ..TextOptions::default() };
    let options = TextOptions { max_tokens: 40, sampling: sampled(), ..shifts };
    let wanted = expected(&folder, &prompt, &options);
    for (first, second) in [(3, 2), (15, 0), (16, 1), (20, 10)] {
        let (devices, scripts) = chained(&folder, &[CUDA, GPU, DeviceId::CPU], cpu);
        scripts[0].fail(Fault::MidRun, first);
        scripts[1].fail(Fault::MidRun, second);
        assert_eq!(said(&devices, &prompt, &options).unwrap(), wanted, "{first} {second}");
        assert_eq!(moved(&devices.fallbacks()), [(CUDA, GPU), (GPU, DeviceId::CPU)]);
        // The next text begins where this one ended.
        assert_eq!(said(&devices, &prompt, &options).unwrap(), wanted);
        assert_eq!(devices.fallbacks().len(), 2);
    }
}

/// The interpreter of kernels keeps caches in a memory of its own, and gives the largest logits only.
#[test]
fn a_text_goes_on_from_a_device_with_a_memory_of_its_own() {
    let folder = golden("llama");
    let prompt = &Golden::open(&folder).ids("prompts")[1];
    let greedy = TextOptions { max_tokens: 5, ..TextOptions::default() };
    let wanted = expected(&folder, prompt, &greedy);
    for (fault, after) in [(Fault::MidRun, 2), (Fault::Load, 0), (Fault::Memory, 0)] {
        let (devices, scripts) = chained(&folder, &[GPU, DeviceId::CPU], rlx_gpu::emulated);
        scripts[0].fail(fault, after);
        assert_eq!(said(&devices, prompt, &greedy).unwrap(), wanted, "{fault:?}");
        assert_eq!(moved(&devices.fallbacks()), [(GPU, DeviceId::CPU)]);
        let cause = devices.fallbacks()[0].to_string();
        assert!(cause.contains(if fault == Fault::MidRun {
            "fell off the bus"
        } else {
            "no 1099511627776 bytes"
        }));
    }
}

#[test]
fn an_adapter_goes_along() {
    let folder = golden("llama");
    let adapter = Path::new(env!("CARGO_MANIFEST_DIR")).join("../rlx-conformance/data/adapters/llama-a");
    let prompt = &Golden::open(&folder).ids("prompts")[1];
    let options = TextOptions { max_tokens: 10, adapter: Some("a".to_owned()), ..TextOptions::default() };
    let run = |after| {
        let (devices, scripts) = chained(&folder, &[CUDA, DeviceId::CPU], cpu);
        devices.model().add_adapter("a", &adapter).unwrap();
        scripts[0].fail(Fault::MidRun, after);
        let found = said(&devices, prompt, &options).unwrap();
        (found, devices.fallbacks().len(), devices.model().adapter_names())
    };
    let (wanted, moves, _) = run(1000);
    assert_eq!(moves, 0);
    let plain = expected(&folder, prompt, &TextOptions { adapter: None, ..options.clone() });
    assert_ne!(wanted, plain);
    for after in [0, 4] {
        assert_eq!(run(after), (wanted.clone(), 1, vec!["a".to_owned()]));
    }
}

/// A draft model's device may fail while the model's does not, and the other way round.
#[test]
fn a_draft_model_that_fails_is_left_and_the_text_stays() {
    let folder = golden("qwen2");
    let prompt = &Golden::open(&folder).ids("prompts")[2];
    let plain = TextOptions { max_tokens: 12, sampling: sampled(), ..TextOptions::default() };
    let wanted = expected(&folder, prompt, &plain);
    for (fault, of_draft, of_model) in [
        (Fault::MidRun, Some(3), None),
        (Fault::Memory, Some(0), None),
        (Fault::MidRun, None, Some(2)),
        (Fault::MidRun, Some(5), Some(2)),
    ] {
        let (draft, [script]) = {
            let (devices, scripts) = chained(&folder, &[GPU], cpu);
            (Arc::clone(devices.model()), [Arc::clone(&scripts[0])])
        };
        let (devices, scripts) = chained(&folder, &[CUDA, DeviceId::CPU], cpu);
        of_draft.inspect(|&after| script.fail(fault, after));
        of_model.inspect(|&after| scripts[0].fail(fault, after));
        let options =
            TextOptions { draft: Draft::Model { model: Arc::clone(&draft), tokens: 3 }, ..plain.clone() };
        assert_eq!(said(&devices, prompt, &options).unwrap(), wanted, "{fault:?} {of_draft:?} {of_model:?}");
        let undrafted = |fallback: &&Fallback| matches!(fallback, Fallback::Undrafted { .. });
        let count = devices.fallbacks().iter().filter(undrafted).count();
        assert_eq!(count, usize::from(of_draft.is_some()));
        assert_eq!(devices.device() == DeviceId::CPU, of_model.is_some());
        // Where the device is the one that was asked for, its draft model's fault is an error as well.
        if of_draft.is_some() {
            let (alone, _) = chained(&folder, &[CUDA], cpu);
            assert!(matches!(said(&alone, prompt, &options), Err(ModelError::Draft(_))));
        }
    }
}

#[cfg(feature = "grammar")]
#[test]
fn a_grammar_goes_on_in_mid_text() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo");
    let grammar = rlx_models::grammar::Grammar::Regex("(yes|no), [a-z]{9}!".into());
    let sampling = SamplingOptions { temperature: 1.0, seed: 3, ..SamplingOptions::greedy() };
    let options = TextOptions { sampling, grammar: Some(grammar), ..TextOptions::default() };
    let wanted = expected(&folder, &[5, 6, 7], &options);
    let (devices, scripts) = chained(&folder, &[CUDA, DeviceId::CPU], cpu);
    scripts[0].fail(Fault::MidRun, 4);
    assert_eq!(said(&devices, &[5, 6, 7], &options).unwrap(), wanted);
    assert_eq!(devices.fallbacks().len(), 1);
}

#[test]
fn texts_are_embedded_again_by_the_next_device() {
    let folder = golden("bert-mean");
    let texts: Vec<String> = (0..7).map(|i| format!("Mia has {i} dogs.")).collect();
    let wanted = open(&folder, cpu()).unwrap().embed(&texts).unwrap();
    for (fault, after) in [(Fault::MidRun, 0), (Fault::Load, 0), (Fault::Memory, 0)] {
        let (devices, scripts) = chained(&folder, &[CUDA, DeviceId::CPU], cpu);
        scripts[0].fail(fault, after);
        assert_eq!(devices.embed(&texts).unwrap(), wanted, "{fault:?}");
        assert_eq!(moved(&devices.fallbacks()), [(CUDA, DeviceId::CPU)]);
    }
}

#[test]
fn a_chain_that_ends_lists_every_device_and_one_device_is_never_left() {
    let folder = golden("llama");
    let options = TextOptions { max_tokens: 8, ..TextOptions::default() };
    let (devices, scripts) = chained(&folder, &[CUDA, DeviceId::CPU], cpu);
    scripts[0].fail(Fault::MidRun, 2);
    scripts[1].fail(Fault::Memory, 0);
    let error = said(&devices, &[1, 5], &options).unwrap_err();
    let text = error.to_string();
    for part in ["no device ran", "cuda: the device is lost: it fell off the bus", "cpu: the device has no"] {
        assert!(text.contains(part), "{text}");
    }
    assert!(error.is_device_fault());
    let (alone, scripts) = chained(&folder, &[CUDA], cpu);
    scripts[0].fail(Fault::MidRun, 2);
    let mut begun = alone.generate_tokens(&[1, 5], &options).unwrap();
    let pieces: Vec<Result<String>> = std::iter::from_fn(|| alone.next_piece(&mut begun)).collect();
    assert_eq!(begun.token_ids().len(), 2);
    let error = pieces.last().unwrap().as_ref().unwrap_err().to_string();
    assert!(pieces[..pieces.len() - 1].iter().all(Result::is_ok) && error.contains("fell off the bus"));
    assert!(alone.fallbacks().is_empty());
}

#[test]
fn a_fault_of_the_caller_moves_nothing() {
    let (devices, _) = chained(&golden("llama"), &[CUDA, DeviceId::CPU], cpu);
    let options = TextOptions { max_tokens: 4, ..TextOptions::default() };
    assert!(matches!(devices.embed(&["text"]), Err(ModelError::NotAnEncoder { .. })));
    assert!(matches!(said(&devices, &[1, 1 << 20], &options), Err(ModelError::TokenId { .. })));
    let long = TextOptions { max_tokens: 1 << 20, ..TextOptions::default() };
    assert!(matches!(said(&devices, &[1], &long), Err(ModelError::Context { .. })));
    options.cancel.cancel();
    assert!(matches!(said(&devices, &[1], &options), Err(ModelError::Cancelled)));
    assert!(devices.fallbacks().is_empty() && devices.device() == CUDA);
    let empty = ModelDevices::open(&[], |_| open(&golden("llama"), cpu()), |_| ());
    assert!(empty.unwrap_err().to_string().contains("chain of devices is empty"));
}
