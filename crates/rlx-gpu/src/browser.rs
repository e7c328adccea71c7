//! The device of a browser: WebGPU, through functions of the page that loaded the module. The page has opened the device before.
//!
//! A run waits for the device as on any other; in a browser that means that the module's call is suspended, which the page arranges.

use crate::device::DeviceBackend;
use crate::device::driver::{Batch, Driver, Limits, exhausted, lost, refused};
use crate::ffi::page::{self, Buffer};
use crate::ir::Kernel;
use crate::lower::MAX_BOUND;
use crate::print::wgsl;
use rlx::backend::{Backend, BackendError};
use std::sync::Arc;

/// Programs along the first axis of a grid at most.
const GRID: usize = 32_768;
const NAME: &str = "the browser's device";

/// The device that the page has opened, if it computes as the interpreter of kernels does.
///
/// # Errors
/// [`BackendError::Lost`] if it has opened none, or one that cannot bind what kernels need; as the device says.
pub fn backend() -> Result<Arc<dyn Backend>, BackendError> {
    let opening = |cause: String| lost(NAME, "opening it", cause);
    let text = page::describe();
    let of = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    let number = |key: &str| of(key).and_then(|value| value.parse::<usize>().ok());
    let (Some(name), Some(binding_bytes), Some(alignment), Some(buffers)) =
        (of("name"), number("binding_bytes"), number("alignment"), number("buffers"))
    else {
        return Err(opening("the page has opened none".to_owned()));
    };
    if buffers < 2 + MAX_BOUND {
        let needed = 2 + MAX_BOUND;
        return Err(opening(format!("a kernel may bind {buffers} buffers, {needed} are needed")));
    }
    let limits = Limits {
        binding_words: binding_bytes / 4,
        argument_words: alignment.max(4) / 4,
        grid: GRID,
        compact: of("software") == Some("1"),
        dots: of("dots") == Some("1"),
    };
    Ok(Arc::new(DeviceBackend::open(Browser { name: name.to_owned(), limits })?))
}

struct Browser {
    name: String,
    limits: Limits,
}

impl Browser {
    /// Waits for what was asked of the device; what the page has to say against it becomes an error.
    fn finish(
        &self,
        what: &str,
        words: usize,
        results: Option<(&Buffer, usize)>,
    ) -> Result<Vec<u32>, BackendError> {
        page::finish(results).map_err(|told| match told.split_once(' ') {
            Some(("kernel", rest)) => {
                let (kernel, cause) = rest.split_once(": ").unwrap_or((rest, "it did not compile"));
                refused(&self.name(), &format!("kernel {kernel}"), cause)
            }
            Some(("memory", _)) => exhausted(&self.name(), what, words),
            Some(("invalid", cause)) => refused(&self.name(), what, cause),
            Some((_, cause)) => lost(&self.name(), what, cause),
            None => lost(&self.name(), what, told),
        })
    }
}

/// What is on its way: the graph, and how many words it gives.
struct Submitted {
    graph: String,
    words: usize,
}

impl Driver for Browser {
    type Buffer = Buffer;
    type Kernel = page::Pipeline;
    /// What results are read from.
    type Work = Option<Buffer>;
    type Pending = Submitted;

    fn name(&self) -> String {
        format!("gpu ({})", self.name)
    }

    fn capabilities(&self) -> Vec<String> {
        vec!["WebGPU".to_owned(), format!("bindings of {} MiB", self.limits.binding_words >> 18)]
    }

    fn fingerprint(&self) -> String {
        format!("gpu {} browser {}", env!("CARGO_PKG_VERSION"), self.name)
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn allocate(&self, what: &str, words: usize) -> Result<Buffer, BackendError> {
        let buffer = Buffer::of_kernels(words);
        self.finish(what, words, None)?;
        Ok(buffer)
    }

    fn upload(&self, what: &str, to: &Buffer, at: usize, words: &[u32]) -> Result<(), BackendError> {
        to.write(at, words);
        self.finish(what, words.len(), None).map(drop)
    }

    fn download(&self, what: &str, from: &Buffer, at: usize, count: usize) -> Result<Vec<u32>, BackendError> {
        if count == 0 {
            return Ok(Vec::new());
        }
        let results = Buffer::of_results(count);
        page::submit(&[0, 0, results.id, 0, 0, from.id, at as u32, count as u32]);
        self.finish(&format!("reading {what}"), count, Some((&results, count)))
    }

    fn compile(&self, kernel: &Kernel) -> Result<page::Pipeline, BackendError> {
        let made = self.compile_all(&[kernel])?.pop();
        made.ok_or_else(|| {
            refused(&self.name(), &format!("kernel {}", kernel.name), "nothing was made of it")
        })
    }

    /// All begin before one is waited for: browsers compile on several threads.
    fn compile_all(&self, kernels: &[&Kernel]) -> Result<Vec<page::Pipeline>, BackendError> {
        let begin = |kernel: &&Kernel| {
            page::Pipeline::new(&kernel.name, &wgsl::print(kernel), [kernel.weights(), kernel.states()])
        };
        let begun = kernels.iter().map(begin).collect();
        self.finish("compiling kernels", 0, None)?;
        Ok(begun)
    }

    fn work(&self) -> Result<Option<Buffer>, BackendError> {
        Ok(None)
    }

    fn submit(&self, work: &mut Option<Buffer>, batch: &Batch<'_, Self>) -> Result<Submitted, BackendError> {
        let words = batch.words_read();
        if work.as_ref().is_some_and(|results| results.words < words) {
            *work = None;
        }
        let results = work.get_or_insert_with(|| Buffer::of_results(words));
        for write in &batch.writes {
            write.to.write(write.at, &write.words);
        }
        let pitch = batch.pitch as u32 * 4;
        let mut text = vec![batch.arena.id, batch.arguments.id, results.id, pitch, batch.calls.len() as u32];
        for call in &batch.calls {
            let [across, down] = call.grid.map(|programs| programs as u32);
            text.extend([call.kernel.0, call.arguments as u32 * 4, across, down, call.bound.len() as u32]);
            text.extend(call.bound.iter().map(|buffer| buffer.id));
        }
        for read in batch.reads.iter().filter(|read| read.count > 0) {
            text.extend([read.from.id, read.at as u32, read.count as u32]);
        }
        page::submit(&text);
        Ok(Submitted { graph: batch.graph.to_owned(), words })
    }

    fn read(&self, work: &mut Option<Buffer>, pending: Submitted) -> Result<Vec<u32>, BackendError> {
        let results = work.as_ref().map(|results| (results, pending.words));
        self.finish(&format!("running {}", pending.graph), pending.words, results)
    }
}
