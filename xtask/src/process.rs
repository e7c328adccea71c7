//! Child processes: no standard input, the command printed before it runs, a missing program named.

use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// A command of `program` in `folder`, without standard input.
pub fn command(program: &str, args: &[&str], folder: &Path) -> Command {
    let mut command = Command::new(program);
    command.args(args).current_dir(folder).stdin(Stdio::null());
    command
}

/// Runs to the end with output passed through; an exit status other than 0 is an error.
pub fn run(command: &mut Command) -> Result<(), String> {
    let line = line_of(command);
    println!("$ {line}");
    let status = command.status().map_err(|e| start_error(command, &e))?;
    if status.success() { Ok(()) } else { Err(format!("`{line}` ended with {status}")) }
}

/// Runs to the end and returns standard output; an exit status other than 0 is an error with standard error in it.
pub fn capture(command: &mut Command) -> Result<String, String> {
    let output: Output = command.output().map_err(|e| start_error(command, &e))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        return Err(format!("`{}` ended with {}: {}", line_of(command), output.status, errors.trim()));
    }
    String::from_utf8(output.stdout).map_err(|_| format!("`{}` printed invalid UTF-8", line_of(command)))
}

fn line_of(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// Why a command did not start.
pub fn start_error(command: &Command, error: &std::io::Error) -> String {
    let program = command.get_program().to_string_lossy();
    if error.kind() == ErrorKind::NotFound {
        format!("`{program}` is not installed; {}", install_hint(&program))
    } else {
        format!("cannot start `{program}`: {error}")
    }
}

/// How to get a missing program, in words.
pub fn install_hint(program: &str) -> &'static str {
    match program {
        "cargo" | "rustup" => "install Rust with rustup",
        "apt-get" => {
            "install a Vulkan driver (Mesa's will do), Chromium and its driver with the system's package manager"
        }
        "chromedriver" => "install Chromium with its driver (Debian: chromium and chromium-driver)",
        "aarch64-linux-gnu-gcc" => "install a cross compiler for AArch64 (Debian: gcc-aarch64-linux-gnu)",
        "qemu-aarch64" => "install an emulator of AArch64 programs (Debian: qemu-user)",
        "git" => "install git with the system's package manager",
        "python3" => "install Python 3.9 or newer with its `venv` module (Debian: python3 and python3-venv)",
        _ => "install it with the system's package manager",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_command_is_named() {
        let error = run(&mut command("false", &["--now"], Path::new("."))).unwrap_err();
        assert!(error.contains("false --now"), "{error}");
    }

    #[test]
    fn a_missing_program_is_named_with_a_way_to_get_it() {
        let error = capture(&mut command("no-such-program-here", &[], Path::new("."))).unwrap_err();
        assert!(error.contains("no-such-program-here") && error.contains("install"), "{error}");
    }
}
