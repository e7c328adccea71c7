//! A model, opened as arguments and settings say.

use crate::args::CacheType;
use crate::context::Context;
use crate::demo;
use crate::failure::{Failure, Result};
use crate::source::Source;
use rlx::backend::cpu::Precision;
use rlx::backend::{Backend, BackendRegistry};
use rlx::devices::DeviceId;
use rlx::import::hf::HfFolder;
use rlx::weights::WeightLoader;
use rlx_kernels::isa::Isa;
use rlx_models::gguf::GgufModel;
use rlx_models::{Beside, Model, OpenOptions, precision_of};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// An opened model.
pub struct Engine {
    /// Where it came from.
    pub source: Source,
    /// The model.
    pub model: Model,
    /// The instruction set of its kernels.
    pub isa: Isa,
    /// Time to open it and load its weights, in milliseconds.
    pub load_ms: f64,
}

impl Engine {
    /// Finds and opens MODEL; the built-in demo if none is given.
    pub fn open(model: Option<&str>, context: &Context) -> Result<Engine> {
        Self::open_beside(model, context, None)
    }

    /// As [`Engine::open`], with weights beside those of another model.
    pub fn open_beside(model: Option<&str>, context: &Context, beside: Option<Beside>) -> Result<Engine> {
        let (mut device, isa) = (context.device()?, context.isa()?);
        let budgeted = context.shared.expert_budget.is_some();
        if budgeted && device != DeviceId::CPU {
            let what = format!("--expert-budget keeps experts for the cpu, not for {device}");
            return Err(Failure::usage(what, "--expert-budget", "leave it out, or use --device cpu"));
        }
        let options = OpenOptions {
            threads: Some(context.threads()),
            isa: Some(isa),
            cache_dtype: context.shared.cache_type.map(CacheType::dtype),
            precision: context.config.precision,
            expert_budget: context.shared.expert_budget.map(usize::from),
            beside,
            ..OpenOptions::default()
        };
        let source = Source::find(model, context)?;
        let started = Instant::now();
        let mut later = context.later_devices(device).into_iter();
        let model = loop {
            match (
                watched(context, "opening the model", || open_on(&source, device, &options, context)),
                later.next(),
            ) {
                (Err(failure), Some(next)) if failure.is_device_fault() => {
                    context.note(format!("on {next}, for {device} cannot run the model: {failure}"));
                    device = next;
                }
                (model, _) => break model?,
            }
        };
        let load_ms = started.elapsed().as_secs_f64() * 1e3;
        let plan = if model.pipeline().plans_found() > 0 { "plan from the cache" } else { "plan made" };
        let steps = model.compiled().template().steps().len();
        context.passed_over(device).iter().for_each(|text| context.detail(text));
        let on = model.backend().name();
        context.detail(format!("opened in {load_ms:.1} ms on {on}: {steps} steps, {plan}"));
        Ok(Engine { source, model, isa, load_ms })
    }

    /// Binds and packs the weights, so that later times do not hold it.
    pub fn load(&mut self, context: &Context) -> Result<()> {
        let started = Instant::now();
        let program = watched(context, "loading weights", || self.model.load());
        let kernels = program?.kernels();
        let ms = started.elapsed().as_secs_f64() * 1e3;
        self.load_ms += ms;
        context.detail(format!("loaded weights in {ms:.1} ms: {} steps", kernels.len()));
        context.trace(|| kernels.iter().map(|choice| choice.kernel.as_str()).collect::<Vec<_>>().join("\n"));
        Ok(())
    }
}

/// A model on one device.
fn open_on(source: &Source, device: DeviceId, options: &OpenOptions, context: &Context) -> Result<Model> {
    let folder = match source {
        Source::Compiled(path) if device == DeviceId::CPU => return Ok(Model::open_with(path, options)?),
        Source::Compiled(path) => {
            return Ok(Model::open_artefact(path, options, backend(device, None, context)?)?);
        }
        Source::Gguf(path) if device == DeviceId::CPU => {
            return Ok(Model::from_gguf(&GgufModel::open(path)?, options)?);
        }
        Source::Gguf(path) => {
            let model = GgufModel::open(path)?;
            let backend = backend(device, Some(model.stored()), context)?;
            return Ok(Model::gguf_on_backend(&model, options, backend)?);
        }
        Source::Demo | Source::Folder(_) => folder(source, context)?,
    };
    Ok(match device {
        DeviceId::CPU => Model::from_folder(folder, options)?,
        other => {
            let weights = folder.loader()?;
            Model::on_backend(folder, options, backend(other, Some(&*weights), context)?)?
        }
    })
}

/// The backend of a device, set up as the settings say; in the precision of the weights, if none is asked for and it is bf16 and the
/// device's own.
fn backend(
    device: DeviceId,
    weights: Option<&dyn WeightLoader>,
    context: &Context,
) -> Result<Arc<dyn Backend>> {
    let (registry, mut config) = (BackendRegistry::global(), context.config.clone());
    if let (None, Some(weights)) = (config.precision, weights)
        && registry.precision_of_bf16(device) == Precision::Bf16
    {
        config.precision = Some(precision_of(weights)?);
    }
    let opened = registry.open(device, &config);
    Ok(opened.map_err(rlx_models::ModelError::from)?)
}

/// The folder of a model that is one.
pub fn folder(source: &Source, context: &Context) -> Result<HfFolder> {
    match source {
        Source::Demo => Ok(HfFolder::embedded("demo", demo::FILES)),
        Source::Folder(path) | Source::Gguf(path) | Source::Compiled(path) => {
            Ok(HfFolder::open(&path.to_string_lossy(), &context.config.hf_cache_dirs())?)
        }
    }
}

/// How long work may take before a terminal shows that it goes on.
const PATIENCE: Duration = Duration::from_millis(500);
const TICK: Duration = Duration::from_millis(100);

/// Runs work that may take long, with a line on the terminal that counts the seconds if it does.
fn watched<T>(context: &Context, what: &str, work: impl FnOnce() -> T) -> T {
    if !context.watched() {
        return work();
    }
    let (done, finished) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let (started, mut wait) = (Instant::now(), PATIENCE);
            while finished.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                eprint!("\r{what} {:.1} s", started.elapsed().as_secs_f64());
                wait = TICK;
            }
            if wait == TICK {
                eprint!("\r\x1b[2K");
            }
        });
        let result = work();
        drop(done);
        result
    })
}
