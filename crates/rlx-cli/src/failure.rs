//! What is shown when a command fails: what, where, what to do.

use rlx::config::ConfigError;
use rlx::devices::DeviceError;
use rlx::import::ImportError;
use std::io::Write as _;
use std::process::ExitCode;

/// Exit status of bad use.
const USAGE: u8 = 2;
/// Exit status of a failure.
const FAILED: u8 = 1;

/// A failed command: three lines and an exit status.
#[derive(Debug)]
pub struct Failure {
    what: String,
    place: String,
    advice: String,
    status: u8,
}

/// A result with [`Failure`].
pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// A command that could not do its work.
    pub fn new(what: impl ToString, place: impl ToString, advice: impl ToString) -> Failure {
        let [what, place, advice] = [what.to_string(), place.to_string(), advice.to_string()].map(one_line);
        Failure { what, place, advice, status: FAILED }
    }

    /// A command that was asked for something impossible.
    pub fn usage(what: impl ToString, place: impl ToString, advice: impl ToString) -> Failure {
        Failure { status: USAGE, ..Failure::new(what, place, advice) }
    }

    /// The reader of standard output is gone: nothing to say, and no failure.
    pub fn quiet() -> Failure {
        Failure { what: String::new(), place: String::new(), advice: String::new(), status: 0 }
    }

    /// The same failure, with a command that fetches marked as one for a machine with a network.
    pub fn with_offline_advice(mut self) -> Failure {
        if self.advice.contains("hf download") {
            self.advice =
                format!("offline, so nothing is fetched; where there is a network: {}", self.advice);
        }
        self
    }

    /// Prints the lines on standard error and gives the exit status.
    pub fn report(&self) -> ExitCode {
        if !self.what.is_empty() {
            let Failure { what, place, advice, .. } = self;
            let lines = format!("error: {what}\n   in: {place}\n  try: {advice}\n");
            // Nobody is left to tell if standard error is closed.
            let _ = std::io::stderr().write_all(lines.as_bytes());
        }
        ExitCode::from(self.status)
    }
}

fn one_line(text: String) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(" ")
}

/// A failure to write results to standard output.
pub fn output_failure(error: std::io::Error) -> Failure {
    if error.kind() == std::io::ErrorKind::BrokenPipe {
        return Failure::quiet();
    }
    Failure::new(error, "standard output", "check the disk or the program that reads the output")
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Failure {
        let advice =
            format!("unset {0} or give it a valid value; `rlx help` lists the settings", error.variable);
        Failure::usage(&error, "the environment", advice)
    }
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Failure {
        Failure::usage(&error, "the choice of device", "`rlx devices` lists every device and what blocks it")
    }
}

impl From<ImportError> for Failure {
    fn from(error: ImportError) -> Failure {
        let whole = error.to_string();
        match error {
            ImportError::NotFound { searched, command, name } => {
                let places: Vec<String> = searched.iter().map(|path| path.display().to_string()).collect();
                let cache = if places.is_empty() { "none known".to_owned() } else { places.join(", ") };
                let place = format!("the current folder and the Hugging Face cache ({cache})");
                Failure::new(
                    format!("`{name}` is neither a path nor a model in the local cache"),
                    place,
                    command,
                )
            }
            ImportError::BadName { .. } => Failure::new(
                whole,
                "the MODEL argument",
                "give a folder that exists, or a hub name such as org/name",
            ),
            ImportError::MissingFile { path, advice } => {
                Failure::new(format!("{} is missing", file_name(&path)), path.display(), advice)
            }
            ImportError::Io { path, source } => {
                Failure::new(source, path.display(), "check that the file exists and may be read")
            }
            ImportError::UnreadFields { path, .. } => Failure::new(
                whole,
                path.display(),
                "use a model without these fields: ignoring them would change its results",
            ),
            ImportError::UnknownFormat { path, .. } | ImportError::NotSupported { path, .. } => Failure::new(
                whole,
                path.display(),
                "give a folder in Hugging Face layout: config.json and safetensors",
            ),
            ImportError::TooLarge { path, .. }
            | ImportError::Json { path, .. }
            | ImportError::MissingField { path, .. }
            | ImportError::Field { path, .. } => {
                Failure::new(whole, path.display(), "fetch the file again, or correct it as said above")
            }
            _ => Failure::new(whole, "the model folder", "fetch the model again"),
        }
    }
}

fn file_name(path: &std::path::Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}
