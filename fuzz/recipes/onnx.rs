//! Models that were well formed until a few of their fields were changed, and what the importer must do with any bytes: for the runner of
//! many inputs.

use prost::Message;
use rlx::Session;
use rlx_onnx::proto::{
    AttributeProto, DimProto, ElementOf, EntryProto, FunctionProto, GraphProto, ModelProto, NodeProto,
    OperatorSetId, SparseTensorProto, TensorProto, TensorType, TypeProto,
};
use rlx_onnx::{NodeDef, OnnxModel};
use std::path::Path;

#[path = "random.rs"]
mod random;

use random::Random as Bits;

/// What changes are drawn from.
pub struct Random(Bits);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(Bits(seed.wrapping_mul(0xD134_2543_DE82_EF95)))
    }

    fn below(&mut self, end: usize) -> usize {
        self.0.below(end)
    }

    fn one<'a, T>(&mut self, list: &'a [T]) -> Option<&'a T> {
        list.get(self.below(list.len()))
    }

    fn one_mut<'a, T>(&mut self, list: &'a mut [T]) -> Option<&'a mut T> {
        let at = self.below(list.len());
        list.get_mut(at)
    }

    /// A number that tests tend to forget, or a small one.
    fn number(&mut self) -> i64 {
        const RARE: [i64; 14] = [
            -1,
            0,
            1,
            -2,
            1 << 16,
            1 << 20,
            (1 << 31) - 1,
            1 << 31,
            1 << 32,
            1 << 40,
            i64::MAX,
            i64::MIN,
            i64::MAX / 2,
            -(1 << 31),
        ];
        if self.below(2) == 0 { RARE[self.below(RARE.len())] } else { self.below(9) as i64 }
    }

    fn float(&mut self) -> f32 {
        const RARE: [f32; 8] = [0.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 1e-45, -1.0];
        RARE[self.below(RARE.len())]
    }
}

/// Models to change.
pub struct Corpus {
    models: Vec<ModelProto>,
    ops: Vec<(String, String)>,
}

impl Corpus {
    /// Every `model.onnx` of the folders below these.
    pub fn of(folders: &[&Path]) -> Self {
        let mut models = Vec::new();
        for folder in folders {
            let mut files: Vec<_> =
                std::fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").path()).collect();
            files.sort();
            for file in files {
                let Ok(bytes) = std::fs::read(file.join("model.onnx")) else { continue };
                models.push(ModelProto::decode(&bytes[..]).expect("a model"));
            }
        }
        let nodes = models.iter().flat_map(|m| m.graph.iter().flat_map(|g| &g.node));
        let mut ops: Vec<_> = nodes.map(|n| (n.domain.clone(), n.op_type.clone())).collect();
        ops.extend(MORE_OPS.iter().map(|op| (String::new(), (*op).to_owned())));
        ops.sort();
        ops.dedup();
        Corpus { models, ops }
    }

    pub fn len(&self) -> usize {
        self.models.len()
    }
}

/// Ops that no model of the corpus may have, of every family of the table.
const MORE_OPS: [&str; 48] = [
    "Add",
    "ArgMax",
    "BatchNormalization",
    "Cast",
    "CastLike",
    "Clip",
    "Compress",
    "Concat",
    "ConstantOfShape",
    "CumSum",
    "DFT",
    "DepthToSpace",
    "Einsum",
    "Expand",
    "EyeLike",
    "Flatten",
    "Gather",
    "GatherND",
    "GridSample",
    "Identity",
    "If",
    "LRN",
    "Loop",
    "MaxPool",
    "MaxUnpool",
    "MelWeightMatrix",
    "NonMaxSuppression",
    "NonZero",
    "OneHot",
    "Pad",
    "Range",
    "ReduceSum",
    "Reshape",
    "Resize",
    "RoiAlign",
    "Scan",
    "SequenceConstruct",
    "Shape",
    "Slice",
    "SpaceToDepth",
    "Split",
    "Squeeze",
    "STFT",
    "Tile",
    "TopK",
    "Transpose",
    "Unique",
    "Where",
];

/// A model of the corpus with a few fields changed, as bytes of which some may be changed as well.
pub fn mutated(random: &mut Random, corpus: &Corpus) -> Vec<u8> {
    let mut model = random.one(&corpus.models).cloned().unwrap_or_default();
    for _ in 0..1 + random.below(4) {
        change(random, corpus, &mut model);
    }
    let mut bytes = model.encode_to_vec();
    if random.below(8) == 0 {
        for _ in 0..1 + random.below(4) {
            let at = random.below(bytes.len());
            match random.below(3) {
                0 => bytes.truncate(at),
                1 if bytes.len() < 1 << 16 => bytes.extend_from_within(at..),
                _ => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = random.0.word() as u8),
            }
        }
    }
    bytes
}

fn change(random: &mut Random, corpus: &Corpus, model: &mut ModelProto) {
    match random.below(12) {
        0 => match random.one_mut(&mut model.opset_import) {
            Some(opset) => opset.version = random.number(),
            None => model.opset_import.push(OperatorSetId { domain: String::new(), version: 21 }),
        },
        1 => function(random, model),
        2 => nest(random, model),
        _ => {
            let Some(graph) = &mut model.graph else { return };
            let graph = inner(random, graph, 0);
            change_graph(random, corpus, graph);
        }
    }
}

/// The graph or one within it.
fn inner<'g>(random: &mut Random, graph: &'g mut GraphProto, depth: usize) -> &'g mut GraphProto {
    let within = |node: &NodeProto| node.attribute.iter().position(|a| a.g.is_some());
    let at = graph.node.iter().enumerate().find_map(|(i, node)| Some((i, within(node)?)));
    match at {
        Some((node, attr)) if depth < 8 && random.below(2) == 0 => {
            let graph = graph.node[node].attribute[attr].g.as_mut().expect("it was there");
            inner(random, graph, depth + 1)
        }
        _ => graph,
    }
}

/// Wraps the graph into branches, more or fewer than may be nested; or gives an input a deep type.
fn nest(random: &mut Random, model: &mut ModelProto) {
    let Some(graph) = &mut model.graph else { return };
    if random.below(2) == 0 {
        let mut kind = TypeProto::default();
        for _ in 0..random.below(60) {
            kind = TypeProto {
                sequence: Some(Box::new(ElementOf { elem_type: Some(Box::new(kind)) })),
                ..TypeProto::default()
            };
        }
        if let Some(info) = random.one_mut(&mut graph.input) {
            info.value_type = Some(kind);
        }
        return;
    }
    for _ in 0..random.below(40) {
        let names: Vec<String> = graph.output.iter().map(|info| info.name.clone()).collect();
        let (input, output) = (graph.input.clone(), graph.output.clone());
        let mut body = std::mem::take(graph);
        body.input.clear();
        let branch = |name: &str, body: &GraphProto| AttributeProto {
            name: name.to_owned(),
            kind: 5,
            g: Some(body.clone()),
            ..AttributeProto::default()
        };
        let condition = random.one(&input).map_or_else(String::new, |info| info.name.clone());
        let node = NodeProto {
            op_type: "If".to_owned(),
            input: vec![condition],
            output: names,
            attribute: vec![branch("then_branch", &body)],
            ..NodeProto::default()
        };
        *graph = GraphProto { node: vec![node], input, output, ..GraphProto::default() };
    }
}

/// A function of the name of one of the nodes, which may call itself.
fn function(random: &mut Random, model: &mut ModelProto) {
    let Some(graph) = &mut model.graph else { return };
    let body = graph.node.clone();
    let Some(node) = random.one_mut(&mut graph.node) else { return };
    if random.below(2) == 0 {
        node.domain = "own".to_owned();
    }
    let body = if random.below(2) == 0 { body } else { vec![node.clone(), node.clone()] };
    let function = FunctionProto {
        name: node.op_type.clone(),
        domain: node.domain.clone(),
        input: node.input.clone(),
        output: node.output.clone(),
        attribute: node.attribute.iter().map(|a| a.name.clone()).collect(),
        node: body,
        opset_import: model.opset_import.clone(),
        ..FunctionProto::default()
    };
    if node.domain == "own" {
        model.opset_import.push(OperatorSetId { domain: "own".to_owned(), version: 1 });
    }
    model.functions.push(function);
}

fn names_of(graph: &GraphProto) -> Vec<String> {
    let nodes = graph.node.iter().flat_map(|n| n.output.iter().chain(&n.input));
    let infos = graph.input.iter().chain(&graph.output).map(|info| &info.name);
    nodes.chain(infos).chain(graph.initializer.iter().map(|t| &t.name)).cloned().collect()
}

fn change_graph(random: &mut Random, corpus: &Corpus, graph: &mut GraphProto) {
    let names = names_of(graph);
    match random.below(16) {
        0 => {
            let name = random.one(&names).cloned().unwrap_or_default();
            if let Some(input) = random.one_mut(&mut graph.node).and_then(|n| random.one_mut(&mut n.input)) {
                *input = name;
            }
        }
        1 => {
            let name = random.one(&names).cloned().unwrap_or_default();
            if let Some(output) = random.one_mut(&mut graph.node).and_then(|n| random.one_mut(&mut n.output))
            {
                *output = name;
            }
        }
        2 | 3 => {
            let op = random.one(&corpus.ops).cloned().unwrap_or_default();
            if let Some(node) = random.one_mut(&mut graph.node) {
                (node.domain, node.op_type) = op;
            }
        }
        4 => graft(random, corpus, graph, &names),
        5 => {
            let (a, b) = (random.below(graph.node.len()), random.below(graph.node.len()));
            match random.below(3) {
                0 if a < graph.node.len() => drop(graph.node.remove(a)),
                1 if a.max(b) < graph.node.len() => graph.node.swap(a, b),
                _ => graph.node.extend(graph.node.get(a).cloned()),
            }
        }
        6 => {
            let which = random.below(2) == 0;
            let list = if which { &mut graph.input } else { &mut graph.output };
            if let Some(info) = random.one_mut(list) {
                change_type(random, info.value_type.get_or_insert_default());
            }
        }
        7 => {
            if let Some(tensor) = random.one(&graph.initializer).cloned() {
                let dims = (0..random.below(4)).map(|_| random.number()).collect();
                let sparse = SparseTensorProto { indices: Some(tensor.clone()), values: Some(tensor), dims };
                graph.sparse_initializer.push(sparse);
            }
        }
        8 | 9 => {
            if let Some(tensor) = random.one_mut(&mut graph.initializer) {
                change_tensor(random, tensor);
            }
        }
        10 => {
            if let Some(node) = random.one_mut(&mut graph.node) {
                let name = random.one(&names).cloned().unwrap_or_default();
                match random.below(3) {
                    0 => node.input.push(name),
                    1 => drop(node.input.pop()),
                    _ => node.output.push(name),
                }
            }
        }
        _ => {
            if let Some(node) = random.one_mut(&mut graph.node) {
                change_attributes(random, corpus, node);
            }
        }
    }
}

/// A node of another model, which reads values of this one.
fn graft(random: &mut Random, corpus: &Corpus, graph: &mut GraphProto, names: &[String]) {
    let Some(other) = random.one(&corpus.models).and_then(|m| m.graph.as_ref()) else { return };
    let Some(mut node) = random.one(&other.node).cloned() else { return };
    node.input.iter_mut().for_each(|input| *input = random.one(names).cloned().unwrap_or_default());
    let at = random.below(graph.node.len() + 1);
    if random.below(2) == 0
        && let Some(output) = graph.output.first_mut()
        && let Some(made) = node.output.first()
    {
        output.name = made.clone();
    }
    graph.node.insert(at, node);
}

fn change_type(random: &mut Random, kind: &mut TypeProto) {
    let tensor: &mut TensorType = kind.tensor.get_or_insert_default();
    match random.below(4) {
        0 => tensor.elem_type = random.below(28) as i32 - 1,
        1 => tensor.shape = None,
        _ => {
            let dims = &mut tensor.shape.get_or_insert_default().dim;
            let dim = match random.below(3) {
                0 => DimProto { value: None, param: Some("n".to_owned()) },
                1 => DimProto::default(),
                _ => DimProto { value: Some(random.number()), param: None },
            };
            match random.one_mut(dims) {
                Some(found) if random.below(4) > 0 => *found = dim,
                _ => dims.push(dim),
            }
        }
    }
}

fn change_tensor(random: &mut Random, tensor: &mut TensorProto) {
    match random.below(7) {
        0 => match random.one_mut(&mut tensor.dims) {
            Some(dim) => *dim = random.number(),
            None => tensor.dims.push(random.number()),
        },
        1 => tensor.data_type = random.below(28) as i32 - 1,
        2 => {
            tensor.data_location = 1;
            let location = *random.one(&["../secret", "/etc/hostname", "data", "", "\0"]).unwrap_or(&"");
            for (key, value) in [("location", location), ("offset", "18446744073709551615"), ("length", "8")]
            {
                tensor.external_data.push(EntryProto { key: key.to_owned(), value: value.to_owned() });
            }
        }
        3 | 4 => {
            // Numbers in place of what stands there: extents, axes and places are such tensors.
            let count = tensor.dims.iter().product::<i64>().clamp(0, 8) as usize;
            let numbers: Vec<i64> = (0..count).map(|_| random.number()).collect();
            if tensor.data_type == 7 {
                tensor.raw_data = None;
                tensor.int64_data = numbers;
            } else if tensor.data_type == 1 {
                tensor.raw_data = None;
                tensor.float_data = (0..count).map(|_| random.float()).collect();
            }
        }
        5 => {
            let mut raw = tensor.raw_data.take().unwrap_or_default().to_vec();
            raw.truncate(random.below(raw.len() + 1));
            tensor.raw_data = Some(raw.into());
        }
        _ => drop(tensor.dims.pop()),
    }
}

fn change_attributes(random: &mut Random, corpus: &Corpus, node: &mut NodeProto) {
    if node.attribute.is_empty() || random.below(4) == 0 {
        let other = random.one(&corpus.models).and_then(|m| m.graph.as_ref());
        let from = other.and_then(|graph| random.one(&graph.node));
        node.attribute.extend(from.and_then(|node| random.one(&node.attribute)).cloned());
        return;
    }
    let at = random.below(node.attribute.len());
    let attr = &mut node.attribute[at];
    match random.below(8) {
        0 => drop(node.attribute.remove(at)),
        1 => attr.kind = random.below(16) as i32,
        2 => attr.f = random.float(),
        3 => {
            attr.s = random
                .one(&["", "SAME_UPPER", "VALID", "linear", "i,j->k", "\u{1F980}"])
                .map_or("", |s| s)
                .into()
        }
        4 => match attr.t.as_mut() {
            Some(tensor) => change_tensor(random, tensor),
            None => attr.ref_attr_name = "alpha".to_owned(),
        },
        5 => attr.i = random.number(),
        _ if attr.ints.is_empty() => attr.i = random.number(),
        _ => match random.below(3) {
            0 => attr.ints.push(random.number()),
            1 => drop(attr.ints.pop()),
            _ => {
                let number = random.number();
                if let Some(found) = random.one_mut(&mut attr.ints) {
                    *found = number;
                }
            }
        },
    }
}

/// What became of an input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Refused while it was imported.
    Refused,
    /// Imported, and not planned for the extents it declares.
    Imported,
    /// Planned.
    Planned,
}

/// Extents of inputs that are planned for have at most this many elements together.
const ELEMENTS: usize = 1 << 16;

/// Imports any bytes, and plans what is imported if its inputs are small.
pub fn check(bytes: &[u8], session: &Session) -> Outcome {
    let Ok(model) = OnnxModel::from_bytes(bytes, session) else { return Outcome::Refused };
    let sizes: Vec<(String, usize)> = model.open_dims().into_iter().map(|name| (name, 2)).collect();
    let Ok(extents) = model.extents(&sizes) else { return Outcome::Imported };
    let elements = extents.iter().map(|(_, dims)| dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d)));
    let small =
        elements.into_iter().try_fold(0usize, |sum, n| sum.checked_add(n?)).is_some_and(|n| n <= ELEMENTS);
    // Loops run as long as a file says.
    if !small || model.program().nodes().iter().any(|node: &NodeDef| node.op == "Loop") {
        return Outcome::Imported;
    }
    match model.prepare(&sizes) {
        Ok(_) => Outcome::Planned,
        Err(_) => Outcome::Imported,
    }
}
