//! Rotary frequencies: every kind of scaling that configs name, rounded as transformers rounds (f32 steps).

use crate::error::Result;
use rlx::aot::wire::{WireError, WireReader, WireWriter};
use rlx::import::hf::ConfigReader;

/// Rotary frequencies of a model (or of one kind of its layers).
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Elements of a head that are rotated; even.
    pub rotary_dim: usize,
    /// Factor of cosines and sines.
    pub scale: f64,
    frequencies: Frequencies,
}

#[derive(Debug, Clone, PartialEq)]
enum Frequencies {
    Fixed(Vec<f32>),
    /// NTK-aware scaling: the base grows with the length (reddit's u/bloc97 and u/emozilla, 2023).
    Dynamic {
        base: f64,
        factor: f64,
        original: usize,
    },
    /// LongRoPE (Ding et al., 2024): one set up to the original length, another beyond.
    Long {
        short: Vec<f32>,
        long: Vec<f32>,
        original: usize,
    },
}

/// What a family assumes where its config is silent.
#[derive(Debug, Clone, Copy)]
pub struct RopeDefaults {
    /// Elements of a head.
    pub head_dim: usize,
    /// Base of the frequencies.
    pub theta: f64,
    /// Most positions.
    pub max_positions: usize,
    /// What old configs of this family call `longrope` besides that name.
    pub longrope_aliases: &'static [&'static str],
}

impl Rope {
    /// Writes all of it.
    pub(crate) fn write(&self, out: &mut WireWriter) {
        out.u64(self.rotary_dim as u64).u64(self.scale.to_bits());
        let list = |out: &mut WireWriter, values: &[f32]| {
            out.u64(values.len() as u64);
            values.iter().for_each(|value| {
                out.u32(value.to_bits());
            });
        };
        match &self.frequencies {
            Frequencies::Fixed(values) => list(out.u8(0), values),
            Frequencies::Dynamic { base, factor, original } => {
                out.u8(1).u64(base.to_bits()).u64(factor.to_bits()).u64(*original as u64);
            }
            Frequencies::Long { short, long, original } => {
                list(out.u8(2), short);
                list(out, long);
                out.u64(*original as u64);
            }
        }
    }

    /// Reads what [`Rope::write`] wrote.
    pub(crate) fn read_back(from: &mut WireReader<'_>) -> std::result::Result<Self, WireError> {
        let (rotary_dim, scale) = (from.size()?, f64::from_bits(from.u64()?));
        let list = |from: &mut WireReader<'_>| -> std::result::Result<Vec<f32>, WireError> {
            let values: Vec<f32> = (0..from.count(4)?)
                .map(|_| Ok(f32::from_bits(from.u32()?)))
                .collect::<std::result::Result<_, _>>()?;
            if values.len() == rotary_dim / 2 {
                Ok(values)
            } else {
                Err(from.fault("a list of frequencies is of another length"))
            }
        };
        let frequencies = match from.u8()? {
            0 => Frequencies::Fixed(list(from)?),
            1 => Frequencies::Dynamic {
                base: f64::from_bits(from.u64()?),
                factor: f64::from_bits(from.u64()?),
                original: from.size()?.max(1),
            },
            2 => Frequencies::Long { short: list(from)?, long: list(from)?, original: from.size()? },
            _ => return Err(from.fault("an unknown kind of frequencies")),
        };
        Ok(Self { rotary_dim, scale, frequencies })
    }

    /// Unscaled frequencies `theta^(-2 i / rotary_dim)`.
    pub fn plain(theta: f64, rotary_dim: usize) -> Self {
        Self { rotary_dim, scale: 1.0, frequencies: Frequencies::Fixed(inverse(&powers(theta, rotary_dim))) }
    }

    /// Reads `rope_parameters` (transformers 5) or `rope_theta`, `rope_scaling` and `partial_rotary_factor`.
    pub fn read(cfg: &ConfigReader, defaults: RopeDefaults) -> Result<Self> {
        let section = match cfg.section("rope_parameters")? {
            Some(section) => {
                cfg.ignore(&["rope_scaling"]);
                Some(section)
            }
            None => cfg.section("rope_scaling")?,
        };
        let top_theta = checked_theta(cfg)?;
        let top_partial = cfg.optional_in::<f64>("partial_rotary_factor", 0.0..=1.0)?;
        let top_original = cfg.optional::<usize>("original_max_position_embeddings")?;
        let defaults = RopeDefaults { theta: top_theta.unwrap_or(defaults.theta), ..defaults };
        match section {
            Some(section) => Self::from_section(&section, defaults, top_partial, top_original),
            None => Ok(Self::plain(defaults.theta, rotary_dim(cfg, defaults.head_dim, top_partial)?)),
        }
    }

    /// Reads one flat object of rope parameters.
    pub fn from_section(
        section: &ConfigReader,
        defaults: RopeDefaults,
        partial: Option<f64>,
        original: Option<usize>,
    ) -> Result<Self> {
        let old_name = section.optional::<String>("type")?;
        let kind = section.optional::<String>("rope_type")?.or(old_name).unwrap_or_else(|| "default".into());
        let theta = checked_theta(section)?.unwrap_or(defaults.theta);
        let partial = section.optional_in::<f64>("partial_rotary_factor", 0.0..=1.0)?.or(partial);
        let dim = rotary_dim(section, defaults.head_dim, partial)?;
        let inner_original = section.optional::<usize>("original_max_position_embeddings")?;
        let original = original.or(inner_original).unwrap_or(defaults.max_positions);
        let powers = powers(theta, dim);
        let mut scale = 1.0;
        let frequencies = match kind.as_str() {
            "default" => Frequencies::Fixed(inverse(&powers)),
            "linear" => {
                let factor = positive(section, "factor")? as f32;
                Frequencies::Fixed(inverse(&powers).iter().map(|f| f / factor).collect())
            }
            "dynamic" => {
                let factor = positive(section, "factor")?;
                if dim <= 2 {
                    return Err(section.wrong("rope_type", "more than two rotated elements", kind).into());
                }
                Frequencies::Dynamic { base: theta, factor, original: defaults.max_positions.max(1) }
            }
            "llama3" => Frequencies::Fixed(llama3(section, &inverse(&powers), original)?),
            "yarn" if !defaults.longrope_aliases.contains(&"yarn") => {
                let (frequencies, factor) = yarn(section, &powers, theta, original, defaults.max_positions)?;
                scale = factor;
                Frequencies::Fixed(frequencies)
            }
            name if name == "longrope" || defaults.longrope_aliases.contains(&name) => {
                scale = longrope_scale(section, original, defaults.max_positions)?;
                let scaled = |field| -> Result<Vec<f32>> { divided(section, field, &powers) };
                let (short, long) = (scaled("short_factor")?, scaled("long_factor")?);
                if short == long {
                    Frequencies::Fixed(short)
                } else {
                    Frequencies::Long { short, long, original }
                }
            }
            _ => {
                let known = "one of \"default\", \"linear\", \"dynamic\", \"llama3\", \"yarn\", \"longrope\"";
                return Err(section.wrong("rope_type", known, format!("\"{kind}\"")).into());
            }
        };
        Ok(Self { rotary_dim: dim, scale, frequencies })
    }

    /// The frequencies, where they are the same for every length.
    pub fn fixed(&self) -> Option<&[f32]> {
        match &self.frequencies {
            Frequencies::Fixed(values) => Some(values),
            _ => None,
        }
    }

    /// The frequencies for a sequence that has `length` positions.
    pub fn frequencies(&self, length: usize) -> Vec<f32> {
        match &self.frequencies {
            Frequencies::Fixed(values) => values.clone(),
            Frequencies::Dynamic { base, factor, original } => {
                let (length, original) = (length.max(*original) as f64, *original as f64);
                let grown = (factor * length / original) - (factor - 1.0);
                let dim = self.rotary_dim as f64;
                inverse(&powers(base * libm::pow(grown, dim / (dim - 2.0)), self.rotary_dim))
            }
            Frequencies::Long { short, long, original } => {
                if length > *original {
                    long.clone()
                } else {
                    short.clone()
                }
            }
        }
    }

    /// Cosines, then sines, of one position in a sequence of `length` positions, times [`Rope::scale`].
    pub fn push_angles(&self, position: usize, length: usize, out: &mut Vec<f32>) {
        let frequencies = self.frequencies(length);
        let angle = |f: &f32| f64::from(position as f32 * f);
        out.extend(frequencies.iter().map(|f| (libm::cos(angle(f)) * self.scale) as f32));
        out.extend(frequencies.iter().map(|f| (libm::sin(angle(f)) * self.scale) as f32));
    }

    /// The length past which keys already in a cache no longer fit: a sequence that grows beyond it is computed again.
    pub fn recompute_beyond(&self) -> Option<usize> {
        match &self.frequencies {
            Frequencies::Long { original, .. } => Some(*original),
            _ => None,
        }
    }

    /// The length that the scaling was made for, where it is more than the model's own.
    pub fn stretched(&self) -> Option<usize> {
        match &self.frequencies {
            Frequencies::Dynamic { factor, original, .. } => {
                Some((*original as f64 * factor.max(1.0)) as usize)
            }
            _ => None,
        }
    }
}

fn checked_theta(cfg: &ConfigReader) -> Result<Option<f64>> {
    match cfg.optional::<f64>("rope_theta")? {
        Some(theta) if theta <= 1.0 => {
            Err(cfg.wrong("rope_theta", "a number above 1", theta.to_string()).into())
        }
        theta => Ok(theta),
    }
}

fn rotary_dim(cfg: &ConfigReader, head_dim: usize, partial: Option<f64>) -> Result<usize> {
    let dim = (head_dim as f64 * partial.unwrap_or(1.0)) as usize;
    if dim == 0 || !dim.is_multiple_of(2) {
        let expected = format!("a factor that gives an even, positive part of {head_dim}");
        return Err(cfg.wrong("partial_rotary_factor", expected, format!("{dim} elements")).into());
    }
    Ok(dim)
}

fn positive(section: &ConfigReader, field: &str) -> Result<f64> {
    let value = section.required::<f64>(field)?;
    if value > 0.0 {
        return Ok(value);
    }
    Err(section.wrong(field, "a number above 0", value.to_string()).into())
}

/// `theta^(2 i / dim)`, exponent and power rounded to f32.
fn powers(theta: f64, dim: usize) -> Vec<f32> {
    let theta = f64::from(theta as f32);
    (0..dim / 2).map(|i| libm::pow(theta, f64::from((2 * i) as f32 / dim as f32)) as f32).collect()
}

fn inverse(powers: &[f32]) -> Vec<f32> {
    powers.iter().map(|p| 1.0 / p).collect()
}

fn divided(section: &ConfigReader, field: &str, powers: &[f32]) -> Result<Vec<f32>> {
    let factors = section.required::<Vec<f64>>(field)?;
    if factors.len() != powers.len() || factors.iter().any(|&f| f <= 0.0) {
        let expected = format!("{} positive numbers, half of the rotated elements of a head", powers.len());
        return Err(section.wrong(field, expected, format!("{} numbers", factors.len())).into());
    }
    Ok(factors.iter().zip(powers).map(|(&f, p)| 1.0 / (f as f32 * p)).collect())
}

/// Llama 3.1: long waves are slowed by `factor`, short ones kept, those between blended.
fn llama3(section: &ConfigReader, plain: &[f32], original: usize) -> Result<Vec<f32>> {
    let factor = positive(section, "factor")? as f32;
    let low = positive(section, "low_freq_factor")?;
    let high = positive(section, "high_freq_factor")?;
    if high <= low {
        return Err(section.wrong("high_freq_factor", "more than low_freq_factor", high.to_string()).into());
    }
    let original = original as f64;
    let (longest, shortest) = ((original / low) as f32, (original / high) as f32);
    let blend = |f: f32| {
        let wave = std::f64::consts::TAU as f32 / f;
        if wave < shortest {
            return f;
        }
        if wave > longest {
            return f / factor;
        }
        let smooth = (original as f32 / wave - low as f32) / (high - low) as f32;
        (1.0 - smooth) * f / factor + smooth * f
    };
    Ok(plain.iter().map(|&f| blend(f)).collect())
}

/// YaRN (Peng et al., 2023): frequencies and attention factor.
fn yarn(
    section: &ConfigReader,
    powers: &[f32],
    theta: f64,
    original: usize,
    max_positions: usize,
) -> Result<(Vec<f32>, f64)> {
    let original = original.max(1) as f64;
    let factor = match section.optional::<f64>("factor")? {
        Some(_) => positive(section, "factor")?,
        None => max_positions as f64 / original,
    };
    let magnitude = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * libm::log(factor) + 1.0 };
    let given = section.optional::<f64>("attention_factor")?;
    let mscale = section.or("mscale", 0.0)?;
    let mscale_all = section.or("mscale_all_dim", 0.0)?;
    let scale = match given {
        Some(scale) => scale,
        None if mscale != 0.0 && mscale_all != 0.0 => magnitude(mscale) / magnitude(mscale_all),
        None => magnitude(1.0),
    };
    let or_default = |value: f64, default: f64| if value == 0.0 { default } else { value };
    let fast = or_default(section.or("beta_fast", 32.0)?, 32.0);
    let slow = or_default(section.or("beta_slow", 1.0)?, 1.0);
    let truncate = section.or("truncate", true)?;
    let dim = (2 * powers.len()) as f64;
    let correction =
        |turns: f64| dim * libm::log(original / (turns * std::f64::consts::TAU)) / (2.0 * libm::log(theta));
    let (mut low, mut high) = (correction(fast), correction(slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
    if low == high {
        high += 0.001;
    }
    let frequencies = powers.iter().enumerate().map(|(i, &p)| {
        let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
        let keep = 1.0 - ramp;
        1.0 / (factor as f32 * p) * (1.0 - keep) + 1.0 / p * keep
    });
    Ok((frequencies.collect(), scale))
}

fn longrope_scale(section: &ConfigReader, original: usize, max_positions: usize) -> Result<f64> {
    let original = original.max(2) as f64;
    let factor = section.optional::<f64>("factor")?.unwrap_or(max_positions as f64 / original);
    Ok(match section.optional::<f64>("attention_factor")? {
        Some(scale) => scale,
        None if factor <= 1.0 => 1.0,
        None => libm::sqrt(1.0 + libm::log(factor) / libm::log(original)),
    })
}
