//! A model, opened as arguments and settings say.

use crate::args::CacheType;
use crate::context::Context;
use crate::demo;
use crate::failure::{Failure, Result};
use crate::source::Source;
use rlx::SessionError;
use rlx::backend::cpu::Precision;
use rlx::backend::{Backend, BackendRegistry};
use rlx::devices::{DeviceId, DevicePickStrategy, GraphDevices, GraphDevicesOptions};
use rlx::import::ImportError;
use rlx::import::hf::HfFolder;
use rlx::weights::{WeightLoader, WeightRegistry};
use rlx_graph::Graph;
use rlx_kernels::isa::Isa;
use rlx_models::gguf::GgufModel;
use rlx_models::{Beside, Model, ModelDevices, ModelError, OpenOptions, PlanRequest, precision_of};
use rlx_tensor::DimBinding;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// Tokens of a context that a model is judged with, unless it has fewer.
const CONTEXT: usize = 2048;

/// An opened model.
pub struct Engine {
    /// Where it came from.
    pub source: Source,
    /// The model, on the first device that opened it, with those to go on with.
    pub devices: ModelDevices,
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

    /// As [`Engine::open`]; where a device is to be chosen, on the one that the cost model expects to be fastest.
    pub fn open_fastest(model: Option<&str>, context: &Context) -> Result<Engine> {
        if context.shared.expert_budget.is_some() || !context.has_choice() {
            return Self::open(model, context);
        }
        let started = Instant::now();
        let host = Self::open(model, &context.without_device())?;
        let device = choose(&host.graph_devices(context)?, context).map_err(ModelError::from)?;
        if device == DeviceId::CPU {
            return Ok(host);
        }
        let chain = [device].into_iter().chain(context.later_devices(device)).collect();
        let mut engine = Self::open(model, &context.on_chain(chain))?;
        engine.load_ms = started.elapsed().as_secs_f64() * 1e3;
        Ok(engine)
    }

    /// The devices that the model's graph could run on, at the sizes of a full step.
    pub fn graph_devices(&self, context: &Context) -> Result<GraphDevices> {
        let model = self.model();
        let tokens = model.context_limit().min(CONTEXT);
        let plan = model.plan(PlanRequest { context: Some(tokens), batch: None }, context.threads())?;
        Ok(devices_of(model.built().graph(), model.compiled().weights(), plan.lir.binding(), context))
    }

    /// As [`Engine::open`], with weights beside those of another model.
    pub fn open_beside(model: Option<&str>, context: &Context, beside: Option<Beside>) -> Result<Engine> {
        let (device, isa) = (context.device()?, context.isa()?);
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
        let chain: Vec<DeviceId> = [device].into_iter().chain(context.later_devices(device)).collect();
        let (of, with, told) = (source.clone(), context.clone(), context.clone());
        let open =
            move |device| watched(&with, "opening the model", || open_on(&of, device, &options, &with));
        let devices = ModelDevices::open(&chain, open, move |fallback| told.note(fallback.to_string()))?;
        let load_ms = started.elapsed().as_secs_f64() * 1e3;
        let model = devices.model();
        let plan = if model.pipeline().plans_found() > 0 { "plan from the cache" } else { "plan made" };
        let steps = model.compiled().template().steps().len();
        context.passed_over(devices.device()).iter().for_each(|text| context.detail(text));
        let on = model.backend().name();
        context.detail(format!("opened in {load_ms:.1} ms on {on}: {steps} steps, {plan}"));
        model.backend().details().iter().for_each(|text| context.detail(text));
        Ok(Engine { source, devices, isa, load_ms })
    }

    /// The model, on the device that it is on now.
    pub fn model(&self) -> &Arc<Model> {
        self.devices.model()
    }

    /// Binds and packs the weights, so that later times do not hold it.
    pub fn load(&mut self, context: &Context) -> Result<()> {
        let started = Instant::now();
        let program = watched(context, "loading weights", || self.devices.run(|model| model.load()));
        let kernels = program?.kernels();
        let ms = started.elapsed().as_secs_f64() * 1e3;
        self.load_ms += ms;
        context.detail(format!("loaded weights in {ms:.1} ms: {} steps", kernels.len()));
        context.trace(|| kernels.iter().map(|choice| choice.kernel.as_str()).collect::<Vec<_>>().join("\n"));
        Ok(())
    }
}

/// The device that the cost model puts first, as it was found earlier or finds now.
pub fn choose(devices: &GraphDevices, context: &Context) -> std::result::Result<DeviceId, SessionError> {
    if let DevicePickStrategy::Benchmark { .. } = devices.policy().pick_strategy() {
        context.note("RLX_BENCHMARK_PICK is for programs that use the library: the cost model chooses here");
    }
    let (device, how) = match devices.chosen_before() {
        Some(device) => (device, "as before"),
        None => (devices.fastest()?, "by the cost model"),
    };
    context.detail(format!("on {device}, {how}: `rlx devices MODEL` has the figures"));
    Ok(device)
}

/// The devices of a graph whose params are in `weights`, judged at these sizes under the settings.
pub fn devices_of(
    graph: &Graph,
    weights: &Arc<WeightRegistry>,
    sizes: &DimBinding,
    context: &Context,
) -> GraphDevices {
    let mut options = GraphDevicesOptions::from_config(&context.config);
    (options.weights, options.sizes) = (Arc::clone(weights), sizes.clone());
    GraphDevices::open(graph.clone(), options)
}

/// A model on one device.
fn open_on(
    source: &Source,
    device: DeviceId,
    options: &OpenOptions,
    context: &Context,
) -> std::result::Result<Model, ModelError> {
    let folder = match source {
        Source::Compiled(path) if device == DeviceId::CPU => return Model::open_with(path, options),
        Source::Compiled(path) => {
            return Model::open_artefact(path, options, backend(device, None, context)?);
        }
        Source::Gguf(path) if device == DeviceId::CPU => {
            return Model::from_gguf(&GgufModel::open(path)?, options);
        }
        Source::Gguf(path) => {
            let model = GgufModel::open(path)?;
            let backend = backend(device, Some(model.stored()), context)?;
            return Model::gguf_on_backend(&model, options, backend);
        }
        Source::Demo | Source::Folder(_) => folder(source, context)?,
    };
    match device {
        DeviceId::CPU => Model::from_folder(folder, options),
        other => {
            let weights = folder.loader()?;
            Model::on_backend(folder, options, backend(other, Some(&*weights), context)?)
        }
    }
}

/// The backend of a device, set up as the settings say; in the precision of the weights, if none is asked for and it is bf16 and the
/// device's own.
fn backend(
    device: DeviceId,
    weights: Option<&dyn WeightLoader>,
    context: &Context,
) -> std::result::Result<Arc<dyn Backend>, ModelError> {
    let (registry, mut config) = (BackendRegistry::global(), context.config.clone());
    if let (None, Some(weights)) = (config.precision, weights)
        && registry.precision_of_bf16(device) == Precision::Bf16
    {
        config.precision = Some(precision_of(weights)?);
    }
    Ok(registry.open(device, &config)?)
}

/// The folder of a model that is one.
pub fn folder(source: &Source, context: &Context) -> std::result::Result<HfFolder, ImportError> {
    match source {
        Source::Demo => Ok(HfFolder::embedded("demo", demo::FILES)),
        Source::Folder(path) | Source::Gguf(path) | Source::Compiled(path) => {
            HfFolder::open(&path.to_string_lossy(), &context.config.hf_cache_dirs())
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

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::args::Shared;
    use crate::output::Devices;
    use rlx::backend::reference::ReferenceBackend;
    use rlx::backend::{BackendError, BackendProvider, DeviceProbe, Program, register_backend};
    use rlx::config::Config;
    use rlx::devices::Device;
    use rlx::plan::{Lir, PlanTarget, Template};
    use rlx_graph::passes::Target;

    /// A device that opens a model and then has no room for its weights.
    struct Full(ReferenceBackend);

    impl Backend for Full {
        fn name(&self) -> &str {
            "full"
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

        fn workspace_bytes(&self, lir: &Lir) -> std::result::Result<usize, BackendError> {
            self.0.workspace_bytes(lir)
        }

        fn load(
            &self,
            _: &Arc<Template>,
            _: &WeightRegistry,
        ) -> std::result::Result<Arc<dyn Program>, BackendError> {
            Err(BackendError::OutOfMemory { bytes: 4096, what: "weights".to_owned() })
        }
    }

    struct FullProvider;

    impl BackendProvider for FullProvider {
        fn kind(&self) -> Device {
            Device::Rocm
        }

        fn probe(&self) -> DeviceProbe {
            DeviceProbe::Present(1)
        }

        fn open(&self, _: u32, _: &Config) -> std::result::Result<Arc<dyn Backend>, SessionError> {
            Ok(Arc::new(Full(ReferenceBackend::default())))
        }
    }

    /// Devices that run the demo under these settings, as JSON; what its first token came to.
    fn first_token(change: impl FnOnce(&mut Config)) -> Result<(String, u32)> {
        let mut context = Context::new(Shared::default(), None)?;
        (context.config.device, context.config.device_chain, context.config.prefer_devices) =
            (None, None, None);
        change(&mut context.config);
        let mut engine = Engine::open(None, &context)?;
        engine.load(&context)?;
        let mut text = engine.devices.generate_tokens(&[5, 6, 7], &rlx_models::TextOptions::default())?;
        drop(engine.devices.next_piece(&mut text).transpose()?);
        let json = serde_json::to_string(&Devices::of(&engine.devices)).unwrap_or_default();
        Ok((json, text.token_ids()[0]))
    }

    #[test]
    fn a_device_that_fails_after_opening_is_left_unless_it_was_asked_for() {
        const ROCM: DeviceId = DeviceId { kind: Device::Rocm, index: 0 };
        register_backend(Arc::new(FullProvider)).unwrap();
        let (json, token) = first_token(|_| ()).unwrap();
        assert_eq!(json, r#"{"device":"cpu"}"#);
        let told = r#"{"device":"cpu","fallbacks":[{"from":"rocm","to":"cpu","what":"model","cause":"the device has no 4096 bytes for weights"}]}"#;
        let chain = |config: &mut Config| config.device_chain = Some(vec![ROCM, DeviceId::CPU]);
        assert_eq!(first_token(chain).unwrap(), (told.to_owned(), token));
        let preferred = |config: &mut Config| config.prefer_devices = Some(vec![Device::Rocm]);
        assert_eq!(first_token(preferred).unwrap(), (told.to_owned(), token));
        let refused = |change: fn(&mut Config)| first_token(change).unwrap_err().what().to_owned();
        assert!(refused(|config| config.device = Some(ROCM)).contains("no 4096 bytes for weights"));
        let alone = refused(|config| {
            (config.prefer_devices, config.deny_devices) =
                (Some(vec![Device::Rocm]), Some(vec![Device::Cpu]));
        });
        assert!(alone.contains("no 4096 bytes for weights"));
    }

    struct Plain;

    impl BackendProvider for Plain {
        fn kind(&self) -> Device {
            Device::Metal
        }

        fn probe(&self) -> DeviceProbe {
            DeviceProbe::Present(2)
        }

        fn is_software(&self, index: u32) -> bool {
            index == 1
        }

        fn open(&self, _: u32, _: &Config) -> std::result::Result<Arc<dyn Backend>, SessionError> {
            Ok(Arc::new(ReferenceBackend::default()))
        }
    }

    /// An invocation beside the reference evaluation as a device of the kind metal, without the settings that ask for one.
    pub fn context_with_metal(cache: &std::path::Path, change: impl FnOnce(&mut Config)) -> Context {
        BackendRegistry::global().replace(Arc::new(Plain));
        let mut context = Context::new(Shared::default(), None).unwrap();
        (context.config.device, context.config.device_chain, context.config.prefer_devices) =
            (None, None, None);
        context.config.cache_dir = Some(cache.to_owned());
        change(&mut context.config);
        context
    }

    #[test]
    fn the_fastest_device_is_taken_where_none_is_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let taken = |change: fn(&mut Config)| {
            let context = context_with_metal(folder.path(), change);
            let engine = Engine::open_fastest(None, &context)?;
            Ok::<_, Failure>((context.has_choice(), engine.devices.device().to_string()))
        };
        assert_eq!(taken(|_| ()).unwrap(), (true, "cpu".to_owned()), "the reference evaluation is slower");
        let only = |config: &mut Config| config.devices = Some(vec![Device::Metal]);
        assert_eq!(taken(only).unwrap(), (true, "metal".to_owned()));
        let asked = |config: &mut Config| config.device = Some(DeviceId { kind: Device::Metal, index: 1 });
        assert_eq!(taken(asked).unwrap(), (false, "metal:1".to_owned()));
        let denied = |config: &mut Config| config.deny_devices = Some(vec![Device::Metal, Device::Rocm]);
        assert_eq!(taken(denied).unwrap(), (false, "cpu".to_owned()));
        let remembered = std::fs::read_to_string(folder.path().join("devices/devices.json")).unwrap();
        assert_eq!(remembered.matches(" by cost\"").count(), 2, "{remembered}");
    }
}
