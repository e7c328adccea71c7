//! No text of the repository names a machine's folders or a package registry's host.

use super::{Finding, Tree};

const FOLDERS: &[&str] = &["/work/", "/root/", "/home/", "/Users/", "/mnt/", "/opt/wheels"];
const HOSTS: &[&str] =
    &["pypi.org", "pythonhosted.org", "index.crates.io", "static.crates.io", "npmjs.org", "proxy.golang.org"];
/// Written by cargo; its sources are checked by `cargo xtask deny`.
const GENERATED: &[&str] = &["Cargo.lock"];

pub fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in tree.texts.iter().filter(|file| !GENERATED.contains(&file.path.as_str())) {
        for (at, line) in file.text.lines().enumerate() {
            let folder = FOLDERS.iter().find(|folder| starts_a_path(line, folder));
            let host = HOSTS.iter().find(|host| line.contains(**host));
            if let Some(word) = folder.or(host) {
                let message = format!("names `{word}`");
                findings.push(Finding { subject: file.path.clone(), line: at + 1, message });
            }
        }
    }
    findings
}

/// Whether `folder` stands in the line as an absolute path, not inside a longer one or an address.
fn starts_a_path(line: &str, folder: &str) -> bool {
    line.match_indices(folder).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || matches!(c, '.' | '_' | '-' | '/' | '~' | '}' | '$'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<usize> {
        check(&Tree::sample(&[("a.md", text)])).iter().map(|f| f.line).collect()
    }

    #[test]
    fn absolute_paths_and_hosts_are_found() {
        assert_eq!(lines("see `/root/x`\nin /work/main\nfrom https://pypi.org/simple"), [1, 2, 3]);
    }

    #[test]
    fn relative_paths_are_fine() {
        assert_eq!(
            lines("crates/work/a\n../home/b\nhttps://example.org/home/x\n$HOME/work/a"),
            Vec::<usize>::new()
        );
    }
}
