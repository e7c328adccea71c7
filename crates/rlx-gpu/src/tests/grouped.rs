//! Products of rows that each have a matrix of their own: experts and adapters. A row has the same bits among any number of rows.

use super::products::{numbers, results, weight};
use crate::emulate::emulated_in;
use crate::emulated;
use crate::lower::blocks::is_packed;
use rlx::backend::Backend;
use rlx::backend::cpu::Precision;
use rlx::backend::reference::ReferenceBackend;
use rlx::session::cpu_backend;
use rlx::{Session, SessionError, TensorArg};
use rlx_graph::Graph;
use rlx_tensor::{DType, Tensor};
use std::sync::Arc;

/// A mixture of five experts, of which each row has two.
struct Mixture {
    dtype: DType,
    width: usize,
    inner: usize,
    renormalize: bool,
}

const EXPERTS: usize = 5;
const TOP_K: usize = 2;

const fn mixture(dtype: DType, width: usize, inner: usize) -> Mixture {
    Mixture { dtype, width, inner, renormalize: true }
}

/// Each storage of weights, columns of both schedules, and a width that nothing divides.
const MIXTURES: &[Mixture] = &[
    Mixture { renormalize: false, ..mixture(DType::F32, 7, 5) },
    mixture(DType::BF16, 72, 40),
    mixture(DType::Q8_0, 64, 96),
    mixture(DType::Q4_K, 256, 256),
    mixture(DType::Q5_1, 32, 64),
    mixture(DType::Q2_K, 256, 256),
];

impl Mixture {
    fn roles(&self) -> [(&'static str, [usize; 2]); 3] {
        let Mixture { width, inner, .. } = *self;
        [("g", [inner, width]), ("u", [inner, width]), ("d", [width, inner])]
    }

    fn graph(&self) -> Graph {
        let Mixture { dtype, width, renormalize, .. } = self;
        let activation = if is_packed(*dtype) { "identity" } else { "silu" };
        let (mut params, mut names) = (String::new(), String::new());
        for expert in 0..EXPERTS {
            for (name, [a, b]) in self.roles() {
                params += &format!("\n  param @{name}{expert} : {dtype}[{a}, {b}]");
                names += &format!(", @{name}{expert}");
            }
        }
        let result = 2 + 3 * EXPERTS;
        let text = format!(
            "graph \"mixture\" {{
  input @x : f32[rows, {width}]
  input @l : f32[rows, {EXPERTS}]{params}
  %{result} : f32[rows, {width}] = moe(@x, @l{names}) {{experts={EXPERTS}, top_k={TOP_K}, renormalize={renormalize}, activation={activation}}}
  return \"y\": %{result}
}}"
        );
        text.parse().unwrap_or_else(|e| panic!("{e}\n{text}"))
    }

    fn params(&self) -> Vec<(String, Tensor)> {
        let mut params = Vec::new();
        for expert in 0..EXPERTS {
            for (role, (name, dims)) in self.roles().into_iter().enumerate() {
                let weight = weight(&dims, self.dtype, (100 * role + expert) as u32 + 5);
                params.push((format!("{name}{expert}"), weight));
            }
        }
        params
    }

    fn check(&self, backend: &Arc<dyn Backend>, counts: &[usize]) {
        let rows = counts[0];
        let (x, l) = (numbers(rows * self.width, 1), numbers(rows * EXPERTS, 2));
        let some = |rows: usize| {
            let x = Tensor::from_slice(&[rows, self.width], &x[..rows * self.width]).unwrap();
            vec![("x", x), ("l", Tensor::from_slice(&[rows, EXPERTS], &l[..rows * EXPERTS]).unwrap())]
        };
        let inputs: Vec<_> = counts.iter().map(|&rows| some(rows)).collect();
        // Of packed weights the host, which quantises rows as well: what another function's last bit would make of codes is not to be seen.
        let right: Arc<dyn Backend> = match is_packed(self.dtype) {
            true => Arc::new(cpu_backend(None, Some(1)).unwrap()),
            false => Arc::new(ReferenceBackend::default()),
        };
        let size = (self.width, self.width + self.inner);
        held([backend, &right], &self.graph(), &self.params(), &inputs, size);
    }
}

/// Adapters of three ranks, one of which leaves the second part alone, and an empty slot.
const LORA: &str = "graph \"adapters\" {
  input @x : f32[rows, 70]
  param @w0 : f32[66, 70]
  param @w1 : f32[66, 70]
  input @slots : i32[rows]
  input @scales : f32[3, 2]
  input @a0 : f32[r0, 280]
  input @a1 : f32[r1, 280]
  input @a2 : f32[r2, 280]
  %8 : f32[rows, 66] = lora_linear(@x, @w0, @w1, @slots, @scales, @a0, @a1, @a2) {parts=2, transposed=false, bias=false, activation=silu, gated=true, residual=false, slots=3, sites=[1, 0], columns=[3, 143]}
  return \"y\": %8
}";

fn adapted(slots: &[i32]) -> Vec<(&'static str, Tensor)> {
    let tensor =
        |dims: &[usize], seed: u32| Tensor::from_slice(dims, &numbers(dims.iter().product(), seed)).unwrap();
    let rows = slots.len();
    vec![
        ("x", Tensor::from_slice(&[rows, 70], &numbers(40 * 70, 1)[..rows * 70]).unwrap()),
        ("slots", Tensor::from_slice(&[rows], slots).unwrap()),
        ("scales", Tensor::from_slice(&[3, 2], &[0.5f32, 1.5, 0.0, -1.0, 1.0, 1.0]).unwrap()),
        ("a0", tensor(&[4, 280], 11)),
        ("a1", tensor(&[9, 280], 12)),
        ("a2", tensor(&[0, 280], 13)),
    ]
}

fn lora_params() -> Vec<(String, Tensor)> {
    let weight = |seed| Tensor::from_slice(&[66, 70], &numbers(66 * 70, seed)).unwrap();
    vec![("w0".to_owned(), weight(21)), ("w1".to_owned(), weight(22))]
}

fn check_adapters(backend: &Arc<dyn Backend>) {
    let slots: Vec<i32> = (0..40).map(|i| i * 7 % 4 - 1).collect();
    let inputs: Vec<_> = [40, 1, 3, 9].iter().map(|&rows| adapted(&slots[..rows])).collect();
    let reference: Arc<dyn Backend> = Arc::new(ReferenceBackend::default());
    held([backend, &reference], &LORA.parse().unwrap(), &lora_params(), &inputs, (66, 140));
}

/// The first of the runs must give what the second backend does, within roundings of so many products, the others the same bits for their rows.
fn held(
    [backend, right]: [&Arc<dyn Backend>; 2],
    graph: &Graph,
    params: &[(String, Tensor)],
    inputs: &[Vec<(&str, Tensor)>],
    (width, products): (usize, usize),
) {
    let found = results(backend, graph, params, inputs);
    let expected = results(right, graph, params, &inputs[..1]);
    let most = expected[0].iter().fold(1.0f32, |most, x| most.max(x.abs()));
    // Operands are within 0.5, and bf16 rounds both by 2^-9.
    let each = if backend.precision() == Some(Precision::Bf16) { 2f32.powi(-10) } else { f32::EPSILON };
    let tolerance = products as f32 * each * most;
    for (i, (a, b)) in found[0].iter().zip(&expected[0]).enumerate() {
        let place = format!("row {}, column {} on {}", i / width, i % width, backend.name());
        assert!((a - b).abs() <= tolerance, "{place}: {a}, expected {b} within {tolerance}\n{graph}");
    }
    for own in &found {
        let same = own.iter().zip(&found[0]).position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(same, None, "{} elements on {}: other bits\n{graph}", own.len(), backend.name());
    }
}

/// What a mixture gives for rows of every form.
pub(super) fn bits(mixture: usize, backend: &Arc<dyn Backend>) -> Vec<Vec<u32>> {
    let mixture = &MIXTURES[mixture];
    let inputs = [20, 5, 2, 1].map(|rows: usize| {
        let of = |name, columns: usize, seed| {
            (name, Tensor::from_slice(&[rows, columns], &numbers(rows * columns, seed)).unwrap())
        };
        vec![of("x", mixture.width, 1), of("l", EXPERTS, 2)]
    });
    let found = results(backend, &mixture.graph(), &mixture.params(), &inputs);
    found.iter().map(|values| values.iter().map(|x| x.to_bits()).collect()).collect()
}

/// For those who go over every kernel.
pub(super) fn graphs() -> Vec<Graph> {
    let adapters = LORA.parse().unwrap();
    MIXTURES.iter().map(Mixture::graph).chain([adapters]).collect()
}

#[test]
fn experts_and_adapters_by_the_interpreter() {
    // Places of several parts, and rows for either form.
    MIXTURES[0].check(&emulated(), &[140, 1, 8, 9]);
    [1, 2, 4].into_iter().for_each(|m| MIXTURES[m].check(&emulated(), &[9, 2]));
    check_adapters(&emulated());
}

#[test]
fn experts_and_adapters_in_bf16_by_the_interpreter() {
    for units in [false, true] {
        let backend = emulated_in(Precision::Bf16, units);
        MIXTURES[..2].iter().for_each(|m| m.check(&backend, &[40, 1, 8, 9]));
        check_adapters(&backend);
    }
}

/// The host's bits, of sums in other functions within a rounding.
#[test]
fn experts_of_packed_weights_by_matrix_units() {
    let backend = emulated_in(Precision::F32, true);
    MIXTURES[4].check(&backend, &[40, 2, 9]);
}

#[cfg(feature = "wgpu")]
#[test]
fn experts_and_adapters_on_the_first_adapter() {
    let backend = crate::provider().unwrap().open(0, &rlx::config::Config::default()).unwrap();
    MIXTURES[0].check(&backend, &[140, 1, 8, 9]);
    MIXTURES[1..].iter().for_each(|m| m.check(&backend, &[20, 1]));
    check_adapters(&backend);
}

/// One launch multiplies by all experts, however many there are, and a device that binds less takes a launch for each part of them.
#[test]
fn experts_share_launches() {
    let launches = |words: usize| {
        let graph = MIXTURES[2].graph();
        let (legal, _) =
            rlx_graph::passes::compile_passes(&graph, &super::Runs, &Default::default()).unwrap();
        let template = rlx::plan::Template::build(&legal, &super::Runs).unwrap();
        let mut cx = crate::lower::LowerCx::new(&template);
        cx.binding_words = words;
        template.steps().iter().enumerate().for_each(|(at, step)| cx.lower(at, step).unwrap());
        cx.launches.iter().map(|l| l.kernel.name.clone()).collect::<Vec<_>>()
    };
    let whole = launches(usize::MAX);
    insta::assert_snapshot!(
        whole.join(" "),
        @"moe_route moe_count moe_starts moe_place quantise_rows moe_gated_grouped_q8 moe_gated_few_q8 quantise_rows moe_down_grouped_q8 moe_down_few_q8 moe_combine moe_combine"
    );
    let two = crate::lower::blocks::words(DType::Q8_0, 2 * 64 * 96);
    let count = |all: &[String], name: &str| all.iter().filter(|n| n.starts_with(name)).count();
    let parts = launches(two);
    assert_eq!((count(&whole, "moe_gated"), count(&whole, "moe_down")), (2, 2));
    assert_eq!((count(&parts, "moe_gated"), count(&parts, "moe_down")), (6, 6));
}

#[test]
fn a_row_that_names_no_adapter_fails_the_run() {
    let session = Session::with_backend(emulated());
    let compiled = session.compile(&LORA.parse().unwrap()).unwrap();
    lora_params().iter().for_each(|(name, value)| compiled.set_param(name, value).unwrap());
    let inputs = adapted(&[0, 3]);
    let named: Vec<(&str, TensorArg<'_>)> = inputs.iter().map(|(n, t)| (*n, t.into())).collect();
    let error: SessionError = compiled.run(&named).unwrap_err();
    assert!(error.to_string().contains("a row names an adapter that there is not"), "{error}");
}
