//! A model, opened as arguments and settings say.

use crate::context::Context;
use crate::demo;
use crate::failure::Result;
use crate::source::Source;
use rlx::import::hf::HfFolder;
use rlx_kernels::isa::Isa;
use rlx_models::gguf::GgufModel;
use rlx_models::{Model, OpenOptions};
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
        context.device()?;
        let isa = context.isa()?;
        let options =
            OpenOptions { threads: Some(context.threads()), isa: Some(isa), ..OpenOptions::default() };
        let source = Source::find(model, context)?;
        let started = Instant::now();
        let model = watched(context, "opening the model", || -> Result<Model> {
            match &source {
                Source::Gguf(path) => Ok(Model::from_gguf(&GgufModel::open(path)?, &options)?),
                _ => Ok(Model::from_folder(folder(&source, context)?, &options)?),
            }
        })?;
        let load_ms = started.elapsed().as_secs_f64() * 1e3;
        context
            .detail(format!("opened in {load_ms:.1} ms: {} nodes", model.compiled().graph().nodes().count()));
        Ok(Engine { source, model, isa, load_ms })
    }

    /// Binds and packs the weights, so that later times do not hold it.
    pub fn load(&mut self, context: &Context) -> Result<()> {
        let started = Instant::now();
        let program = watched(context, "loading weights", || self.model.compiled().program());
        let kernels = program.map_err(rlx_models::ModelError::from)?.kernels();
        let ms = started.elapsed().as_secs_f64() * 1e3;
        self.load_ms += ms;
        context.detail(format!("loaded weights in {ms:.1} ms: {} steps", kernels.len()));
        context.trace(|| kernels.iter().map(|choice| choice.kernel.as_str()).collect::<Vec<_>>().join("\n"));
        Ok(())
    }
}

/// The folder of a model that is one.
pub fn folder(source: &Source, context: &Context) -> Result<HfFolder> {
    match source {
        Source::Demo => Ok(HfFolder::embedded("demo", demo::FILES)),
        Source::Folder(path) | Source::Gguf(path) => {
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
