//! `rlx devices`.

use super::onnx;
use super::sizes::Sizes;
use crate::context::Context;
use crate::engine::Engine;
use crate::failure::Result;
use crate::output;
use rlx::backend::BackendRegistry;
use rlx::config::ByteSize;
use rlx::devices::{DeviceCandidate, DeviceId, DevicePolicy, device_report};
use serde::Serialize;

/// List every kind of device: whether it can be used, and if not, why
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder, GGUF or ONNX file, or hub name in the local cache: also tell which devices can run it, and how fast they would
    model: Option<String>,
    #[command(flatten)]
    sizes: Sizes,
}

/// One device, or one kind without any.
#[derive(Debug, Serialize)]
struct Row {
    device: String,
    registered: bool,
    available: bool,
    allowed: bool,
    /// `null` without MODEL, and for devices that cannot be asked.
    supports_graph: Option<bool>,
    needed_bytes: Option<u64>,
    free_bytes: Option<u64>,
    /// The cost model's figure for one full step, or run of an ONNX model.
    predicted_ms: Option<f64>,
    recommended: bool,
    capabilities: Vec<String>,
    blocker: Option<String>,
}

#[derive(Debug, Serialize)]
struct Report {
    devices: Vec<Row>,
    /// The device that `RLX_DEVICE`, `RLX_DEVICE_CHAIN` or `--device` leads to; `null` if it cannot be used.
    chosen: Option<String>,
    /// Why not.
    refused: Option<String>,
}

impl Args {
    pub fn run(self, context: &Context) -> Result<()> {
        context.isa()?;
        // A device that is asked for and cannot be used is what this verb is to explain.
        let chosen = context.choose_device();
        let onnx = self.sizes.onnx_file(self.model.as_deref(), &[])?;
        let candidates = match (self.model.as_deref(), onnx) {
            (_, Some(file)) => onnx::devices(&file, &self.sizes, context)?,
            (Some(model), None) => {
                Engine::open(Some(model), &context.without_device())?.graph_devices(context)?.report()
            }
            (None, None) => {
                let policy = DevicePolicy::from_config(&context.config);
                device_report(BackendRegistry::global(), &policy, &context.config)
            }
        };
        let forced = context.config.device.is_some() || context.config.device_chain.is_some();
        let forced =
            (forced || self.model.is_none() || chosen.is_err()).then(|| chosen.as_ref().ok().copied());
        let devices: Vec<Row> = candidates.into_iter().map(|candidate| row(candidate, forced)).collect();
        if context.shared.json {
            let refused = chosen.as_ref().err().map(ToString::to_string);
            return output::print_json(&Report {
                devices,
                chosen: chosen.ok().map(|device| device.to_string()),
                refused,
            });
        }
        let refused =
            chosen.err().map_or_else(String::new, |error| format!("the device asked for: {error}\n"));
        output::print(&(text(&devices) + &refused))
    }
}

/// `forced`: the device that is asked for, or that none which is asked for can be used.
fn row(candidate: DeviceCandidate, forced: Option<Option<DeviceId>>) -> Row {
    Row {
        device: candidate.device.to_string(),
        registered: candidate.registered,
        available: candidate.available,
        allowed: candidate.allowed,
        supports_graph: candidate.supports_graph,
        needed_bytes: candidate.needed_bytes,
        free_bytes: candidate.free_bytes,
        predicted_ms: candidate.predicted_s.map(|seconds| seconds * 1e3),
        recommended: forced.map_or(candidate.recommended, |device| device == Some(candidate.device)),
        capabilities: candidate.capabilities,
        blocker: candidate.blocker,
    }
}

fn text(devices: &[Row]) -> String {
    let mut text = String::new();
    for row in devices {
        let mark = if row.recommended { "*" } else { " " };
        let state = row.blocker.clone().unwrap_or_else(|| usable(row));
        text.push_str(&format!("{mark} {:5}  {state}\n", row.device));
    }
    text
}

fn usable(row: &Row) -> String {
    let does = if row.supports_graph == Some(true) { "runs the model" } else { "usable" };
    let mut parts = vec![format!("{does}: {}", row.capabilities.join(", "))];
    if let Some(ms) = row.predicted_ms {
        parts.push(format!("about {ms:.1} ms a step"));
    }
    if let Some(needed) = row.needed_bytes {
        let free = row.free_bytes.map_or("an unknown amount".to_owned(), |free| ByteSize(free).to_string());
        parts.push(format!("needs {} more, {free} free", ByteSize(needed)));
    }
    parts.join("; ")
}
