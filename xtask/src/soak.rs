//! `cargo xtask soak`: faults in numbers that CI has no time for. A slice of each runs with the tests.

use std::fs;
use std::path::Path;
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

/// Runs the fault tests of compiled files, then a model in control groups too small for it.
pub fn run(config: &Config, _args: &[String]) -> Result<(), String> {
    let args = ["test", "--release", "--locked", "-p", "rlx", "--test", "aot_faults", "--", "--nocapture"];
    let mut command: Command = process::command("cargo", &args, &config.root);
    process::run(command.envs(COUNTS))?;
    process::run(&mut process::command("cargo", &["build", "--release", "--locked"], &config.root))?;
    control_groups(&config.root)
}

/// Where a group's files are: version 1, version 2, and the name of its limit.
const GROUPS: [(&str, &str); 2] =
    [("/sys/fs/cgroup/memory/rlx-soak", "memory.limit_in_bytes"), ("/sys/fs/cgroup/rlx-soak", "memory.max")];

/// Limits in MiB, from what the program itself needs to more than the demo model does.
const LIMITS: [u64; 8] = [6, 7, 8, 9, 12, 16, 32, 256];

/// Under a limit below the need, loading is refused with numbers: it never ends by a signal.
fn control_groups(root: &Path) -> Result<(), String> {
    let (group, limit_file) = GROUPS
        .into_iter()
        .map(|(group, file)| (Path::new(group), file))
        .find(|(group, file)| fs::create_dir_all(group).is_ok() && group.join(file).exists())
        .ok_or("no control group for memory can be made here; run this as root on a machine that has one")?;
    let outcome = in_group(root, group, limit_file);
    let removed = fs::remove_dir(group).map_err(|error| format!("{}: {error}", group.display()));
    outcome.and(removed)
}

fn in_group(root: &Path, group: &Path, limit_file: &str) -> Result<(), String> {
    let (mut refused, mut done) = (0, 0);
    for (limit, cache) in LIMITS.into_iter().flat_map(|limit| [(limit, "0"), (limit, "1GiB")]) {
        let file = group.join(limit_file);
        fs::write(&file, (limit << 20).to_string())
            .map_err(|error| format!("{}: {error}", file.display()))?;
        let enter =
            format!("echo $$ > {}/cgroup.procs && exec target/release/rlx generate -n 2", group.display());
        let mut command = process::command("sh", &["-c", &enter], root);
        let output =
            command.env("RLX_CACHE_BYTES", cache).output().map_err(|error| format!("sh: {error}"))?;
        let told = String::from_utf8_lossy(&output.stderr);
        match output.status.code() {
            Some(0) => done += 1,
            Some(1) if told.contains("than the budget of") => refused += 1,
            _ => return Err(format!("{limit} MiB, cache {cache}: {}: {told}", output.status)),
        }
    }
    println!("control groups: {refused} refused, {done} ran, none ended by a signal");
    if refused == 0 || done == 0 {
        return Err("the limits met only one of both outcomes".to_owned());
    }
    Ok(())
}
