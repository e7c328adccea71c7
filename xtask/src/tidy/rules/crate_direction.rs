//! A crate depends only on crates before it in the walk.

use super::{Finding, Tree};

/// The walk. A crate may depend on the ones above it, less those named in [`NEVER`].
const WALK: &[&str] =
    &["rlx-tensor", "rlx-graph", "rlx-kernels", "rlx", "rlx-gpu", "rlx-onnx", "rlx-models", "rlx-cli"];
/// Pairs (crate, dependency) that the walk would allow and the design does not.
const NEVER: &[(&str, &str, &str)] = &[("rlx-kernels", "rlx-graph", "kernels know tensors, not graphs")];
/// Test data for every crate: a dev-dependency, which knows data and meaning only.
const TEST_CRATE: &str = "rlx-conformance";
const TEST_CRATE_NEEDS: &[&str] = &["rlx-tensor", "rlx-graph"];

pub fn check(tree: &Tree) -> Vec<Finding> {
    let manifests = tree.texts.iter().filter_map(|file| {
        let name = file.path.strip_prefix("crates/")?.strip_suffix("/Cargo.toml")?;
        Some((name, file))
    });
    let mut findings = Vec::new();
    for (name, file) in manifests {
        let mut report = |line: usize, message: String| {
            findings.push(Finding { subject: file.path.clone(), line, message });
        };
        if name != TEST_CRATE && !WALK.contains(&name) {
            report(0, format!("`{name}` has no place in the walk ({})", WALK.join(", ")));
            continue;
        }
        for dependency in dependencies(&file.text) {
            if let Err(message) = may_depend(name, &dependency) {
                report(dependency.line, message);
            }
        }
    }
    findings
}

struct Dependency<'a> {
    name: &'a str,
    dev: bool,
    line: usize,
}

fn may_depend(name: &str, dependency: &Dependency) -> Result<(), String> {
    let needed = dependency.name;
    if let Some((_, _, reason)) = NEVER.iter().find(|(user, used, _)| *user == name && *used == needed) {
        return Err(format!("`{name}` must not depend on `{needed}`: {reason}"));
    }
    if needed == TEST_CRATE {
        return if dependency.dev { Ok(()) } else { Err(format!("`{needed}` is a dev-dependency only")) };
    }
    if name == TEST_CRATE {
        let allowed = TEST_CRATE_NEEDS.contains(&needed);
        return if allowed { Ok(()) } else { Err(format!("`{name}` must not depend on `{needed}`")) };
    }
    let place = |name: &str| WALK.iter().position(|known| *known == name);
    match (place(needed), place(name)) {
        (Some(used), Some(user)) if used < user => Ok(()),
        _ => Err(format!("`{name}` must not depend on `{needed}`: the walk goes {}", WALK.join(", "))),
    }
}

/// The workspace's crates that a manifest's dependency tables name.
fn dependencies(manifest: &str) -> Vec<Dependency<'_>> {
    let mut found = Vec::new();
    let mut table = "";
    for (at, line) in manifest.lines().enumerate() {
        let line = line.trim();
        if let Some(header) = line.strip_prefix('[') {
            table = header.trim_end_matches(']');
            if let Some((kind, name)) = table.rsplit_once("dependencies.") {
                found.push(Dependency { name, dev: kind.ends_with("dev-"), line: at + 1 });
            }
            continue;
        }
        if table.ends_with("dependencies") {
            let name = line.split(['.', '=', ' ']).next().unwrap_or(line);
            found.push(Dependency { name, dev: table.ends_with("dev-dependencies"), line: at + 1 });
        }
    }
    found.retain(|dependency| dependency.name == "rlx" || dependency.name.starts_with("rlx-"));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(name: &str, manifest: &str) -> Vec<String> {
        let path = format!("crates/{name}/Cargo.toml");
        check(&Tree::sample(&[(&path, manifest)])).into_iter().map(|f| f.message).collect()
    }

    #[test]
    fn only_earlier_crates_may_be_used() {
        assert!(messages("rlx", "[dependencies]\nrlx-graph.workspace = true\nserde = \"1\"\n").is_empty());
        assert_eq!(messages("rlx-graph", "[dependencies]\nrlx = { workspace = true }\n").len(), 1);
        assert_eq!(
            messages("rlx-graph", "[target.'cfg(unix)'.dependencies]\nrlx-graph.path = \".\"\n").len(),
            1
        );
        assert_eq!(messages("rlx-graph", "[dev-dependencies.rlx-models]\nworkspace = true\n").len(), 1);
    }

    #[test]
    fn kernels_know_no_graph_and_the_test_crate_is_for_tests() {
        assert!(
            messages("rlx-kernels", "[dependencies]\nrlx-graph.workspace = true\n")[0].contains("not graphs")
        );
        assert_eq!(messages("rlx", "[dependencies]\nrlx-conformance.workspace = true\n").len(), 1);
        assert!(messages("rlx", "[dev-dependencies]\nrlx-conformance.workspace = true\n").is_empty());
        assert_eq!(messages("rlx-conformance", "[dependencies]\nrlx.workspace = true\n").len(), 1);
    }

    #[test]
    fn a_new_crate_needs_a_place() {
        assert!(messages("rlx-extra", "")[0].contains("no place"));
    }
}
