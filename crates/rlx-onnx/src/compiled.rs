//! A model as one file for one machine: the graph it became, its plan and its weights as kernels read them, with the names, types and dims of
//! inputs and outputs.

use crate::OnnxModel;
use crate::error::OnnxError;
use crate::model::{Declared, DeclaredDim, Slot};
use crate::prepare::CompiledRegion;
use crate::program::{Program, Variant};
use crate::runtime::Runtime;
use crate::value::{ElementType, Value};
use rlx::aot::wire::{WireError, WireReader, WireWriter};
use rlx::aot::{AotCacheError, Artefact, ArtefactKind, ArtefactParts};
use rlx::{CompiledGraph, Session};
use rlx_tensor::{DType, DimBinding, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Once, OnceLock};

/// The file of the artefact that holds the [`Interface`].
const INTERFACE: &str = "interface";

/// Slots of a file are below this.
const MAX_SLOTS: usize = 1 << 20;
/// Numbers by which ONNX knows element types are below this.
const ELEMENT_CODES: i32 = 64;

/// Inputs by name, with their extents.
type Extents = Vec<(String, Vec<usize>)>;

/// What lies around the graph of a compiled file.
struct Interface {
    name: String,
    /// The nodes that became the graph, in a few words.
    nodes: String,
    inputs: Vec<(Slot, Declared)>,
    outputs: Vec<(Slot, Declared)>,
    /// The slots of each output of the graph.
    results: Vec<Vec<Slot>>,
    /// Inputs that are outputs, too.
    copies: Vec<(Slot, Slot)>,
    /// Outputs that are the same in every run.
    constants: Vec<(Slot, Tensor)>,
}

impl Interface {
    /// What lies around the region of a variant that runs by itself.
    fn of(program: &Program, variant: &Variant, region: &CompiledRegion) -> Result<Self, OnnxError> {
        let inputs = program.input_slots().filter(|(_, _, required)| *required);
        let outputs: Vec<(Slot, Declared)> =
            program.output_slots().map(|(slot, declared)| (slot, declared.clone())).collect();
        let wanted: BTreeSet<Slot> = outputs.iter().map(|(slot, _)| *slot).collect();
        let copied = |to: &Slot| variant.copies.iter().any(|(_, copy)| copy == to);
        let computed = |slot: &Slot| region.outputs.iter().any(|slots| slots.contains(slot));
        let mut constants = Vec::new();
        for &slot in wanted.iter().filter(|slot| !copied(slot) && !computed(slot)) {
            let value = variant.next.constants.get(slot).and_then(Option::as_ref);
            match value.and_then(|value| value.loaded().ok()) {
                Some(Value::Tensor(tensor)) => constants.push((slot, tensor)),
                _ => {
                    let named = outputs.iter().find(|(at, _)| *at == slot).map(|(_, d)| &d.name);
                    let reason =
                        format!("output {:?} is no tensor of numbers", named.unwrap_or(&String::new()));
                    return Err(OnnxError::NotOneGraph { reason });
                }
            }
        }
        Ok(Self {
            name: program.name().to_owned(),
            nodes: region.nodes.clone(),
            inputs: inputs.map(|(slot, declared, _)| (slot, declared.clone())).collect(),
            outputs,
            results: region.outputs.clone(),
            copies: variant.copies.iter().filter(|(_, to)| wanted.contains(to)).copied().collect(),
            constants,
        })
    }

    /// The same for inputs of these extents only.
    fn of_extents(mut self, extents: &Extents) -> Self {
        for (_, declared) in &mut self.inputs {
            let found = extents.iter().find(|(name, _)| *name == declared.name);
            let known = found.map(|(_, dims)| dims.iter().map(|&dim| DeclaredDim::Known(dim)).collect());
            declared.dims = known.or(declared.dims.take());
        }
        self
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut out = WireWriter::new();
        out.text(&self.name).text(&self.nodes);
        for list in [&self.inputs, &self.outputs] {
            out.u64(list.len() as u64);
            for (slot, declared) in list {
                out.u64(*slot as u64);
                write_declared(&mut out, declared);
            }
        }
        out.u64(self.results.len() as u64);
        for slots in &self.results {
            out.u64(slots.len() as u64);
            for &slot in slots {
                out.u64(slot as u64);
            }
        }
        out.u64(self.copies.len() as u64);
        for &(from, to) in &self.copies {
            out.u64(from as u64).u64(to as u64);
        }
        out.u64(self.constants.len() as u64);
        for (slot, tensor) in &self.constants {
            out.u64(*slot as u64).text(&tensor.dtype().to_string()).u64(tensor.dims().len() as u64);
            for &dim in tensor.dims() {
                out.u64(dim as u64);
            }
            out.bytes(tensor.bytes());
        }
        out.finish()
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self, WireError> {
        let mut from = WireReader::new(bytes);
        let (name, nodes) = (from.text()?.to_owned(), from.text()?.to_owned());
        let (inputs, outputs) = (read_list(&mut from)?, read_list(&mut from)?);
        let slots = |from: &mut WireReader<'_>| {
            (0..from.count(8)?).map(|_| read_slot(from)).collect::<Result<Vec<_>, _>>()
        };
        let results = (0..from.count(8)?).map(|_| slots(&mut from)).collect::<Result<_, _>>()?;
        let mut copies = Vec::new();
        for _ in 0..from.count(16)? {
            copies.push((read_slot(&mut from)?, read_slot(&mut from)?));
        }
        let mut constants = Vec::new();
        for _ in 0..from.count(32)? {
            constants.push((read_slot(&mut from)?, read_tensor(&mut from)?));
        }
        from.end()?;
        Ok(Self { name, nodes, inputs, outputs, results, copies, constants })
    }

    /// How many slots there are.
    fn slots(&self) -> usize {
        let declared = self.inputs.iter().chain(&self.outputs).map(|(slot, _)| slot);
        let copied = self.copies.iter().flat_map(|(from, to)| [from, to]);
        let constant = self.constants.iter().map(|(slot, _)| slot);
        let all = declared.chain(self.results.iter().flatten()).chain(copied).chain(constant);
        all.max().map_or(0, |last| last + 1)
    }

    /// What does not fit the graph of the file, or itself.
    fn misfit(&self, graph: &CompiledGraph) -> Option<String> {
        let slots: BTreeMap<String, Slot> =
            self.inputs.iter().map(|(slot, _)| (name_of(*slot), *slot)).collect();
        let names: BTreeSet<&str> = self.inputs.iter().map(|(_, declared)| declared.name.as_str()).collect();
        if slots.len() < self.inputs.len() || names.len() < self.inputs.len() {
            return Some("two inputs are one".to_owned());
        }
        if let Some(input) = graph.inputs().iter().find(|input| !slots.contains_key(&input.name)) {
            return Some(format!("the graph reads {:?}, which is no input", input.name));
        }
        if graph.outputs().len() != self.results.len() {
            return Some("the graph has another number of outputs".to_owned());
        }
        let mut known: BTreeSet<Slot> = slots.into_values().collect();
        if let Some((from, _)) = self.copies.iter().find(|(from, _)| !known.contains(from)) {
            return Some(format!("value {from} is copied, but no input"));
        }
        known.extend(self.copies.iter().map(|(_, to)| to));
        known.extend(self.results.iter().flatten());
        known.extend(self.constants.iter().map(|(slot, _)| slot));
        let missing = self.outputs.iter().find(|(slot, _)| !known.contains(slot));
        missing.map(|(_, declared)| format!("output {:?} is not computed", declared.name))
    }

    /// The program of this interface around a graph.
    fn program(self, graph: CompiledGraph) -> Program {
        let mut constants = vec![None; self.slots()];
        for (slot, tensor) in self.constants {
            constants[slot] = Some(Value::Tensor(tensor));
        }
        let read = |name: &String| graph.inputs().iter().any(|input| input.name == *name);
        let inputs = self.inputs.iter().map(|(slot, _)| (*slot, name_of(*slot)));
        let region = CompiledRegion {
            inputs: inputs.filter(|(_, name)| read(name)).collect(),
            outputs: self.results,
            source: graph.graph().clone(),
            graph,
            at: 0,
            moved: OnceLock::new(),
            nodes: self.nodes,
            times: OnceLock::new(),
            counted: Once::new(),
        };
        Program::of_region(self.name, self.inputs, self.outputs, region, self.copies, constants)
    }
}

/// What a region's graph calls the value of a slot.
fn name_of(slot: Slot) -> String {
    format!("v{slot}")
}

fn write_declared(out: &mut WireWriter, declared: &Declared) {
    let code = (1..ELEMENT_CODES).find(|&code| ElementType::from_onnx(code) == declared.element);
    out.text(&declared.name).u32(code.filter(|_| declared.element.is_some()).unwrap_or(0) as u32);
    out.u8(u8::from(declared.dims.is_some())).u64(declared.dims.as_ref().map_or(0, Vec::len) as u64);
    for dim in declared.dims.iter().flatten() {
        match dim {
            DeclaredDim::Known(size) => out.u8(0).u64(*size as u64),
            DeclaredDim::Named(name) => out.u8(1).text(name),
            DeclaredDim::Open => out.u8(2).u64(0),
        };
    }
}

fn read_declared(from: &mut WireReader<'_>) -> Result<Declared, WireError> {
    let name = from.text()?.to_owned();
    let element = match from.u32()? {
        0 => None,
        code => {
            let element = i32::try_from(code).ok().and_then(ElementType::from_onnx);
            Some(element.ok_or_else(|| from.fault("an unknown element type"))?)
        }
    };
    let ranked = from.u8()? != 0;
    let dims = (0..from.count(9)?).map(|_| {
        Ok(match from.u8()? {
            0 => DeclaredDim::Known(from.size()?),
            1 => DeclaredDim::Named(from.text()?.to_owned()),
            2 if from.u64()? == 0 => DeclaredDim::Open,
            _ => return Err(from.fault("an unknown dim")),
        })
    });
    let dims = dims.collect::<Result<Vec<_>, _>>()?;
    Ok(Declared { name, element, dims: ranked.then_some(dims) })
}

fn read_slot(from: &mut WireReader<'_>) -> Result<Slot, WireError> {
    let slot = from.size()?;
    if slot < MAX_SLOTS { Ok(slot) } else { Err(from.fault("a value's number is too large")) }
}

fn read_list(from: &mut WireReader<'_>) -> Result<Vec<(Slot, Declared)>, WireError> {
    let mut list = Vec::new();
    for _ in 0..from.count(29)? {
        list.push((read_slot(from)?, read_declared(from)?));
    }
    Ok(list)
}

fn read_tensor(from: &mut WireReader<'_>) -> Result<Tensor, WireError> {
    let dtype = from.text()?.parse::<DType>().map_err(|_| from.fault("an unknown dtype"))?;
    let dims = (0..from.count(8)?).map(|_| from.size()).collect::<Result<Vec<_>, _>>()?;
    let bytes = from.bytes()?;
    Tensor::from_bytes(&dims, dtype, bytes).map_err(|_| from.fault("a constant is not of its size"))
}

impl OnnxModel {
    /// Writes the model as one file for this machine, which [`OnnxModel::open`] opens. A model that is one graph over the dims of its inputs serves
    /// every size from that file; `sizes` are those its plan is written down for, 1 where none is given. Any other is compiled for the extents that
    /// `sizes` says, and serves these alone. Inputs that have a default keep it.
    ///
    /// # Errors
    /// [`OnnxError::NotOneGraph`] for a model with nodes that the host evaluates, or whose form depends on values of a run: they are named;
    /// [`OnnxError::Input`] for sizes that are missing or fit no dim; [`OnnxError::Compiled`] for a device whose weights have no stored form, or a file
    /// that cannot be written.
    pub fn write_compiled(
        &self,
        sizes: &[(String, usize)],
        path: &Path,
        threads: usize,
    ) -> Result<(), OnnxError> {
        let refused = |reason: String| Err(OnnxError::NotOneGraph { reason });
        if self.program.is_compiled() {
            return refused("it is one already".to_owned());
        }
        let (variant, binding, extents) = self.whole(sizes)?;
        let left = |nodes: &[usize]| {
            let nodes = nodes.iter().map(|&at| &self.program.nodes()[at]);
            let mut named: Vec<String> =
                nodes.map(|node| format!("node {:?} ({})", node.name, node.label())).collect();
            let more = named.len().saturating_sub(3);
            named.truncate(3);
            named.join(", ") + &if more > 0 { format!(" and {more} more") } else { String::new() }
        };
        if !variant.hosts.is_empty() {
            return refused(format!("{}: evaluated on the host between graphs", left(&variant.hosts)));
        }
        if !variant.next.remaining.is_empty() {
            let left = left(&variant.next.remaining);
            return refused(format!("{left}: compiled when a run knows the values they depend on"));
        }
        if variant.reads_values() {
            return refused("its form depends on values of an input, not on extents alone".to_owned());
        }
        let Some(region) = &variant.region else {
            return refused("nothing of it depends on its inputs, so that nothing is compiled".to_owned());
        };
        let mut interface = Interface::of(&self.program, &variant, region)?;
        if let Some(extents) = &extents {
            interface = interface.of_extents(extents);
        }
        if interface.slots() > MAX_SLOTS {
            return refused(format!("it has more than {MAX_SLOTS} values"));
        }
        let files = [(INTERFACE.to_owned(), interface.to_bytes())];
        let (kind, compiled) = (ArtefactKind::Onnx, region.graph());
        Ok(ArtefactParts { kind, compiled, binding: &binding, files: &files }.write(path, threads)?)
    }

    /// What runs the whole model, sizes of its symbols, and the extents of its inputs if it serves these alone.
    fn whole(
        &self,
        sizes: &[(String, usize)],
    ) -> Result<(Arc<Variant>, DimBinding, Option<Extents>), OnnxError> {
        let mut all = sizes.to_vec();
        for name in self.open_dims() {
            if !all.iter().any(|(known, _)| *known == name) {
                all.push((name, 1));
            }
        }
        if let Some((variant, binding)) = self.over_symbols(&self.extents(&all)?)?
            && self.planned(Arc::clone(&variant), binding.clone()).is_ok()
        {
            return Ok((variant, binding, None));
        }
        let prepared = self.prepare(sizes)?;
        Ok((Arc::clone(&prepared.variant), prepared.binding().clone(), Some(self.extents(sizes)?)))
    }

    /// Opens what [`OnnxModel::write_compiled`] wrote: nothing is imported, optimised or packed. Weights are verified before they are read.
    ///
    /// # Errors
    /// [`OnnxError::Compiled`] for a file that is damaged, made for another version, device, instruction set or precision, or no ONNX model.
    pub(crate) fn open_compiled(path: &Path, session: &Session) -> Result<Self, OnnxError> {
        let backend = session.backend();
        let artefact = Arc::new(Artefact::open(path, ArtefactKind::Onnx, &**backend)?);
        let refused = |reason: String| AotCacheError::Refused { path: path.to_path_buf(), reason };
        let interface = artefact.file(INTERFACE)?;
        let interface = Interface::from_bytes(interface.bytes())
            .map_err(|error| refused(format!("the model's names, {error}")))?;
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let graph = artefact.compiled(backend, threads)?;
        if let Some(misfit) = interface.misfit(&graph) {
            return Err(refused(misfit).into());
        }
        let runtime = Runtime::with_registry(session, Arc::clone(graph.weights()));
        runtime.note(|report| report.regions = 1);
        let program = interface.program(graph).with_bytes_read(artefact.opened_bytes());
        Ok(Self { program, runtime })
    }
}

#[cfg(test)]
mod tests;
