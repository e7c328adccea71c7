//! A lint is silenced with `#[expect(.., reason = "..")]`, never with `allow`, and never without the reason.

use super::super::source::SourceFile;
use super::{Finding, Tree};

pub fn check(tree: &Tree) -> Vec<Finding> {
    tree.sources.iter().flat_map(check_file).collect()
}

fn check_file(file: &SourceFile) -> Vec<Finding> {
    let mut findings = Vec::new();
    for start in (0..file.len()).filter(|&at| file.word(at) == "#") {
        let open = if file.word(start + 1) == "!" { start + 2 } else { start + 1 };
        let Some(close) = file.close(open).filter(|_| file.word(open) == "[") else { continue };
        for at in open..close {
            let Some(end) = file.close(at + 1).filter(|_| file.word(at + 1) == "(") else { continue };
            let message = match file.word(at) {
                "allow" => "`allow` attribute; use `#[expect(.., reason = \"..\")]`",
                "expect" if !(at..end).any(|inside| file.is_ident(inside, "reason")) => {
                    "`expect` without a reason"
                }
                _ => continue,
            };
            let subject = file.subject(at);
            findings.push(Finding { subject, line: file.line(at), message: message.to_string() });
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(source: &str) -> usize {
        check(&Tree::sample(&[("a.rs", source)])).len()
    }

    #[test]
    fn allow_is_found_in_every_form() {
        assert_eq!(count("#[allow(dead_code)] fn f() {}"), 1);
        assert_eq!(count("#![allow(dead_code)]"), 1);
        assert_eq!(count("#[cfg_attr(test, allow(dead_code))] fn f() {}"), 1);
    }

    #[test]
    fn expect_needs_a_reason() {
        assert_eq!(count("#[expect(dead_code)] fn f() {}"), 1);
        assert_eq!(count("#[expect(dead_code, reason = \"read by C\")] fn f() { x.expect(\"y\") }"), 0);
    }
}
