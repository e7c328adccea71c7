//! `rlx doctor`.

use crate::context::Context;
use crate::failure::Result;
use crate::output;
use rlx::config::{ByteSize, Config};
use rlx::memory::{MemoryProbe, MemoryView, SystemProbe};
use rlx_kernels::gemm::{BLOCKS, Precision};
use rlx_kernels::isa::{CpuFeatures, Isa};
use rlx_kernels::limits::{self, DotKind};
use rlx_kernels::pool::Pool;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// Describe this machine: instruction sets, kernels chosen, measured limits, memory, folders
#[derive(Debug, clap::Args)]
pub struct Args {}

#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    os: &'static str,
    arch: &'static str,
    cpu: Cpu,
    limits: Limits,
    memory: Memory,
    kernels: Vec<String>,
    hub_folder: Option<String>,
    offline: bool,
    unknown_variables: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Cpu {
    isa: &'static str,
    available_isas: Vec<&'static str>,
    features: Vec<&'static str>,
    threads: usize,
    l1_bytes: usize,
    l2_bytes: usize,
    l3_bytes: usize,
}

/// What all threads reach together.
#[derive(Debug, Clone, Serialize)]
pub struct Limits {
    /// f32 operations per second; a multiply-add is two.
    pub f32_flops: Option<f64>,
    /// bf16 operations per second by `vdpbf16ps`.
    pub bf16_flops: Option<f64>,
    /// int8 operations per second by `vpdpbusd`.
    pub int8_ops: Option<f64>,
    /// Bytes read per second from memory.
    pub read_bytes_per_s: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Memory {
    physical_bytes: Option<u64>,
    available_bytes: Option<u64>,
    cgroup_limit_bytes: Option<u64>,
    soft_budget_bytes: Option<u64>,
    headroom_bytes: Option<u64>,
}

/// More than any cache holds.
const STREAM_BYTES: usize = 256 << 20;

impl Limits {
    /// Operations per second of products: of bf16 operands, by whichever instructions are faster.
    pub fn product_flops(&self, precision: Precision) -> Option<f64> {
        match (precision, self.bf16_flops) {
            (Precision::Bf16, Some(bf16)) => self.f32_flops.map(|f32| f32.max(bf16)),
            _ => self.f32_flops,
        }
    }

    /// Measures this machine; takes a fraction of a second.
    pub fn measure(isa: Isa, threads: usize) -> Limits {
        let pool = Pool::new(threads);
        let dot = |kind| if isa == Isa::Avx512 { limits::dot_ops(&pool, kind) } else { None };
        Limits {
            f32_flops: limits::fma_flops(&pool, isa),
            bf16_flops: dot(DotKind::Bf16),
            int8_ops: dot(DotKind::Int8),
            read_bytes_per_s: limits::read_rate(&pool, isa, STREAM_BYTES),
        }
    }
}

impl Args {
    pub fn run(self, context: &Context) -> Result<()> {
        let report = Report::make(context)?;
        if context.shared.json {
            return output::print_json(&report);
        }
        output::print(&report.text())
    }
}

impl Report {
    fn make(context: &Context) -> Result<Report> {
        let isa = context.isa()?;
        let features = CpuFeatures::detect();
        let view = MemoryView::new(&SystemProbe, &context.config);
        let rows = BLOCKS.iter().flat_map(|group| group.iter());
        let chosen = rows.filter(|row| row.isa() == isa && row.is_available());
        Ok(Report {
            version: env!("CARGO_PKG_VERSION"),
            os: std::env::consts::OS,
            arch: std::env::consts::ARCH,
            cpu: Cpu {
                isa: isa.name(),
                available_isas: Isa::available().into_iter().map(Isa::name).collect(),
                features: feature_names(features),
                threads: context.threads(),
                l1_bytes: features.caches.l1_bytes,
                l2_bytes: features.caches.l2_bytes,
                l3_bytes: features.caches.l3_bytes,
            },
            limits: Limits::measure(isa, context.threads()),
            memory: Memory {
                physical_bytes: SystemProbe.physical_bytes(),
                available_bytes: SystemProbe.available_bytes(),
                cgroup_limit_bytes: SystemProbe.cgroup().map(|group| group.limit_bytes),
                soft_budget_bytes: view.soft_budget_bytes(),
                headroom_bytes: view.headroom_bytes(),
            },
            kernels: chosen.map(|row| row.name()).collect::<BTreeSet<_>>().into_iter().collect(),
            hub_folder: context.config.hf_cache_dirs().hub().map(|path| path.display().to_string()),
            offline: context.config.offline(),
            unknown_variables: Config::unknown_variables(),
        })
    }

    fn text(&self) -> String {
        let Report { cpu, memory, limits, .. } = self;
        let size =
            |bytes: Option<u64>| bytes.map_or("unknown".to_owned(), |bytes| ByteSize(bytes).to_string());
        let cache = |bytes: usize| size((bytes > 0).then_some(bytes as u64));
        let rate =
            |rate: Option<f64>, unit| rate.map_or("unknown".to_owned(), |r| format!("{:.1} {unit}", r / 1e9));
        let group = memory.cgroup_limit_bytes.map_or("none".to_owned(), |bytes| size(Some(bytes)));
        let mut lines = vec![
            ("rlx", format!("{} on {} {}", self.version, self.os, self.arch)),
            ("instruction set", format!("{} of {}", cpu.isa, cpu.available_isas.join(", "))),
            ("features", cpu.features.join(" ")),
            ("threads", cpu.threads.to_string()),
            ("caches", format!("{}, {}, {}", cache(cpu.l1_bytes), cache(cpu.l2_bytes), cache(cpu.l3_bytes))),
            ("f32 limit", rate(limits.f32_flops, "GFLOP/s")),
            ("bf16 limit", rate(limits.bf16_flops, "GFLOP/s")),
            ("int8 limit", rate(limits.int8_ops, "GOP/s")),
            ("read limit", rate(limits.read_bytes_per_s, "GB/s")),
            (
                "memory",
                format!("{}, {} available", size(memory.physical_bytes), size(memory.available_bytes)),
            ),
            ("control group", group),
            ("soft budget", size(memory.soft_budget_bytes)),
            ("headroom", size(memory.headroom_bytes)),
            ("hub cache", self.hub_folder.clone().unwrap_or_else(|| "none known".to_owned())),
            ("fetching", if self.offline { "off" } else { "never by rlx itself" }.to_owned()),
            ("kernels", self.kernel_families()),
        ];
        if !self.unknown_variables.is_empty() {
            lines.push(("not a setting", self.unknown_variables.join(" ")));
        }
        lines.into_iter().map(|(name, value)| format!("{name:16}{value}\n")).collect()
    }

    /// Kernels without the last part of their names, and how many of each there are.
    fn kernel_families(&self) -> String {
        let mut families = BTreeMap::new();
        for kernel in &self.kernels {
            *families
                .entry(kernel.rsplit_once('_').map_or(kernel.as_str(), |(family, _)| family))
                .or_insert(0) += 1;
        }
        families.iter().map(|(family, count)| format!("{family} ({count})")).collect::<Vec<_>>().join(", ")
    }
}

fn feature_names(features: &CpuFeatures) -> Vec<&'static str> {
    let all = [
        ("avx2", features.avx2),
        ("fma", features.fma),
        ("f16c", features.f16c),
        ("avx_vnni", features.avx_vnni),
        ("avx512", features.avx512),
        ("avx512_vnni", features.avx512_vnni),
        ("avx512_bf16", features.avx512_bf16),
        ("avx512_fp16", features.avx512_fp16),
        ("amx_tile", features.amx_tile),
        ("amx_bf16", features.amx_bf16),
        ("amx_int8", features.amx_int8),
        ("neon", features.neon),
        ("neon_dotprod", features.neon_dotprod),
        ("neon_fp16", features.neon_fp16),
        ("neon_bf16", features.neon_bf16),
        ("neon_i8mm", features.neon_i8mm),
    ];
    all.into_iter().filter(|(_, present)| *present).map(|(name, _)| name).collect()
}
