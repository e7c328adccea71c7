//! Integers: what the reference evaluation gives where a word holds it, and otherwise no result at all.

use crate::emulated;
use crate::lower::BEYOND;
use rlx::backend::reference::ReferenceBackend;
use rlx::{CompiledGraph, Session, SessionError, TensorArg};
use rlx_graph::Graph;
use rlx_graph::eval::{from_i64, to_i64};
use rlx_tensor::{DType, Tensor};
use std::sync::Arc;

/// Numbers at which 32 bits and narrower ones run out, and whose products or sums do.
const EDGES: [i64; 17] = [
    0,
    1,
    -1,
    2,
    -3,
    7,
    127,
    -128,
    255,
    46_340,
    46_341,
    -46_341,
    65_535,
    1 << 30,
    i32::MAX as i64,
    i32::MIN as i64,
    i32::MAX as i64 - 1,
];

const WIDE: [DType; 3] = [DType::I64, DType::U64, DType::U32];
const NARROW: [DType; 5] = [DType::I32, DType::I16, DType::U16, DType::I8, DType::U8];

struct Pair {
    device: CompiledGraph,
    reference: CompiledGraph,
}

impl Pair {
    fn new(text: &str) -> Pair {
        let graph: Graph = text.parse().unwrap_or_else(|e| panic!("{e}\n{text}"));
        let compile = |backend| Session::with_backend(backend).compile(&graph);
        let device = compile(emulated()).unwrap_or_else(|e| panic!("{e}\n{text}"));
        let reference = compile(Arc::new(ReferenceBackend::default())).unwrap();
        Pair { device, reference }
    }

    /// What both give must be equal, or refused by the device where a word does not hold what the reference gives; whether it was.
    fn agrees(&self, inputs: &[Tensor]) -> bool {
        let names = ["x", "y"];
        let args: Vec<(&str, TensorArg<'_>)> = names.into_iter().zip(inputs.iter().map(Into::into)).collect();
        let expected = self.reference.run(&args).unwrap().remove(0).1;
        let holds = !is_wide(expected.dtype()) || fits(&expected);
        match self.device.run(&args) {
            Ok(found) => {
                assert_eq!(found[0].1.bytes(), expected.bytes(), "{inputs:?}\n{}", self.device.graph());
                assert!(holds, "{inputs:?} gave {found:?}\n{}", self.device.graph());
                true
            }
            Err(error) => {
                refused_by_name(&error);
                false
            }
        }
    }
}

/// Whether words hold every element; those of u64 beyond 63 bits are read as if they were negative.
fn fits(tensor: &Tensor) -> bool {
    let least = if tensor.dtype() == DType::U64 { 0 } else { i64::from(i32::MIN) };
    to_i64(tensor).unwrap().iter().all(|v| (least..=i64::from(i32::MAX)).contains(v))
}

fn is_wide(dtype: DType) -> bool {
    WIDE.contains(&dtype)
}

fn refused_by_name(error: &SessionError) {
    assert!(error.is_device_fault(), "{error}");
    assert!(error.to_string().contains(BEYOND), "{error}");
}

/// The numbers of a dtype among [`EDGES`].
fn edges(dtype: DType) -> Vec<Tensor> {
    let one = |&value: &i64| from_i64(&[1], dtype, &[value]).unwrap();
    let kept = |t: &Tensor, value: i64| to_i64(t).unwrap() == [value] && (!is_wide(dtype) || fits(t));
    EDGES.iter().map(|value| (one(value), *value)).filter(|(t, v)| kept(t, *v)).map(|(t, _)| t).collect()
}

#[test]
fn a_function_of_two_integers_is_right_or_refused() {
    for dtype in WIDE.into_iter().chain(NARROW) {
        for kind in ["add", "sub", "mul", "div", "rem", "min", "max", "less", "greater_equal", "equal"] {
            let to = if kind.starts_with(['l', 'g', 'e']) { DType::Bool } else { dtype };
            let pair = Pair::new(&format!(
                "graph \"g\" {{\n  input @x : {dtype}[1]\n  input @y : {dtype}[1]\n  %2 : {to}[1] = binary(@x, @y) {{kind={kind}}}\n  return \"z\": %2\n}}"
            ));
            let (mut right, mut total) = (0, 0);
            for x in edges(dtype) {
                for y in edges(dtype) {
                    total += 1;
                    let exact = pair.agrees(&[x.clone(), y]);
                    right += usize::from(exact);
                    assert!(exact || is_wide(dtype));
                }
            }
            let may_exceed = is_wide(dtype) && ["add", "sub", "mul", "div"].contains(&kind);
            assert!(right == total || may_exceed, "{kind} of {dtype}: {right} of {total}");
            assert!(2 * right > total, "{kind} of {dtype}: {right} of {total}");
        }
    }
}

#[test]
fn a_function_of_an_integer_and_a_conversion_are_right_or_refused() {
    let all = || WIDE.into_iter().chain(NARROW);
    for from in all() {
        for kind in ["neg", "abs", "sign"] {
            let pair = Pair::new(&format!(
                "graph \"g\" {{\n  input @x : {from}[1]\n  %1 : {from}[1] = unary(@x) {{kind={kind}}}\n  return \"z\": %1\n}}"
            ));
            edges(from).into_iter().for_each(|x| assert!(pair.agrees(&[x]) || is_wide(from)));
        }
        for to in all().chain([DType::F32, DType::Bool]) {
            let pair = Pair::new(&conversion(from, to));
            edges(from).into_iter().for_each(|x| assert!(pair.agrees(&[x]) || is_wide(to)));
        }
    }
    for to in all() {
        let pair = Pair::new(&conversion(DType::F32, to));
        let floats = [0.0, -0.5, 1.9, -1.9, 127.5, -129.0, 256.0, 65_536.0, 2.147_483_5e9, 3e9, -3e9, 1e20];
        for x in floats.into_iter().chain([f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -2_147_483_648.0]) {
            assert!(pair.agrees(&[Tensor::from_slice(&[1], &[x]).unwrap()]) || is_wide(to));
        }
    }
}

fn conversion(from: DType, to: DType) -> String {
    format!(
        "graph \"g\" {{\n  input @x : {from}[1]\n  %1 : {to}[1] = cast(@x) {{to={to}}}\n  return \"z\": %1\n}}"
    )
}

#[test]
fn sums_along_axes_are_right_or_refused() {
    let large = 1 << 30;
    let rows: [&[i64]; 6] =
        [&[1, -2, 3, 4], &[0, 9, 9, 9], &[large; 4], &[large, large, -large, -large], &[3; 4], &[-7; 4]];
    for dtype in WIDE.into_iter().chain(NARROW) {
        for op in ["sum", "prod", "max", "min"] {
            let pair = Pair::new(&format!(
                "graph \"g\" {{\n  input @x : {dtype}[1, 4]\n  %1 : {dtype}[1] = reduce(@x) {{kind={op}, axes=[1], keep_dims=false}}\n  return \"z\": %1\n}}"
            ));
            let of = |row: &[i64]| from_i64(&[1, 4], dtype, row).unwrap();
            for row in rows {
                let may_exceed = is_wide(dtype) && row.iter().any(|v| v.abs() == large);
                let x = of(row);
                let unsigned = is_wide(dtype) && !fits(&x);
                assert!(unsigned || pair.agrees(&[x]) || may_exceed, "{op} of {dtype}: {row:?}");
            }
        }
        let pair = Pair::new(&format!(
            "graph \"g\" {{\n  input @x : {dtype}[1, 4]\n  %1 : {dtype}[1, 4] = cumsum(@x) {{axis=1, exclusive=false, reverse=false}}\n  return \"z\": %1\n}}"
        ));
        for row in rows {
            let x = from_i64(&[1, 4], dtype, row).unwrap();
            let unsigned = is_wide(dtype) && !fits(&x);
            let may_exceed = is_wide(dtype) && row.iter().any(|v| v.abs() == large);
            assert!(unsigned || pair.agrees(&[x]) || may_exceed, "cumsum of {dtype}: {row:?}");
        }
    }
}

#[test]
fn the_largest_of_no_integers_is_refused() {
    let pair = Pair::new(
        "graph \"g\" {\n  input @x : i64[2, n]\n  %1 : i64[2] = reduce(@x) {kind=max, axes=[1], keep_dims=false}\n  return \"z\": %1\n}",
    );
    let none: [i64; 0] = [];
    assert!(!pair.agrees(&[Tensor::from_slice(&[2, 0], &none).unwrap()]));
    assert!(pair.agrees(&[Tensor::from_slice(&[2, 2], &[1i64, 2, -3, -4]).unwrap()]));
}
