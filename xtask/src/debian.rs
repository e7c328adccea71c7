//! Programs that tests need, from Debian's packages.

use std::path::Path;

use crate::process;

/// Installs packages with apt, if there are any to install.
pub fn install(root: &Path, packages: &[&str]) -> Result<(), String> {
    if packages.is_empty() {
        return Ok(());
    }
    let apt = |args: &[&str]| {
        let mut command = process::command("apt-get", args, root);
        process::run(command.env("DEBIAN_FRONTEND", "noninteractive"))
    };
    apt(&["update", "--quiet"])?;
    let install = ["install", "--quiet", "--yes", "--no-install-recommends"];
    apt(&[&install[..], packages].concat())
}
