//! `xtask/stage-minutes.txt`: how long a stage may take on two cores, `name minutes` a line.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

const FILE: &str = "xtask/stage-minutes.txt";
/// Beyond the budget a stage is reported; beyond this many budgets it fails.
const FAIL_AT: f64 = 1.5;

pub struct Budgets(BTreeMap<String, Duration>);

impl Budgets {
    pub fn read(root: &Path) -> Result<Budgets, String> {
        let text =
            std::fs::read_to_string(root.join(FILE)).map_err(|e| format!("cannot read {FILE}: {e}"))?;
        Budgets::parse(&text)
    }

    pub fn parse(text: &str) -> Result<Budgets, String> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let rows = lines.map(|line| {
            let (name, minutes) =
                line.split_once(' ').ok_or_else(|| format!("{FILE}: expected minutes in `{line}`"))?;
            let minutes: f64 =
                minutes.trim().parse().map_err(|_| format!("{FILE}: no number in `{line}`"))?;
            let budget =
                Duration::try_from_secs_f64(60.0 * minutes).map_err(|e| format!("{FILE}: `{line}`: {e}"))?;
            Ok((name.to_string(), budget))
        });
        rows.collect::<Result<_, String>>().map(Budgets)
    }

    pub fn of(&self, stage: &str) -> Option<Duration> {
        self.0.get(stage).copied()
    }

    /// The error of a stage that took more than 1.5 budgets.
    pub fn over(&self, stage: &str, took: Duration) -> Option<String> {
        let budget = self.of(stage)?;
        let is_over = took > budget.mul_f64(FAIL_AT);
        is_over.then(|| format!("{stage} took {took:.0?}, over {FAIL_AT} times its {budget:.0?}"))
    }

    #[cfg(test)]
    pub fn names(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_fails_at_one_and_a_half_budgets() {
        let budgets = Budgets::parse("# stage minutes\n\ntests 2").unwrap();
        assert!(budgets.over("tests", Duration::from_secs(180)).is_none());
        assert!(budgets.over("tests", Duration::from_secs(181)).is_some());
        assert!(budgets.over("other", Duration::MAX).is_none());
    }

    #[test]
    fn a_line_that_does_not_parse_is_an_error() {
        for text in ["tests", "tests two", "tests -1"] {
            assert!(Budgets::parse(text).is_err(), "{text}");
        }
    }
}
