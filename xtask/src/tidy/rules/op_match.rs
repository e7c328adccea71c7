//! No hand-written switch over ops: a `match` names at most 15 of them.
//!
//! Counted are patterns of enums whose name ends in `Op` or `OpKind` (also as `Self` in their own `impl`), and
//! text patterns that spell the stem of a file in the op folder. An op's own file may spell out its own kinds.

use std::collections::BTreeSet;

use super::super::lexer::Kind;
use super::super::source::SourceFile;
use super::op_cases::OPS_FOLDER;
use super::{Finding, Tree};

const LIMIT_OPS: usize = 15;

pub fn check(tree: &Tree) -> Vec<Finding> {
    let stems: BTreeSet<String> = tree.modules(OPS_FOLDER).iter().map(|(stem, _)| normalize(stem)).collect();
    tree.sources.iter().flat_map(|file| check_file(file, &stems)).collect()
}

fn check_file(file: &SourceFile, stems: &BTreeSet<String>) -> Vec<Finding> {
    let matches = (0..file.len()).filter(|&at| file.is_ident(at, "match"));
    let counts = matches.filter_map(|at| Some((at, ops_in_match(file, at, stems)?.len())));
    counts
        .filter(|(_, ops)| *ops > LIMIT_OPS)
        .map(|(at, ops)| Finding {
            subject: file.subject(at),
            line: file.line(at),
            message: format!(
                "match over {ops} ops, at most {LIMIT_OPS}; ask the op for a property or use a table"
            ),
        })
        .collect()
}

/// The distinct ops that the patterns of the match at `at` name.
fn ops_in_match(file: &SourceFile, at: usize, stems: &BTreeSet<String>) -> Option<BTreeSet<String>> {
    let open = file.next_brace(at + 1)?;
    let end = file.close(open)?;
    let self_is_op = impl_type_is_op(file, at);
    let mut ops = BTreeSet::new();
    let mut arm = open + 1;
    while arm < end {
        let arrow = arrow_after(file, arm, end)?;
        ops.extend((arm..arrow).filter_map(|here| op_named(file, here, self_is_op, stems)));
        arm = after_arm(file, arrow + 2, end);
    }
    Some(ops)
}

/// The first `=>` from `from` on that is in no group.
fn arrow_after(file: &SourceFile, from: usize, end: usize) -> Option<usize> {
    let mut at = from;
    while at < end {
        if file.reads(at, &["=", ">"]) {
            return Some(at);
        }
        at = file.close(at).unwrap_or(at) + 1;
    }
    None
}

fn after_arm(file: &SourceFile, from: usize, end: usize) -> usize {
    let mut at = from;
    while at < end {
        if file.word(at) == "," {
            return at + 1;
        }
        let block = at == from && file.word(at) == "{";
        at = file.close(at).unwrap_or(at) + 1;
        if block {
            return if file.word(at) == "," { at + 1 } else { at };
        }
    }
    end
}

fn op_named(file: &SourceFile, at: usize, self_is_op: bool, stems: &BTreeSet<String>) -> Option<String> {
    if file.kind(at) == Some(Kind::Text) {
        let spelled = normalize(file.word(at));
        return stems.contains(&spelled).then_some(spelled);
    }
    let is_path = file.reads(at + 1, &[":", ":"]) && file.kind(at + 3) == Some(Kind::Ident);
    let is_op = (is_op_type(file.word(at)) && !is_own_kind(file, file.word(at)))
        || (self_is_op && file.word(at) == "Self");
    (is_path && is_op).then(|| file.word(at + 3).to_string())
}

fn is_own_kind(file: &SourceFile, name: &str) -> bool {
    file.path.starts_with(OPS_FOLDER) && file.find(&["enum", name]).next().is_some()
}

fn is_op_type(name: &str) -> bool {
    name.ends_with("Op") || name.ends_with("OpKind")
}

fn impl_type_is_op(file: &SourceFile, at: usize) -> bool {
    let impls = (0..at).rev().filter(|&start| file.is_ident(start, "impl"));
    let headers = impls.filter_map(|start| Some((start, file.next_brace(start)?)));
    let mut around =
        headers.filter(|&(_, open)| file.close(open).is_some_and(|close| open < at && at < close));
    around.next().is_some_and(|(start, open)| {
        (start..open).any(|here| is_op_type(file.word(here)) && !is_own_kind(file, file.word(here)))
    })
}

fn normalize(name: &str) -> String {
    name.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subjects(source: &str) -> Vec<String> {
        check(&Tree::sample(&[("a.rs", source)])).into_iter().map(|f| f.subject).collect()
    }

    fn arms(count: usize, pattern: impl Fn(usize) -> String) -> String {
        (0..count).map(|i| format!("{} => {{ f(a, b) }}\n", pattern(i))).collect()
    }

    #[test]
    fn a_long_match_over_ops_is_found_and_a_short_one_is_not() {
        let of = |count| {
            format!(
                "fn f() {{ match op {{ {} _ => g(1, 2), }} }}",
                arms(count, |i| format!("Op::V{i}(x, y)"))
            )
        };
        assert_eq!(subjects(&of(16)), ["a.rs::f"]);
        assert!(subjects(&of(15)).is_empty());
    }

    #[test]
    fn or_patterns_and_self_count() {
        let variants: Vec<String> = (0..16).map(|i| format!("Self::V{i}")).collect();
        let source = |name: &str| {
            format!("impl {name} {{ fn f(self) {{ match self {{ {} => 1 }} }} }}", variants.join(" | "))
        };
        assert_eq!(subjects(&source("BinaryOp")), ["a.rs::f"]);
        assert!(subjects(&source("Color")).is_empty());
    }

    #[test]
    fn an_op_file_may_spell_out_its_own_kinds() {
        let code = format!(
            "enum UnaryOp {{}} fn f() {{ match op {{ {} }} }}",
            arms(20, |i| format!("UnaryOp::V{i}"))
        );
        let own = format!("{OPS_FOLDER}unary.rs");
        let found = check(&Tree::sample(&[(&own, &code), ("crates/rlx/src/a.rs", &code)]));
        assert_eq!(found.iter().map(|f| f.subject.as_str()).collect::<Vec<_>>(), ["crates/rlx/src/a.rs::f"]);
    }

    #[test]
    fn op_names_as_text_count_and_arm_bodies_do_not() {
        let files: Vec<(String, String)> =
            (0..16).map(|i| (format!("{OPS_FOLDER}op_{i}.rs"), String::new())).collect();
        let by_name = format!("fn f() {{ match name {{ {} _ => 0 }} }}", arms(16, |i| format!("\"Op{i}\"")));
        let bodies: String = (0..16).map(|i| format!("{i} => Op::V{i},\n")).collect();
        let by_number = format!("fn g() {{ match n {{ {bodies} _ => Op::X }} }}");
        let mut tree: Vec<(&str, &str)> =
            files.iter().map(|(path, text)| (path.as_str(), text.as_str())).collect();
        tree.extend([("a.rs", by_name.as_str()), ("b.rs", by_number.as_str())]);
        let found: Vec<_> = check(&Tree::sample(&tree)).into_iter().map(|f| f.subject).collect();
        assert_eq!(found, ["a.rs::f"]);
    }
}
