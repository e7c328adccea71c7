//! `.venv`: Python packages that tests need, pinned by hash. No torch is among them.

use std::path::{Path, PathBuf};

use crate::process;

/// The interpreter.
pub fn python(root: &Path) -> PathBuf {
    root.join(".venv/bin/python")
}

/// A file or folder of an installed package, by its path within the folder of packages.
pub fn find(root: &Path, path: &str) -> Option<PathBuf> {
    let libraries = std::fs::read_dir(root.join(".venv/lib")).ok()?;
    let places = libraries.flatten().map(|python| python.path().join("site-packages").join(path));
    places.into_iter().find(|place| place.exists())
}

/// Installs what a file pins, by hash and without dependencies, unless `path` is there; gives its place.
pub fn install(root: &Path, requirements: &str, path: &str) -> Result<PathBuf, String> {
    if let Some(place) = find(root, path) {
        return Ok(place);
    }
    let python = python(root);
    if !python.is_file() {
        process::run(&mut process::command("python3", &["-m", "venv", ".venv"], root))
            .map_err(|error| format!("{error}; {}", process::install_hint("python3")))?;
    }
    let args =
        ["-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--requirement", requirements];
    process::run(&mut process::command(&python.to_string_lossy(), &args, root))?;
    find(root, path).ok_or_else(|| format!("{requirements} is installed, but .venv holds no {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_found_in_the_folder_of_packages() {
        let root = std::env::temp_dir().join(format!("rlx-xtask-venv-{}", std::process::id()));
        let file = root.join(".venv/lib/python3.11/site-packages/model/model.safetensors");
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        assert_eq!(find(&root, "model/model.safetensors"), None);
        std::fs::write(&file, b"").unwrap();
        assert_eq!(find(&root, "model/model.safetensors"), Some(file));
        std::fs::remove_dir_all(&root).unwrap();
    }
}
