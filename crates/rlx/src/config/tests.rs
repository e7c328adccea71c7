//! Settings from a made-up environment.

use super::*;

fn config(variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
    Config::from_env(&|name| {
        let found = variables.iter().find(|(known, _)| *known == name);
        found.map(|(_, text)| OsString::from(text))
    })
}

#[test]
fn an_empty_environment_sets_nothing() {
    assert_eq!(config(&[]), Ok(Config::default()));
    assert_eq!(config(&[("RLX_THREADS", "")]), Ok(Config::default()));
}

#[test]
fn values_of_each_kind_are_read() {
    let config = config(&[
        ("RLX_DEVICE", "nvidia:1"),
        ("RLX_DEVICES", "cpu, gpu"),
        ("RLX_DEVICE_CHAIN", "cuda:1,cpu"),
        ("RLX_THREADS", "3"),
        ("RLX_ISA", "AVX2"),
        ("RLX_PRECISION", "bf16"),
        ("RLX_SOFT_MEMORY_FRACTION", "0.5"),
        ("RLX_SOFT_MEMORY_BUDGET_BYTES", "12GiB"),
        ("RLX_CACHE_BYTES", "0"),
        ("HF_HUB_OFFLINE", "YES"),
    ])
    .expect("every value is valid");
    assert_eq!(config.device, Some(DeviceId { kind: Device::Cuda, index: 1 }));
    assert_eq!(config.devices, Some(vec![Device::Cpu, Device::Gpu]));
    assert_eq!(config.device_chain, Some(vec![DeviceId { kind: Device::Cuda, index: 1 }, DeviceId::CPU]));
    assert_eq!(config.threads, NonZeroUsize::new(3));
    assert_eq!(config.isa, Some(Isa::Avx2));
    assert_eq!(config.precision, Some(Precision::Bf16));
    assert_eq!(config.soft_memory_fraction.map(Fraction::value), Some(0.5));
    assert_eq!(config.soft_memory_budget_bytes, Some(ByteSize(12 << 30)));
    assert_eq!(config.cache_bytes, Some(ByteSize(0)));
    assert!(config.offline());
}

#[test]
fn an_invalid_value_names_variable_and_text() {
    let cases = [
        ("RLX_DEVICE", "tpu"),
        ("RLX_DEVICES", "cpu,,gpu"),
        ("RLX_DENY_DEVICES", "cuda:1"),
        ("RLX_DEVICE_CHAIN", "cpu,tpu"),
        ("RLX_BENCHMARK_PICK", "0"),
        ("RLX_SOFT_MEMORY_FRACTION", "0"),
        ("RLX_SOFT_MEMORY_FRACTION", "1.01"),
        ("RLX_SOFT_MEMORY_FRACTION", "nan"),
        ("RLX_SOFT_MEMORY_BUDGET_BYTES", "12XiB"),
        ("RLX_DECODE_BUCKET_PEAK_BYTES", "-1"),
        ("RLX_DECODE_ONESHOT_PEAK_BYTES", "many"),
        ("RLX_THREADS", "0"),
        ("RLX_THREADS", "two"),
        ("RLX_ISA", "sse2"),
        ("RLX_PRECISION", "f8"),
        ("RLX_CACHE_BYTES", "1.5"),
        ("HF_HUB_OFFLINE", "maybe"),
    ];
    for (variable, text) in cases {
        let error = config(&[(variable, text)]).expect_err(variable);
        assert_eq!((error.variable.as_str(), error.text.as_str()), (variable, text));
        assert!(error.to_string().starts_with(&format!("{variable}={text:?}: ")), "{error}");
    }
}

#[test]
fn byte_sizes_have_units() {
    let read = |text: &str| text.parse::<ByteSize>().map(|size| size.0).map_err(|error| error.to_string());
    assert_eq!(read("12"), Ok(12));
    assert_eq!(read(" 12 B "), Ok(12));
    assert_eq!(read("12GiB"), Ok(12 << 30));
    assert_eq!(read("12 gib"), Ok(12 << 30));
    assert_eq!(read("12GB"), Ok(12_000_000_000));
    assert_eq!(read("1.5KiB"), Ok(1536));
    assert_eq!(read("18446744073709551615"), Ok(u64::MAX));
    for text in ["18446744073709551616", "16777216TiB", "99999999999.5TiB"] {
        assert_eq!(read(text), Err("more than 2^64 bytes".to_owned()), "{text}");
    }
    for text in
        ["12XiB", "12G", "12Gbit", "GiB", "", ".", "1.5", "1.2.3MiB", "-1GiB", "1e3", "0x10", "12GiB8"]
    {
        assert!(read(text).is_err(), "{text}");
    }
}

#[test]
fn the_hub_folder_follows_its_variables() {
    let folder =
        |variables: &[(&str, &str)]| config(variables).expect("paths are valid").hf_cache_dirs().hub();
    let home = [("HOME", "/h"), ("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")];
    let expected = ["/h/.cache/huggingface/hub", "/x/huggingface/hub", "/f/hub", "/c"];
    assert_eq!(folder(&[]), None);
    for (count, expected) in expected.into_iter().enumerate() {
        assert_eq!(folder(&home[..=count]), Some(PathBuf::from(expected)));
    }
    assert_eq!(folder(&[("USERPROFILE", "/w")]), Some(PathBuf::from("/w/.cache/huggingface/hub")));
}

#[test]
fn misspelt_variables_are_found() {
    let names = ["RLX_THREADS", "RLX_THREAD", "RLX_TEST_MODEL", "PATH", "RLX_DEVICE_LIST"];
    assert_eq!(unknown_among(names.into_iter().map(OsString::from)), ["RLX_DEVICE_LIST", "RLX_THREAD"]);
}

#[test]
fn environment_names_derive_from_fields() {
    for setting in SETTINGS {
        let upper = setting.field.to_uppercase().replace("USER_PROFILE", "USERPROFILE");
        let bare = ["HF_", "XDG_", "HOME", "USERPROFILE"].iter().any(|name| upper.starts_with(name));
        let expected = if bare { upper } else { format!("RLX_{upper}") };
        assert_eq!(setting.variable, expected);
    }
}

#[test]
fn the_committed_documentation_is_the_table() {
    let page = include_str!("../../../../docs/settings.md");
    assert!(page.contains(&Config::markdown()), "docs/settings.md lacks:\n{}", Config::markdown());
    assert!(Config::help().contains("RLX_THREADS") && !Config::help().contains("HF_HOME"));
}
