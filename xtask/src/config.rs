//! What the tasks take from outside: the repository's root and the environment.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process;

pub struct Config {
    /// The folder that holds the workspace manifest.
    pub root: PathBuf,
    /// `CI=true`: stage budgets become limits.
    pub in_ci: bool,
    /// `RLX_TEST_MINILM_DIR` as the caller set it.
    pub minilm_dir: Option<PathBuf>,
}

impl Config {
    /// A cargo command in the root folder. CI builds once, so nothing is kept for a next build.
    pub fn cargo(&self, args: &[&str]) -> Command {
        let mut command = process::command("cargo", args, &self.root);
        if self.in_ci {
            command.env("CARGO_INCREMENTAL", "0");
        }
        command
    }

    /// Reads the environment and walks up from the current folder to the workspace manifest.
    pub fn read() -> Result<Config, String> {
        let current = std::env::current_dir().map_err(|e| format!("cannot tell the current folder: {e}"))?;
        Ok(Config {
            root: workspace_root(&current)?,
            in_ci: std::env::var("CI").is_ok_and(|value| value == "true"),
            minilm_dir: std::env::var_os("RLX_TEST_MINILM_DIR").map(PathBuf::from),
        })
    }
}

fn workspace_root(from: &Path) -> Result<PathBuf, String> {
    from.ancestors()
        .find(|folder| {
            std::fs::read_to_string(folder.join("Cargo.toml")).is_ok_and(|text| text.contains("[workspace]"))
        })
        .map(Path::to_path_buf)
        .ok_or_else(|| format!("no workspace manifest at or above {}", from.display()))
}
