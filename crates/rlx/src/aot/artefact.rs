//! One file that holds a compiled graph: its plan, its weights as the device reads them, and files that belong to the model.

use super::container::{Container, LargeSection, OpenContainer, Section, Stamp};
use super::error::AotCacheError;
use super::wire::{WireError, WireReader, WireWriter};
use crate::backend::{Backend, PackedStorage, PackedUse, WeightUses};
use crate::plan::{Lir, parse_lir};
use crate::session::{CompiledGraph, Session, SessionError};
use crate::weights::{
    LazyBytes, Packed, PackedKey, PinGuard, SharedBytes, WeightBytes, WeightHandle, WeightKind,
    WeightRegistry,
};
use rlx_graph::Graph;
use rlx_tensor::storage::mapped::MappedRange;
use rlx_tensor::{DType, DimBinding, Shape};
use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// What kind of model an artefact holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ArtefactKind {
    /// One that works on text.
    Model,
    /// An ONNX model.
    Onnx,
}

impl ArtefactKind {
    /// The word in a file's stamp.
    pub fn name(self) -> &'static str {
        match self {
            ArtefactKind::Model => "model",
            ArtefactKind::Onnx => "onnx",
        }
    }
}

/// What an artefact holds, besides weights.
pub struct ArtefactParts<'a> {
    /// What it is.
    pub kind: ArtefactKind,
    /// The compiled graph. Its weights are packed if they are not yet.
    pub compiled: &'a CompiledGraph,
    /// Capacities under which the plan is written down; others are bound after opening.
    pub binding: &'a DimBinding,
    /// Files that belong to the model: names and contents.
    pub files: &'a [(String, Vec<u8>)],
}

const PLAN: &str = "plan";
const GRAPH: &str = "graph";
const PARAMS: &str = "params";
const FILE: &str = "file/";
const PACKED: &str = "packed";
const RAW: &str = "raw";

/// The stamp of what is compiled for a backend; `None` if it stores nothing.
pub(crate) fn stamp(backend: &dyn Backend, storage: &dyn PackedStorage, kind: &str) -> Stamp {
    Stamp {
        kind: kind.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        device: backend.name().to_owned(),
        isa: storage.isa(),
        precision: storage.precision().to_owned(),
        packing: storage.packing(),
    }
}

fn storage(backend: &dyn Backend) -> Result<&dyn PackedStorage, AotCacheError> {
    backend.storage().ok_or_else(|| AotCacheError::Unstorable {
        reason: format!("weights of the backend {:?} have no stored form", backend.name()),
    })
}

fn write_shape(out: &mut WireWriter, name: &str, shape: &Shape) -> Result<(), AotCacheError> {
    let dims = shape.known_dims().ok_or_else(|| AotCacheError::Unstorable {
        reason: format!("the weight {name} has no known size"),
    })?;
    out.text(name).text(&shape.dtype().to_string()).u64(dims.len() as u64);
    dims.iter().for_each(|&dim| {
        out.u64(dim as u64);
    });
    Ok(())
}

fn read_shape<'b>(from: &mut WireReader<'b>) -> Result<(&'b str, Shape), WireError> {
    let name = from.text()?;
    let dtype = from.text()?.parse::<DType>().map_err(|_| from.fault("an unknown dtype"))?;
    let dims = (0..from.count(8)?).map(|_| from.size()).collect::<Result<Vec<_>, _>>()?;
    Ok((name, Shape::new(&dims, dtype)))
}

fn write_key(out: &mut WireWriter, param: &str, key: &PackedKey) {
    out.text(param).text(&key.layout).text(&key.isa).text(&key.precision);
}

fn read_key<'b>(from: &mut WireReader<'b>) -> Result<(&'b str, PackedKey), WireError> {
    let param = from.text()?;
    let mut text = || from.text().map(str::to_owned);
    Ok((param, PackedKey::new(text()?, text()?, text()?)))
}

/// A packed copy to write, and its layout.
type StoredUse<'u> = (&'u PackedUse, Arc<Packed>, Vec<u8>);

/// A weight to write: what to say of it, and who holds its bytes.
enum Held {
    Raw(PinGuard),
    Packed(Arc<Packed>),
}

impl ArtefactParts<'_> {
    /// Writes the artefact: a reader sees all of it or none.
    ///
    /// # Errors
    /// [`AotCacheError::Unstorable`] if the backend or the graph has no stored form; [`AotCacheError::Io`].
    pub fn write(&self, path: &Path, threads: usize) -> Result<(), AotCacheError> {
        let unstorable = |error: SessionError| AotCacheError::Unstorable { reason: error.to_string() };
        let backend = self.compiled.backend();
        let storage = storage(&**backend)?;
        let program = self.compiled.program().map_err(unstorable)?;
        let lir = self.compiled.specialize(self.binding).map_err(unstorable)?;
        let (plan, graph) = (lir.to_string(), self.compiled.graph().to_string());
        let mut params = WireWriter::new();
        let template = self.compiled.template();
        let uses = program.weight_uses().ok_or_else(|| AotCacheError::Unstorable {
            reason: format!("the backend {:?} does not tell how it reads weights", backend.name()),
        })?;
        let (packed, raw) = self.forms(storage, uses).map_err(unstorable)?;
        let only_packed = template.params().iter().filter(|param| !raw.contains(&param.name));
        params.u64(only_packed.count() as u64);
        let (mut held, mut about) = (Vec::new(), Vec::new());
        for param in template.params() {
            if !raw.contains(&param.name) {
                write_shape(&mut params, &param.name, &param.shape)?;
                continue;
            }
            let mut out = WireWriter::new();
            write_shape(&mut out, &param.name, &param.shape)?;
            held.push(Held::Raw(self.pinned(&param.name).map_err(unstorable)?));
            about.push(out.finish());
        }
        for (used, packed, layout) in packed {
            let mut out = WireWriter::new();
            write_key(&mut out, &used.param, &used.key);
            out.bytes(&layout);
            held.push(Held::Packed(packed));
            about.push(out.finish());
        }
        let mut large = Vec::with_capacity(held.len());
        for (held, about) in held.iter().zip(&about) {
            let (name, bytes) = match held {
                Held::Raw(guard) => (RAW, guard.bytes()),
                Held::Packed(packed) => (PACKED, storage.store(packed).map_or(&[][..], |(_, bytes)| bytes)),
            };
            large.push(Section { name, about, bytes });
        }
        let params = params.finish();
        let names: Vec<String> = self.files.iter().map(|(name, _)| format!("{FILE}{name}")).collect();
        let mut small = vec![
            Section { name: PLAN, about: &[], bytes: plan.as_bytes() },
            Section { name: GRAPH, about: &[], bytes: graph.as_bytes() },
            Section { name: PARAMS, about: &[], bytes: &params },
        ];
        small.extend(names.iter().zip(self.files).map(|(name, (_, bytes))| Section {
            name,
            about: &[],
            bytes,
        }));
        let stamp = stamp(&**backend, storage, self.kind.name());
        Container { stamp: &stamp, key: &[], small: &small, large: &large }.write(path, threads)
    }

    /// The packed copies that have a stored form, with it, and the params that are kept as they are: those read so, and those whose packed
    /// copy has none and is made anew when the file is opened.
    fn forms<'u>(
        &self,
        storage: &dyn PackedStorage,
        uses: &'u WeightUses,
    ) -> Result<(Vec<StoredUse<'u>>, BTreeSet<String>), SessionError> {
        let (mut stored, mut raw) = (Vec::new(), uses.raw.clone());
        for used in &uses.packed {
            let packed = self.compiled.weights().packed(self.handle(&used.param)?, &used.key)?;
            let layout = packed.as_ref().and_then(|packed| storage.store(packed)).map(|(layout, _)| layout);
            match (packed, layout) {
                (Some(packed), Some(layout)) => stored.push((used, packed, layout)),
                _ => drop(raw.insert(used.param.clone())),
            }
        }
        Ok((stored, raw))
    }

    fn handle(&self, name: &str) -> Result<WeightHandle, SessionError> {
        let missing = || SessionError::Missing { kind: "param", name: name.to_owned() };
        self.compiled.weights().lookup(name).ok_or_else(missing)
    }

    fn pinned(&self, name: &str) -> Result<PinGuard, SessionError> {
        Ok(self.compiled.weights().guard(self.handle(name)?)?)
    }
}

/// The bytes of a weight that an artefact holds in its packed form only.
#[derive(Debug)]
struct OnlyPacked {
    len: usize,
    path: Arc<Path>,
}

impl LazyBytes for OnlyPacked {
    fn len(&self) -> usize {
        self.len
    }

    fn load(&self) -> io::Result<SharedBytes> {
        Err(io::Error::other(format!(
            "{} holds this weight only as its kernels read it; compile the model again for another use",
            self.path.display()
        )))
    }
}

/// An opened artefact: header, plan and files are verified; weights are once [`Artefact::verify`] was called.
#[derive(Debug)]
pub struct Artefact {
    container: OpenContainer,
}

impl Artefact {
    /// The precision a file was compiled for, as [`Precision::name`](crate::backend::cpu::Precision::name) spells it.
    ///
    /// # Errors
    /// [`AotCacheError`] for a file that cannot be read or is no artefact.
    pub fn precision_of(path: &Path) -> Result<String, AotCacheError> {
        Ok(OpenContainer::open(path)?.stamp().precision.clone())
    }

    /// Whether a file holds a model of this kind.
    ///
    /// # Errors
    /// [`AotCacheError`] for a file that cannot be read or is no artefact.
    pub fn is_kind(path: &Path, kind: ArtefactKind) -> Result<bool, AotCacheError> {
        Ok(OpenContainer::open(path)?.stamp().kind == kind.name())
    }

    /// Opens an artefact of this kind that was made for this backend.
    ///
    /// # Errors
    /// As [`OpenContainer::open`]; [`AotCacheError::Mismatch`] for one of another kind, or made for another device, instruction set, precision or
    /// version.
    pub fn open(path: &Path, kind: ArtefactKind, backend: &dyn Backend) -> Result<Artefact, AotCacheError> {
        let container = OpenContainer::open(path)?;
        container.expect(&stamp(backend, storage(backend)?, kind.name()))?;
        Ok(Artefact { container })
    }

    /// Reads every weight once, on `threads` threads, and compares checksums. To be called before weights are used.
    ///
    /// # Errors
    /// As [`OpenContainer::verify_body`].
    pub fn verify(&self, threads: usize) -> Result<(), AotCacheError> {
        self.container.verify_body(threads)
    }

    /// The path.
    pub fn path(&self) -> &Path {
        self.container.path()
    }

    /// Bytes that opening reads: all but the weights.
    pub fn opened_bytes(&self) -> u64 {
        self.container.opened_bytes()
    }

    /// Size of the file.
    pub fn file_bytes(&self) -> u64 {
        self.container.file_bytes()
    }

    /// A small section by name, mapped.
    ///
    /// # Errors
    /// [`AotCacheError::Refused`] if there is none.
    pub fn file(&self, name: &str) -> Result<MappedRange, AotCacheError> {
        let missing = || self.refused(format!("it holds no {name}"));
        self.container.small_range(&format!("{FILE}{name}")).ok_or_else(missing)
    }

    /// Files that belong to the model: names and contents.
    pub fn files(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.container.small_names().filter_map(|section| {
            let name = section.strip_prefix(FILE)?;
            Some((name, self.container.small(section)?))
        })
    }

    fn refused(&self, reason: impl ToString) -> AotCacheError {
        AotCacheError::Refused { path: self.path().to_path_buf(), reason: reason.to_string() }
    }

    fn text(&self, name: &str) -> Result<&str, AotCacheError> {
        let bytes = self.container.small(name).ok_or_else(|| self.refused(format!("it holds no {name}")))?;
        std::str::from_utf8(bytes).map_err(|_| self.refused(format!("the {name} is not UTF-8")))
    }

    /// The plan, verified as a fresh one is.
    ///
    /// # Errors
    /// [`AotCacheError::Refused`].
    pub fn plan(&self) -> Result<Lir, AotCacheError> {
        parse_lir(self.text(PLAN)?).map_err(|error| self.refused(format!("the plan, {error}")))
    }

    /// The graph that was planned.
    ///
    /// # Errors
    /// [`AotCacheError::Refused`].
    pub fn graph(&self) -> Result<Graph, AotCacheError> {
        rlx_graph::text::parse(self.text(GRAPH)?).map_err(|error| self.refused(format!("the graph, {error}")))
    }

    /// The weights: raw ones mapped, the others known by name and shape, with their packed copies in place.
    ///
    /// # Errors
    /// [`AotCacheError::Refused`] for sizes that contradict each other; [`AotCacheError::Map`].
    pub fn registry(&self, backend: &dyn Backend) -> Result<WeightRegistry, AotCacheError> {
        let storage = storage(backend)?;
        let registry = WeightRegistry::new();
        let path: Arc<Path> = Arc::from(self.path());
        let wire = |error: WireError| self.refused(format!("a weight, {error}"));
        let params = self.container.small(PARAMS).ok_or_else(|| self.refused("it holds no params"))?;
        let mut from = WireReader::new(params);
        for _ in 0..from.count(24).map_err(wire)? {
            let (name, shape) = read_shape(&mut from).map_err(wire)?;
            let bytes = shape.known_dims().and_then(|dims| rlx_tensor::byte_count(&dims, shape.dtype()));
            let len = bytes.ok_or_else(|| self.refused(format!("{name} has no size")))?;
            let lazy: Arc<dyn LazyBytes> = Arc::new(OnlyPacked { len, path: Arc::clone(&path) });
            self.register(&registry, name, shape, lazy.into())?;
        }
        from.end().map_err(wire)?;
        let mut seen = BTreeSet::new();
        for LargeSection { name: section, about, content } in self.container.large()? {
            let mut from = WireReader::new(about);
            if section == RAW {
                let (name, shape) = read_shape(&mut from).map_err(wire)?;
                self.register(&registry, name, shape, WeightBytes::Mapped(content))?;
                continue;
            }
            let (param, key) = read_key(&mut from).map_err(wire)?;
            let layout = from.bytes().map_err(wire)?;
            if !seen.insert((param, key.clone())) {
                return Err(self.refused(format!("{param} is packed twice in one way")));
            }
            self.adopt(&registry, storage, param, key, layout, content)?;
        }
        Ok(registry)
    }

    fn register(
        &self,
        registry: &WeightRegistry,
        name: &str,
        shape: Shape,
        bytes: WeightBytes,
    ) -> Result<(), AotCacheError> {
        let registered = registry.register(name, shape, bytes, WeightKind::Base);
        registered.map(|_| ()).map_err(|error| self.refused(error))
    }

    fn adopt(
        &self,
        registry: &WeightRegistry,
        storage: &dyn PackedStorage,
        param: &str,
        key: PackedKey,
        layout: &[u8],
        content: MappedRange,
    ) -> Result<(), AotCacheError> {
        let handle = registry.lookup(param).ok_or_else(|| self.refused(format!("{param} has no shape")))?;
        let packed = storage.restore(layout, content).map_err(|e| self.refused(format!("{param}: {e}")))?;
        registry.adopt_packed(handle, key, packed).map_err(|error| self.refused(error))
    }

    /// The compiled graph, ready to run: no pass runs, nothing is packed or copied. Weights are verified on `threads` threads before
    /// a program reads them.
    ///
    /// # Errors
    /// As [`Artefact::plan`], [`Artefact::graph`] and [`Artefact::registry`]; params of the plan that the file lacks.
    pub fn compiled(
        self: &Arc<Self>,
        backend: &Arc<dyn Backend>,
        threads: usize,
    ) -> Result<CompiledGraph, AotCacheError> {
        let (plan, graph) = (self.plan()?, self.graph()?);
        let registry = Arc::new(self.registry(&**backend)?);
        let session = Session::with_backend(Arc::clone(backend)).with_weights(registry);
        let compiled =
            session.adopt(Arc::clone(plan.template()), graph).map_err(|error| self.refused(error))?;
        let artefact = Arc::clone(self);
        Ok(compiled.verified_by(move || Ok(artefact.verify(threads)?)))
    }
}
