//! `rlx devices`.

use crate::context::{Context, PRESENT};
use crate::engine::Engine;
use crate::failure::Result;
use crate::output;
use rlx::devices::{Device, DeviceId, resolve_device};
use rlx_kernels::isa::Isa;
use serde::Serialize;

/// List every kind of device: whether it can be used, and if not, why
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder, GGUF file, or hub name in the local cache: also tell which devices can run it
    model: Option<String>,
}

/// One kind of device.
#[derive(Debug, Serialize)]
struct Candidate {
    device: &'static str,
    registered: bool,
    available: bool,
    /// `null` without MODEL, and for kinds that are not built in.
    supports_graph: Option<bool>,
    recommended: bool,
    capabilities: Vec<String>,
    blocker: Option<String>,
}

#[derive(Debug, Serialize)]
struct Report {
    devices: Vec<Candidate>,
}

impl Args {
    pub fn run(self, context: &Context) -> Result<()> {
        let (chosen, isa) = (context.device()?, context.isa()?);
        let model = self.model.as_deref().map(|model| Engine::open(Some(model), context)).transpose()?;
        let candidate = |kind| candidate(kind, chosen, isa, model.as_ref(), context);
        let devices: Vec<Candidate> = Device::ALL.into_iter().map(candidate).collect();
        if context.shared.json {
            return output::print_json(&Report { devices });
        }
        output::print(&text(&devices))
    }
}

fn candidate(
    kind: Device,
    chosen: DeviceId,
    isa: Isa,
    model: Option<&Engine>,
    context: &Context,
) -> Candidate {
    let of_cpu = || vec![isa.name().to_owned(), "f32".to_owned(), format!("{} threads", context.threads())];
    let registered = PRESENT.contains(&kind);
    let refusal = resolve_device(Some(kind.into()), &context.config, PRESENT).err();
    Candidate {
        device: kind.name(),
        registered,
        available: registered,
        supports_graph: model
            .filter(|_| registered)
            .map(|engine| engine.model.backend().name() == kind.name()),
        recommended: chosen.kind == kind,
        capabilities: if kind == Device::Cpu { of_cpu() } else { Vec::new() },
        blocker: refusal.map(|error| error.to_string()),
    }
}

fn text(devices: &[Candidate]) -> String {
    let mut text = String::new();
    for Candidate { device, blocker, recommended, capabilities, supports_graph, .. } in devices {
        let mark = if *recommended { "*" } else { " " };
        let runs = if *supports_graph == Some(true) { "runs the model" } else { "usable" };
        let state = blocker.clone().unwrap_or_else(|| format!("{runs}: {}", capabilities.join(", ")));
        text.push_str(&format!("{mark} {device:5}  {state}\n"));
    }
    text
}
