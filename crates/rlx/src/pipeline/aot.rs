//! Plans that outlive the process: found in the automatic cache, or left there by threads of their own.

use super::key::CacheKey;
use super::{CompilationMode, ModelCompilePipeline, PipelineError, Specialised, context_bytes, lock};
use crate::aot::AotCache;
use crate::aot::container::Stamp;
use crate::backend::Backend;
use crate::plan::Lir;
use crate::session::{CompileOptions, SessionError};
use rlx_graph::Graph;
use rlx_tensor::DimBinding;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// A cache of plans, and the threads that write to it.
pub(super) struct PlanStore {
    cache: Arc<AotCache>,
    stamp: Stamp,
    found: AtomicU64,
    writers: Mutex<Vec<JoinHandle<()>>>,
}

/// What plans of a backend are made for. Where packed weights have a digest of their layout, plans have one of the compiler's sources.
pub(super) fn stamp(backend: &dyn Backend) -> Stamp {
    let storage = backend.storage();
    Stamp {
        kind: "plan".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        device: backend.name().to_owned(),
        isa: storage.map_or_else(String::new, |storage| storage.isa()),
        precision: storage.map_or("", |storage| storage.precision()).to_owned(),
        packing: *blake3::hash(env!("SOURCES_DIGEST").as_bytes()).as_bytes(),
    }
}

impl PlanStore {
    fn new(cache: AotCache, backend: &dyn Backend) -> Self {
        let (found, writers) = (AtomicU64::new(0), Mutex::default());
        PlanStore { cache: Arc::new(cache), stamp: stamp(backend), found, writers }
    }

    /// Leaves a plan in the cache, some time before the store is dropped.
    fn leave(&self, key: &CacheKey, plan: &Lir) {
        if self.cache.has_plan(&self.stamp, key.bytes()) {
            return;
        }
        let (cache, stamp, key, plan) =
            (Arc::clone(&self.cache), self.stamp.clone(), key.clone(), plan.clone());
        let work = move || {
            cache.store_plan(&stamp, key.bytes(), &plan);
        };
        // Without a thread nothing is kept, and nothing else is lost.
        if let Ok(writer) = std::thread::Builder::new().name("rlx-plans".to_owned()).spawn(work) {
            lock(&self.writers).push(writer);
        }
    }
}

impl Drop for PlanStore {
    fn drop(&mut self) {
        for writer in self.writers.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // A panic there has been reported; what it was to keep is made anew next time.
            let _ = writer.join();
        }
    }
}

impl ModelCompilePipeline {
    /// The same pipeline with a cache on disk, compiling ahead of time: a plan that an earlier process left there is verified and used,
    /// so that no pass runs; a plan made anew is left there.
    #[must_use]
    pub fn with_aot(mut self, cache: AotCache) -> Self {
        self.plans = Some(PlanStore::new(cache, &**self.session.backend()));
        self.with_mode(CompilationMode::Aot)
    }

    /// How many plans came from the cache on disk.
    pub fn plans_found(&self) -> u64 {
        self.plans.as_ref().map_or(0, |plans| plans.found.load(Ordering::Relaxed))
    }

    /// As [`ModelCompilePipeline::get_or_compile`] of this graph's template, through the cache on disk. Without one (see
    /// [`ModelCompilePipeline::with_aot`]) it is the same without it.
    ///
    /// # Errors
    /// As [`ModelCompilePipeline::ensure_template`] and [`ModelCompilePipeline::get_or_compile`]. Whatever is wrong with the cache is a
    /// miss with a warning.
    pub fn get_or_specialize_aot(
        &self,
        label: &str,
        hir: &Graph,
        options: &CompileOptions,
        binding: &DimBinding,
    ) -> Result<Arc<Specialised>, PipelineError> {
        let template = self.template_key(hir, options);
        let key = self.executable_key(&template, hir.name(), binding);
        let found = self.adopt_plan(&template, &key, hir, options);
        let id = self.ensure_template(hir, options)?;
        let Some(lir) = found else {
            let executable = self.get_or_compile(label, Some(id), binding)?;
            if let Some(plans) = &self.plans {
                plans.leave(&key, executable.lir());
            }
            return Ok(executable);
        };
        let compiled = self.compiled(Some(id))?;
        let bytes = context_bytes(&**self.session.backend(), &lir)?;
        self.cache.get_or_build(
            &key,
            || Ok::<_, PipelineError>((lir, bytes)),
            |lir| self.bind(label, compiled, lir, bytes),
        )
    }

    /// The plan of a key from the disk, its template adopted; `None` if there is none, or the template is here already.
    fn adopt_plan(
        &self,
        template: &CacheKey,
        key: &CacheKey,
        hir: &Graph,
        options: &CompileOptions,
    ) -> Option<Lir> {
        let plans = self.plans.as_ref()?;
        let mut templates = lock(&self.templates);
        if templates.by_key.contains_key(template) {
            return None;
        }
        let lir = plans.cache.plan(&plans.stamp, key.bytes())?;
        match self.session.compile_plan(&lir, hir, options) {
            Ok(compiled) => {
                templates.put(template.clone(), Arc::new(compiled));
                plans.found.fetch_add(1, Ordering::Relaxed);
                Some(lir)
            }
            // The caller's weights: compiling the graph will say the same.
            Err(SessionError::Weights { .. }) => None,
            Err(error) => {
                tracing::warn!("cache: a plan of {:?} cannot be used: {error}; it is made anew", hir.name());
                plans.cache.forget_plan(&plans.stamp, key.bytes());
                None
            }
        }
    }
}
