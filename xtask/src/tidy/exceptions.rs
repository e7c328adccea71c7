//! `xtask/tidy-exceptions.txt`: one line an exception, `rule | subject | reason`.

use std::fmt::Write as _;
use std::path::Path;

use super::rules::RULES;

const FILE: &str = "xtask/tidy-exceptions.txt";

struct Exception {
    rule: String,
    subject: String,
    reason: String,
    used: bool,
}

pub struct Exceptions(Vec<Exception>);

impl Exceptions {
    pub fn read(root: &Path) -> Result<Exceptions, String> {
        let text =
            std::fs::read_to_string(root.join(FILE)).map_err(|e| format!("cannot read {FILE}: {e}"))?;
        Exceptions::parse(&text)
    }

    /// Blank lines and lines that start with `#` are skipped; an unknown rule or an empty reason is an error.
    pub fn parse(text: &str) -> Result<Exceptions, String> {
        let lines = text.lines().enumerate().map(|(at, line)| (at + 1, line.trim()));
        let entries = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
        entries.map(|(at, line)| parse_line(at, line)).collect::<Result<_, _>>().map(Exceptions)
    }

    /// Whether an exception covers this finding; it then counts as used.
    pub fn cover(&mut self, rule: &str, subject: &str) -> bool {
        let entry = self.0.iter_mut().find(|entry| entry.rule == rule && entry.subject == subject);
        entry.map(|entry| entry.used = true).is_some()
    }

    pub fn unused(&self) -> Vec<String> {
        let unused = self.0.iter().filter(|entry| !entry.used);
        unused.map(|entry| format!("{} | {}", entry.rule, entry.subject)).collect()
    }

    pub fn listing(&self) -> String {
        let mut text = format!("exceptions: {}\n", self.0.len());
        for Exception { rule, subject, reason, .. } in &self.0 {
            let _ = writeln!(text, "  {rule}: {subject}: {reason}");
        }
        text
    }
}

fn parse_line(at: usize, line: &str) -> Result<Exception, String> {
    let fields: Vec<&str> = line.splitn(3, '|').map(str::trim).collect();
    let [rule, subject, reason] = fields[..] else {
        return Err(format!("{FILE}:{at}: expected `rule | subject | reason`"));
    };
    if !RULES.iter().any(|known| known.name == rule) {
        return Err(format!("{FILE}:{at}: no rule named `{rule}`"));
    }
    if subject.is_empty() || reason.is_empty() {
        return Err(format!("{FILE}:{at}: subject and reason must not be empty"));
    }
    Ok(Exception { rule: rule.into(), subject: subject.into(), reason: reason.into(), used: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exception_covers_its_subject_only_and_unused_ones_are_listed() {
        let mut entries =
            Exceptions::parse("# c\n\nlong_file | a.rs | a table\nlong_file | b.rs | one | two").unwrap();
        assert!(entries.cover("long_file", "a.rs"));
        assert!(!entries.cover("long_function", "a.rs") && !entries.cover("long_file", "c.rs"));
        assert_eq!(entries.unused(), ["long_file | b.rs"]);
        assert!(entries.listing().contains("a table"));
    }

    #[test]
    fn a_line_without_reason_or_with_an_unknown_rule_is_refused() {
        for text in ["long_file | a.rs", "long_file | a.rs | ", "long_fiel | a.rs | a table"] {
            assert!(Exceptions::parse(text).is_err(), "{text}");
        }
    }
}
