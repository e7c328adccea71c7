//! A model file becomes a program: names become slots, functions are written out, subgraphs become programs of their own.

use crate::decode::{self, ExternalData};
use crate::error::OnnxError;
use crate::model::{Attr, Declared, DeclaredDim, NodeDef, Slot};
use crate::program::Program;
use crate::proto::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetId, TypeProto,
    ValueInfoProto,
};
use crate::value::{ElementType, Value};
use bytes::Bytes;
use prost::Message;
use rlx_tensor::storage::mapped::MappedFile;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

/// Graphs within graphs, functions within functions: more than this is refused.
const DEPTH: usize = 24;
/// Nodes after functions are written out.
const NODES: usize = 1 << 20;

/// Reads a model file.
pub fn open(path: &Path) -> Result<Program, OnnxError> {
    let file = MappedFile::open(path)?;
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let bytes = Bytes::from_owner(Whole(Arc::clone(&file)));
    from_bytes(bytes, ExternalData::within(folder).beside(&file))
}

/// A file as bytes that messages are decoded from without copying them.
struct Whole(Arc<MappedFile>);

impl AsRef<[u8]> for Whole {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
    }
}

/// Reads a model.
pub fn from_bytes(bytes: Bytes, external: ExternalData) -> Result<Program, OnnxError> {
    let model = ModelProto::decode(bytes).map_err(|e| OnnxError::Malformed { reason: e.to_string() })?;
    from_model(&model, external)
}

/// Imports a decoded model.
pub fn from_model(model: &ModelProto, external: ExternalData) -> Result<Program, OnnxError> {
    let graph = model.graph.as_ref().ok_or_else(|| OnnxError::Malformed { reason: "no graph".into() })?;
    if model.opset_import.is_empty() && model.ir_version.is_none() {
        return Err(OnnxError::Malformed { reason: "neither an IR version nor opsets".into() });
    }
    let mut functions = HashMap::new();
    for function in &model.functions {
        functions.insert(function_key(&function.domain, &function.name, &function.overload), function);
    }
    let mut shared = Shared { functions, external, nodes: 0 };
    let scope = Scope { opsets: opsets(&model.opset_import), attrs: HashMap::new(), depth: 0 };
    let mut none = |_: &str| None;
    let program = Builder::import(graph, &mut shared, &scope, &mut none)?;
    Ok(program.with_bytes_read(shared.external.bytes_read()))
}

fn domain_of(text: &str) -> &str {
    if text == "ai.onnx" { "" } else { text }
}

fn function_key(domain: &str, name: &str, overload: &str) -> (String, String, String) {
    (domain_of(domain).to_owned(), name.to_owned(), overload.to_owned())
}

fn opsets(imports: &[OperatorSetId]) -> HashMap<String, i64> {
    imports.iter().map(|i| (domain_of(&i.domain).to_owned(), i.version)).collect()
}

/// What the whole import shares.
struct Shared<'m> {
    functions: HashMap<(String, String, String), &'m FunctionProto>,
    external: ExternalData,
    nodes: usize,
}

/// What holds within one function body or graph.
#[derive(Clone)]
struct Scope<'m> {
    opsets: HashMap<String, i64>,
    attrs: HashMap<String, &'m AttributeProto>,
    depth: usize,
}

/// Looks a name up in the graph around; gives its slot there.
type Outer<'o> = &'o mut dyn FnMut(&str) -> Option<Slot>;

#[derive(Default)]
struct Builder {
    slots: Vec<String>,
    constants: Vec<(Slot, Value)>,
    captures: Vec<(Slot, Slot)>,
    nodes: Vec<NodeDef>,
}

/// Names of one graph or function body.
type Names = HashMap<String, Option<Slot>>;

impl Builder {
    fn import<'m>(
        graph: &'m GraphProto,
        shared: &mut Shared<'m>,
        scope: &Scope<'m>,
        outer: Outer<'_>,
    ) -> Result<Program, OnnxError> {
        let fail = |reason: String| OnnxError::Graph { graph: graph.name.clone(), reason };
        if scope.depth > DEPTH {
            return Err(fail(format!("graphs and functions are nested deeper than {DEPTH}")));
        }
        let mut builder = Builder::default();
        let mut names = Names::new();
        let mut initial: HashMap<&str, Value> = HashMap::new();
        for proto in &graph.initializer {
            let value = decode::initialiser(proto, &mut shared.external)?;
            if initial.insert(&proto.name, value).is_some() {
                return Err(fail(format!("initialiser {:?} is given twice", proto.name)));
            }
        }
        for proto in &graph.sparse_initializer {
            let (_, value) = decode::sparse(proto, &mut shared.external)?;
            let name = proto.values.as_ref().map_or("", |v| v.name.as_str());
            if initial.insert(name, value).is_some() {
                return Err(fail(format!("initialiser {name:?} is given twice")));
            }
        }
        let mut inputs = Vec::new();
        for info in &graph.input {
            let default = initial.remove(info.name.as_str());
            let slot = builder.define(&mut names, &info.name).map_err(fail)?;
            inputs.push((slot, declared(info), default));
        }
        let mut ordered: Vec<_> = initial.into_iter().collect();
        ordered.sort_by_key(|(name, _)| *name);
        for (name, value) in ordered {
            let slot = builder.define(&mut names, name).map_err(fail)?;
            builder.constants.push((slot, value));
        }
        builder.nodes(&graph.node, &mut names, shared, scope, outer)?;
        let mut outputs = Vec::new();
        for info in &graph.output {
            let slot = builder.resolve(&mut names, &info.name, outer);
            let slot =
                slot.flatten().ok_or_else(|| fail(format!("output {:?} is never produced", info.name)))?;
            outputs.push((slot, declared(info)));
        }
        Ok(Program::new(
            graph.name.clone(),
            builder.slots,
            inputs,
            builder.captures,
            outputs,
            builder.constants,
            builder.nodes,
        ))
    }

    fn fresh(&mut self, name: &str) -> Slot {
        self.slots.push(name.to_owned());
        self.slots.len() - 1
    }

    fn define(&mut self, names: &mut Names, name: &str) -> Result<Slot, String> {
        if names.contains_key(name) {
            return Err(format!("value {name:?} is defined twice"));
        }
        let slot = self.fresh(name);
        names.insert(name.to_owned(), Some(slot));
        Ok(slot)
    }

    /// The slot of a name, taken from around if it is not known here. The inner `None`: an operand that a function call left out.
    fn resolve(&mut self, names: &mut Names, name: &str, outer: Outer<'_>) -> Option<Option<Slot>> {
        if let Some(known) = names.get(name) {
            return Some(*known);
        }
        let around = outer(name)?;
        let slot = self.fresh(name);
        self.captures.push((around, slot));
        names.insert(name.to_owned(), Some(slot));
        Some(Some(slot))
    }

    fn nodes<'m>(
        &mut self,
        protos: &'m [NodeProto],
        names: &mut Names,
        shared: &mut Shared<'m>,
        scope: &Scope<'m>,
        outer: Outer<'_>,
    ) -> Result<(), OnnxError> {
        for proto in protos {
            shared.nodes += 1;
            if shared.nodes > NODES {
                return Err(OnnxError::Malformed { reason: format!("more than {NODES} nodes") });
            }
            self.node(proto, names, shared, scope, outer)?;
        }
        Ok(())
    }

    fn node<'m>(
        &mut self,
        proto: &'m NodeProto,
        names: &mut Names,
        shared: &mut Shared<'m>,
        scope: &Scope<'m>,
        outer: Outer<'_>,
    ) -> Result<(), OnnxError> {
        let domain = domain_of(&proto.domain);
        let label = node_label(proto);
        let fail = |reason: String| OnnxError::Node {
            node: label.clone(),
            op: if domain.is_empty() {
                proto.op_type.clone()
            } else {
                format!("{domain}::{}", proto.op_type)
            },
            reason,
        };
        let mut inputs = Vec::with_capacity(proto.input.len());
        for name in &proto.input {
            let slot = match name.as_str() {
                "" => None,
                name => self.resolve(names, name, outer).ok_or_else(|| {
                    fail(format!("operand {name:?} is not defined before it (missing, or part of a cycle)"))
                })?,
            };
            inputs.push(slot);
        }
        let key = function_key(domain, &proto.op_type, &proto.overload);
        if let Some(&function) = shared.functions.get(&key)
            && !crate::ops::is_known(domain, &proto.op_type)
        {
            return self.call(function, proto, &inputs, names, shared, scope);
        }
        let opset = match scope.opsets.get(domain) {
            Some(version) => *version,
            None if domain.is_empty() || crate::ops::is_known(domain, &proto.op_type) => 1,
            None => return Err(fail(format!("domain {domain:?} is not imported by the model"))),
        };
        let (attrs, captures) = self.attributes(proto, names, shared, scope, outer)?;
        let mut outputs = Vec::with_capacity(proto.output.len());
        for name in &proto.output {
            let slot = if name.is_empty() { None } else { Some(self.define(names, name).map_err(&fail)?) };
            outputs.push(slot);
        }
        self.nodes.push(NodeDef {
            name: label.clone(),
            op: proto.op_type.clone(),
            domain: domain.to_owned(),
            opset,
            inputs,
            captures,
            outputs,
            attrs,
        });
        Ok(())
    }

    /// Writes out a call of a function of the model.
    fn call<'m>(
        &mut self,
        function: &'m FunctionProto,
        proto: &'m NodeProto,
        inputs: &[Option<Slot>],
        names: &mut Names,
        shared: &mut Shared<'m>,
        scope: &Scope<'m>,
    ) -> Result<(), OnnxError> {
        let fail = |reason: String| OnnxError::Node {
            node: node_label(proto),
            op: format!("{}::{}", function.domain, function.name),
            reason,
        };
        if scope.depth > DEPTH {
            return Err(fail(format!("functions call each other deeper than {DEPTH}")));
        }
        let mut attrs: HashMap<String, &AttributeProto> =
            function.attribute_proto.iter().map(|a| (a.name.clone(), a)).collect();
        for attr in &proto.attribute {
            match attr.ref_attr_name.as_str() {
                "" => {
                    attrs.insert(attr.name.clone(), attr);
                }
                outer => {
                    if let Some(&given) = scope.attrs.get(outer) {
                        attrs.insert(attr.name.clone(), given);
                    }
                }
            }
        }
        let mut opsets = opsets(&function.opset_import);
        if opsets.is_empty() {
            opsets = scope.opsets.clone();
        }
        let inner = Scope { opsets, attrs, depth: scope.depth + 1 };
        let mut own = Names::new();
        for (i, name) in function.input.iter().enumerate() {
            own.insert(name.clone(), inputs.get(i).copied().flatten());
        }
        let mut none = |_: &str| None;
        self.nodes(&function.node, &mut own, shared, &inner, &mut none)?;
        for (formal, actual) in function.output.iter().zip(&proto.output) {
            if actual.is_empty() {
                continue;
            }
            let slot = own.get(formal).copied().flatten();
            let slot = slot.ok_or_else(|| fail(format!("the function never produces {formal:?}")))?;
            if names.insert(actual.clone(), Some(slot)).is_some() {
                return Err(fail(format!("value {actual:?} is defined twice")));
            }
        }
        Ok(())
    }

    fn attributes<'m>(
        &mut self,
        proto: &'m NodeProto,
        names: &mut Names,
        shared: &mut Shared<'m>,
        scope: &Scope<'m>,
        outer: Outer<'_>,
    ) -> Result<(BTreeMap<String, Attr>, Vec<Slot>), OnnxError> {
        let mut attrs = BTreeMap::new();
        let mut captures: BTreeMap<&str, Vec<Slot>> = BTreeMap::new();
        for attr in &proto.attribute {
            let given = match attr.ref_attr_name.as_str() {
                "" => attr,
                name => match scope.attrs.get(name) {
                    Some(given) => given,
                    None => continue,
                },
            };
            let value = match given.kind {
                5 => {
                    let graph = given.g.as_ref().ok_or_else(|| OnnxError::Malformed {
                        reason: format!("attribute {:?} holds no graph", attr.name),
                    })?;
                    let inner = Scope { depth: scope.depth + 1, ..scope.clone() };
                    let mut around = |name: &str| self.resolve(names, name, outer).flatten();
                    let program = Builder::import(graph, shared, &inner, &mut around)?;
                    let taken = program.captures().iter().map(|(around, _)| *around);
                    captures.insert(&attr.name, taken.collect());
                    Attr::Graph(Arc::new(program))
                }
                _ => plain_attribute(given, &mut shared.external)?,
            };
            attrs.insert(attr.name.clone(), value);
        }
        Ok((attrs, captures.into_values().flatten().collect()))
    }
}

fn node_label(proto: &NodeProto) -> String {
    match proto.name.as_str() {
        "" => proto.output.iter().find(|o| !o.is_empty()).cloned().unwrap_or_default(),
        name => name.to_owned(),
    }
}

fn plain_attribute(attr: &AttributeProto, external: &mut ExternalData) -> Result<Attr, OnnxError> {
    let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
    let tensor = |external: &mut ExternalData| match &attr.t {
        Some(proto) => decode::tensor(proto, external).map(Attr::Tensor),
        None => Err(OnnxError::Malformed { reason: format!("attribute {:?} holds no tensor", attr.name) }),
    };
    Ok(match attr.kind {
        1 => Attr::Float(attr.f),
        2 => Attr::Int(attr.i),
        3 => Attr::Text(text(&attr.s)),
        4 => tensor(external)?,
        6 => Attr::Floats(attr.floats.clone()),
        7 => Attr::Ints(attr.ints.clone()),
        8 => Attr::Texts(attr.strings.iter().map(text).collect()),
        11 => {
            let proto = attr.sparse_tensor.clone().unwrap_or_default();
            Attr::Tensor(decode::sparse(&proto, external)?.1)
        }
        13 => Attr::Type(attr.tp.as_ref().and_then(element_of)),
        kind => Attr::Other(kind),
    })
}

fn element_of(proto: &TypeProto) -> Option<ElementType> {
    if let Some(tensor) = &proto.tensor {
        return ElementType::from_onnx(tensor.elem_type);
    }
    let inner = proto.sequence.as_ref().or(proto.optional.as_ref())?;
    element_of(inner.elem_type.as_ref()?)
}

fn declared(info: &ValueInfoProto) -> Declared {
    let tensor = info.value_type.as_ref().and_then(|t| t.tensor.as_ref());
    let dim = |d: &crate::proto::DimProto| match (d.value, &d.param) {
        (Some(v), _) if v >= 0 => DeclaredDim::Known(v as usize),
        (_, Some(name)) if !name.is_empty() => DeclaredDim::Named(name.clone()),
        _ => DeclaredDim::Open,
    };
    Declared {
        name: info.name.clone(),
        element: tensor.and_then(|t| ElementType::from_onnx(t.elem_type)),
        dims: tensor.and_then(|t| t.shape.as_ref()).map(|s| s.dim.iter().map(dim).collect()),
    }
}
