//! A low-rank adapter in PEFT layout: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use super::super::ImportError;
use super::super::safetensors::{SafetensorsLoader, refuse_pickle};
use super::config::{ConfigReader, OneOrMany};
use crate::weights::{LoraSide, RegistryError, WeightHandle, WeightKind, WeightLoader, WeightRegistry};

const CONFIG_FILE: &str = "adapter_config.json";
const WEIGHTS_FILE: &str = "adapter_model.safetensors";
pub(super) const PREFIX: &str = "base_model.model.";
const MAX_RANK: usize = 1 << 16;

/// Of no influence on a trained adapter: how it was trained and where it came from.
const IRRELEVANT: &[&str] = &[
    "arrow_config",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
];

/// An adapter on disk, its factors paired and named by the weight they update.
pub struct PeftAdapter {
    // The highest rank, and the alpha of weights that have none of their own.
    pub(super) rank: usize,
    pub(super) alpha: f32,
    // Rank and alpha of each base weight that a pattern names.
    pub(super) own: BTreeMap<String, (usize, f32)>,
    pub(super) loader: Box<dyn WeightLoader>,
    // Base weight -> the tensors of A and B.
    pub(super) factors: BTreeMap<String, [String; 2]>,
}

impl fmt::Debug for PeftAdapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PeftAdapter(rank {}, alpha {}, {} weights)", self.rank, self.alpha, self.factors.len())
    }
}

impl PeftAdapter {
    /// Opens a folder.
    ///
    /// # Errors
    /// [`ImportError`] for a file that is missing or broken, a method other than plain LoRA, a tensor that is no factor,
    /// or a factor without its other side.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self, ImportError> {
        let folder = folder.as_ref();
        let need = |file: &str| {
            let path = folder.join(file);
            if path.is_file() {
                return Ok(path);
            }
            let advice = "a PEFT adapter folder holds it; save one with `save_pretrained`".to_owned();
            Err(ImportError::MissingFile { path, advice })
        };
        let scaling = read_config(&ConfigReader::open(need(CONFIG_FILE)?)?)?;
        let pickled = folder.join("adapter_model.bin");
        if !folder.join(WEIGHTS_FILE).is_file() && pickled.is_file() {
            refuse_pickle(&pickled)?;
        }
        let path = need(WEIGHTS_FILE)?;
        let loader = SafetensorsLoader::open(&path)?;
        let factors = pair_factors(&path, &loader)?;
        let (_, alpha) = scaling.of("");
        let each = factors.keys().map(|base| (base.clone(), scaling.of(base.trim_end_matches(".weight"))));
        let own: BTreeMap<String, (usize, f32)> = each.collect();
        let rank = own.values().map(|(rank, _)| *rank).max().unwrap_or(scaling.rank);
        Ok(PeftAdapter { rank, alpha, own, loader: Box::new(loader), factors })
    }

    /// Rank and alpha of the factors of a base weight.
    pub fn scaling(&self, base: &str) -> (usize, f32) {
        self.own.get(base).copied().unwrap_or((self.rank, self.alpha))
    }

    /// Inner dim of the factors; the highest where they differ.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The update is scaled by `alpha / rank`. For a rank-stabilised adapter (Kalajdzievski, 2023), whose scale is
    /// `alpha / sqrt(rank)`, this is the alpha that gives the same scale.
    pub fn alpha(&self) -> f32 {
        self.alpha
    }

    /// The weights that it updates, sorted.
    pub fn base_names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.factors.keys().map(String::as_str)
    }

    /// Registers all factors under `adapter`, or none. `base_of` finds the weight of a base name; usually
    /// [`WeightRegistry::lookup`].
    ///
    /// # Errors
    /// [`RegistryError::Absent`] for a base that is not registered, and as [`WeightRegistry::register`].
    pub fn register(
        &self,
        registry: &WeightRegistry,
        adapter: &str,
        base_of: impl Fn(&str) -> Option<WeightHandle>,
    ) -> Result<Vec<WeightHandle>, RegistryError> {
        let adapter: Arc<str> = adapter.into();
        let mut added = Vec::new();
        let result = self.register_each(registry, &adapter, base_of, &mut added);
        if result.is_err() {
            for handle in added.drain(..) {
                // Pinned by another thread in between: then that thread keeps it.
                drop(registry.unregister(handle));
            }
        }
        result.map(|()| added)
    }

    fn register_each(
        &self,
        registry: &WeightRegistry,
        adapter: &Arc<str>,
        base_of: impl Fn(&str) -> Option<WeightHandle>,
        added: &mut Vec<WeightHandle>,
    ) -> Result<(), RegistryError> {
        for (base_name, tensors) in &self.factors {
            let base = base_of(base_name).ok_or_else(|| RegistryError::Absent { name: base_name.clone() })?;
            for (tensor, side) in tensors.iter().zip([LoraSide::A, LoraSide::B]) {
                let absent = || RegistryError::Absent { name: tensor.clone() };
                let shape = self.loader.tensor(tensor)?.ok_or_else(absent)?.shape();
                let bytes = self.loader.storage(tensor)?.ok_or_else(absent)?;
                let (rank, alpha) = self.scaling(base_name);
                let kind = WeightKind::LoraAdapter { adapter: Arc::clone(adapter), base, side, rank, alpha };
                let name = format!("{adapter}/{base_name}.lora_{side}");
                let known = registry.lookup(&name).is_some();
                let handle = registry.register(&name, shape, bytes, kind)?;
                if !known {
                    added.push(handle);
                }
            }
        }
        Ok(())
    }
}

/// Ranks and alphas, as the config gives them: for all weights, and for those whose module a pattern names.
struct Scaling {
    rank: usize,
    alpha: f32,
    stabilised: bool,
    ranks: Vec<(String, usize)>,
    alphas: Vec<(String, f32)>,
}

impl Scaling {
    /// Rank and alpha of a module's factors. A pattern is the end of a module's path from a dot on; the first that fits holds.
    fn of(&self, module: &str) -> (usize, f32) {
        fn first<T: Copy>(patterns: &[(String, T)], module: &str) -> Option<T> {
            let fits = |pattern: &str| {
                let rest = module.strip_suffix(pattern);
                rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            };
            patterns.iter().find(|(pattern, _)| fits(pattern)).map(|(_, value)| *value)
        }
        let rank = first(&self.ranks, module).unwrap_or(self.rank);
        let alpha = first(&self.alphas, module).unwrap_or(self.alpha);
        (rank, if self.stabilised { alpha * (rank as f32).sqrt() } else { alpha })
    }
}

/// The patterns of a section with their values. A pattern may be a regular expression; only plain names are read.
fn read_patterns<T>(
    cfg: &ConfigReader,
    field: &str,
    value: impl Fn(&ConfigReader, &str) -> Result<T, ImportError>,
) -> Result<Vec<(String, T)>, ImportError> {
    let Some(section) = cfg.section(field)? else { return Ok(Vec::new()) };
    let mut patterns = Vec::new();
    for name in section.field_names() {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        if name.is_empty() || !name.chars().all(plain) {
            return Err(cfg.wrong(field, "names of modules, not regular expressions", name));
        }
        patterns.push((name.to_owned(), value(&section, name)?));
    }
    Ok(patterns)
}

fn read_config(cfg: &ConfigReader) -> Result<Scaling, ImportError> {
    cfg.ignore(IRRELEVANT);
    cfg.choice("peft_type", &[("LORA", ())], None)?;
    cfg.choice("bias", &[("none", ())], Some(()))?;
    for off in ["use_dora", "use_qalora", "lora_bias"] {
        cfg.must_be(off, false)?;
    }
    // Only meaningful with use_qalora; and a base stored [in, out] is told from the shapes.
    cfg.ignore(&["qalora_group_size", "fan_in_fan_out"]);
    for list in ["modules_to_save", "target_parameters", "layer_replication"] {
        if let Some(OneOrMany(items)) = cfg.optional::<OneOrMany<super::super::json::Json>>(list)?
            && !items.is_empty()
        {
            return Err(cfg.wrong(
                list,
                "nothing: only low-rank factors are supported",
                format!("{} items", items.len()),
            ));
        }
    }
    let ranks = read_patterns(cfg, "rank_pattern", |cfg, name| cfg.required_in(name, 1..=MAX_RANK))?;
    let alphas = read_patterns(cfg, "alpha_pattern", |cfg, name| cfg.required::<f32>(name))?;
    let rank = cfg.required_in("r", 1..=MAX_RANK)?;
    let alpha: f32 = cfg.required("lora_alpha")?;
    let stabilised = cfg.or("use_rslora", false)?;
    cfg.finish()?;
    Ok(Scaling { rank, alpha, stabilised, ranks, alphas })
}

pub(super) fn pair_factors(
    path: &Path,
    loader: &dyn WeightLoader,
) -> Result<BTreeMap<String, [String; 2]>, ImportError> {
    let wrong = |tensor: &str, expected: &str| ImportError::Field {
        path: path.to_path_buf(),
        field: tensor.to_owned(),
        expected: expected.to_owned(),
        found: "this tensor".to_owned(),
    };
    let mut sides: BTreeMap<String, [Option<String>; 2]> = BTreeMap::new();
    for tensor in loader.names() {
        let stem = tensor.strip_prefix(PREFIX).unwrap_or(tensor);
        let (module, side) = match (stem.strip_suffix(".lora_A.weight"), stem.strip_suffix(".lora_B.weight"))
        {
            (Some(module), _) => (module, 0),
            (_, Some(module)) => (module, 1),
            _ => return Err(wrong(tensor, "a name that ends in .lora_A.weight or .lora_B.weight")),
        };
        sides.entry(format!("{module}.weight")).or_default()[side] = Some(tensor.to_owned());
    }
    sides
        .into_iter()
        .map(|(base, sides)| match sides {
            [Some(a), Some(b)] => Ok((base, [a, b])),
            [Some(only), None] => Err(wrong(&only, "its other side, lora_B, beside it")),
            [None, only] => Err(wrong(&only.unwrap_or(base), "its other side, lora_A, beside it")),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rlx_tensor::{DType, Shape};
    use std::fs;

    fn folder(config: &str, tensors: &[(&str, [usize; 2])]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(CONFIG_FILE), config).unwrap();
        let (mut header, mut end) = (String::from("{"), 0);
        for (i, (name, [rows, columns])) in tensors.iter().enumerate() {
            let (begin, comma) = (end, if i == 0 { "" } else { "," });
            end += rows * columns;
            header += &format!(
                r#"{comma}"{name}":{{"dtype":"U8","shape":[{rows},{columns}],"data_offsets":[{begin},{end}]}}"#
            );
        }
        header.push('}');
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend(vec![1u8; end]);
        fs::write(folder.path().join(WEIGHTS_FILE), file).unwrap();
        folder
    }

    const CONFIG: &str = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 16, "bias": "none", "rank_pattern": {},
        "alpha_pattern": {}, "modules_to_save": null, "use_dora": false, "fan_in_fan_out": false,
        "target_modules": ["q_proj"], "base_model_name_or_path": "x", "lora_dropout": 0.0}"#;
    const A: (&str, [usize; 2]) = ("base_model.model.m.q_proj.lora_A.weight", [2, 6]);
    const B: (&str, [usize; 2]) = ("base_model.model.m.q_proj.lora_B.weight", [4, 2]);

    fn registry() -> WeightRegistry {
        let registry = WeightRegistry::new();
        let shape = Shape::new(&[4usize, 6], DType::U8);
        registry.register("m.q_proj.weight", shape, vec![0u8; 24], WeightKind::Base).unwrap();
        registry
    }

    #[test]
    fn an_adapter_is_registered_by_the_weights_it_updates() {
        let folder = folder(CONFIG, &[A, B]);
        let adapter = PeftAdapter::open(folder.path()).unwrap();
        assert_eq!((adapter.rank(), adapter.alpha()), (2, 16.0));
        assert_eq!(adapter.base_names().collect::<Vec<_>>(), ["m.q_proj.weight"]);
        let registry = registry();
        let handles = adapter.register(&registry, "style", |name| registry.lookup(name)).unwrap();
        assert_eq!(registry.lora_adapter_handles("style").unwrap(), handles);
        assert_eq!((handles.len(), registry.lora_adapter_bytes("style").unwrap()), (2, 20));
        assert!(adapter.register(&registry, "style", |name| registry.lookup(name)).unwrap().is_empty());
    }

    #[test]
    fn a_wrong_shape_or_absent_base_registers_nothing() {
        let registry = registry();
        let wide = folder(CONFIG, &[A, (B.0, [5, 2])]);
        let adapter = PeftAdapter::open(wide.path()).unwrap();
        let result = adapter.register(&registry, "style", |name| registry.lookup(name));
        assert!(matches!(result, Err(RegistryError::Adapter { .. })), "{result:?}");
        let result = adapter.register(&registry, "style", |_| None);
        assert!(matches!(result, Err(RegistryError::Absent { name }) if name == "m.q_proj.weight"));
        assert_eq!(registry.len(), 1);
    }

    #[test]
    fn a_missing_side_and_a_foreign_tensor_are_refused_by_name() {
        let text = PeftAdapter::open(folder(CONFIG, &[A]).path()).unwrap_err().to_string();
        assert!(text.contains(A.0) && text.contains("lora_B"), "{text}");
        let text = PeftAdapter::open(folder(CONFIG, &[B]).path()).unwrap_err().to_string();
        assert!(text.contains(B.0) && text.contains("lora_A"), "{text}");
        let other = ("base_model.model.m.lora_embedding_A", [2, 6]);
        let text = PeftAdapter::open(folder(CONFIG, &[A, B, other]).path()).unwrap_err().to_string();
        assert!(text.contains("lora_embedding_A"), "{text}");
    }

    #[test]
    fn methods_that_change_the_result_are_refused_and_named() {
        for (from, to, field) in [
            ("\"LORA\"", "\"IA3\"", "peft_type"),
            ("\"none\"", "\"all\"", "bias"),
            ("\"use_dora\": false", "\"use_dora\": true", "use_dora"),
            ("\"rank_pattern\": {}", "\"rank_pattern\": {\"q.*proj\": 4}", "rank_pattern"),
            ("\"rank_pattern\": {}", "\"rank_pattern\": {\"q_proj\": 0}", "rank_pattern.q_proj"),
            ("\"alpha_pattern\": {}", "\"alpha_pattern\": {\"q_proj\": \"x\"}", "alpha_pattern.q_proj"),
            ("\"modules_to_save\": null", "\"modules_to_save\": [\"head\"]", "modules_to_save"),
            ("\"r\": 2", "\"r\": 0", "`r`"),
            ("\"r\": 2", "\"r\": 2, \"new_trick\": 1", "new_trick"),
        ] {
            let text = PeftAdapter::open(folder(&CONFIG.replace(from, to), &[A, B]).path()).unwrap_err();
            assert!(text.to_string().contains(field), "{field}: {text}");
        }
        let stabilised = CONFIG.replace("\"r\": 2", "\"r\": 4, \"use_rslora\": true");
        assert_eq!(PeftAdapter::open(folder(&stabilised, &[A, B]).path()).unwrap().alpha(), 32.0);
    }

    #[test]
    fn patterns_give_modules_ranks_and_alphas_of_their_own() {
        let patterns = CONFIG
            .replace("\"rank_pattern\": {}", "\"rank_pattern\": {\"0.k_proj\": 3, \"k_proj\": 1}")
            .replace("\"alpha_pattern\": {}", "\"alpha_pattern\": {\"m.q_proj\": 4.0}");
        let name = |module: &str, side: &str| format!("base_model.model.{module}.lora_{side}.weight");
        let modules = [("m.q_proj", 2), ("m.0.k_proj", 3), ("m.10.k_proj", 1), ("m.xk_proj", 2)];
        let names: Vec<_> = modules.iter().map(|(m, rank)| (name(m, "A"), name(m, "B"), *rank)).collect();
        let tensors: Vec<(&str, [usize; 2])> = names
            .iter()
            .flat_map(|(a, b, rank)| [(a.as_str(), [*rank, 6]), (b.as_str(), [4, *rank])])
            .collect();
        let adapter = PeftAdapter::open(folder(&patterns, &tensors).path()).unwrap();
        let scaling = |module: &str| adapter.scaling(&format!("{module}.weight"));
        assert_eq!(adapter.rank(), 3);
        assert_eq!((scaling("m.q_proj"), scaling("m.0.k_proj")), ((2, 4.0), (3, 16.0)));
        assert_eq!((scaling("m.10.k_proj"), scaling("m.xk_proj")), ((1, 16.0), (2, 16.0)));
        let stabilised = patterns.replace("\"r\": 2", "\"r\": 2, \"use_rslora\": true");
        let adapter = PeftAdapter::open(folder(&stabilised, &tensors).path()).unwrap();
        assert_eq!(adapter.scaling("m.0.k_proj.weight"), (3, 16.0 * 3f32.sqrt()));
        let registry = WeightRegistry::new();
        for (module, _) in modules {
            let shape = Shape::new(&[4usize, 6], DType::U8);
            registry.register(&format!("{module}.weight"), shape, vec![0u8; 24], WeightKind::Base).unwrap();
        }
        assert_eq!(adapter.register(&registry, "style", |name| registry.lookup(name)).unwrap().len(), 8);
        let wrong: Vec<_> =
            tensors.iter().map(|(name, dims)| (*name, dims.map(|d| if d == 3 { 2 } else { d }))).collect();
        let adapter = PeftAdapter::open(folder(&patterns, &wrong).path()).unwrap();
        let error =
            adapter.register(&registry, "other", |name| registry.lookup(name)).unwrap_err().to_string();
        assert!(error.contains("m.0.k_proj"), "{error}");
    }

    #[test]
    fn absent_files_and_pickled_weights_are_refused() {
        let empty = tempfile::tempdir().unwrap();
        assert!(matches!(PeftAdapter::open(empty.path()), Err(ImportError::MissingFile { .. })));
        let pickled = folder(CONFIG, &[A, B]);
        let weights = pickled.path().join(WEIGHTS_FILE);
        fs::rename(weights, pickled.path().join("adapter_model.bin")).unwrap();
        let text = PeftAdapter::open(pickled.path()).unwrap_err().to_string();
        assert!(text.contains("pickle"), "{text}");
    }
}
