//! A Vulkan driver for the tests of `rlx-gpu`: Mesa's, which computes on the processor where there is no card.

use std::path::Path;

/// Where Vulkan's loader looks for drivers.
const DRIVERS: &str = "/usr/share/vulkan/icd.d";

/// Debian's package, unless some driver is there.
pub fn missing() -> Vec<&'static str> {
    if is_installed(Path::new(DRIVERS)) { Vec::new() } else { vec!["mesa-vulkan-drivers"] }
}

fn is_installed(folder: &Path) -> bool {
    let names = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.into_iter().any(|name| name.to_string_lossy().ends_with(".json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_is_a_manifest_in_the_folder() {
        let folder = std::env::temp_dir().join(format!("rlx-xtask-vulkan-{}", std::process::id()));
        assert!(!is_installed(&folder));
        std::fs::create_dir_all(&folder).unwrap();
        assert!(!is_installed(&folder));
        std::fs::write(folder.join("lvp_icd.x86_64.json"), "{}").unwrap();
        assert!(is_installed(&folder));
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
