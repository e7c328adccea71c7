//! Finds a model by path or by hub name in the local cache, in that cache's own layout:
//! `models--ORG--NAME/{refs/REVISION, snapshots/COMMIT/}`. Nothing is fetched.

use std::fmt;
use std::path::{Path, PathBuf};

use super::super::ImportError;
use super::super::json::read_bounded;

/// Where the cache may be, as the settings say. Read from the environment elsewhere, once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HfCacheDirs {
    /// `HF_HUB_CACHE`: the hub cache itself.
    pub hf_hub_cache: Option<PathBuf>,
    /// `HF_HOME`: holds `hub/`.
    pub hf_home: Option<PathBuf>,
    /// `XDG_CACHE_HOME`: holds `huggingface/hub/`.
    pub xdg_cache_home: Option<PathBuf>,
    /// The user's home: holds `.cache/huggingface/hub/`.
    pub home: Option<PathBuf>,
}

impl HfCacheDirs {
    /// The hub cache: the first of the settings that is there decides.
    pub fn hub(&self) -> Option<PathBuf> {
        let in_home = || self.home.as_ref().map(|path| path.join(".cache/huggingface/hub"));
        self.hf_hub_cache
            .clone()
            .or_else(|| self.hf_home.as_ref().map(|path| path.join("hub")))
            .or_else(|| self.xdg_cache_home.as_ref().map(|path| path.join("huggingface/hub")))
            .or_else(in_home)
    }
}

/// `org/name[@revision][:quantisation]`, or `name` for the few models without an owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubName {
    /// The owner.
    pub org: Option<String>,
    /// The model.
    pub name: String,
    /// Branch, tag or commit; `main` when absent.
    pub revision: Option<String>,
    /// Which GGUF file of the repository: the quantisation in its name, such as `Q4_K_M`.
    pub quantization: Option<String>,
}

impl HubName {
    /// Parses a hub name; a part may not be able to leave the cache folder.
    ///
    /// # Errors
    /// [`ImportError::BadName`] with the rule it breaks.
    pub fn parse(text: &str) -> Result<Self, ImportError> {
        let bad = |reason: &str| ImportError::BadName { name: text.to_owned(), reason: reason.to_owned() };
        let (whole, quantization) = match text.split_once(':') {
            Some((whole, quantization)) => (whole, Some(quantization)),
            None => (text, None),
        };
        let (path, revision) = match whole.split_once('@') {
            Some((path, revision)) => (path, Some(revision)),
            None => (whole, None),
        };
        let parts: Vec<&str> = path.split('/').collect();
        let (org, name) = match parts[..] {
            [name] => (None, name),
            [org, name] => (Some(org), name),
            _ => return Err(bad("expected `org/name`")),
        };
        for part in org.into_iter().chain([name]) {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            if part.is_empty() || part.len() > 96 || !part.chars().all(plain) {
                return Err(bad("each part is 1 to 96 letters, digits, `-`, `_` or `.`"));
            }
            if part.starts_with(['.', '-']) || part.contains("..") || part.contains("--") {
                return Err(bad("a part may not start with `.` or `-`, nor hold `..` or `--`"));
            }
        }
        if let Some(revision) = revision {
            let plain = |part: &str| {
                let plain = |c: char| c.is_ascii_alphanumeric() || "-_.+".contains(c);
                !part.is_empty() && !part.starts_with('.') && part.chars().all(plain)
            };
            if revision.len() > 200 || !revision.split('/').all(plain) {
                return Err(bad("the revision after `@` is not a branch, tag or commit"));
            }
        }
        let plain = |text: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        if quantization.is_some_and(|text| text.is_empty() || text.len() > 32 || !plain(text)) {
            return Err(bad("what follows `:` is a quantisation, such as Q4_K_M"));
        }
        Ok(HubName {
            org: org.map(str::to_owned),
            name: name.to_owned(),
            revision: revision.map(str::to_owned),
            quantization: quantization.map(str::to_owned),
        })
    }

    /// Without the revision.
    pub fn repository(&self) -> String {
        match &self.org {
            Some(org) => format!("{org}/{}", self.name),
            None => self.name.clone(),
        }
    }

    fn cache_folder(&self) -> String {
        format!("models--{}", self.repository().replace('/', "--"))
    }

    fn fetch_arguments(&self) -> String {
        let revision = self.revision.as_ref().map(|revision| format!(" --revision {revision}"));
        let files = self.quantization.as_ref().map(|text| format!(" --include \"*{text}*.gguf\""));
        [Some(self.repository()), revision, files].into_iter().flatten().collect()
    }
}

impl fmt::Display for HubName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repository())?;
        if let Some(revision) = &self.revision {
            write!(f, "@{revision}")?;
        }
        match &self.quantization {
            Some(quantization) => write!(f, ":{quantization}"),
            None => Ok(()),
        }
    }
}

/// Where a model is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ResolvedModel {
    /// A file or folder that exists.
    pub path: PathBuf,
    /// What to give to `hf download` to fetch what it lacks.
    pub fetch_name: String,
}

/// Finds `model`: a path that exists wins, then the local cache.
///
/// # Errors
/// [`ImportError::BadName`] for text that is neither, [`ImportError::NotFound`] with the command that fetches it,
/// [`ImportError::Field`] for a broken `refs` file.
pub fn resolve_model(model: &str, dirs: &HfCacheDirs) -> Result<ResolvedModel, ImportError> {
    let path = Path::new(model);
    if !model.is_empty() && path.exists() {
        let fetch_name = name_in_cache(path).unwrap_or_else(|| format!("ORG/NAME --local-dir {model}"));
        return Ok(ResolvedModel { path: path.to_path_buf(), fetch_name });
    }
    if model.starts_with(['/', '.', '~']) || model.contains('\\') || model.is_empty() {
        let reason = "it is spelled as a path".to_owned();
        return Err(ImportError::BadName { name: model.to_owned(), reason });
    }
    let name = HubName::parse(model)?;
    let hub = dirs.hub();
    let not_found = || ImportError::NotFound {
        name: model.to_owned(),
        searched: hub.iter().cloned().collect(),
        command: format!("hf download {}", name.fetch_arguments()),
    };
    let repository = hub.as_ref().ok_or_else(not_found)?.join(name.cache_folder());
    let revision = name.revision.as_deref().unwrap_or("main");
    let snapshot = repository.join("snapshots").join(commit_of(&repository, revision)?);
    if !snapshot.is_dir() {
        return Err(not_found());
    }
    let path = match &name.quantization {
        Some(quantization) => gguf_of(&snapshot, quantization)?.ok_or_else(not_found)?,
        None => snapshot,
    };
    Ok(ResolvedModel { path, fetch_name: name.fetch_arguments() })
}

/// The GGUF file of a snapshot whose name holds a quantisation as a word of its own; of a split model the first part.
fn gguf_of(snapshot: &Path, quantization: &str) -> Result<Option<PathBuf>, ImportError> {
    let io = |source| ImportError::Io { path: snapshot.to_path_buf(), source };
    let wanted = quantization.to_ascii_lowercase();
    let mut found = Vec::new();
    for entry in std::fs::read_dir(snapshot).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("").to_ascii_lowercase();
        let Some(stem) = name.strip_suffix(".gguf") else { continue };
        let is_first = !stem.contains("-of-") || stem.contains("-00001-of-");
        if is_first && stem.split(['-', '.']).any(|word| word == wanted) {
            found.push(path);
        }
    }
    found.sort();
    match &found[..] {
        [_, second, ..] => {
            let found = format!("{} and {}", found[0].display(), second.display());
            let (path, field) = (snapshot.to_path_buf(), "(file names)".to_owned());
            let expected =
                format!("one GGUF file named after {quantization}: give the path of the one that is meant");
            Err(ImportError::Field { path, field, expected, found })
        }
        _ => Ok(found.pop()),
    }
}

/// The commit a branch or tag points at; a revision without a ref is taken for a commit.
fn commit_of(repository: &Path, revision: &str) -> Result<String, ImportError> {
    let reference = repository.join("refs").join(revision);
    if !reference.is_file() {
        return Ok(revision.to_owned());
    }
    let bytes = read_bounded(&reference, 256)?;
    let text = String::from_utf8_lossy(&bytes);
    let commit = text.trim();
    if commit.is_empty() || !commit.chars().all(|c| c.is_ascii_alphanumeric()) {
        return Err(ImportError::Field {
            path: reference,
            field: "(whole file)".to_owned(),
            expected: "a commit id".to_owned(),
            found: format!("{commit:?}"),
        });
    }
    Ok(commit.to_owned())
}

/// `org/name` of a path inside a hub cache.
fn name_in_cache(path: &Path) -> Option<String> {
    let folder = path.ancestors().find_map(|part| part.file_name()?.to_str()?.strip_prefix("models--"));
    folder.map(|name| name.replacen("--", "/", 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn cache() -> (tempfile::TempDir, HfCacheDirs) {
        let folder = tempfile::tempdir().unwrap();
        let repository = folder.path().join("hub/models--org--tiny");
        fs::create_dir_all(repository.join("refs/refs/pr")).unwrap();
        fs::create_dir_all(repository.join("snapshots").join(COMMIT)).unwrap();
        fs::write(repository.join("refs/main"), COMMIT).unwrap();
        fs::write(repository.join("refs/refs/pr/1"), format!("{COMMIT}\n")).unwrap();
        fs::write(repository.join("snapshots").join(COMMIT).join("config.json"), "{}").unwrap();
        let dirs = HfCacheDirs { hf_home: Some(folder.path().to_path_buf()), ..HfCacheDirs::default() };
        (folder, dirs)
    }

    #[test]
    fn a_hub_name_is_found_by_branch_tag_and_commit() {
        let (_folder, dirs) = cache();
        for name in ["org/tiny", "org/tiny@main", "org/tiny@refs/pr/1", &format!("org/tiny@{COMMIT}")] {
            let found = resolve_model(name, &dirs).unwrap();
            assert!(found.path.ends_with(COMMIT), "{name}");
        }
    }

    #[test]
    fn an_absent_model_names_the_cache_and_the_command() {
        let (folder, dirs) = cache();
        let text = resolve_model("org/other@v1", &dirs).unwrap_err().to_string();
        assert!(text.contains("`hf download org/other --revision v1`"), "{text}");
        assert!(text.contains(folder.path().join("hub").to_str().unwrap()), "{text}");
        assert!(matches!(resolve_model("org/tiny@v9", &dirs), Err(ImportError::NotFound { .. })));
        let none = resolve_model("org/tiny", &HfCacheDirs::default()).unwrap_err().to_string();
        assert!(none.contains("no cache folder is known"), "{none}");
    }

    #[test]
    fn a_quantisation_names_one_gguf_file_of_the_repository() {
        let (folder, dirs) = cache();
        let snapshot = folder.path().join("hub/models--org--tiny/snapshots").join(COMMIT);
        for file in ["tiny-Q4_K_M.gguf", "tiny-q8_0.gguf", "tiny.Q6_K-00001-of-00002.gguf"] {
            fs::write(snapshot.join(file), "GGUF").unwrap();
        }
        fs::write(snapshot.join("tiny.Q6_K-00002-of-00002.gguf"), "GGUF").unwrap();
        for (name, file) in [
            ("org/tiny:Q4_K_M", "tiny-Q4_K_M.gguf"),
            ("org/tiny@main:q4_k_m", "tiny-Q4_K_M.gguf"),
            ("org/tiny:Q8_0", "tiny-q8_0.gguf"),
            ("org/tiny:Q6_K", "tiny.Q6_K-00001-of-00002.gguf"),
        ] {
            assert!(resolve_model(name, &dirs).unwrap().path.ends_with(file), "{name}");
        }
        let absent = resolve_model("org/tiny@main:Q4_K", &dirs).unwrap_err().to_string();
        let command = "`hf download org/tiny --revision main --include \"*Q4_K*.gguf\"`";
        assert!(absent.contains(command), "{absent}");
        fs::write(snapshot.join("other-Q8_0.gguf"), "GGUF").unwrap();
        let two = resolve_model("org/tiny:Q8_0", &dirs).unwrap_err().to_string();
        assert!(two.contains("other-Q8_0.gguf and"), "{two}");
        for wrong in ["org/tiny:", "org/tiny:../x", "org/tiny:Q4:Q5"] {
            assert!(matches!(resolve_model(wrong, &dirs), Err(ImportError::BadName { .. })), "{wrong}");
        }
    }

    #[test]
    fn a_local_path_wins_over_the_cache() {
        let (folder, dirs) = cache();
        let local = folder.path().join("org/tiny");
        fs::create_dir_all(&local).unwrap();
        assert_eq!(resolve_model(local.to_str().unwrap(), &dirs).unwrap().path, local);
    }

    #[test]
    fn names_that_could_leave_the_cache_are_refused() {
        let dirs = HfCacheDirs::default();
        for name in [
            "",
            "../etc",
            "/etc/none",
            "org/..",
            "a/b/c",
            "org/na me",
            "org/",
            "org/x--y",
            "org/x@../../y",
            "org/x@",
            "~/x",
            "org\\x",
            ".hidden/x",
            "org/x@a//b",
        ] {
            assert!(matches!(resolve_model(name, &dirs), Err(ImportError::BadName { .. })), "{name}");
        }
        HubName::parse("gpt2").unwrap();
        assert_eq!(HubName::parse("a/b.c_d-e@v1.0+x").unwrap().to_string(), "a/b.c_d-e@v1.0+x");
    }

    #[test]
    fn a_broken_ref_is_an_error_that_names_its_file() {
        let (folder, dirs) = cache();
        fs::write(folder.path().join("hub/models--org--tiny/refs/main"), "../../../etc").unwrap();
        let text = resolve_model("org/tiny", &dirs).unwrap_err().to_string();
        assert!(text.contains("refs/main") && text.contains("a commit id"), "{text}");
    }

    #[test]
    fn the_first_setting_decides_where_the_cache_is() {
        let mut dirs = HfCacheDirs { home: Some("/h".into()), ..HfCacheDirs::default() };
        assert_eq!(dirs.hub().unwrap(), Path::new("/h/.cache/huggingface/hub"));
        dirs.xdg_cache_home = Some("/x".into());
        assert_eq!(dirs.hub().unwrap(), Path::new("/x/huggingface/hub"));
        dirs.hf_home = Some("/f".into());
        assert_eq!(dirs.hub().unwrap(), Path::new("/f/hub"));
        dirs.hf_hub_cache = Some("/c".into());
        assert_eq!(dirs.hub().unwrap(), Path::new("/c"));
    }

    #[test]
    fn missing_files_name_the_command_that_fetches_them() {
        let (folder, dirs) = cache();
        let model = super::super::HfFolder::open("org/tiny", &dirs).unwrap();
        for error in [model.tokenizer().unwrap_err(), model.weights().map(|_| ()).unwrap_err()] {
            let text = error.to_string();
            assert!(text.contains("`hf download org/tiny`"), "{text}");
        }
        let empty = folder.path().join("hub");
        let error = super::super::HfFolder::open(empty.to_str().unwrap(), &dirs).unwrap_err();
        assert!(matches!(error, ImportError::MissingFile { .. }));
    }
}
