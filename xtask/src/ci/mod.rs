//! `cargo xtask ci` and `cargo xtask test`: the stages in order, then a table of what each took.

mod budget;
mod stages;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::config::Config;
use crate::{debian, minilm, vulkan, web};
use budget::Budgets;
pub use stages::FEATURES;
use stages::STAGES;

/// What a stage runs with.
pub struct Run<'a> {
    pub config: &'a Config,
    pub quick: bool,
    /// The folder of the real MiniLM, handed to tests as `RLX_TEST_MINILM_DIR`.
    pub minilm_dir: Option<PathBuf>,
}

struct Outcome {
    name: &'static str,
    took: Duration,
    error: Option<String>,
}

/// `ci [--quick]` with the models that are already there.
pub fn run(config: &Config, args: &[String]) -> Result<(), String> {
    let quick = match args {
        [] => false,
        [flag] if flag == "--quick" => true,
        _ => return Err(format!("ci takes `--quick` or nothing, not `{}`", args.join(" "))),
    };
    let minilm_dir = config.minilm_dir.clone().or_else(|| minilm::find(&config.root));
    if minilm_dir.is_none() && !quick {
        println!("note: the real MiniLM is not installed; `cargo xtask test` installs it");
    }
    run_stages(&Run { config, quick, minilm_dir })
}

/// `test`: full CI after installing the real MiniLM into `.venv`, a Vulkan driver and a browser.
pub fn run_installing(config: &Config, args: &[String]) -> Result<(), String> {
    if let Some(unknown) = args.first() {
        return Err(format!("test takes no argument `{unknown}`"));
    }
    let minilm_dir = match &config.minilm_dir {
        Some(folder) => folder.clone(),
        None => minilm::install(&config.root)?,
    };
    let packages = [vulkan::missing(), web::missing(&config.root)].concat();
    debian::install(&config.root, &packages)?;
    run_stages(&Run { config, quick: false, minilm_dir: Some(minilm_dir) })
}

fn run_stages(run: &Run) -> Result<(), String> {
    let budgets = Budgets::read(&run.config.root)?;
    let mut outcomes = Vec::new();
    for stage in STAGES.iter().filter(|stage| stage.quick || !run.quick) {
        println!("\n== {}", stage.name);
        let started = Instant::now();
        let error = (stage.run)(run).err();
        let took = started.elapsed();
        let error = error.or_else(|| budgets.over(stage.name, took).filter(|_| run.config.in_ci));
        if let Some(error) = &error {
            println!("error: {error}");
        }
        outcomes.push(Outcome { name: stage.name, took, error });
    }
    print!("\n{}", table(&outcomes, &budgets));
    let failed: Vec<&str> = outcomes.iter().filter(|o| o.error.is_some()).map(|o| o.name).collect();
    if failed.is_empty() { Ok(()) } else { Err(format!("failed: {}", failed.join(", "))) }
}

fn table(outcomes: &[Outcome], budgets: &Budgets) -> String {
    let mut text = format!("{:<10} {:>9} {:>9}\n", "stage", "seconds", "budget");
    for Outcome { name, took, error } in outcomes {
        let budget = budgets.of(name).map_or_else(String::new, |limit| format!("{:.0}", limit.as_secs_f64()));
        let verdict = match error {
            Some(_) => "FAILED",
            None if budgets.of(name).is_some_and(|limit| *took > limit) => "slow",
            None => "ok",
        };
        text.push_str(&format!("{name:<10} {:>9.1} {budget:>9} {verdict}\n", took.as_secs_f64()));
    }
    let total: Duration = outcomes.iter().map(|outcome| outcome.took).sum();
    text.push_str(&format!("{:<10} {:>9.1}\n", "total", total.as_secs_f64()));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stage_has_a_budget_and_every_budget_a_stage() {
        let budgets = Budgets::parse(include_str!("../../stage-minutes.txt")).unwrap();
        let mut names: Vec<&str> = STAGES.iter().map(|stage| stage.name).collect();
        names.sort_unstable();
        assert_eq!(names, budgets.names());
    }

    #[test]
    fn full_ci_is_budgeted_below_half_an_hour() {
        let budgets = Budgets::parse(include_str!("../../stage-minutes.txt")).unwrap();
        let total: Duration = STAGES.iter().filter_map(|stage| budgets.of(stage.name)).sum();
        assert!(total <= Duration::from_secs(30 * 60), "{total:?}");
    }

    #[test]
    fn the_table_tells_ok_from_slow_from_failed() {
        let budgets = Budgets::parse("a 1\nb 1\nc 1").unwrap();
        let outcome = |name, seconds, error| Outcome { name, took: Duration::from_secs(seconds), error };
        let rows = [outcome("a", 59, None), outcome("b", 61, None), outcome("c", 1, Some("x".into()))];
        let text = table(&rows, &budgets);
        let verdicts: Vec<_> =
            text.lines().skip(1).filter_map(|line| line.split_whitespace().nth(3)).collect();
        assert_eq!(verdicts, ["ok", "slow", "FAILED"]);
    }
}
