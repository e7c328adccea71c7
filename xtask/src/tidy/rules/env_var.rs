//! The environment is read in `config.rs` files only; tests may read `RLX_TEST_*`.

use super::super::source::SourceFile;
use super::{Finding, Tree};

const READERS: &[&str] = &["var", "var_os", "vars", "vars_os", "set_var", "remove_var"];
const TEST_PREFIX: &str = "\"RLX_TEST_";

pub fn check(tree: &Tree) -> Vec<Finding> {
    let elsewhere = tree.sources.iter().filter(|file| !file.path.ends_with("/config.rs"));
    elsewhere.flat_map(check_file).collect()
}

fn check_file(file: &SourceFile) -> Vec<Finding> {
    let paths = file.find(&["env", ":", ":"]).filter(|&at| reads_environment(file, at + 3));
    paths
        .map(|at| Finding {
            subject: file.subject(at),
            line: file.line(at),
            message: "environment read outside config.rs; declare a setting there".to_string(),
        })
        .collect()
}

fn reads_environment(file: &SourceFile, at: usize) -> bool {
    let imported = || (at..file.close(at).unwrap_or(at)).any(|inside| READERS.contains(&file.word(inside)));
    let is_test = file.word(at + 1) == "(" && file.word(at + 2).starts_with(TEST_PREFIX);
    (READERS.contains(&file.word(at)) && !is_test) || (file.word(at) == "{" && imported())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_outside_config_are_found() {
        let tree = Tree::sample(&[
            ("crates/rlx/src/config.rs", "fn f() { std::env::var(\"A\"); }"),
            ("crates/rlx/src/a.rs", "fn f() { std::env::var(\"A\"); }"),
            ("crates/rlx/src/b.rs", "use std::env::{self, var_os};"),
            ("crates/rlx/tests/c.rs", "fn f() { std::env::var_os(\"RLX_TEST_MODEL_DIR\"); }"),
            ("crates/rlx/src/d.rs", "fn f() { std::env::args(); env!(\"CARGO_PKG_VERSION\"); }"),
        ]);
        let found: Vec<_> = check(&tree).into_iter().map(|f| f.subject).collect();
        assert_eq!(found, ["crates/rlx/src/a.rs::f", "crates/rlx/src/b.rs"]);
    }
}
