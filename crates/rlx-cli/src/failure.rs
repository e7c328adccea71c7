//! What is shown when a command fails: what, where, what to do.

use rlx::SessionError;
use rlx::aot::AotCacheError;
use rlx::config::ConfigError;
use rlx::devices::DeviceError;
use rlx::import::{ImportError, ModelSource};
use rlx_models::ModelError;
use std::fmt;
use std::io::Write as _;
use std::process::ExitCode;

/// Exit status of bad use.
const USAGE: u8 = 2;
/// Exit status of a failure.
const FAILED: u8 = 1;

const DAMAGED: &str = "fetch the model again: a file is damaged or incomplete";

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
        let [what, place, advice] = [const { String::new() }; 3];
        Failure { what, place, advice, status: 0 }
    }

    /// What went wrong.
    pub fn what(&self) -> &str {
        &self.what
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

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
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
        Failure::new(&error, "the choice of device", "`rlx devices` lists every device and what blocks it")
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
            ImportError::NotSupported { path, format: ModelSource::Onnx } => Failure::new(
                whole,
                path.display(),
                "`rlx run`, `plan`, `explain`, `bench`, `compile` and `devices` take ONNX files",
            ),
            ImportError::UnknownFormat { path, .. } | ImportError::NotSupported { path, .. } => Failure::new(
                whole,
                path.display(),
                "give a folder in Hugging Face layout (config.json and safetensors) or a GGUF file",
            ),
            ImportError::TooLarge { path, .. }
            | ImportError::Json { path, .. }
            | ImportError::MissingField { path, .. }
            | ImportError::Field { path, .. } => {
                Failure::new(whole, path.display(), "fetch the file again, or correct it as said above")
            }
            ImportError::Load(_) => Failure::new(whole, "the weight files", DAMAGED),
            _ => Failure::new(whole, "the model folder", "fetch the model again"),
        }
    }
}

impl From<ModelError> for Failure {
    fn from(error: ModelError) -> Failure {
        let whole = error.to_string();
        let of_device = error.is_device_fault();
        let (place, advice) = match error {
            ModelError::Import(error) => return error.into(),
            ModelError::Session(SessionError::Aot(error)) => return aot_failure(&error),
            ModelError::Load(_) => ("the weight files", DAMAGED),
            ModelError::Memory(_) => (
                "the memory that may be used",
                "use a smaller --ctx or a smaller model, or raise RLX_SOFT_MEMORY_BUDGET_BYTES; `rlx plan` shows the parts",
            ),
            ModelError::NotAnEncoder { .. } => ("the model", "rlx generate MODEL --prompt TEXT"),
            ModelError::NotADecoder { .. } => ("the model", "rlx embed MODEL TEXT"),
            ModelError::MissingTensor { .. }
            | ModelError::TensorShape { .. }
            | ModelError::UnusedTensor { .. } => (
                "config.json and the weight files",
                "use the config that came with these weights, or fetch both again",
            ),
            ModelError::TensorDType { .. } => {
                ("the weight files", "convert the checkpoint to f32, f16 or bf16")
            }
            ModelError::UnknownModelType { .. } => ("config.json", "use a model of a supported family"),
            ModelError::Tokenizer { .. } | ModelError::Vocabulary { .. } => {
                ("the tokenizer", "fetch tokenizer.json of this very model again")
            }
            ModelError::Template { .. } | ModelError::NoTemplate { .. } => {
                ("the chat template", "use `rlx generate` with a plain prompt")
            }
            ModelError::EmptyPrompt => ("--prompt", "give some text to continue"),
            ModelError::Context { .. } => (
                "--prompt, --max-tokens and --ctx",
                "shorten the prompt, ask for fewer tokens, or use a larger context",
            ),
            ModelError::Setting { .. } => ("the options", "choose a value in the range that is named"),
            ModelError::UnknownAdapter { .. } | ModelError::AdapterExists { .. } => {
                ("--lora and --adapter", "give each adapter a name of its own: --lora NAME=PATH")
            }
            ModelError::Adapter { .. } => {
                ("the adapter's folder", "use an adapter that was trained for this very model")
            }
            ModelError::Logits { .. } => {
                ("the weight files", "fetch the model again; report it if it still fails")
            }
            ModelError::Draft(_) => ("the draft model", ANOTHER_DEVICE),
            _ if of_device => ("the device", ANOTHER_DEVICE),
            _ => ("the model", "run again with -v; report it with the model's name if it still fails"),
        };
        Failure::new(whole, place, advice)
    }
}

/// What a device does not do another one may.
pub const ANOTHER_DEVICE: &str = "use --device cpu, or name devices in order, RLX_DEVICE_CHAIN=gpu,cpu: what one does not run goes on with the next";

/// A compiled file cannot be rebuilt from itself.
pub fn aot_failure(error: &AotCacheError) -> Failure {
    let advice = match error {
        AotCacheError::Io { .. } => "check the folder, its rights and the space on the disk",
        AotCacheError::Unstorable { .. } => "use the model's folder as it is",
        AotCacheError::Mismatch { what: "the kind", .. } => {
            "give a compiled ONNX model to `rlx run`, `rlx plan`, `rlx explain` or `rlx bench`"
        }
        _ => "compile the model again, here: `rlx compile MODEL -o FILE.rlx`",
    };
    Failure::new(error, "the compiled file", advice)
}

fn file_name(path: &std::path::Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}
