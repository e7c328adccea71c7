//! What inference refuses, op by op: attributes and operand shapes that do not fit, and the words of the error.

use crate::graph::Graph;

macro_rules! conv {
    ($strides:literal, $dilations:literal, $ends:literal, $groups:literal) => {
        concat!(
            "strides=",
            $strides,
            ", dilations=",
            $dilations,
            ", before=dims",
            $ends,
            ", after=dims",
            $ends,
            ", groups=",
            $groups,
            ", bias=false, addend=false, activation=identity, channels_last=false"
        )
    };
}

macro_rules! pool {
    ($kind:literal, $window:literal, $strides:literal, $indices:literal) => {
        concat!(
            "kind=",
            $kind,
            ", window=",
            $window,
            ", strides=",
            $strides,
            ", dilations=[1], before=dims[0], after=dims[0], ceil=false, count_added=false, power=2.0, indices=",
            $indices,
            ", column_major=false, channels_last=false"
        )
    };
}

macro_rules! sums {
    (WINDOW, $to:literal) => {
        sums!("strides=[1], dilations=[1], before=dims[0], after=dims[0], channels_last=false", $to)
    };
    ($own:literal, $to:literal) => {
        concat!($own, ", weight_zeros=false, bias=false, to=", $to, ", zero=0, low=0, high=0")
    };
}

const REFUSED: &[(&str, &str, &str, &str)] = &[
    ("embedding", "", "f32[2] f32[5, 6]", "i32 or i64"),
    ("embedding", "", "i32[2] f32[5]", "rank 2"),
    ("gather", "axis=2", "f32[3, 4] i32[2]", "outside rank 2"),
    ("layer_norm", "eps=1e-5, bias=true, residual=false", "f32[2, 4] f32[4] f32[3]", "differ"),
    ("layer_norm", "eps=1e-5, bias=false, residual=true", "f32[2, 4] f32[4]", "takes 3 operands"),
    ("rms_norm", "eps=1e-5, unit_offset=false, groups=3, residual=false", "f32[2, 4] f32[2]", "differ"),
    ("softmax", "axis=1", "f32[4]", "outside rank 1"),
    ("softmax", "axis=0", "i32[4]", "must be a float"),
    ("gated", "activation=silu", "f32[2, 3] f32[2, 4]", "differ"),
    ("rope_angles", "scale=1.0", "i64[4] f32[3]", "must be i32"),
    ("rope", "heads=2, head_dim=4, rotary_dim=3, style=neox", "f32[2, 8] f32[2, 3]", "even"),
    ("rope", "heads=2, head_dim=4, rotary_dim=4, style=neox", "f32[2, 9] f32[2, 4]", "differ"),
    ("pool", "kind=mean", "f32[2, 3] i32[0]", "sequence starts"),
    ("l2_normalize", "eps=1e-9", "f32[]", "at least 1"),
    ("transpose", "perm=[0, 0]", "f32[2, 3]", "no permutation"),
    ("broadcast", "dims=dims[2, 5]", "f32[3]", "differ"),
    ("slice", "axis=0, start=dims[2], len=dims[2], step=1", "f32[3]", "differ"),
    ("slice", "axis=0, start=dims[0], len=dims[2], step=0", "f32[3]", "at least 1"),
    ("pad", "before=dims[1], after=dims[1, 1], value=0.0", "f32[2, 2]", "1 entries for rank 2"),
    ("select", "", "f32[2] f32[2] f32[2]", "must be bool"),
    ("topk", "k=4", "f32[2, 3]", "differ"),
    ("iota", "dims=dims[3], axis=0, dtype=bool", "", "no integer type"),
    ("cumsum", "axis=0, exclusive=false, reverse=false", "bool[3]", "float or integer"),
    ("moe", "experts=1, top_k=2, renormalize=true, activation=silu", "f32[1, 2]", "2 of 1"),
    ("moe", "experts=2, top_k=1, renormalize=true, activation=silu", "f32[1, 2] f32[1, 2]", "2 + 3 * 2"),
    (
        "linear",
        "parts=3, transposed=false, bias=false, activation=silu, gated=true, residual=false",
        "f32[1]",
        "parts",
    ),
    (
        "lora_linear",
        "parts=1, transposed=false, bias=false, activation=identity, gated=false, residual=false, slots=0, sites=[0], columns=[0]",
        "f32[1, 2]",
        "slots",
    ),
    (
        "lora_linear",
        "parts=1, transposed=false, bias=false, activation=identity, gated=false, residual=false, slots=1, sites=[], columns=[0]",
        "f32[1, 2]",
        "0 entries for 1 parts",
    ),
    (
        "lora_linear",
        "parts=1, transposed=false, bias=false, activation=identity, gated=false, residual=false, slots=1, sites=[1], columns=[0]",
        "f32[1, 2] f32[3, 2] i32[1] f32[1, 1] f32[4, 5]",
        "scales have 1 columns",
    ),
    (
        "lora_linear",
        "parts=1, transposed=false, bias=false, activation=identity, gated=false, residual=false, slots=1, sites=[0], columns=[1]",
        "f32[1, 2] f32[3, 2] i32[1] f32[1, 1] f32[4, 5]",
        "reach past operand 4",
    ),
    (
        "lora_linear",
        "parts=1, transposed=false, bias=false, activation=identity, gated=false, residual=false, slots=1, sites=[0], columns=[0]",
        "f32[1, 2] f32[3, 2] i32[2] f32[1, 1] f32[4, 5]",
        "differ",
    ),
    ("fused_elementwise", "program=\"t0=mul i0\"", "f32[2]", "takes 2 arguments"),
    ("conv", conv!("[1]", "[1]", "[0]", 1), "f32[1, 2] f32[1, 2, 1]", "at least 3"),
    ("conv", conv!("[1]", "[1]", "[0]", 1), "f32[1, 2, 3] f32[1, 3, 1]", "differ"),
    ("conv", conv!("[1]", "[1]", "[0]", 2), "f32[1, 3, 3] f32[2, 1, 1]", "channels and groups"),
    ("conv", conv!("[0]", "[1]", "[0]", 1), "f32[1, 2, 3] f32[1, 2, 1]", "at least 1"),
    ("conv", conv!("[1]", "[1, 1]", "[0]", 1), "f32[1, 2, 3] f32[1, 2, 1]", "2 entries for 1"),
    ("conv", conv!("[1]", "[2]", "[0]", 1), "f32[1, 2, 3] f32[1, 2, 3]", "a window and the extent"),
    ("conv", conv!("[1]", "[1]", "[0]", 1), "f32[1, 2, 3] f16[1, 2, 1]", "must be f32"),
    (
        "conv_transpose",
        "strides=[1], dilations=[1], before=[0], after=[0], groups=1, bias=false",
        "f32[1, 2, 3] f32[3, 1, 1]",
        "channels and weight",
    ),
    (
        "conv_transpose",
        "strides=[1], dilations=[1], before=[2], after=[2], groups=1, bias=false",
        "f32[1, 2, 3] f32[2, 1, 1]",
        "more is cut",
    ),
    ("pool_window", pool!("mean", "[2]", "[1]", true), "f32[1, 2, 3]", "mean has none"),
    ("pool_window", pool!("max", "[0]", "[1]", false), "f32[1, 2, 3]", "at least 1"),
    ("pool_window", pool!("max", "[2, 2]", "[1]", false), "f32[1, 2, 3]", "2 entries for 1"),
    ("pool_window", pool!("lp", "[2]", "[1]", false), "i32[1, 2, 3]", "must be a float"),
    (
        "integer_linear",
        sums!("transposed=false", "i32"),
        "u8[2, 3] i8[4, 5] u8[]",
        "inputs of x and of the weight",
    ),
    ("integer_linear", sums!("transposed=false", "i32"), "u8[2, 3] f32[4, 3] u8[]", "u8 or i8"),
    ("integer_linear", sums!("transposed=false", "i32"), "u8[2, 3] i8[4, 3] i8[]", "must be u8"),
    (
        "integer_linear",
        sums!("transposed=false", "f32"),
        "u8[2, 3] i8[4, 3] u8[] f32[3]",
        "scales and outputs",
    ),
    ("integer_linear", sums!("transposed=false", "i64"), "u8[2, 3] i8[4, 3] u8[] f32[4]", "is no result"),
    ("integer_conv", sums!(WINDOW, "i32"), "u8[1, 2, 3] i8[4, 3, 1] u8[]", "channels of x and of the weight"),
    ("integer_conv", sums!(WINDOW, "u8"), "u8[1, 2, 3] i8[4, 2, 1] u8[] f32[4]", "takes 5 operands"),
    ("fused_elementwise", "program=\"t0=i8 i0; t1=neg t0\"", "f32[2]", "kinds of arguments"),
    ("fused_elementwise", "program=\"t0=neg t0\"", "f32[2]", "not defined yet"),
    ("fused_elementwise", "program=\"t0=not i0\"", "f32[2]", "kinds of arguments"),
    ("fused_elementwise", "program=\"t0=neg i0; t2=neg t0\"", "f32[2]", "expected t1"),
    ("fused_elementwise", "program=\"t0=frob i0\"", "f32[2]", "unknown function"),
];

fn refusal(op: &str, attrs: &str, operands: &str) -> String {
    let shapes: Vec<&str> = operands.split_inclusive(']').map(str::trim).filter(|s| !s.is_empty()).collect();
    let mut text = String::from("graph \"refused\" {\n");
    for (i, shape) in shapes.iter().enumerate() {
        text += &format!("  input @x{i} : {shape}\n");
    }
    let names: Vec<String> = (0..shapes.len()).map(|i| format!("@x{i}")).collect();
    text += &format!("  {op}({}) {{{attrs}}}\n}}\n", names.join(", "));
    match text.parse::<Graph>() {
        Ok(_) => "accepted".into(),
        Err(e) => e.reason,
    }
}

#[test]
fn what_does_not_fit_is_refused_with_a_reason() {
    for (op, attrs, operands, reason) in REFUSED {
        let found = refusal(op, attrs, operands);
        assert!(found.contains(reason), "{op}({operands}) {{{attrs}}}: expected {reason:?}, found {found:?}");
        assert!(found.starts_with(op), "{found}");
    }
}

#[test]
fn attention_refuses_what_does_not_fit() {
    let attrs = |change: &str| {
        let all = "heads=4, kv_heads=2, head_dim=2, scale=1.0, causal=true, window=none, softcap=none, mask=false, cache=false";
        let (name, value) = change.split_once('=').unwrap();
        let fields = all.split(", ").map(|f| match f.split_once('=') {
            Some((n, _)) if n == name => format!("{n}={value}"),
            _ => f.to_owned(),
        });
        fields.collect::<Vec<_>>().join(", ")
    };
    let fits = "f32[3, 8] f32[3, 4] f32[3, 4] i32[2]";
    for (change, operands, reason) in [
        ("kv_heads=3", fits, "does not divide"),
        ("window=0", fits, "at least 1"),
        ("softcap=0.0", fits, "not above 0"),
        ("cache=true", fits, "takes 8 operands"),
        ("mask=true", "f32[3, 8] f32[3, 4] f32[3, 4] i32[2] f32[1, 3, 3, 3]", "mask and heads"),
        ("heads=4", "f32[3, 8] f32[3, 6] f32[3, 4] i32[2]", "heads * head_dim"),
        ("heads=4", "f32[3, 8] f32[2, 4] f32[3, 4] i32[2]", "rows of q, k and v"),
        ("heads=4", "f32[3, 8] f32[3, 4] f32[3, 4] i64[2]", "must be i32"),
    ] {
        let found = refusal("attention", &attrs(change), operands);
        assert!(found.contains(reason), "{change} {operands}: expected {reason:?}, found {found:?}");
    }
}

#[test]
fn dims_in_attributes_are_bound() {
    let op: crate::Op = crate::ops::reshape::Reshape { dims: vec![rlx_tensor::Dim::symbol("n") * 2] }.into();
    let bound = op.bind_dims(&|_| Some(rlx_tensor::Dim::Known(3)));
    assert_eq!(bound.downcast::<crate::ops::reshape::Reshape>().unwrap().dims, [rlx_tensor::Dim::Known(6)]);
}
