//! The rules, one file each. A rule reads the tree and returns what breaks it.

mod allow_attribute;
mod crate_direction;
mod duplication;
mod env_var;
mod links;
mod long_file;
mod long_function;
mod machine_paths;
mod op_cases;
mod op_match;
mod pass_goldens;
mod unfinished;
mod unsafe_address;

use super::Finding;
use super::source::SourceFile;
use super::tree::Tree;

pub struct Rule {
    pub name: &'static str,
    pub check: fn(&Tree) -> Vec<Finding>,
}

/// Every rule; the order is the order of the report.
pub const RULES: &[Rule] = &[
    Rule { name: "long_function", check: long_function::check },
    Rule { name: "long_file", check: long_file::check },
    Rule { name: "op_match", check: op_match::check },
    Rule { name: "op_cases", check: op_cases::check },
    Rule { name: "pass_goldens", check: pass_goldens::check },
    Rule { name: "unsafe_address", check: unsafe_address::check },
    Rule { name: "env_var", check: env_var::check },
    Rule { name: "allow_attribute", check: allow_attribute::check },
    Rule { name: "duplication", check: duplication::check },
    Rule { name: "crate_direction", check: crate_direction::check },
    Rule { name: "unfinished", check: unfinished::check },
    Rule { name: "machine_paths", check: machine_paths::check },
    Rule { name: "links", check: links::check },
];

/// Lines of a file on which code starts.
pub fn code_lines_of(file: &SourceFile) -> usize {
    file.code_lines(0..file.len()).len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = RULES.iter().map(|rule| rule.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), RULES.len());
    }
}
