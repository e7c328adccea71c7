//! Gemma 3, text (Kamath et al., 2025): five layers with a window for one without, each kind with its own frequencies.

use crate::arch::{BuildCx, Built};
use crate::blocks::decoder::{DecoderSizes, FamilyDefaults};
use crate::blocks::gemma::{self, GemmaSpec};
use crate::blocks::llama::{layer_windows, window_or};
use crate::blocks::rope::{Rope, RopeDefaults};
use crate::error::Result;
use rlx::import::hf::ConfigReader;

const GLOBAL_THETA: f64 = 1_000_000.0;
const LOCAL_THETA: f64 = 10_000.0;

pub fn build(cx: &BuildCx<'_>) -> Result<Built> {
    let cfg = cx.cfg;
    let defaults = FamilyDefaults { head_dim: Some(256), max_positions: 131_072, eps: 1e-6, tied: true };
    let sizes = DecoderSizes::read(cfg, defaults)?;
    cfg.must_be("use_bidirectional_attention", false)?;
    let old_pattern = cfg.optional_in("_sliding_window_pattern", 1..=1 << 16)?;
    let pattern = cfg.optional_in("sliding_window_pattern", 1..=1 << 16)?.or(old_pattern).unwrap_or(6);
    let window = window_or(cfg, Some(4096))?;
    let spec = GemmaSpec {
        ropes: read_ropes(cfg, sizes.rope_defaults())?,
        windows: layer_windows(cfg, sizes.layers, window, |layer| (layer + 1) % pattern != 0)?,
        qk_norm: true,
        bias: cfg.or("attention_bias", false)?,
        query_scalar: cfg.optional_in("query_pre_attn_scalar", 1e-6..=1e9)?.unwrap_or(256.0),
        attention_cap: gemma::cap(cfg, "attn_logit_softcapping", None)?,
        logit_cap: gemma::cap(cfg, "final_logit_softcapping", None)?,
        feed: gemma::read_feed(cfg, sizes.width)?,
        sizes,
    };
    gemma::build(cx, &spec)
}

/// Frequencies of full and of sliding layers: two objects in `rope_parameters`, or `rope_theta` with `rope_scaling` for the
/// first and `rope_local_base_freq` for the second.
fn read_ropes(cfg: &ConfigReader, defaults: RopeDefaults) -> Result<[Rope; 2]> {
    let global = RopeDefaults { theta: cfg.or("rope_theta", GLOBAL_THETA)?, ..defaults };
    let local = RopeDefaults { theta: cfg.or("rope_local_base_freq", LOCAL_THETA)?, ..defaults };
    let scaling = cfg.section("rope_scaling")?;
    let sections = cfg.section("rope_parameters")?;
    let inside = |name: &str| sections.as_ref().map_or(Ok(None), |section| section.section(name));
    let read = |section: Option<ConfigReader>, defaults: RopeDefaults| match section {
        Some(section) => Rope::from_section(&section, defaults, None, None),
        None => Ok(Rope::plain(defaults.theta, defaults.head_dim)),
    };
    let full = inside("full_attention")?.or(scaling);
    Ok([read(full, global)?, read(inside("sliding_attention")?, local)?])
}
