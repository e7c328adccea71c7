//! A relative link in a Markdown page points at a file or folder of the repository.

use super::{Finding, Tree};

pub fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for page in tree.texts.iter().filter(|file| file.path.ends_with(".md")) {
        for (at, line) in page.text.lines().enumerate() {
            for target in targets(line).filter(|target| !resolves(tree, &page.path, target)) {
                let message = format!("link to `{target}`, which is not there");
                findings.push(Finding { subject: page.path.clone(), line: at + 1, message });
            }
        }
    }
    findings
}

/// The relative link targets of a line, without their `#fragment`.
fn targets(line: &str) -> impl Iterator<Item = &str> {
    let after = line.split("](").skip(1);
    let inside = after.filter_map(|rest| rest.split(')').next());
    let files = inside.map(|target| target.split('#').next().unwrap_or(target));
    files.filter(|target| !target.is_empty() && !target.contains(':') && !target.contains(' '))
}

fn resolves(tree: &Tree, page: &str, target: &str) -> bool {
    let folder = page.rsplit_once('/').map_or("", |(folder, _)| folder);
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                if parts.pop().is_none() {
                    return false;
                }
            }
            _ => parts.push(part),
        }
    }
    let path = parts.join("/");
    let inside = format!("{path}/");
    path.is_empty()
        || tree.paths.contains(&path)
        || tree.paths.range(inside.clone()..).next().is_some_and(|found| found.starts_with(&inside))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_links_are_found() {
        let page = "[a](../README.md#top) [b](add-a-pass.md)\n[c](gone.md) [d](https://example.org/x.md) [e](../src) [f](#here)";
        let tree = Tree::sample(&[
            ("docs/a.md", page),
            ("README.md", ""),
            ("docs/add-a-pass.md", ""),
            ("src/a.rs", ""),
        ]);
        let found = check(&tree);
        assert_eq!(found.iter().map(|f| f.line).collect::<Vec<_>>(), [2]);
        assert!(found[0].message.contains("gone.md"));
    }
}
