//! The repository's text as the rules see it.

use std::collections::BTreeSet;
use std::path::Path;

use super::source::SourceFile;
use crate::process;

/// Files longer than this are data, not text to review.
const TEXT_LIMIT_BYTES: u64 = 1 << 20;

pub struct TextFile {
    pub path: String,
    pub text: String,
}

/// Everything git tracks or would track, read once.
pub struct Tree {
    /// Every path, data files included.
    pub paths: BTreeSet<String>,
    /// Files of UTF-8 text.
    pub texts: Vec<TextFile>,
    /// The Rust files among them.
    pub sources: Vec<SourceFile>,
}

impl Tree {
    /// Reads the tracked and the not ignored files below `root`.
    pub fn read(root: &Path) -> Result<Tree, String> {
        let args = ["-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"];
        let listing = process::capture(&mut process::command("git", &args, root))?;
        let mut paths = BTreeSet::new();
        let mut texts = Vec::new();
        for path in listing.split('\0').filter(|path| !path.is_empty()) {
            let Ok(metadata) = std::fs::metadata(root.join(path)) else { continue };
            paths.insert(path.to_string());
            if metadata.len() > TEXT_LIMIT_BYTES || !metadata.is_file() {
                continue;
            }
            let bytes = std::fs::read(root.join(path)).map_err(|e| format!("cannot read {path}: {e}"))?;
            if let Ok(text) = String::from_utf8(bytes) {
                texts.push(TextFile { path: path.into(), text });
            }
        }
        Ok(Tree::of(paths, texts))
    }

    fn of(paths: BTreeSet<String>, texts: Vec<TextFile>) -> Tree {
        let rust = texts.iter().filter(|file| file.path.ends_with(".rs"));
        let sources = rust.map(|file| SourceFile::parse(&file.path, &file.text)).collect();
        Tree { paths, texts, sources }
    }

    /// A tree of samples, for the rules' own tests.
    #[cfg(test)]
    pub fn sample(files: &[(&str, &str)]) -> Tree {
        let paths = files.iter().map(|(path, _)| path.to_string()).collect();
        let texts =
            files.iter().map(|(path, text)| TextFile { path: path.to_string(), text: text.to_string() });
        Tree::of(paths, texts.collect())
    }

    pub fn source(&self, path: &str) -> Option<&SourceFile> {
        self.sources.iter().find(|file| file.path == path)
    }

    /// The modules directly in `folder`, as (stem, file): `a.rs` and `a/mod.rs`, but neither `mod.rs` nor `tests.rs`.
    pub fn modules(&self, folder: &str) -> Vec<(&str, &SourceFile)> {
        let inside = self.sources.iter().filter_map(|file| {
            let rest = file.path.strip_prefix(folder)?.strip_suffix(".rs")?;
            let stem = rest.strip_suffix("/mod").unwrap_or(rest);
            (!stem.contains('/') && stem != "mod" && stem != "tests").then_some((stem, file))
        });
        inside.collect()
    }

    /// The file that declares a folder's modules: `folder.rs` or `folder/mod.rs`, for a `folder` that ends in `/`.
    pub fn module_file(&self, folder: &str) -> Option<&SourceFile> {
        let beside = format!("{}.rs", folder.trim_end_matches('/'));
        self.source(&beside).or_else(|| self.source(&format!("{folder}mod.rs")))
    }

    /// The Rust files below `folder`.
    pub fn below<'a>(&'a self, folder: &'a str) -> impl Iterator<Item = &'a SourceFile> {
        self.sources.iter().filter(move |file| file.path.starts_with(folder))
    }
}
