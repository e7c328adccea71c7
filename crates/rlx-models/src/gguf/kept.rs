//! Tokenizers of GGUF files in the automatic cache: as tables that are read in place, since building one from metadata takes longer
//! than reading a short prompt.

use super::GgufModel;
use crate::error::Result;
use crate::tokenizer::TextTokenizer;
use rlx::aot::AotCache;
use rlx::aot::container::Stamp;
use rlx::aot::wire::WireWriter;
use rlx::config::Config;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Vocabularies below this are built anew each time.
const LEAST_TOKENS: usize = 20_000;

/// Changes whenever the same metadata gives another tokenizer.
const RULES: u32 = 1;

/// Writes a tokenizer's tables when it is dropped, if the model was used: after the model whose last part it is, whose memory the work
/// would add to. It takes as long as some runs, so what only looks at a model (`rlx plan`, say) does not pay for it.
pub(crate) struct TableWriter {
    cache: AotCache,
    stamp: Stamp,
    key: Vec<u8>,
    model: GgufModel,
    vocab: usize,
    /// The one that was built, where it is the whole of what the file says.
    pub built: Option<Arc<TextTokenizer>>,
    used: AtomicBool,
}

impl TableWriter {
    /// The model is going to run.
    pub fn use_model(&self) {
        self.used.store(true, Ordering::Relaxed);
    }

    fn write(&self) -> Result<()> {
        let started = Instant::now();
        let stored = match &self.built {
            Some(built) => built.stored()?,
            None => self.model.tokenizer(self.vocab)?.stored()?,
        };
        if !stored.tables.is_empty() {
            let layout = (stored.rest.len() as u64).to_le_bytes();
            let content = [stored.rest, stored.tables].concat();
            self.cache.store_packed(&self.stamp, &self.key, &layout, &content, 1);
            let ms = started.elapsed().as_millis();
            tracing::info!(
                "the tokenizer's tables are in the cache for later runs; making them took {ms} ms"
            );
        }
        Ok(())
    }
}

impl Drop for TableWriter {
    fn drop(&mut self) {
        if !*self.used.get_mut() {
            return;
        }
        if let Err(error) = self.write() {
            tracing::warn!("cache: {error}; the tokenizer is not kept");
        }
    }
}

/// The tokenizer of a file, from the cache where it is there; else built, with what writes it there.
pub(crate) fn tokenizer(model: &GgufModel, vocab: usize) -> Result<(TextTokenizer, Option<TableWriter>)> {
    let cache = match vocab >= LEAST_TOKENS {
        true => AotCache::from_config(Config::global().map_err(rlx::SessionError::from)?),
        false => None,
    };
    tokenizer_in(cache, model, vocab)
}

fn tokenizer_in(
    cache: Option<AotCache>,
    model: &GgufModel,
    vocab: usize,
) -> Result<(TextTokenizer, Option<TableWriter>)> {
    let Some((cache, header)) = cache.zip(model.header()) else { return Ok((model.tokenizer(vocab)?, None)) };
    let path = model.metadata().path().to_path_buf();
    let stamp = Stamp {
        kind: "tokenizer".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        device: String::new(),
        isa: String::new(),
        precision: String::new(),
        packing: *blake3::hash(header).as_bytes(),
    };
    let mut key = WireWriter::new();
    key.u32(RULES).u64(vocab as u64);
    let key = key.finish();
    if let Some(found) = cache.packed(&stamp, &key, 1) {
        let rest = found.layout.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let rest = usize::try_from(rest).unwrap_or(usize::MAX).min(found.content.len());
        let tables = found.content.slice(rest, found.content.len() - rest);
        let opened = tables
            .ok()
            .map(|tables| TextTokenizer::from_stored(&path, tables, &found.content.bytes()[..rest], vocab));
        match opened {
            Some(Ok(tokenizer)) => return Ok((tokenizer, None)),
            Some(Err(error)) => tracing::warn!("cache: {error}; the tokenizer is made anew"),
            None => tracing::warn!("cache: a tokenizer's tables lie out of their file; it is made anew"),
        }
    }
    let tokenizer = model.tokenizer(vocab)?;
    Ok((
        tokenizer,
        Some(TableWriter {
            cache,
            stamp,
            key,
            model: model.clone(),
            vocab,
            built: None,
            used: AtomicBool::new(false),
        }),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn a_kept_tokenizer_gives_the_ids_of_the_one_it_was_made_from_and_a_broken_one_is_made_anew() {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../rlx-conformance/data/gguf/nomic-bert.gguf");
        let folder = std::env::temp_dir().join(format!("rlx-tokenizer-{}", std::process::id()));
        let model = GgufModel::open(data).unwrap();
        let vocab = model.metadata().strings("tokenizer.ggml.tokens").unwrap().unwrap().len();
        let open = || tokenizer_in(Some(AotCache::new(&folder, 1 << 30)), &model, vocab).unwrap();
        let ids = |tokenizer: &TextTokenizer| {
            let texts = ["the dog ran", "houses and dogs, running", "", "it's"];
            texts.map(|text| tokenizer.encode(text, true).unwrap())
        };
        let (built, writer) = open();
        assert!(writer.is_some() && built.to_json().unwrap().is_some());
        drop(writer);
        let (_, writer) = open();
        let writer = writer.expect("a model that is not used leaves nothing");
        writer.use_model();
        drop(writer);
        let (kept, writer) = open();
        assert!(writer.is_none() && kept.to_json().unwrap().is_none());
        assert_eq!(ids(&kept), ids(&built));
        assert_eq!(kept.stored().unwrap(), built.stored().unwrap());
        let entry = std::fs::read_dir(folder.join("packed")).unwrap().next().unwrap().unwrap().path();
        let mut bytes = std::fs::read(&entry).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(&entry, bytes).unwrap();
        let (anew, writer) = open();
        assert!(writer.is_some());
        assert_eq!(ids(&anew), ids(&built));
        drop(writer);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
