//! Random models: values with what is known of their numbers, nodes, and the ONNX file they make.

use prost::Message;
use rlx_onnx::proto::{
    AttributeProto, DimProto, GraphProto, ModelProto, NodeProto, OperatorSetId, ShapeProto, TensorProto,
    TensorType, TypeProto, ValueInfoProto,
};
use rlx_tensor::{DType, Tensor};

/// Version of the default domain that is written.
pub const OPSET: i64 = 20;

/// The position of a value.
pub type Id = usize;

/// A value, with bounds that hold for whoever computes it.
#[derive(Debug, Clone)]
pub struct Info {
    pub dims: Vec<usize>,
    pub dtype: DType,
    /// No element is smaller.
    pub low: f64,
    /// No element is larger.
    pub high: f64,
    /// How far a correct implementation may be from the exact result; 0: all agree to the bit but for the sign of a zero.
    pub error: f64,
}

impl Info {
    /// The largest magnitude.
    pub fn size(&self) -> f64 {
        self.low.abs().max(self.high.abs())
    }

    pub fn count(&self) -> usize {
        self.dims.iter().product()
    }

    pub fn rank(&self) -> usize {
        self.dims.len()
    }

    pub fn exact(&self) -> bool {
        self.error == 0.0
    }
}

/// An attribute's value.
#[derive(Debug, Clone)]
pub enum Attr {
    Int(i64),
    Float(f32),
    Ints(Vec<i64>),
    Text(&'static str),
    Graph(Body),
}

/// A graph within: it sees every value around it.
#[derive(Debug, Clone)]
pub struct Body {
    pub inputs: Vec<Id>,
    pub nodes: Vec<Node>,
    pub outputs: Vec<Id>,
}

/// One application of an op.
#[derive(Debug, Clone)]
pub struct Node {
    pub op: &'static str,
    /// Operands; nothing where one is left out.
    pub inputs: Vec<Option<Id>>,
    pub outputs: Vec<Id>,
    pub attrs: Vec<(&'static str, Attr)>,
}

impl Node {
    /// Operands, and what graphs within take from around them.
    pub fn reads(&self) -> Vec<Id> {
        let mut reads: Vec<Id> = self.inputs.iter().flatten().copied().collect();
        for (_, attr) in &self.attrs {
            let Attr::Graph(body) = attr else { continue };
            let made =
                |id: &Id| body.inputs.contains(id) || body.nodes.iter().any(|n| n.outputs.contains(id));
            let within = body.nodes.iter().flat_map(Node::reads).chain(body.outputs.iter().copied());
            reads.extend(within.filter(|id| !made(id)));
        }
        reads
    }
}

/// A model under construction.
#[derive(Debug, Clone, Default)]
pub struct Model {
    pub values: Vec<Info>,
    pub inputs: Vec<(Id, Tensor)>,
    pub constants: Vec<(Id, Tensor)>,
    pub nodes: Vec<Node>,
    pub outputs: Vec<Id>,
}

pub fn name(id: Id) -> String {
    format!("v{id}")
}

fn onnx_type(dtype: DType) -> i32 {
    match dtype {
        DType::F32 => 1,
        DType::U8 => 2,
        DType::I8 => 3,
        DType::I32 => 6,
        DType::I64 => 7,
        DType::Bool => 9,
        _ => 11,
    }
}

impl Model {
    /// Drops what no output needs.
    pub fn prune(&mut self) {
        let mut needed = vec![false; self.values.len()];
        self.outputs.iter().for_each(|&id| needed[id] = true);
        let mut kept = Vec::new();
        for node in self.nodes.drain(..).rev() {
            if node.outputs.iter().any(|&id| needed[id]) {
                node.reads().into_iter().for_each(|id| needed[id] = true);
                kept.push(node);
            }
        }
        kept.reverse();
        self.nodes = kept;
        self.inputs.retain(|(id, _)| needed[*id]);
        self.constants.retain(|(id, _)| needed[*id]);
    }

    /// The file. With `symbols`, extents above 1 of inputs are names, the same for the same extent. With `defaults`, inputs carry the
    /// values they were made with.
    pub fn file(&self, symbols: bool, defaults: bool) -> Vec<u8> {
        let mut graph = GraphProto { name: "random".into(), ..GraphProto::default() };
        graph.node = self.nodes.iter().map(|node| self.node_proto(node)).collect();
        graph.initializer = self.constants.iter().map(|(id, tensor)| tensor_proto(*id, tensor)).collect();
        if defaults {
            graph.initializer.extend(self.inputs.iter().map(|(id, tensor)| tensor_proto(*id, tensor)));
        }
        graph.input = self.inputs.iter().map(|(id, _)| self.declared(*id, symbols)).collect();
        graph.output = self.outputs.iter().map(|&id| self.output(id)).collect();
        let opset_import = vec![OperatorSetId { domain: String::new(), version: OPSET }];
        let model =
            ModelProto { ir_version: Some(9), graph: Some(graph), opset_import, ..ModelProto::default() };
        model.encode_to_vec()
    }

    fn output(&self, id: Id) -> ValueInfoProto {
        let tensor = TensorType { elem_type: onnx_type(self.values[id].dtype), shape: None };
        let value_type = Some(TypeProto { tensor: Some(tensor), ..TypeProto::default() });
        ValueInfoProto { name: name(id), value_type }
    }

    fn node_proto(&self, node: &Node) -> NodeProto {
        NodeProto {
            op_type: node.op.into(),
            input: node.inputs.iter().map(|id| id.map_or_else(String::new, name)).collect(),
            output: node.outputs.iter().map(|&id| name(id)).collect(),
            attribute: node.attrs.iter().map(|(name, value)| self.attribute(name, value)).collect(),
            ..NodeProto::default()
        }
    }

    fn attribute(&self, name: &str, value: &Attr) -> AttributeProto {
        let mut proto = AttributeProto { name: name.into(), ..AttributeProto::default() };
        match value {
            Attr::Int(value) => (proto.kind, proto.i) = (2, *value),
            Attr::Float(value) => (proto.kind, proto.f) = (1, *value),
            Attr::Ints(values) => (proto.kind, proto.ints) = (7, values.clone()),
            Attr::Text(text) => (proto.kind, proto.s) = (3, text.as_bytes().to_vec().into()),
            Attr::Graph(body) => {
                let graph = GraphProto {
                    name: "body".into(),
                    node: body.nodes.iter().map(|node| self.node_proto(node)).collect(),
                    input: body.inputs.iter().map(|&id| self.declared(id, false)).collect(),
                    output: body.outputs.iter().map(|&id| self.output(id)).collect(),
                    ..GraphProto::default()
                };
                (proto.kind, proto.g) = (5, Some(graph));
            }
        }
        proto
    }

    fn declared(&self, id: Id, symbols: bool) -> ValueInfoProto {
        let mut info = self.output(id);
        let dim = |&extent: &usize| match symbols && extent > 1 {
            true => DimProto { value: None, param: Some(format!("d{extent}")) },
            false => DimProto { value: Some(extent as i64), param: None },
        };
        let shape = ShapeProto { dim: self.values[id].dims.iter().map(dim).collect() };
        if let Some(tensor) = info.value_type.as_mut().and_then(|t| t.tensor.as_mut()) {
            tensor.shape = Some(shape);
        }
        info
    }
}

fn tensor_proto(id: Id, tensor: &Tensor) -> TensorProto {
    TensorProto {
        name: name(id),
        dims: tensor.dims().iter().map(|&d| d as i64).collect(),
        data_type: onnx_type(tensor.dtype()),
        raw_data: Some(tensor.bytes().to_vec().into()),
        ..TensorProto::default()
    }
}
