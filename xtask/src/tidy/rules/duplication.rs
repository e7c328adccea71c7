//! Copied code: lines that lie in a window of 12 code lines found elsewhere too are at most 3% of all code lines.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::super::source::SourceFile;
use super::{Finding, Tree};

const WINDOW_LINES: usize = 12;
const LIMIT_PERCENT: f64 = 3.0;
/// Where the report names the worst pairs, how many.
const SHOWN_PAIRS: usize = 8;

pub fn check(tree: &Tree) -> Vec<Finding> {
    let copies = find_copies(&tree.sources);
    let percent = 100.0 * copies.lines as f64 / copies.total_lines.max(1) as f64;
    if percent <= LIMIT_PERCENT {
        return Vec::new();
    }
    let mut pairs: Vec<_> = copies.pairs.into_iter().collect();
    pairs.sort_by_key(|(_, lines)| std::cmp::Reverse(*lines));
    let worst = pairs.iter().take(SHOWN_PAIRS);
    let worst: String = worst.map(|((a, b), lines)| format!("\n  {lines} lines: {a} and {b}")).collect();
    let message = format!("{percent:.1}% of code lines are copies, at most {LIMIT_PERCENT}%{worst}");
    vec![Finding { subject: "workspace".to_string(), line: 0, message }]
}

struct Copies {
    total_lines: usize,
    /// Code lines inside a window that occurred before.
    lines: usize,
    /// Copied lines by (earlier, later) place.
    pairs: BTreeMap<(String, String), usize>,
}

fn find_copies(files: &[SourceFile]) -> Copies {
    let mut copies = Copies { total_lines: 0, lines: 0, pairs: BTreeMap::new() };
    let mut seen: HashMap<Vec<&str>, (usize, usize)> = HashMap::new();
    for (index, file) in files.iter().enumerate() {
        let text: Vec<&str> = file.text().lines().collect();
        let numbers: Vec<usize> = file.code_lines(0..file.len()).into_iter().collect();
        let code: Vec<&str> = numbers.iter().map(|line| text[line - 1].trim()).collect();
        let mut copied = BTreeSet::new();
        for (start, window) in code.windows(WINDOW_LINES).enumerate() {
            let first = *seen.entry(window.to_vec()).or_insert((index, start));
            if first != (index, start) && !(first.0 == index && first.1 + WINDOW_LINES > start) {
                let fresh = (start..start + WINDOW_LINES).filter(|line| copied.insert(*line)).count();
                let pair = (files[first.0].path.clone(), file.path.clone());
                *copies.pairs.entry(pair).or_default() += fresh;
            }
        }
        copies.total_lines += code.len();
        copies.lines += copied.len();
    }
    copies
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(from: usize, count: usize) -> String {
        (from..from + count).map(|i| format!("step({i});\n")).collect()
    }

    #[test]
    fn a_copied_file_is_found_whatever_its_indent_and_comments() {
        let copy: String =
            lines(0, 100).lines().map(|line| format!("    {line}\n\n// a comment\n")).collect();
        let found = check(&Tree::sample(&[("a.rs", &lines(0, 100)), ("b.rs", &copy)]));
        assert!(
            found[0].message.contains("50.0%") && found[0].message.contains("a.rs and b.rs"),
            "{found:?}"
        );
    }

    #[test]
    fn eleven_equal_lines_and_three_percent_pass() {
        let b = format!("{}{}", lines(0, 11), lines(1000, 20));
        assert!(check(&Tree::sample(&[("a.rs", &lines(0, 20)), ("b.rs", &b)])).is_empty());
        let c = format!("{}{}", lines(0, 12), lines(1000, 400));
        assert!(check(&Tree::sample(&[("a.rs", &lines(0, 20)), ("c.rs", &c)])).is_empty());
    }
}
