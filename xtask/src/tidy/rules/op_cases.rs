//! An op is in the op list and has a case: a conformance file or entry of its name, or a test in its own file.

use super::{Finding, Tree};

/// One module per op.
pub const OPS_FOLDER: &str = "crates/rlx-graph/src/ops/";
const CASE_FOLDERS: &[&str] = &["crates/rlx-conformance/", "crates/rlx-graph/tests/"];

pub fn check(tree: &Tree) -> Vec<Finding> {
    let list = tree.module_file(OPS_FOLDER);
    let mut findings = Vec::new();
    for (stem, file) in tree.modules(OPS_FOLDER) {
        let mut report = |message: &str| {
            findings.push(Finding { subject: file.path.clone(), line: 0, message: message.to_string() });
        };
        if !list.is_some_and(|list| list.names(stem)) {
            report("the op list does not name it");
        }
        if !file.has_test() && !has_case(tree, stem) {
            report("no case: no conformance case of its name and no test of its own");
        }
    }
    findings
}

fn has_case(tree: &Tree, stem: &str) -> bool {
    let is_case = |path: &str| CASE_FOLDERS.iter().any(|folder| path.starts_with(folder));
    let own = format!("{OPS_FOLDER}{stem}/");
    let shared = format!("{OPS_FOLDER}tests.rs");
    tree.below(&own).any(|file| file.has_test())
        || tree.source(&shared).is_some_and(|file| file.names(stem))
        || tree.paths.iter().any(|path| is_case(path) && file_stem(path).starts_with(stem))
        || tree.sources.iter().any(|file| is_case(&file.path) && file.names(stem))
}

fn file_stem(path: &str) -> &str {
    let name = path.rsplit('/').next().unwrap_or(path);
    name.split('.').next().unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: (&str, &str) = ("crates/rlx-graph/src/ops.rs", "ops! { gelu, reduce, rope, silu, tanh }");

    fn op(stem: &str) -> String {
        format!("{OPS_FOLDER}{stem}.rs")
    }

    #[test]
    fn an_op_without_a_case_is_found() {
        let tree = Tree::sample(&[
            LIST,
            (&op("gelu"), "struct Gelu;"),
            (&op("rope"), "#[cfg(test)] mod tests { #[test] fn rotates() {} }"),
            (&op("silu"), "struct Silu;"),
            (&op("tanh"), "struct Tanh;"),
            ("crates/rlx-conformance/cases/silu_f32.txt", ""),
            (&op("reduce"), "struct Reduce;"),
            (&op("reduce/tests"), "#[test] fn sums() {}"),
            ("crates/rlx-conformance/src/lib.rs", "const CASES: &[&str] = &[\"tanh\"]; // gelu"),
        ]);
        let found = check(&tree);
        assert_eq!(found.iter().map(|f| f.subject.clone()).collect::<Vec<_>>(), [op("gelu")]);
    }

    #[test]
    fn an_op_outside_the_list_is_found() {
        let found = check(&Tree::sample(&[LIST, (&op("where_op"), "#[test] fn f() {}")]));
        assert!(found[0].message.contains("list"), "{found:?}");
    }
}
