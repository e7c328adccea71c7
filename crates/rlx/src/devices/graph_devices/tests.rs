use super::*;
use crate::backend::fake::{FakeProvider, Fault, Script};
use crate::backend::{CpuProvider, DeviceProbe, ReferenceProvider};
use crate::devices::id::Device;
use crate::session::contract::{graph, values};
use rlx_tensor::Tensor;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::atomic::AtomicU64;

const CPU: DeviceId = DeviceId::CPU;
const CUDA: DeviceId = DeviceId { kind: Device::Cuda, index: 0 };
const ROCM: DeviceId = DeviceId { kind: Device::Rocm, index: 0 };

/// The CPU, a fake cuda and a fake rocm, with what the fakes follow.
struct Lab {
    options: GraphDevicesOptions,
    cuda: Arc<Script>,
    rocm: Arc<Script>,
    seconds: Arc<AtomicU64>,
}

fn lab() -> Lab {
    let backends = BackendRegistry::empty();
    let ((cuda_provider, cuda), (rocm_provider, rocm)) =
        (FakeProvider::new(Device::Cuda), FakeProvider::new(Device::Rocm));
    backends.register(Arc::new(CpuProvider)).unwrap();
    backends.register(Arc::new(ReferenceProvider)).unwrap();
    backends.register(cuda_provider).unwrap();
    backends.register(rocm_provider).unwrap();
    let seconds = Arc::new(AtomicU64::new(1_000_000));
    let now = Arc::clone(&seconds);
    let config = Config { threads: NonZeroUsize::new(1), ..Config::default() };
    let options = GraphDevicesOptions {
        backends,
        folder: None,
        clock: Arc::new(move || SystemTime::UNIX_EPOCH + Duration::from_secs(now.load(Ordering::SeqCst))),
        ..GraphDevicesOptions::from_config(&config)
    };
    Lab { options, cuda, rocm, seconds }
}

impl Lab {
    /// The graph with its params, and rates under which cuda is fastest, rocm slowest.
    fn devices(&self) -> GraphDevices {
        let devices = GraphDevices::open(graph(), self.options.clone());
        for (device, factor) in [(CPU, 1.0), (CUDA, 10.0), (ROCM, 0.1)] {
            if let Ok(backend) = devices.options.backends.open(device, &devices.options.config) {
                let rates = DeviceRates {
                    matrix_flops: BTreeMap::from([("f32".to_owned(), 1e9 * factor)]),
                    vector_flops: 1e9 * factor,
                    bytes_per_s: 1e9 * factor,
                    dispatch_s: 1e-6 / factor,
                };
                devices.store.keep_rates(&rates_key(&*backend), &rates);
            }
        }
        for (name, count) in [("w1", 32 * 48), ("w2", 48 * 32), ("bias", 48)] {
            devices.set_param(name, values(count, count as u32).as_slice()).unwrap();
        }
        devices
    }

    fn with_policy(mut self, policy: DevicePolicy) -> Lab {
        self.options.policy = policy;
        self
    }

    fn with_config(mut self, change: impl FnOnce(&mut Config)) -> Lab {
        change(&mut self.options.config);
        self
    }
}

type Runs = Result<Tensor, SessionError>;

fn run_with(
    rows: usize,
    call: impl FnOnce(&[(&str, TensorArg<'_>)]) -> Result<Vec<(String, Tensor)>, SessionError>,
) -> Runs {
    let x = values(rows * 32, rows as u32);
    Ok(call(&[("x", TensorArg::typed(&[rows, 32], &x))])?.remove(0).1)
}

fn attempts(error: SessionError) -> Vec<DeviceAttempt> {
    let SessionError::Fallback(error) = error else { panic!("{error}") };
    error.attempts
}

fn by_runs(runs: usize) -> DevicePolicy {
    DevicePolicy::all().with_benchmark_pick(NonZeroUsize::new(runs).unwrap())
}

fn env(variable: &'static str, value: &'static str) -> Result<Config, crate::config::ConfigError> {
    Config::from_env(&|name| (name == variable).then(|| value.into()))
}

#[test]
fn every_device_gives_the_same_result_and_the_graph_is_compiled_once_for_each() {
    let lab = lab();
    let devices = lab.devices();
    let wanted = run_with(5, |x| devices.run(CPU, x)).unwrap();
    for device in [CUDA, ROCM, Device::Reference.into()] {
        for _ in 0..3 {
            let found = run_with(5, |x| devices.run(device, x)).unwrap();
            let pairs = found.as_slice::<f32>().unwrap().iter().zip(wanted.as_slice::<f32>().unwrap());
            assert!(pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) < 1e-4, "{device}");
        }
    }
    assert_eq!(Script::count(&lab.cuda.loads), 1);
    assert_eq!(devices.devices(), [CPU, CUDA, ROCM]);
    assert_eq!(graph_param_names(devices.graph()), ["w1", "w2", "bias"]);
}

#[test]
fn the_report_has_a_row_for_every_kind_with_its_blocker_in_words() {
    let lab = lab().with_policy(DevicePolicy::all().with_deny(Device::Rocm));
    lab.cuda.refuse("softmax");
    let (metal, metal_script) = FakeProvider::new(Device::Metal);
    lab.options.backends.register(metal).unwrap();
    metal_script.see(DeviceProbe::Absent("no Metal driver on this system".to_owned()));
    let rows = lab.devices().report();
    assert_eq!(rows.len(), Device::ALL.len());
    let row = |kind: Device| rows.iter().find(|row| row.device.kind == kind).unwrap();
    let cpu = row(Device::Cpu);
    assert!(cpu.available && cpu.registered && cpu.allowed && !cpu.recommended, "{cpu:?}");
    assert!(row(Device::Cuda).recommended, "its rates are ten times the CPU's");
    assert!(cpu.supports_graph == Some(true) && cpu.blocker.is_none() && cpu.predicted_s.unwrap() > 0.0);
    assert!(cpu.capabilities.contains(&"1 threads".to_owned()), "{cpu:?}");
    let blocker = |kind: Device| row(kind).blocker.clone().unwrap();
    assert!(blocker(Device::Gpu).contains("no backend"), "{}", blocker(Device::Gpu));
    assert!(!row(Device::Gpu).registered);
    assert!(blocker(Device::Rocm).contains("RLX_DENY_DEVICES"));
    assert!(row(Device::Rocm).available && !row(Device::Rocm).allowed);
    assert_eq!(blocker(Device::Metal), "no Metal driver on this system");
    assert_eq!(rows.iter().filter(|row| row.recommended).count(), 1);
    assert!(row(Device::Cuda).blocker.is_none(), "softmax is decomposed there");
}

#[test]
fn an_op_that_cannot_be_run_is_named_with_its_node() {
    let lab = lab();
    lab.cuda.refuse("linear");
    lab.rocm.refuse("reduce");
    let mut module = rlx_graph::HirModule::new("sum");
    let mut hir = module.edit();
    let x = hir.input("x", &[rlx_tensor::Dim::Known(4)], DType::F32).unwrap();
    let sum = hir.reduce(rlx_graph::ops::reduce::ReduceOp::Sum, x, &[0], true).unwrap();
    let graph = module.finish(&[("sum", sum)]).unwrap();
    let devices = GraphDevices::open(graph, lab.options.clone());
    let rows = devices.report();
    let row = rows.iter().find(|row| row.device == ROCM).unwrap();
    let blocker = row.blocker.clone().unwrap();
    assert_eq!(row.supports_graph, Some(false));
    assert!(blocker.contains("rocm does not run reduce (node") && blocker.contains("tests.rs:"), "{blocker}");
    assert!(rows.iter().find(|row| row.device == CUDA).unwrap().is_viable());
    let x = [1.0f32, 2.0, 3.0, 4.0];
    let (device, _) = devices.run_try(&[ROCM, CUDA], &[("x", (&x[..]).into())]).unwrap();
    assert_eq!(device, CUDA);
}

#[test]
fn memory_is_a_hard_constraint_and_unknown_memory_is_said_so() {
    let lab = lab();
    lab.cuda.leave_free(Some(1000));
    lab.rocm.leave_free(None);
    let devices = lab.devices();
    let rows = devices.report_for(&DimBinding::new().with("rows", 7));
    let row = |device: DeviceId| rows.iter().find(|row| row.device == device).unwrap();
    let cuda = row(CUDA);
    let weights = (2 * 32 * 48 + 48) * 4;
    assert!(cuda.needed_bytes.unwrap() > weights, "{cuda:?}");
    assert!(cuda.blocker.as_ref().unwrap().starts_with("needs ") && !cuda.recommended, "{cuda:?}");
    assert_eq!((row(ROCM).free_bytes, row(ROCM).is_viable()), (None, true));
    let error = devices.resolve(Some(CUDA)).unwrap_err().to_string();
    assert!(
        error.contains("needs") && error.contains("are free") && error.ends_with("viable: cpu, rocm"),
        "{error}"
    );
    assert_eq!(devices.fastest().unwrap(), CPU, "cuda would be faster, but is too small");
    lab.cuda.leave_free(Some(1 << 30));
    devices.invalidate_cache();
    assert_eq!(devices.fastest().unwrap(), CUDA);
}

#[test]
fn a_param_is_checked_once_and_then_seen_by_cached_and_later_executables() {
    let lab = lab();
    let devices = lab.devices();
    let before = run_with(3, |x| devices.run(CUDA, x)).unwrap();
    devices.set_param("bias", values(48, 77).as_slice()).unwrap();
    let cached = run_with(3, |x| devices.run(CUDA, x)).unwrap();
    let later = run_with(3, |x| devices.run(ROCM, x)).unwrap();
    assert!(cached.bits_eq(&later) && !cached.bits_eq(&before));
    let loads = Script::count(&lab.cuda.loads);
    devices.set_param("bias", values(48, 78).as_slice()).unwrap();
    devices.sync_params_to_all().unwrap();
    assert_eq!(Script::count(&lab.cuda.loads), loads + 1, "loaded before the next run asks");
    run_with(3, |x| devices.run(CUDA, x)).unwrap();
    assert_eq!(Script::count(&lab.cuda.loads), loads + 1);
}

#[test]
fn params_are_set_all_or_none_and_an_unknown_name_is_refused() {
    let lab = lab();
    let devices = lab.devices();
    let before = run_with(2, |x| devices.run(CPU, x)).unwrap();
    let (bias, short) = (values(48, 9), values(47, 9));
    let bytes = |v: &[f32]| bytemuck::cast_slice::<f32, u8>(v).to_vec();
    let (good, short) = (bytes(&bias), bytes(&short));
    let good: (&str, &[u8], DType) = ("bias", &good, DType::F32);
    for (bad, expected) in [
        (("bais", &good.1[..4], DType::F32), "no param \"bais\"; did you mean \"bias\"?"),
        (("w1", &short[..], DType::F32), "\"w1\" must be f32[32, 48], found 188 bytes"),
        (("w2", good.1, DType::I32), "\"w2\" must be f32, found i32"),
    ] {
        let error = devices.set_params(&[good, bad]).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    assert!(run_with(2, |x| devices.run(CPU, x)).unwrap().bits_eq(&before), "nothing was changed");
    devices.set_params(&[good]).unwrap();
    assert!(!run_with(2, |x| devices.run(CPU, x)).unwrap().bits_eq(&before));
}

#[test]
fn an_executable_that_cannot_take_new_params_is_listed_and_never_runs_on_old_ones() {
    let lab = lab();
    let devices = lab.devices();
    for device in [CUDA, ROCM] {
        run_with(2, |x| devices.run(device, x)).unwrap();
    }
    devices.set_param("bias", values(48, 5).as_slice()).unwrap();
    lab.cuda.fail_loads(Fault::OutOfMemory);
    let failed = attempts(devices.sync_params_to_all().unwrap_err());
    assert!(failed.len() == 1 && failed[0].device == CUDA);
    assert!(run_with(2, |x| devices.run(CUDA, x)).unwrap_err().is_device_fault());
    lab.cuda.fail_loads(Fault::None);
    let (a, b) = (run_with(2, |x| devices.run(CUDA, x)), run_with(2, |x| devices.run(ROCM, x)));
    assert!(a.unwrap().bits_eq(&b.unwrap()));
}

#[test]
fn a_hint_that_is_not_viable_lists_the_viable() {
    let lab = lab();
    let devices = lab.devices();
    assert_eq!(devices.resolve(Some(ROCM)).unwrap(), ROCM);
    let gpu = devices.resolve(Some(Device::Gpu.into())).unwrap_err().to_string();
    assert!(gpu.contains("gpu is no candidate") && gpu.ends_with("viable: cpu, cuda, rocm"), "{gpu}");
    let second = DeviceId { kind: Device::Cuda, index: 1 };
    let error = devices.resolve(Some(second)).unwrap_err().to_string();
    assert!(error.contains("the only cuda is cuda") && error.contains("viable: cpu, cuda, rocm"), "{error}");
}

#[test]
fn the_hint_comes_before_the_setting_and_the_setting_never_falls_through() {
    let set = lab().with_config(|config| config.device = Some(ROCM));
    let devices = set.devices();
    assert_eq!(devices.resolve(None).unwrap(), ROCM, "though cuda is faster");
    assert_eq!(devices.resolve(Some(CPU)).unwrap(), CPU);
    let broken = lab().with_config(|config| config.device = Some(Device::Metal.into()));
    let error = broken.devices().resolve(None).unwrap_err();
    assert!(matches!(error, SessionError::Device(DeviceError::NotViable { .. })), "{error}");
    assert!(run_with(2, |x| broken.devices().run_resolved(None, x)).is_err());
}

#[test]
fn the_chain_setting_is_walked_and_none_viable_is_an_error() {
    let metal = DeviceId::from(Device::Metal);
    let lab_of = |chain: &[DeviceId]| lab().with_config(|config| config.device_chain = Some(chain.to_vec()));
    let devices = lab_of(&[metal, ROCM, CUDA]).devices();
    assert_eq!(devices.resolve_chain(None).unwrap(), ROCM);
    assert_eq!(devices.resolve_chain(Some(CUDA)).unwrap(), CUDA);
    assert_eq!(devices.compile_chain(None).unwrap().backend().name(), "rocm");
    let mut ran = None;
    run_with(2, |x| devices.run_chain(None, x).map(|(device, out)| (ran = Some(device), out).1)).unwrap();
    assert_eq!(ran, Some(ROCM));
    let none = lab_of(&[metal]).devices();
    let error = none.resolve_chain(None).unwrap_err();
    assert!(matches!(error, SessionError::Device(DeviceError::NoneViable { .. })), "{error}");
    assert_eq!(lab().devices().resolve_chain(None).unwrap(), CUDA, "without a chain, as resolve");
}

#[test]
fn a_setting_that_does_not_parse_is_an_error_naming_variable_and_token() {
    for (variable, value, token) in [
        ("RLX_DEVICE", "cpu:x", "\"cpu:x\""),
        ("RLX_DEVICES", "cpu, tpu", "\"tpu\""),
        ("RLX_DENY_DEVICES", "cuda,,cpu", "\"\""),
        ("RLX_PREFER_DEVICES", "fast", "\"fast\""),
        ("RLX_DEVICE_CHAIN", "cuda:1,npu", "\"npu\""),
        ("RLX_BENCHMARK_PICK", "many", "RLX_BENCHMARK_PICK=\"many\""),
    ] {
        let error = env(variable, value).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{variable}={value:?}")) && error.contains(token), "{error}");
    }
    let picked = DevicePolicy::from_config(&env("RLX_BENCHMARK_PICK", "5").unwrap());
    assert_eq!(picked, by_runs(5));
}

#[test]
fn a_denied_device_is_never_used_whatever_is_forced() {
    let policy = DevicePolicy::all().with_prefer(Device::Cuda).with_deny(Device::Cuda);
    let lab = lab().with_policy(policy).with_config(|config| {
        config.device = Some(CUDA);
        config.device_chain = Some(vec![CUDA, ROCM]);
    });
    let devices = lab.devices();
    let opens = Script::count(&lab.cuda.opens);
    assert!(run_with(2, |x| devices.run(CUDA, x)).unwrap_err().to_string().contains("forbidden"));
    assert!(devices.resolve(Some(CUDA)).is_err() && devices.resolve(None).is_err());
    assert!(run_with(2, |x| devices.run_resolved(None, x)).is_err());
    assert!(devices.compile(CUDA).is_err());
    assert_eq!(devices.fastest().unwrap(), CPU);
    let x = values(64, 1);
    let inputs = [("x", TensorArg::typed(&[2, 32], &x))];
    assert_eq!(devices.run_chain(None, &inputs).unwrap().0, ROCM);
    assert_eq!(devices.run_chain_lenient(Some(CUDA), &inputs).unwrap().0, ROCM);
    assert!(devices.run_chain(Some(CUDA), &inputs).is_err());
    assert!(devices.warm_all().iter().all(|result| result.device != CUDA));
    assert!(devices.benchmark(&inputs, 1).unwrap().iter().all(|result| result.device != CUDA));
    assert_eq!((Script::count(&lab.cuda.opens), Script::count(&lab.cuda.runs)), (opens, 0));
}

#[test]
fn a_preference_decides_among_viable_devices() {
    let devices = lab().with_policy(DevicePolicy::all().with_prefer(Device::Rocm)).devices();
    assert_eq!(devices.fastest().unwrap(), ROCM);
    let only = lab().with_policy(DevicePolicy::only([Device::Cpu, Device::Rocm])).devices();
    assert_eq!(only.devices(), [CPU, ROCM]);
    let none = lab().with_policy(DevicePolicy::only([])).devices();
    assert!(matches!(none.fastest(), Err(SessionError::Device(DeviceError::NoneViable { .. }))));
    let hidden = lab().with_policy(DevicePolicy::only([Device::Reference])).devices();
    assert_eq!(hidden.devices(), [Device::Reference.into()], "named, so considered");
}

#[test]
fn fallback_moves_on_for_device_faults_and_reports_every_attempt() {
    for fault in [Fault::Lost, Fault::OutOfMemory, Fault::Panic] {
        for at_load in [false, true] {
            let lab = lab();
            let devices = lab.devices();
            let strike = |script: &Script| match at_load {
                true => script.fail_loads(fault),
                false => script.fail_runs(fault),
            };
            strike(&lab.cuda);
            let x = values(64, 1);
            let inputs = [("x", TensorArg::typed(&[2, 32], &x))];
            let (device, found) = devices.run_try(&[CUDA, ROCM, CPU], &inputs).unwrap();
            assert_eq!(device, ROCM, "{fault:?}");
            assert!(found[0].1.bits_eq(&devices.run(ROCM, &inputs).unwrap()[0].1));
            strike(&lab.rocm);
            devices.invalidate_cache();
            let error = devices.run_try(&[CUDA, Device::Gpu.into(), ROCM], &inputs).unwrap_err();
            let text = error.to_string();
            let attempts = attempts(error);
            let tried: Vec<DeviceId> = attempts.iter().map(|attempt| attempt.device).collect();
            assert_eq!(tried, [CUDA, Device::Gpu.into(), ROCM]);
            assert!(attempts.iter().all(|attempt| text.contains(&attempt.cause.to_string())), "{text}");
        }
    }
}

#[test]
fn fallback_returns_at_once_for_caller_faults() {
    let lab = lab();
    let devices = lab.devices();
    let x = values(64, 1);
    for bad in [
        vec![("z", TensorArg::typed(&[2, 32], &x))],
        vec![],
        vec![("x", TensorArg::typed(&[2, 32], &[1i32; 64]))],
        vec![("x", TensorArg::typed(&[4, 16], &x))],
    ] {
        let error = devices.run_try(&[CUDA, CPU], &bad).unwrap_err();
        assert!(!error.is_device_fault() && !matches!(error, SessionError::Fallback(_)), "{error}");
    }
    assert_eq!(Script::count(&lab.cuda.runs), 0);
    assert!(!devices.is_compiled(CPU), "the second device was not even compiled");
    let unset =
        GraphDevices::open(graph(), GraphDevicesOptions { weights: Arc::default(), ..lab.options.clone() });
    let inputs = [("x", TensorArg::typed(&[2, 32], &x))];
    assert!(matches!(unset.run_try(&[CUDA, CPU], &inputs), Err(SessionError::Weights { .. })));
    let empty = devices.run_try(&[], &inputs).unwrap_err();
    assert!(matches!(empty, SessionError::Device(DeviceError::EmptyChain)), "{empty}");
}

#[test]
fn a_hinted_chain_runs_there_only_and_the_lenient_form_goes_on() {
    let lab = lab();
    let devices = lab.devices();
    lab.cuda.fail_runs(Fault::Lost);
    let x = values(64, 1);
    let inputs = [("x", TensorArg::typed(&[2, 32], &x))];
    assert!(devices.run_chain(Some(CUDA), &inputs).unwrap_err().is_device_fault());
    assert_eq!(devices.run_chain_lenient(Some(CUDA), &inputs).unwrap().0, CPU);
}

#[test]
fn one_failing_device_does_not_stop_warm_all_or_benchmark() {
    let lab = lab();
    let devices = lab.devices();
    lab.cuda.fail_loads(Fault::Panic);
    let warmed = devices.warm_all();
    let of = |results: &[DeviceBenchResult], device| results.iter().position(|r| r.device == device).unwrap();
    assert_eq!(warmed.len(), 3);
    assert!(warmed[of(&warmed, CUDA)].outcome.is_err());
    assert!(warmed[of(&warmed, CPU)].outcome.is_ok() && warmed[of(&warmed, ROCM)].outcome.is_ok());
    let x = values(64, 1);
    let inputs = [("x", TensorArg::typed(&[2, 32], &x))];
    lab.cuda.fail_loads(Fault::None);
    lab.cuda.fail_runs(Fault::Lost);
    let measured = devices.benchmark(&inputs, 5).unwrap();
    assert!(measured[of(&measured, CUDA)].outcome.as_ref().unwrap_err().is_device_fault());
    let rocm = measured[of(&measured, ROCM)].outcome.as_ref().unwrap();
    assert_eq!((rocm.runs, rocm.verified), (5, Some(true)));
    assert!(rocm.median > Duration::ZERO && measured[of(&measured, CPU)].outcome.is_ok());
    let bad = [("x", TensorArg::typed(&[2, 31], &x[..62]))];
    assert!(
        !devices.benchmark(&bad, 1).unwrap_err().is_device_fault(),
        "the caller's own fault is said at once"
    );
}

#[test]
fn a_device_that_computes_wrong_numbers_cannot_win() {
    let lab = lab().with_policy(by_runs(3));
    let devices = lab.devices();
    lab.rocm.slow_down(Duration::from_millis(3));
    lab.cuda.fail_runs(Fault::Wrong);
    let x = values(64, 1);
    let inputs = [("x", TensorArg::typed(&[2, 32], &x))];
    let pick = devices.pick_with_inputs(None, &inputs).unwrap();
    let verdict = |device| {
        let result = pick.measured.iter().find(|result| result.device == device).unwrap();
        result.outcome.as_ref().unwrap().verified
    };
    assert_eq!((verdict(CUDA), verdict(ROCM), verdict(CPU)), (Some(false), Some(true), Some(true)));
    assert_ne!(pick.device, CUDA);
    assert_eq!(pick.verified, Some(true));
    devices.set_policy(by_runs(3).with_prefer(Device::Cuda));
    assert_ne!(devices.resolve_with_inputs(None, &inputs).unwrap(), CUDA, "not even if it is preferred");
    devices
        .set_policy(DevicePolicy::only([Device::Cuda, Device::Rocm]).with_benchmark_pick(NonZeroUsize::MIN));
    let pick = devices.pick_with_inputs(None, &inputs).unwrap();
    assert_eq!(pick.verified, None, "without the CPU nothing is verified, and the pick says so");
}

#[test]
fn set_policy_keeps_what_is_still_allowed_and_params() {
    let lab = lab();
    let devices = lab.devices();
    for device in [CPU, CUDA, ROCM] {
        run_with(2, |x| devices.run(device, x)).unwrap();
    }
    devices.set_policy(DevicePolicy::only([Device::Cpu, Device::Cuda]));
    assert!(devices.is_compiled(CPU) && devices.is_compiled(CUDA) && !devices.is_compiled(ROCM));
    run_with(2, |x| devices.run(CUDA, x)).unwrap();
    assert_eq!(Script::count(&lab.cuda.loads), 1);
    assert!(run_with(2, |x| devices.run(ROCM, x)).is_err());
    devices.invalidate_cache();
    assert!(!devices.is_compiled(CUDA));
    run_with(2, |x| devices.run(CUDA, x)).unwrap();
}

#[test]
fn decisions_are_cached_not_recomputed_per_run_and_keyed_by_shape_and_policy() {
    let lab = lab();
    let devices = lab.devices();
    for _ in 0..5 {
        run_with(6, |x| devices.run_resolved(None, x)).unwrap();
    }
    assert_eq!(devices.decisions(), 1);
    run_with(7, |x| devices.run_resolved(None, x)).unwrap();
    assert_eq!(devices.decisions(), 2, "another shape");
    devices.set_policy(DevicePolicy::all().with_deny(Device::Cuda));
    run_with(6, |x| devices.run_resolved(None, x)).unwrap();
    assert_eq!(devices.decisions(), 3, "another policy");
    devices.set_policy(DevicePolicy::all());
    run_with(6, |x| devices.run_fastest(x)).unwrap();
    assert_eq!(devices.decisions(), 3, "the first policy's decisions are still known");
    assert_eq!(devices.calibrations(), 0, "rates were given");
}

#[test]
fn measured_decisions_persist_per_shape_and_expire() {
    let folder = tempfile::tempdir().unwrap();
    let mut lab = lab().with_policy(by_runs(2));
    lab.options.folder = Some(folder.path().to_owned());
    let resolve = |rows: usize| {
        let devices = lab.devices();
        let x = values(rows * 32, 1);
        devices.resolve_with_inputs(None, &[("x", TensorArg::typed(&[rows, 32], &x))]).unwrap();
        devices.decisions()
    };
    assert_eq!((resolve(2), resolve(2)), (1, 0), "another process finds the decision");
    assert_eq!(resolve(3), 1, "another shape does not");
    lab.seconds.fetch_add(DECISION_LIFETIME.as_secs(), Ordering::SeqCst);
    assert_eq!(resolve(2), 1, "expired");
}

#[test]
fn a_remembered_device_that_is_gone_is_not_taken() {
    let folder = tempfile::tempdir().unwrap();
    let mut lab = lab();
    lab.options.folder = Some(folder.path().to_owned());
    assert_eq!(lab.devices().fastest().unwrap(), CUDA);
    lab.cuda.see(DeviceProbe::Absent("unplugged".to_owned()));
    assert_eq!(lab.devices().fastest().unwrap(), CPU);
}

#[test]
fn an_earlier_choice_is_known_without_opening_a_device_while_the_same_devices_are_there() {
    let folder = tempfile::tempdir().unwrap();
    let mut lab = lab();
    lab.options.folder = Some(folder.path().to_owned());
    let before = |lab: &Lab| GraphDevices::open(graph(), lab.options.clone()).chosen_before();
    assert_eq!(before(&lab), None);
    assert_eq!(lab.devices().fastest().unwrap(), CUDA);
    let opened = Script::count(&lab.cuda.opens);
    assert_eq!((before(&lab), Script::count(&lab.cuda.opens)), (Some(CUDA), opened));
    lab.rocm.see(DeviceProbe::Present(2));
    assert_eq!(before(&lab), None, "the new card may be faster");
    lab.options.policy = DevicePolicy::all().with_deny(Device::Cuda);
    assert_eq!(before(&lab), None);
}

#[test]
fn a_lost_device_is_probed_and_opened_again() {
    let lab = lab();
    let devices = lab.devices();
    run_with(2, |x| devices.run_resolved(None, x)).unwrap();
    let opens = Script::count(&lab.cuda.opens);
    lab.cuda.fail_runs(Fault::Lost);
    lab.cuda.see(DeviceProbe::Absent("reset in progress".to_owned()));
    assert!(run_with(2, |x| devices.run_resolved(None, x)).unwrap_err().is_device_fault());
    assert_eq!(devices.fastest().unwrap(), CPU, "while it is gone another is taken");
    let report = devices.report();
    let row = report.iter().find(|row| row.device == CUDA).unwrap();
    assert_eq!(row.blocker.as_deref(), Some("reset in progress"));
    lab.cuda.fail_runs(Fault::None);
    lab.cuda.see(DeviceProbe::Present(1));
    assert_eq!(devices.devices(), [CPU, CUDA, ROCM]);
    run_with(2, |x| devices.run(CUDA, x)).unwrap();
    assert_eq!(Script::count(&lab.cuda.opens), opens + 1);
}

#[test]
fn an_executable_whose_backend_panicked_is_compiled_anew() {
    let lab = lab();
    let devices = lab.devices();
    lab.cuda.fail_runs(Fault::Panic);
    assert!(run_with(2, |x| devices.run(CUDA, x)).unwrap_err().is_device_fault());
    lab.cuda.fail_runs(Fault::None);
    run_with(2, |x| devices.run(CUDA, x)).unwrap();
}

#[test]
fn an_uncalibrated_device_is_calibrated_once_not_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let mut lab = lab();
    lab.options.folder = Some(folder.path().to_owned());
    let fresh = || GraphDevices::open(graph(), lab.options.clone());
    let devices = fresh();
    let rows = devices.report();
    assert_eq!(rows.iter().filter(|row| row.predicted_s.is_some()).count(), 3);
    assert_eq!(devices.calibrations(), 3);
    devices.report();
    assert_eq!(devices.calibrations(), 3);
    let again = fresh();
    again.report();
    assert_eq!(again.calibrations(), 0, "another process finds the rates");
    assert!(Path::new(&folder.path().join("devices.json")).is_file());
    let recommended = rows.iter().find(|row| row.recommended).unwrap();
    assert_eq!(recommended.device, CPU, "vector kernels beat the reference evaluation of the fakes");
}

#[test]
fn a_device_that_fails_while_it_is_calibrated_is_no_candidate_with_the_reason() {
    let lab = lab();
    lab.cuda.fail_runs(Fault::Lost);
    let devices = GraphDevices::open(graph(), lab.options.clone());
    let rows = devices.report();
    let row = rows.iter().find(|row| row.device == CUDA).unwrap();
    assert!(row.blocker.as_ref().unwrap().contains("cannot be measured"), "{row:?}");
    assert_eq!(devices.fastest().unwrap(), CPU);
}

#[test]
fn eight_threads_share_one_graph_devices() {
    fn shared<T: Send + Sync>(_: &T) {}
    let lab = lab();
    let devices = lab.devices();
    shared(&devices);
    let wanted: Vec<Tensor> =
        (1..=4).map(|rows| run_with(rows, |x| lab.devices().run(CPU, x)).unwrap()).collect();
    std::thread::scope(|scope| {
        for thread in 0..8usize {
            let (devices, wanted) = (&devices, &wanted);
            scope.spawn(move || {
                for i in 0..12 {
                    let rows = 1 + (thread + i) % 4;
                    let found = match i % 4 {
                        0 => run_with(rows, |x| devices.run(CPU, x)).unwrap(),
                        1 => run_with(rows, |x| devices.run_resolved(None, x)).unwrap(),
                        2 => {
                            run_with(rows, |x| devices.run_try(&[ROCM, CPU], x).map(|(_, out)| out)).unwrap()
                        }
                        _ => {
                            if thread == 0 {
                                devices.invalidate_cache();
                            }
                            run_with(rows, |x| devices.run_fastest(x)).unwrap()
                        }
                    };
                    let pairs = found
                        .as_slice::<f32>()
                        .unwrap()
                        .iter()
                        .zip(wanted[rows - 1].as_slice::<f32>().unwrap());
                    assert!(pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) < 1e-4);
                    if i % 4 == 0 {
                        assert!(found.bits_eq(&wanted[rows - 1]));
                    }
                }
            });
        }
    });
}

#[test]
fn the_sizes_of_options_and_inputs_are_those_that_choices_are_made_for() {
    let lab = lab();
    let devices = lab.devices();
    let x = values(64, 1);
    let sizes = devices.complete(&devices.sizes_of(&[("x", TensorArg::typed(&[2, 32], &x))]));
    assert_eq!(sizes.value(&rlx_tensor::Symbol::new("rows")), Some(2));
    assert_eq!(devices.nominal_sizes().value(&rlx_tensor::Symbol::new("rows")), Some(NOMINAL_EXTENT));
    let set = GraphDevicesOptions { sizes: DimBinding::new().with("rows", 9), ..lab.options.clone() };
    let set = GraphDevices::open(graph(), set);
    assert_eq!(set.nominal_sizes().value(&rlx_tensor::Symbol::new("rows")), Some(9));
}
