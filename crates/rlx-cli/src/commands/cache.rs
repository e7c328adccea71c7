//! `rlx cache`.

use crate::context::Context;
use crate::failure::{Failure, Result};
use crate::output;
use rlx::aot::{AotCache, AotCacheError, CacheRemoval};
use serde::Serialize;
use std::time::SystemTime;

/// Show or clean the folder of plans and packed weights that runs keep for later ones
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Clone, Copy, clap::Subcommand)]
enum Action {
    /// List the entries, the most recently used first
    Ls,
    /// Remove what cannot be used, and what exceeds the size limit
    Gc,
    /// Remove every entry
    Clear,
}

#[derive(Debug, Serialize)]
struct Listing {
    folder: String,
    limit_bytes: u64,
    total_bytes: u64,
    entries: Vec<Entry>,
}

#[derive(Debug, Serialize)]
struct Entry {
    kind: &'static str,
    name: String,
    bytes: u64,
    used_unix_s: u64,
    fault: Option<String>,
}

#[derive(Debug, Serialize)]
struct Removed {
    folder: String,
    removed_files: usize,
    removed_bytes: u64,
}

impl Args {
    pub fn run(self, context: &Context) -> Result<()> {
        let Some(cache) = AotCache::from_config(&context.config) else {
            let advice = "set RLX_CACHE_DIR to a folder, and RLX_CACHE_BYTES to more than 0 or not at all";
            return Err(Failure::new("the cache is off", "the settings", advice));
        };
        match self.action {
            Action::Ls => list(&cache, context),
            Action::Gc => removed(&cache, cache.collect(), context),
            Action::Clear => removed(&cache, cache.clear(), context),
        }
    }
}

fn failure(error: AotCacheError) -> Failure {
    Failure::new(error, "the cache folder", "check the folder's rights, or set RLX_CACHE_DIR to another")
}

fn list(cache: &AotCache, context: &Context) -> Result<()> {
    let entries: Vec<Entry> = cache
        .entries()
        .map_err(failure)?
        .into_iter()
        .map(|entry| Entry {
            kind: entry.kind,
            name: entry.name,
            bytes: entry.bytes,
            used_unix_s: entry.used.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |age| age.as_secs()),
            fault: entry.fault,
        })
        .collect();
    let total_bytes = entries.iter().map(|entry| entry.bytes).sum();
    let folder = cache.folder().display().to_string();
    if context.shared.json {
        return output::print_json(&Listing {
            folder,
            limit_bytes: cache.limit_bytes(),
            total_bytes,
            entries,
        });
    }
    let mib = |bytes: u64| format!("{:.2}", bytes as f64 / (1u64 << 20) as f64);
    let mut rows = vec![vec!["entry".to_owned(), "MiB".to_owned(), "state".to_owned()]];
    for entry in &entries {
        let state = entry.fault.clone().unwrap_or_else(|| "whole".to_owned());
        rows.push(vec![format!("{}/{}", entry.kind, &entry.name[..16]), mib(entry.bytes), state]);
    }
    let total = format!("{} of {} MiB in {folder}\n", mib(total_bytes), mib(cache.limit_bytes()));
    output::print(&(output::table(&rows) + &total))
}

fn removed(
    cache: &AotCache,
    removal: std::result::Result<CacheRemoval, AotCacheError>,
    context: &Context,
) -> Result<()> {
    let CacheRemoval { files, bytes } = removal.map_err(failure)?;
    let folder = cache.folder().display().to_string();
    if context.shared.json {
        return output::print_json(&Removed { folder, removed_files: files, removed_bytes: bytes });
    }
    let mib = bytes as f64 / (1u64 << 20) as f64;
    output::print(&format!("removed {files} files, {mib:.2} MiB, from {folder}\n"))
}
