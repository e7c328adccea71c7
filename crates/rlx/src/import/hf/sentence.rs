//! What sentence-transformers puts beside the model: `modules.json`, the pooling config, prompts and limits.

use std::path::{Component, Path, PathBuf};

use super::super::ImportError;
use super::super::json::Json;
use super::config::ConfigReader;
use super::{CONFIG_FILE, HfFolder};

/// A sentence encoder: its modules in order, and what its configs say.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct SentenceTransformer {
    /// `modules.json`, in order.
    pub modules: Vec<SentenceModule>,
    /// The folder that holds the transformer's `config.json` and weights.
    pub transformer: PathBuf,
    /// The pooling module's config.
    pub pooling: PoolingConfig,
    /// Longest input in tokens, special tokens included; longer ones are cut.
    pub max_seq_length: Option<usize>,
    /// Lower-case the text before the tokenizer.
    pub do_lower_case: bool,
    /// The output is divided by its Euclidean length.
    pub normalize: bool,
    /// Texts put before the input.
    pub prompts: SentencePrompts,
}

/// One entry of `modules.json`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SentenceModule {
    /// What it does.
    pub kind: SentenceModuleKind,
    /// Its folder, in the model's.
    pub path: PathBuf,
}

/// What a module does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SentenceModuleKind {
    /// Tokens -> one vector each.
    Transformer,
    /// Vectors of all tokens -> one.
    Pooling,
    /// Divides by the Euclidean length.
    Normalize,
}

/// How the vectors of all tokens become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PoolingMode {
    /// The first token's.
    Cls,
    /// The largest of each component.
    Max,
    /// The mean.
    Mean,
    /// The sum over the square root of the count.
    MeanSqrtLen,
    /// The mean, weighted by position from 1.
    WeightedMean,
    /// The last token's.
    LastToken,
}

/// The pooling module's `config.json`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolingConfig {
    /// Size of a token's vector.
    pub dim: Option<usize>,
    /// In the order their results are concatenated; usually one.
    pub modes: Vec<PoolingMode>,
    /// The prompt's tokens take part.
    pub include_prompt: bool,
}

/// `prompts` of `config_sentence_transformers.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SentencePrompts {
    /// Name and text, in file order.
    pub prompts: Vec<(String, String)>,
    /// The one used when none is named.
    pub default: Option<String>,
}

/// The modules of a sentence encoder.
const MODULES_FILE: &str = "modules.json";

/// Flag, newer name and meaning, in the order of concatenation.
const MODES: &[(&str, &str, PoolingMode)] = &[
    ("pooling_mode_cls_token", "cls", PoolingMode::Cls),
    ("pooling_mode_max_tokens", "max", PoolingMode::Max),
    ("pooling_mode_mean_tokens", "mean", PoolingMode::Mean),
    ("pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len_tokens", PoolingMode::MeanSqrtLen),
    ("pooling_mode_weightedmean_tokens", "weightedmean", PoolingMode::WeightedMean),
    ("pooling_mode_lasttoken", "lasttoken", PoolingMode::LastToken),
];

impl SentenceTransformer {
    /// An encoder of which only the pooling is known.
    pub fn of_pooling(mode: PoolingMode, normalize: bool, max_seq_length: Option<usize>) -> Self {
        use SentenceModuleKind::{Normalize, Pooling, Transformer};
        let kinds = [Transformer, Pooling].into_iter().chain(normalize.then_some(Normalize));
        SentenceTransformer {
            modules: kinds.map(|kind| SentenceModule { kind, path: PathBuf::new() }).collect(),
            transformer: PathBuf::new(),
            pooling: PoolingConfig { dim: None, modes: vec![mode], include_prompt: true },
            max_seq_length,
            do_lower_case: false,
            normalize,
            prompts: SentencePrompts::default(),
        }
    }

    /// Reads a folder on disk; `None` without `modules.json`.
    ///
    /// # Errors
    /// As [`SentenceTransformer::of_folder`].
    pub fn open(root: &Path) -> Result<Option<Self>, ImportError> {
        Self::of_folder(&HfFolder::on_disk(root))
    }

    /// Reads a folder, on disk or not; `None` without `modules.json`.
    ///
    /// # Errors
    /// [`ImportError`] for a broken file, a module that is not supported or a field that is not understood.
    pub fn of_folder(folder: &HfFolder) -> Result<Option<Self>, ImportError> {
        let (root, path) = (folder.root(), folder.root().join(MODULES_FILE));
        let Some(json) = folder.json(MODULES_FILE)? else { return Ok(None) };
        let modules = read_modules(&path, &json)?;
        let kinds: Vec<SentenceModuleKind> = modules.iter().map(|module| module.kind).collect();
        use SentenceModuleKind::{Normalize, Pooling, Transformer};
        let normalize = match kinds[..] {
            [Transformer, Pooling] => false,
            [Transformer, Pooling, Normalize] => true,
            _ => {
                return Err(ImportError::Field {
                    path,
                    field: "(order of modules)".to_owned(),
                    expected: "Transformer, Pooling and possibly Normalize".to_owned(),
                    found: format!("{kinds:?}"),
                });
            }
        };
        let transformer = root.join(&modules[0].path);
        let pooling = inside(&modules[1].path, CONFIG_FILE);
        let pooling = folder.reader(&pooling)?.ok_or_else(|| folder.missing(&pooling))?;
        let pooling = PoolingConfig::read(&pooling)?;
        let (max_seq_length, do_lower_case) =
            read_limits(folder, &inside(&modules[0].path, "sentence_bert_config.json"))?;
        let prompts = SentencePrompts::of_folder(folder)?;
        Ok(Some(SentenceTransformer {
            modules,
            transformer,
            pooling,
            max_seq_length,
            do_lower_case,
            normalize,
            prompts,
        }))
    }
}

/// The name of a file in one of the folder's own.
fn inside(folder: &Path, file: &str) -> String {
    let parts = folder.iter().map(|part| part.to_string_lossy().into_owned());
    parts.chain([file.to_owned()]).collect::<Vec<_>>().join("/")
}

fn read_modules(path: &Path, json: &Json) -> Result<Vec<SentenceModule>, ImportError> {
    let wrong = |field: String, expected: &str, found: String| ImportError::Field {
        path: path.to_path_buf(),
        field,
        expected: expected.to_owned(),
        found,
    };
    let Json::Array(items) = json else {
        return Err(wrong("(top level)".to_owned(), "an array of modules", json.kind().to_owned()));
    };
    let mut modules = Vec::new();
    for (i, item) in items.iter().enumerate() {
        let text = |name: &str| match item.field(name) {
            Some(Json::String(text)) => Ok(text.as_str()),
            other => {
                let found = other.map_or("nothing", Json::kind).to_owned();
                Err(wrong(format!("[{i}].{name}"), "a string", found))
            }
        };
        let kind = match text("type")?.rsplit('.').next() {
            Some("Transformer") => SentenceModuleKind::Transformer,
            Some("Pooling") => SentenceModuleKind::Pooling,
            Some("Normalize") => SentenceModuleKind::Normalize,
            _ => {
                let found = text("type")?.to_owned();
                return Err(wrong(format!("[{i}].type"), "Transformer, Pooling or Normalize", found));
            }
        };
        let folder = PathBuf::from(text("path")?);
        if !folder.components().all(|part| matches!(part, Component::Normal(_))) {
            let found = folder.display().to_string();
            return Err(wrong(format!("[{i}].path"), "a folder inside the model's", found));
        }
        modules.push(SentenceModule { kind, path: folder });
    }
    Ok(modules)
}

impl PoolingConfig {
    /// Reads the flags of older versions, or the `pooling_mode` of newer ones.
    ///
    /// # Errors
    /// [`ImportError::Field`], [`ImportError::UnreadFields`].
    pub fn read(cfg: &ConfigReader) -> Result<Self, ImportError> {
        let mut modes = Vec::new();
        for (flag, _, mode) in MODES {
            if cfg.or(flag, false)? {
                modes.push(*mode);
            }
        }
        let names: Vec<(&str, PoolingMode)> = MODES.iter().map(|(_, name, mode)| (*name, *mode)).collect();
        if cfg.has("pooling_mode") {
            let named = cfg.choice("pooling_mode", &names, None)?;
            if modes.iter().any(|mode| *mode != named) {
                return Err(cfg.wrong(
                    "pooling_mode",
                    format!("the mode of the flags, {modes:?}"),
                    format!("{named:?}"),
                ));
            }
            modes = vec![named];
        }
        if modes.is_empty() {
            return Err(cfg.wrong("pooling_mode", "at least one mode", "none"));
        }
        let older = cfg.optional_in("word_embedding_dimension", 1..=1 << 20)?;
        let newer = cfg.optional_in("embedding_dimension", 1..=1 << 20)?;
        let include_prompt = cfg.or("include_prompt", true)?;
        cfg.finish()?;
        Ok(PoolingConfig { dim: newer.or(older), modes, include_prompt })
    }
}

fn read_limits(folder: &HfFolder, file: &str) -> Result<(Option<usize>, bool), ImportError> {
    let Some(cfg) = folder.reader(file)? else { return Ok((None, false)) };
    let limits = (cfg.optional_in("max_seq_length", 1..=1 << 24)?, cfg.or("do_lower_case", false)?);
    cfg.must_be("transformer_task", "feature-extraction".to_owned())?;
    cfg.ignore(&["modality_config", "module_output_name"]);
    cfg.finish()?;
    Ok(limits)
}

impl SentencePrompts {
    fn of_folder(folder: &HfFolder) -> Result<Self, ImportError> {
        let Some(cfg) = folder.reader("config_sentence_transformers.json")? else {
            return Ok(SentencePrompts::default());
        };
        let mut prompts = Vec::new();
        if let Some(section) = cfg.section("prompts")? {
            for name in section.field_names() {
                if let Some(text) = section.optional(name)? {
                    prompts.push((name.to_owned(), text));
                }
            }
        }
        let default: Option<String> = cfg.optional("default_prompt_name")?;
        if let Some(name) = default.as_ref().filter(|name| prompts.iter().all(|(known, _)| known != *name)) {
            return Err(cfg.wrong("default_prompt_name", "one of `prompts`", format!("\"{name}\"")));
        }
        cfg.ignore(&["__version__", "similarity_fn_name", "model_type"]);
        cfg.finish()?;
        Ok(SentencePrompts { prompts, default })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const MODULES: &str = r#"[
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]"#;
    const POOLING: &str = r#"{"word_embedding_dimension": 384, "pooling_mode_cls_token": false,
        "pooling_mode_mean_tokens": true}"#;

    fn folder(modules: &str, pooling: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("1_Pooling")).unwrap();
        fs::write(folder.path().join("modules.json"), modules).unwrap();
        fs::write(folder.path().join("1_Pooling/config.json"), pooling).unwrap();
        fs::write(
            folder.path().join("sentence_bert_config.json"),
            r#"{"max_seq_length": 256, "do_lower_case": false}"#,
        )
        .unwrap();
        folder
    }

    #[test]
    fn a_sentence_encoder_is_read_whole() {
        let folder = folder(MODULES, POOLING);
        let read = SentenceTransformer::open(folder.path()).unwrap().unwrap();
        assert!(read.normalize && !read.do_lower_case && read.pooling.include_prompt);
        assert_eq!((read.max_seq_length, read.pooling.dim), (Some(256), Some(384)));
        assert_eq!(read.pooling.modes, [PoolingMode::Mean]);
        assert_eq!(read.transformer, folder.path().join(""));
        let plain = tempfile::tempdir().unwrap();
        assert!(SentenceTransformer::open(plain.path()).unwrap().is_none());
    }

    #[test]
    fn a_folder_in_memory_is_read_as_one_on_disk_is() {
        let folder = folder(MODULES, POOLING);
        let files = ["modules.json", "1_Pooling/config.json", "sentence_bert_config.json"];
        let held = |names: &[&str]| {
            let content = |name: &&str| ((*name).to_owned(), fs::read(folder.path().join(name)).unwrap());
            HfFolder::bundled(folder.path(), names.iter().map(content))
        };
        let read = held(&files).sentence_transformer().unwrap();
        assert_eq!(read, SentenceTransformer::open(folder.path()).unwrap());
        assert_eq!(held(&[]).sentence_transformer().unwrap(), None);
        let text = held(&files[..1]).sentence_transformer().unwrap_err().to_string();
        assert!(text.contains("1_Pooling/config.json: file is missing"), "{text}");
    }

    #[test]
    fn modules_out_of_reach_or_unknown_are_named() {
        let outside = MODULES.replace("1_Pooling", "../1_Pooling");
        let text = SentenceTransformer::open(folder(&outside, POOLING).path()).unwrap_err().to_string();
        assert!(text.contains("[1].path"), "{text}");
        let dense = MODULES.replace("models.Normalize", "models.Dense");
        let text = SentenceTransformer::open(folder(&dense, POOLING).path()).unwrap_err().to_string();
        assert!(text.contains("models.Dense"), "{text}");
        assert!(SentenceTransformer::open(folder("[]", POOLING).path()).is_err());
        assert!(SentenceTransformer::open(folder("{}", POOLING).path()).is_err());
    }

    #[test]
    fn pooling_without_a_mode_or_with_an_unknown_field_is_refused() {
        let read = |text: &str| PoolingConfig::read(&ConfigReader::from_bytes("p", text.as_bytes()).unwrap());
        assert!(read(r#"{"word_embedding_dimension": 8}"#).is_err());
        assert!(read(r#"{"pooling_mode_mean_tokens": true, "pooling_mode_odd": true}"#).is_err());
        assert_eq!(read(r#"{"pooling_mode": "lasttoken"}"#).unwrap().modes, [PoolingMode::LastToken]);
        assert!(read(r#"{"pooling_mode": "cls", "pooling_mode_max_tokens": true}"#).is_err());
        let both = read(r#"{"pooling_mode_cls_token": true, "pooling_mode_max_tokens": true}"#).unwrap();
        assert_eq!(both.modes, [PoolingMode::Cls, PoolingMode::Max]);
    }

    #[test]
    fn a_default_prompt_has_to_be_one_of_the_prompts() {
        let folder = folder(MODULES, POOLING);
        let write =
            |text: &str| fs::write(folder.path().join("config_sentence_transformers.json"), text).unwrap();
        write(r#"{"prompts": {"query": "query: "}, "default_prompt_name": "query"}"#);
        let read = SentenceTransformer::open(folder.path()).unwrap().unwrap();
        assert_eq!(read.prompts.prompts, [("query".to_owned(), "query: ".to_owned())]);
        write(r#"{"prompts": {}, "default_prompt_name": "query"}"#);
        assert!(SentenceTransformer::open(folder.path()).is_err());
    }
}
