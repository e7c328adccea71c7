//! No unfinished code: `todo!`, `unimplemented!`, `dbg!`.

use super::{Finding, Tree};

const MACROS: &[&str] = &["todo", "unimplemented", "dbg"];

pub fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in &tree.sources {
        for at in (0..file.len()).filter(|&at| file.word(at + 1) == "!" && MACROS.contains(&file.word(at))) {
            let message = format!("`{}!` left in the code", file.word(at));
            findings.push(Finding { subject: file.subject(at), line: file.line(at), message });
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macros_are_found_and_names_are_not() {
        let tree = Tree::sample(&[(
            "a.rs",
            "fn f() { todo!() }\nfn todo() { todo; dbg ! (1); \"unimplemented!\" }",
        )]);
        assert_eq!(check(&tree).iter().map(|f| f.line).collect::<Vec<_>>(), [1, 2]);
    }
}
