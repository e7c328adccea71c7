//! Packed weights that outlive the process: found in the cache, or left there by a thread of its own while the model runs.

use super::CpuBackend;
use super::lower::PackedSpec;
use crate::aot::AotCache;
use crate::aot::artefact::stamp;
use crate::aot::container::Stamp;
use crate::aot::wire::WireWriter;
use crate::backend::{BackendError, PackedStorage};
use crate::weights::{Packed, WeightHandle, WeightRegistry};
use rlx_kernels::gemm::PackedMatrix;
use rlx_tensor::storage::mapped::{MappedFile, MappedRange};
use std::collections::HashMap;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::SystemTime;

/// Packed copies below this size are made anew each time.
pub const LEAST_KEPT_BYTES: usize = 1 << 20;

/// Bytes at a file's start that are part of its identity, where its header's length is not told there.
const HEAD_BYTES: usize = 64 << 10;

/// The header of a weight file: of safetensors as long as its first number says, of others their first bytes.
fn head(bytes: &[u8]) -> &[u8] {
    let told = bytes.first_chunk::<8>().map(|first| u64::from_le_bytes(*first).saturating_add(8));
    let told = told.and_then(|len| bytes.get(..usize::try_from(len).ok()?));
    told.unwrap_or(&bytes[..bytes.len().min(HEAD_BYTES)])
}

/// A cache, and the thread that fills it.
pub(super) struct Keeper {
    cache: Arc<AotCache>,
    stamp: OnceLock<Stamp>,
    heads: Mutex<HashMap<usize, [u8; 32]>>,
    writer: Mutex<Option<(Sender<Job>, JoinHandle<()>)>>,
}

struct Job {
    stamp: Stamp,
    key: Vec<u8>,
    layout: Vec<u8>,
    matrix: PackedMatrix,
}

impl Keeper {
    pub fn new(cache: AotCache) -> Self {
        let (stamp, heads, writer) = (OnceLock::new(), Mutex::default(), Mutex::new(None));
        Keeper { cache: Arc::new(cache), stamp, heads, writer }
    }

    fn stamp(&self, backend: &CpuBackend) -> &Stamp {
        self.stamp.get_or_init(|| stamp(backend, backend, "packed"))
    }

    /// Digest of a file's header; computed once for a map.
    fn head(&self, file: &Arc<MappedFile>) -> [u8; 32] {
        let mut known = self.heads.lock().unwrap_or_else(PoisonError::into_inner);
        *known
            .entry(Arc::as_ptr(file) as usize)
            .or_insert_with(|| *blake3::hash(head(file.bytes())).as_bytes())
    }

    /// Which version of which file: path, size, time of modification, inode, digest of its header; and the range in it.
    fn write_identity(&self, out: &mut WireWriter, range: &MappedRange) {
        let file = range.file();
        let identity = file.identity();
        let path = std::path::absolute(file.path()).unwrap_or_else(|_| file.path().to_path_buf());
        let modified = identity.modified.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
        let modified = modified.unwrap_or_default();
        out.bytes(path.as_os_str().as_encoded_bytes()).u64(identity.file_bytes);
        out.u64(modified.as_secs()).u32(modified.subsec_nanos()).u64(identity.device_inode.1);
        out.raw(&self.head(file)).u64(range.offset() as u64).u64(range.len() as u64);
    }

    /// Leaves a matrix in the cache, some time before the keeper is dropped.
    fn keep(&self, job: Job) {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        if writer.is_none() {
            let (sender, jobs) = channel::<Job>();
            let cache = Arc::clone(&self.cache);
            let work = move || {
                for Job { stamp, key, layout, matrix } in jobs {
                    if !cache.store_packed(&stamp, &key, &layout, matrix.bytes(), 1) {
                        return;
                    }
                }
            };
            // Without a thread nothing is kept, and nothing else is lost.
            *writer = std::thread::Builder::new()
                .name("rlx-cache".to_owned())
                .spawn(work)
                .ok()
                .map(|t| (sender, t));
        }
        if let Some((sender, _)) = &*writer {
            // A writer that gave up has said why.
            let _ = sender.send(job);
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let writer = self.writer.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((sender, thread)) = writer {
            drop(sender);
            // A panic there has been reported; what it was to keep is made anew next time.
            let _ = thread.join();
        }
    }
}

/// A packed matrix's place in the cache.
pub(super) struct Kept<'b> {
    keeper: &'b Keeper,
    key: Vec<u8>,
    bytes: usize,
}

impl CpuBackend {
    /// The place of a packed copy of these weights; `None` if it is not to be kept.
    pub(super) fn kept(
        &self,
        weights: &WeightRegistry,
        handles: &[WeightHandle],
        spec: &PackedSpec,
    ) -> Result<Option<Kept<'_>>, BackendError> {
        let large = spec.bytes >= LEAST_KEPT_BYTES && spec.codes.is_none();
        let Some(keeper) = self.keeper.as_ref().filter(|_| large) else {
            return Ok(None);
        };
        let mut key = WireWriter::new();
        key.u8(u8::from(spec.gated)).u8(u8::from(spec.transposed)).u64(spec.groups as u64);
        key.u8(u8::from(spec.winograd));
        key.u64(handles.len() as u64);
        for &handle in handles {
            let Some(range) = weights.mapped(handle)? else { return Ok(None) };
            key.text(&weights.get(handle)?.shape().to_string());
            keeper.write_identity(&mut key, &range);
        }
        Ok(Some(Kept { keeper, key: key.finish(), bytes: spec.bytes }))
    }
}

impl Kept<'_> {
    /// Whether the cache has it. Reads nothing.
    pub fn is_there(&self, backend: &CpuBackend) -> bool {
        self.keeper.cache.has_packed(self.keeper.stamp(backend), &self.key)
    }

    /// The matrix as it was kept, verified.
    pub fn find(&self, backend: &CpuBackend) -> Option<Packed> {
        let stamp = self.keeper.stamp(backend);
        let found = self.keeper.cache.packed(stamp, &self.key, backend.pool().threads())?;
        if found.content.len() != self.bytes {
            tracing::warn!(
                "cache: a packed weight has {} bytes, expected {}",
                found.content.len(),
                self.bytes
            );
            return None;
        }
        match backend.restore(&found.layout, found.content) {
            Ok(packed) => Some(packed),
            Err(reason) => {
                tracing::warn!("cache: {reason}; the weight is packed anew");
                None
            }
        }
    }

    /// Leaves the matrix for later processes.
    pub fn keep(self, backend: &CpuBackend, matrix: &PackedMatrix) {
        let packed = Packed::new(matrix.clone(), self.bytes as u64);
        let Some((layout, _)) = backend.store(&packed) else { return };
        let stamp = self.keeper.stamp(backend).clone();
        self.keeper.keep(Job { stamp, key: self.key, layout, matrix: matrix.clone() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Session;
    use crate::backend::Backend;
    use crate::import::safetensors::SafetensorsLoader;
    use crate::session::TensorArg;
    use crate::weights::WeightKind;
    use rlx_graph::Graph;
    use rlx_graph::ops::linear::Linear;
    use rlx_kernels::isa::Isa;
    use rlx_tensor::{DType, Dim, Shape, Tensor};
    use std::path::Path;

    const N: usize = 640;
    const K: usize = 512;

    /// A checkpoint of one matrix that is large enough to be kept, written beside its name and renamed.
    fn write_checkpoint(path: &Path, seed: usize) {
        let header =
            format!(r#"{{"w":{{"dtype":"F32","shape":[{N},{K}],"data_offsets":[0,{}]}}}}"#, N * K * 4);
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend((0..N * K).flat_map(|i| (((i * 31 + seed * 7) % 97) as f32 / 97.0 - 0.5).to_le_bytes()));
        let part = path.with_extension("part");
        std::fs::write(&part, file).unwrap();
        std::fs::rename(part, path).unwrap();
    }

    /// The product of one run in a process of its own, as far as the cache can tell: results by rows, and bytes found packed on disk.
    fn run(checkpoint: &Path, cache: &Path, isa: Isa) -> (Vec<Tensor>, u64) {
        let backend: Arc<dyn Backend> =
            Arc::new(CpuBackend::new(isa, 1).with_cache(AotCache::new(cache, 1 << 30)));
        let weights = Arc::new(WeightRegistry::new());
        let loader = SafetensorsLoader::open(checkpoint).unwrap();
        weights.register_from(&loader, "w", WeightKind::Base).unwrap();
        let mut graph = Graph::new("kept");
        let x = Shape::from_dims(vec![Dim::symbol("rows"), Dim::Known(K)], DType::F32);
        let x = graph.input("x", x).unwrap();
        let w = graph.param("w", Shape::new(&[N, K], DType::F32)).unwrap();
        let y = graph.add_one(Linear::plain(), &[x, w]).unwrap();
        graph.set_outputs(&[("y", y)]).unwrap();
        let session = Session::with_backend(Arc::clone(&backend)).with_weights(Arc::clone(&weights));
        let compiled = session.compile(&graph).unwrap();
        let mapped = backend.packed_mapped_bytes(compiled.template(), &weights).unwrap();
        let results = [1, 7, 64].map(|rows| {
            let x: Vec<f32> = (0..rows * K).map(|i| (i % 13) as f32 * 0.1 - 0.6).collect();
            compiled.run(&[("x", TensorArg::typed(&[rows, K], &x))]).unwrap().remove(0).1
        });
        (results.to_vec(), mapped)
    }

    fn equal(a: &[Tensor], b: &[Tensor]) -> bool {
        a.iter().zip(b).all(|(a, b)| a.bits_eq(b))
    }

    fn packed_files(cache: &Path) -> usize {
        std::fs::read_dir(cache.join("packed")).map_or(0, |files| files.count())
    }

    #[test]
    fn a_new_checkpoint_at_an_old_path_never_gets_the_old_packed_weights() {
        let folder = tempfile::tempdir().unwrap();
        let (checkpoint, cache) = (folder.path().join("model.safetensors"), folder.path().join("cache"));
        let isa = Isa::detect();
        let nothing = folder.path().join("none");
        write_checkpoint(&checkpoint, 1);
        let modified = std::fs::metadata(&checkpoint).unwrap().modified().unwrap();
        let (first, mapped) = run(&checkpoint, &cache, isa);
        assert_eq!((mapped, packed_files(&cache)), (0, 1), "one copy for all sizes of runs");
        let (again, mapped) = run(&checkpoint, &cache, isa);
        assert!(mapped >= (N * K * 4) as u64 && equal(&first, &again), "found: {mapped} bytes");
        write_checkpoint(&checkpoint, 2);
        let same_time = std::fs::File::options().write(true).open(&checkpoint).unwrap();
        same_time.set_modified(modified).unwrap();
        drop(same_time);
        let (wanted, _) = run(&checkpoint, &nothing, isa);
        let (found, mapped) = run(&checkpoint, &cache, isa);
        assert!(mapped == 0 && equal(&found, &wanted) && !equal(&found, &first), "of the same size and time");
        let mut bytes = std::fs::read(&checkpoint).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 0x40;
        std::fs::write(&checkpoint, bytes).unwrap();
        let (wanted, _) = run(&checkpoint, &nothing, isa);
        let (found, mapped) = run(&checkpoint, &cache, isa);
        assert!(mapped == 0 && equal(&found, &wanted), "written over in place");
        assert_eq!(packed_files(&cache), 3);
        let (scalar, mapped) = run(&checkpoint, &cache, Isa::Scalar);
        assert!(mapped == 0 || isa == Isa::Scalar, "another instruction set");
        assert_eq!(scalar.len(), 3);
    }
}
