use super::parse;
use crate::attrs::AttrValue;
use crate::graph::Graph;
use crate::ops::binary::{Binary, BinaryOp};
use crate::ops::pad::Pad;
use proptest::prelude::*;
use rlx_tensor::{DType, Dim, Shape, Tensor};

fn sample() -> Graph {
    let mut graph = Graph::new("odd \"name\"\n");
    let rows = Dim::symbol("rows");
    let x = graph.input("layer.0/x", Shape::new(&[rows.clone(), Dim::Known(2)], DType::F32)).unwrap();
    let w = graph.param("a weight, \\ quoted", Shape::new(&[2usize], DType::F32)).unwrap();
    graph.state("k", Shape::new(&[rows.ceil_div(64), Dim::Known(2)], DType::BF16)).unwrap();
    let numbers = [0.1f32, f32::INFINITY];
    let small = graph.constant(Tensor::from_slice(&[2], &numbers).unwrap());
    graph.label(small, "small");
    let large: Vec<f32> = (0..20).map(|i| i as f32 / 3.0).collect();
    graph.constant(Tensor::from_slice(&[20], &large).unwrap());
    graph.constant(Tensor::from_slice(&[1], &[f32::from_bits(0x7fc0_1234)]).unwrap());
    let a = graph.add_one(Binary { kind: BinaryOp::Mul }, &[x, w]).unwrap();
    let b = graph.add_one(Binary { kind: BinaryOp::Add }, &[a, small]).unwrap();
    graph.label(b, "sum");
    let pad =
        Pad { before: vec![rows.clone() * 2, Dim::Known(0)], after: vec![Dim::Known(1); 2], value: -1.5e-9 };
    let padded = graph.add_one(pad, &[b]).unwrap();
    graph.set_outputs(&[("y", padded), ("z z", a)]).unwrap();
    graph
}

#[test]
fn prints_and_parses_back() {
    let text = sample().to_string();
    let again = parse(&text).unwrap();
    assert_eq!(again.to_string(), text);
    assert!(text.contains("const %3 \"small\" : f32[2] = [0.1, inf]"), "{text}");
    assert!(text.contains("@\"a weight, \\\\ quoted\""), "{text}");
    let pad = "= pad(%7) {before=dims[2*rows, 0], after=dims[1, 1], value=-1.5e-9}";
    assert!(text.contains(pad), "{text}");
    for (before, after) in sample().values().zip(again.values()) {
        assert_eq!(before.1.shape, after.1.shape);
        if let (Some(a), Some(b)) = (sample().as_const(before.0), again.as_const(after.0)) {
            assert!(a.bits_eq(b));
        }
    }
}

#[test]
fn faults_have_a_line_and_a_column() {
    let fault = |text: &str| parse(text).unwrap_err();
    let unknown = fault("graph \"g\" {\n  %0 : f32[] = sine() {}\n}\n");
    assert_eq!((unknown.line, unknown.column), (2, 16));
    assert!(unknown.reason.contains("sine"));
    let wrong = fault("graph \"g\" {\n  input @x : f32[2]\n  %1 : f16[2] = unary(@x) {kind=neg}\n}\n");
    assert_eq!((wrong.line, wrong.column), (3, 3));
    let kind = fault("graph \"g\" {\n  input @x : f32[2]\n  %1 : f32[2] = unary(@x) {kind=nag}\n}\n");
    assert!(kind.reason.contains("one of neg"), "{kind}");
    assert!(fault("graph \"g\" {\n  input @x : f32[(((((2]\n}\n").reason.contains("dim"));
    assert!(fault("graph \"g\" {\n  const %0 : f32[2] = [1.0]\n}\n").reason.contains("elements"));
    assert!(fault("graph \"g\" {\n  const %0 : f32[2] = blob 3\n}\n").reason.contains("no blob 3"));
    assert!(fault("graph \"g\" {\n  input @x : f32[]\n  input @x : f32[]\n}\n").reason.contains("taken"));
    assert!(fault("graph \"g").reason.contains("quotes"));
}

#[test]
fn floats_keep_their_bits() {
    for bits in [
        0u64,
        1 << 63,
        0x7ff0_0000_0000_0000,
        0x7ff8_0000_0000_0000,
        0xfff8_0000_0000_0001,
        0x3ff1_2345_6789_abcd,
    ] {
        let value = f64::from_bits(bits);
        let text = format!(
            "graph \"g\" {{\n  input @x : f32[]\n  %1 : f32[] = pad(@x) {{before=dims[], after=dims[], value={}}}\n}}\n",
            super::float_text(value)
        );
        let graph = parse(&text).unwrap();
        let (_, node) = graph.nodes().next().unwrap();
        let Some((_, AttrValue::Float(read))) = node.op.def().attrs().into_iter().next_back() else {
            panic!()
        };
        assert_eq!(read.to_bits(), bits);
        assert_eq!(graph.to_string(), text);
    }
}

proptest! {
    #[test]
    fn damaged_text_never_panics(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0u8..4), 1..6)) {
        let mut text: Vec<char> = sample().to_string().chars().collect();
        for (at, other, how) in edits {
            if text.is_empty() {
                break;
            }
            let (i, j) = (at.index(text.len()), other.index(text.len()));
            match how {
                0 => { text.remove(i); }
                1 => text.swap(i, j),
                2 => { let c = text[j]; text.insert(i, c); }
                _ => text.truncate(i.max(1)),
            }
        }
        let text: String = text.into_iter().collect();
        if let Ok(graph) = parse(&text) {
            let printed = graph.to_string();
            prop_assert_eq!(parse(&printed).map(|g| g.to_string()), Ok(printed));
        }
    }

    #[test]
    fn shuffled_words_never_panic(words in prop::collection::vec(0usize..60, 0..80)) {
        let sample = sample().to_string();
        let pieces: Vec<&str> = sample.split_inclusive([' ', ',', '(']).collect();
        let text: String = words.iter().map(|&w| pieces[w % pieces.len()]).collect();
        prop_assert!(parse(&text).is_err() || text.contains("graph"));
    }
}
