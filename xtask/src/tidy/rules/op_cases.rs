//! An op is in the op list and has a case: a conformance file or entry of its name, or a test in its own file.

use super::super::lexer::Kind;
use super::super::source::SourceFile;
use super::{Finding, Tree};

/// One module per op.
pub const OPS_FOLDER: &str = "crates/rlx-graph/src/ops/";
const CONFORMANCE: &str = "crates/rlx-conformance/";

pub fn check(tree: &Tree) -> Vec<Finding> {
    let list = tree.source(&format!("{OPS_FOLDER}mod.rs"));
    let mut findings = Vec::new();
    for (stem, file) in tree.modules(OPS_FOLDER) {
        let mut report = |message: &str| {
            findings.push(Finding { subject: file.path.clone(), line: 0, message: message.to_string() });
        };
        if !list.is_some_and(|list| (0..list.len()).any(|at| list.is_ident(at, stem))) {
            report("the op list in ops/mod.rs does not name it");
        }
        if !file.has_test() && !has_conformance_case(tree, stem) {
            report("no conformance case of its name and no test in its file");
        }
    }
    findings
}

fn has_conformance_case(tree: &Tree, stem: &str) -> bool {
    let named = |path: &&String| path.starts_with(CONFORMANCE) && file_stem(path).starts_with(stem);
    tree.paths.iter().any(|path| named(&path))
        || tree.sources.iter().any(|file| file.path.starts_with(CONFORMANCE) && quotes(file, stem))
}

fn quotes(file: &SourceFile, stem: &str) -> bool {
    (0..file.len()).any(|at| {
        let word = file.word(at);
        match file.kind(at) {
            Some(Kind::Ident) => word == stem,
            Some(Kind::Text) => word.trim_matches(|c| c == '"' || c == 'b') == stem,
            _ => false,
        }
    })
}

fn file_stem(path: &str) -> &str {
    let name = path.rsplit('/').next().unwrap_or(path);
    name.split('.').next().unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: (&str, &str) = ("crates/rlx-graph/src/ops/mod.rs", "ops! { gelu, rope, silu, tanh }");

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
