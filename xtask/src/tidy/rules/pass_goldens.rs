//! A pass is in the pipeline and has a golden test: graph text before and after, beside the pass or in a file of
//! its name.

use super::super::lexer::Kind;
use super::super::source::SourceFile;
use super::{Finding, Tree};

const GRAPH: &str = "crates/rlx-graph/";
const PASSES_FOLDER: &str = "crates/rlx-graph/src/passes/";
const PIPELINE: &str = "pipeline";

pub fn check(tree: &Tree) -> Vec<Finding> {
    let pipeline = tree.source(&format!("{PASSES_FOLDER}{PIPELINE}.rs"));
    let mut findings = Vec::new();
    for (stem, file) in tree.modules(PASSES_FOLDER).into_iter().filter(|(stem, _)| *stem != PIPELINE) {
        let mut report = |message: &str| {
            findings.push(Finding { subject: file.path.clone(), line: 0, message: message.to_string() });
        };
        if !pipeline.is_some_and(|list| list.names(stem)) {
            report("passes/pipeline.rs does not name it");
        }
        let own = format!("{PASSES_FOLDER}{stem}/");
        let inside = || tree.below(&own).any(has_golden_beside);
        if !has_golden_beside(file) && !inside() && !has_golden_file(tree, stem) {
            report("no golden test: a test that quotes graph text before and after");
        }
    }
    findings
}

/// A test in the pass's file that quotes text of several lines or compares with a golden.
fn has_golden_beside(file: &SourceFile) -> bool {
    let start = if file.path.ends_with("/tests.rs") { 0 } else { file.test_start() };
    let mut inside = start..file.len();
    file.has_test()
        && inside.any(|at| match file.kind(at) {
            Some(Kind::Text) => file.word(at).contains('\n'),
            Some(Kind::Ident) => file.word(at).contains("golden") || file.word(at) == "assert_snapshot",
            _ => false,
        })
}

/// A test or data file of the graph crate, outside its sources or in a golden folder, that carries the pass's name.
fn has_golden_file(tree: &Tree, stem: &str) -> bool {
    tree.paths.iter().any(|path| {
        let in_tests = path.starts_with(GRAPH) && (!path.contains("/src/") || path.contains("/golden/"));
        let name = path.rsplit('/').next().unwrap_or(path);
        in_tests && name.split('.').next().is_some_and(|name| name.starts_with(stem))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(stem: &str) -> String {
        format!("{PASSES_FOLDER}{stem}.rs")
    }

    #[test]
    fn a_pass_without_a_golden_is_found() {
        let golden = "#[cfg(test)] mod tests { #[test] fn f() { rewrites(\"a\nb\", \"a\") } }";
        let tree = Tree::sample(&[
            (
                &pass("pipeline"),
                "const PASSES: &[Pass] = &[fold::PASS, cse::PASS, dce::PASS, fuse::PASS, legalize::PASS];",
            ),
            (&pass("fold"), "#[cfg(test)] mod tests { #[test] fn f() { assert_eq!(1, 1) } }"),
            (&pass("cse"), golden),
            (&pass("fuse"), "#[cfg(test)] mod tests;"),
            (&pass("fuse/tests"), "#[test] fn f() { rewrites(\"a\nb\", \"a\") }"),
            (&pass("dce"), "const A: &str = \"a\nb\";"),
            (&pass("legalize"), "struct L;"),
            ("crates/rlx-graph/tests/golden/legalize.txt", ""),
        ]);
        let found: Vec<_> = check(&tree).into_iter().map(|f| f.subject).collect();
        assert_eq!(found, [pass("fold"), pass("dce")]);
    }

    #[test]
    fn a_pass_outside_the_pipeline_is_found() {
        let source = "#[cfg(test)] mod tests { #[test] fn f() { golden(1) } }";
        let found = check(&Tree::sample(&[(&pass("pipeline"), ""), (&pass("fold"), source)]));
        assert!(found.len() == 1 && found[0].message.contains("pipeline"), "{found:?}");
    }
}
