//! A file holds at most 900 lines of code.

use super::{Finding, Tree, code_lines_of};

const LIMIT_LINES: usize = 900;

pub fn check(tree: &Tree) -> Vec<Finding> {
    let lengths = tree.sources.iter().map(|file| (file, code_lines_of(file)));
    let long = lengths.filter(|(_, lines)| *lines > LIMIT_LINES);
    long.map(|(file, lines)| Finding {
        subject: file.path.clone(),
        line: 0,
        message: format!("{lines} code lines, at most {LIMIT_LINES}; split it by what a reader looks for"),
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_counts_and_comments_do_not() {
        let long = "const A: u8 = 0;\n".repeat(LIMIT_LINES + 1);
        let commented = "// a comment\n\n".repeat(LIMIT_LINES + 1);
        let found = check(&Tree::sample(&[("a.rs", &long), ("b.rs", &commented)]));
        assert_eq!(found.iter().map(|f| f.subject.as_str()).collect::<Vec<_>>(), ["a.rs"]);
    }
}
