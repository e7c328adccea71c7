//! `cargo xtask soak`: faults in numbers that CI has no time for. A slice of each runs with the tests.

use std::process::Command;

use crate::config::Config;
use crate::process;

/// The variable of a fault's count, and how often it is made.
const COUNTS: [(&str, &str); 4] = [
    ("RLX_TEST_AOT_KILLS", "1000"),
    ("RLX_TEST_AOT_FULL", "200"),
    ("RLX_TEST_AOT_FLIPS", "10000"),
    ("RLX_TEST_AOT_HEADERS", "100000"),
];

/// Runs the fault tests of compiled files.
pub fn run(config: &Config, _args: &[String]) -> Result<(), String> {
    let args = ["test", "--release", "--locked", "-p", "rlx", "--test", "aot_faults", "--", "--nocapture"];
    let mut command: Command = process::command("cargo", &args, &config.root);
    process::run(command.envs(COUNTS))
}
