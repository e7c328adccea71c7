use super::*;
use crate::aot::AotCache;
use crate::backend::cpu::CpuBackend;
use crate::backend::reference::ReferenceBackend;
use crate::session::contract::{cached, cpu, graph, values};
use rlx_graph::ops::linear::Linear;
use rlx_graph::passes::PassOptions;
use rlx_kernels::isa::Isa;
use rlx_tensor::{DType, Dim};

fn weighted(session: &Session) {
    let compiled = session.compile(&graph()).unwrap();
    for (name, count) in [("w1", 32 * 48), ("w2", 48 * 32), ("bias", 48)] {
        compiled.set_param(name, values(count, count as u32).as_slice()).unwrap();
    }
}

fn pipeline() -> ModelCompilePipeline {
    let session = cpu(1);
    weighted(&session);
    ModelCompilePipeline::of_session(session)
}

fn rows(count: usize) -> DimBinding {
    DimBinding::new().with("rows", count)
}

fn options() -> CompileOptions {
    CompileOptions::default()
}

#[test]
fn the_first_use_through_get_or_compile_component_works() {
    let pipeline = pipeline();
    assert!(!pipeline.has_template() && pipeline.is_empty());
    let component = ModelComponent::new("layers", ModelVariant::encoder(3, 4));
    let first = pipeline.get_or_compile_component(&component, &graph(), &options()).unwrap();
    assert_eq!((first.label(), first.manifest().inputs[0].shape.as_slice()), ("layers", &[12, 32][..]));
    let again = pipeline.get_or_compile_component(&component, &graph(), &options()).unwrap();
    assert!(Arc::ptr_eq(&first, &again));
    assert_eq!((pipeline.specialisations(), pipeline.len()), (1, 1));
    let manifest = pipeline.binding_manifest_for_component(None, &component).unwrap();
    assert_eq!(manifest, first.manifest());
}

#[test]
fn one_specialisation_per_miss_and_none_per_hit() {
    let pipeline = pipeline();
    let id = pipeline.ensure_template(&graph(), &options()).unwrap();
    for count in [4, 8, 4, 4, 8, 16] {
        pipeline.get_or_compile("a label", Some(id), &rows(count)).unwrap();
    }
    assert_eq!(pipeline.specialisations(), 3);
    assert!(pipeline.contains(Some(id), &rows(16)) && !pipeline.contains(Some(id), &rows(17)));
}

#[test]
fn a_second_graph_or_other_options_never_get_the_first_template() {
    let pipeline = pipeline();
    let first = pipeline.ensure_template(&graph(), &options()).unwrap();
    let text = graph().to_string().replace("kind=add", "kind=sub");
    let other: Graph = text.parse().unwrap();
    let second = pipeline.ensure_template(&other, &options()).unwrap();
    let passes = PassOptions { skip: vec!["fuse_linear".to_owned()], ..PassOptions::default() };
    let third = pipeline.build_template(&graph(), &CompileOptions { passes, ..options() }).unwrap();
    assert!(first != second && first != third && second != third);
    let (a, b, c) = (
        pipeline.compiled(Some(first)).unwrap(),
        pipeline.compiled(Some(second)).unwrap(),
        pipeline.compiled(Some(third)).unwrap(),
    );
    assert!(!Arc::ptr_eq(&a, &b) && a.template().steps().len() < c.template().steps().len());
    assert!(Arc::ptr_eq(&pipeline.compiled(None).unwrap(), &c), "the latest");
    assert_eq!(pipeline.ensure_template(&graph(), &options()).unwrap(), first, "found again");
    assert!(Arc::ptr_eq(&pipeline.compiled(None).unwrap(), &a));
    assert!(!pipeline.template_result(Some(first)).unwrap().passes.trace.tally().is_empty());
}

#[test]
fn a_key_cannot_serve_another_binding_whatever_its_label() {
    let pipeline = pipeline();
    pipeline.ensure_template(&graph(), &options()).unwrap();
    let small = pipeline.get_or_compile("same", None, &rows(4)).unwrap();
    let large = pipeline.get_or_compile("same", None, &rows(5)).unwrap();
    assert_eq!((small.manifest().inputs[0].shape[0], large.manifest().inputs[0].shape[0]), (4, 5));
    let x = values(5 * 32, 1);
    let inputs = [("x", TensorArg::typed(&[5, 32], &x))];
    assert!(small.run(&mut State::default(), &inputs).is_err(), "above its capacity");
    assert!(large.run(&mut State::default(), &inputs).is_ok());
}

#[test]
fn unbound_unknown_and_conflicting_symbols_are_errors() {
    let pipeline = pipeline();
    assert!(matches!(pipeline.get_or_compile("x", None, &rows(1)), Err(PipelineError::NoTemplate)));
    pipeline.ensure_template(&graph(), &options()).unwrap();
    let unbound = pipeline.get_or_compile("x", None, &DimBinding::new()).unwrap_err().to_string();
    assert!(unbound.contains("rows"), "{unbound}");
    let unknown = pipeline.get_or_compile("x", None, &rows(1).with("columns", 2)).unwrap_err().to_string();
    assert!(unknown.contains("columns"), "{unknown}");
    assert!(rows(1).bind(&rlx_tensor::Symbol::new("rows"), 2).is_err(), "two values for one symbol");
    let foreign = TemplateId([7; 32]);
    assert!(matches!(pipeline.compiled(Some(foreign)), Err(PipelineError::UnknownTemplate { .. })));
    assert!(pipeline.is_empty());
    assert!(matches!(
        ModelCompilePipeline::of_session(cpu(1)).with_capacity(0),
        Err(PipelineError::ZeroCapacity)
    ));
}

/// One product with a weight of this dtype.
fn product(dtype: DType) -> Graph {
    let mut graph = Graph::new("product");
    let x = Shape::from_dims(vec![Dim::symbol("rows"), Dim::Known(8)], DType::F32);
    let (x, w) = (graph.input("x", x).unwrap(), graph.param("w", Shape::new(&[4, 8], dtype)).unwrap());
    let y = graph.add_one(Linear::plain(), &[x, w]).unwrap();
    graph.set_outputs(&[("y", y)]).unwrap();
    graph
}

#[test]
fn keys_are_equal_across_processes_and_differ_when_anything_differs() {
    let of = |session: Session, graph: &Graph, options: &CompileOptions, count: usize| {
        let pipeline = ModelCompilePipeline::of_session(session);
        let id = pipeline.ensure_template(graph, options).unwrap();
        pipeline.key(Some(id), &rows(count)).unwrap()
    };
    let scalar = || Session::with_backend(Arc::new(CpuBackend::new(Isa::Scalar, 1)));
    let base = of(scalar(), &graph(), &options(), 4);
    let threads = Session::with_backend(Arc::new(CpuBackend::new(Isa::Scalar, 2)));
    assert_eq!(of(threads, &graph(), &options(), 4), base, "threads change no result");
    let verify = PassOptions { verify: true, ..PassOptions::default() };
    assert_eq!(of(scalar(), &graph(), &CompileOptions { passes: verify, ..options() }, 4), base);
    let parsed: Graph = graph().to_string().parse().unwrap();
    assert_eq!(of(scalar(), &parsed, &options(), 4), base, "the same graph read from text");
    let fold = PassOptions { fold_limit_bytes: 7, ..PassOptions::default() };
    let layout =
        |dtype| Some(Arc::new(rlx_graph::adapters::AdapterLayout::of(&product(DType::F32), 2, dtype)));
    let adapted = |dtype| {
        let passes = PassOptions { adapters: layout(dtype), ..PassOptions::default() };
        of(scalar(), &product(DType::F32), &CompileOptions { passes, ..options() }, 4)
    };
    let plain = of(scalar(), &product(DType::F32), &options(), 4);
    let (wide, narrow) = (adapted(DType::F32), adapted(DType::BF16));
    assert!(wide != narrow && wide != plain && narrow != plain, "room for adapters");
    let weighing = |dtype| of(scalar(), &product(dtype), &options(), 4);
    assert_ne!(weighing(DType::F32), weighing(DType::F16), "the dtype of a weight");
    let other: Graph = graph().to_string().replace("axis=1", "axis=0").parse().unwrap();
    let mut keys = vec![
        base,
        of(scalar(), &graph(), &options(), 5),
        of(scalar(), &other, &options(), 4),
        of(scalar(), &graph(), &CompileOptions { passes: fold, ..options() }, 4),
        of(Session::with_backend(Arc::new(ReferenceBackend::default())), &graph(), &options(), 4),
    ];
    if Isa::detect() != Isa::Scalar {
        keys.push(of(cpu(1), &graph(), &options(), 4));
    }
    for (i, a) in keys.iter().enumerate() {
        assert!(keys[i + 1..].iter().all(|b| a != b && a.hex() != b.hex()), "{i}");
    }
}

#[test]
fn it_keeps_entries_and_bytes_within_bounds() {
    let pipeline = pipeline().with_capacity(2).unwrap();
    pipeline.ensure_template(&graph(), &options()).unwrap();
    for count in [4, 8, 16] {
        pipeline.get_or_compile("x", None, &rows(count)).unwrap();
    }
    assert!(pipeline.len() == 2 && !pipeline.contains(None, &rows(4)) && pipeline.contains(None, &rows(16)));
    let bytes = pipeline.get_or_compile("x", None, &rows(64)).unwrap().bytes();
    let tight = self::pipeline().with_budget(bytes + bytes / 2);
    tight.ensure_template(&graph(), &options()).unwrap();
    for count in [64, 63, 62] {
        tight.get_or_compile("x", None, &rows(count)).unwrap();
        assert!(tight.len() == 1 && tight.bytes() <= bytes);
    }
    let error = tight.get_or_compile("x", None, &rows(640)).unwrap_err();
    assert!(matches!(error, PipelineError::TooLarge { .. }), "{error}");
    assert!(tight.contains(None, &rows(62)), "nothing was evicted for it");
}

#[test]
fn sixteen_threads_asking_for_one_key_compile_it_once() {
    let pipeline = pipeline().with_mode(CompilationMode::Eager);
    let component = ModelComponent::new("layers", ModelVariant::encoder(1, 9));
    let executables: Vec<Arc<Specialised>> = std::thread::scope(|scope| {
        let ask = || pipeline.get_or_compile_component(&component, &graph(), &options()).unwrap();
        let threads: Vec<_> = (0..16).map(|_| scope.spawn(ask)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(executables.iter().all(|e| Arc::ptr_eq(e, &executables[0])));
    assert_eq!((pipeline.specialisations(), pipeline.len()), (1, 1));
}

#[test]
fn a_specialised_executable_gives_the_bits_and_checks_of_the_directly_compiled_one() {
    let pipeline = pipeline();
    let direct = pipeline.session().compile(&graph()).unwrap();
    pipeline.ensure_template(&graph(), &options()).unwrap();
    let lir = pipeline.specialize_template(None, &rows(20)).unwrap();
    let by_lir = pipeline.compile_lir(&lir, &options()).unwrap();
    let by_text = crate::plan::parse_lir(&lir.to_string()).unwrap();
    let by_text = pipeline.compile_lir(&by_text, &options()).unwrap();
    assert!(Arc::ptr_eq(by_lir.compiled(), &pipeline.compiled(None).unwrap()), "one program, packed once");
    for mode in [CompilationMode::Lazy, CompilationMode::Eager] {
        let pipeline = self::pipeline().with_mode(mode);
        pipeline.ensure_template(&graph(), &options()).unwrap();
        let executable = pipeline.get_or_compile("x", None, &rows(20)).unwrap();
        for count in [1, 7, 20] {
            let x = values(count * 32, 3);
            let dims = [count, 32];
            let inputs = [("x", TensorArg::typed(&dims, &x))];
            let wanted = direct.run(&inputs).unwrap().remove(0).1;
            for specialised in [&*executable, &by_lir, &by_text] {
                let found = specialised.run(&mut State::default(), &inputs).unwrap().remove(0).1;
                assert!(found.bits_eq(&wanted), "{count} rows, {mode:?}");
                let bad = [("y", TensorArg::typed(&dims, &x))];
                let error = specialised.run(&mut State::default(), &bad).unwrap_err();
                assert_eq!(error.to_string(), direct.run(&bad).unwrap_err().to_string());
            }
        }
    }
}

#[test]
fn a_state_is_usable_by_every_specialisation_of_one_template() {
    let pipeline = ModelCompilePipeline::of_session(cpu(1));
    let id = pipeline.ensure_template(&cached(), &options()).unwrap();
    let at = |seq: usize| {
        let component = ModelComponent::new("cached", ModelVariant::prefill(1, seq, 64));
        pipeline.get_or_compile_component(&component, &cached(), &options()).unwrap()
    };
    let (prefill, decode) = (at(8), at(1));
    assert_eq!(pipeline.ensure_template(&cached(), &options()).unwrap(), id);
    let run = |executable: &Specialised, state: &mut State, q: &[f32], past: i32| {
        let rows = q.len() / 16;
        let (dims, starts) = ([rows, 16], [0, rows as i32]);
        let inputs = [
            ("q", TensorArg::typed(&dims, q)),
            ("seq_starts", TensorArg::typed(&[2], &starts)),
            ("past", TensorArg::typed(&[1], std::slice::from_ref(&past))),
            ("block_table", TensorArg::typed(&[1, 1], &[0i32])),
        ];
        executable.run(state, &inputs).unwrap().remove(0).1
    };
    let q = values(8 * 16, 5);
    let whole = run(&prefill, &mut prefill.new_state().unwrap(), &q, 0);
    let mut shared = prefill.new_state().unwrap();
    run(&prefill, &mut shared, &q[..7 * 16], 0);
    let last = run(&decode, &mut shared, &q[7 * 16..], 7);
    assert_eq!(whole.as_slice::<f32>().unwrap()[7 * 16..], *last.as_slice::<f32>().unwrap());
}

#[test]
fn the_manifest_is_the_layout_that_the_executable_uses() {
    let pipeline = pipeline();
    pipeline.ensure_template(&graph(), &options()).unwrap();
    let executable = pipeline.get_or_compile("x", None, &rows(12)).unwrap();
    let manifest = pipeline.binding_manifest_for_binding(None, &rows(12)).unwrap();
    assert_eq!(manifest, executable.manifest());
    assert_eq!(manifest.arena_bytes, executable.context().unwrap().bytes().0);
    let names = |list: &[crate::plan::ManifestEntry]| list.iter().map(|e| e.name.clone()).collect::<Vec<_>>();
    assert_eq!(
        (names(&manifest.inputs), names(&manifest.outputs)),
        (vec!["x".to_owned()], vec!["y".to_owned()])
    );
    let x = &manifest.inputs[0];
    assert_eq!(
        (x.bytes, x.alignment, x.arena_offset, x.shape.as_slice()),
        (12 * 32 * 4, 4, None, &[12, 32][..])
    );
    let open = pipeline.template_binding_manifest(None).unwrap();
    assert_eq!(open.inputs[0].1.to_string(), "f32[rows, 32]");
    assert_eq!(open.params.len(), 3);
}

#[test]
fn an_idle_context_is_used_again_and_not_after_its_weights_were_replaced() {
    let pipeline = pipeline();
    pipeline.ensure_template(&graph(), &options()).unwrap();
    let executable = pipeline.get_or_compile("x", None, &rows(3)).unwrap();
    let context = executable.context().unwrap();
    let program = Arc::clone(context.program());
    executable.keep(context);
    assert!(Arc::ptr_eq(executable.context().unwrap().program(), &program));
    let context = executable.context().unwrap();
    executable.keep(context);
    executable.compiled().set_param("bias", values(48, 1).as_slice()).unwrap();
    assert!(!Arc::ptr_eq(executable.context().unwrap().program(), &program));
}

fn aot(folder: &std::path::Path) -> ModelCompilePipeline {
    pipeline().with_aot(AotCache::new(folder, 1 << 30))
}

fn y(executable: &Specialised, count: usize) -> Tensor {
    let x = values(count * 32, 3);
    executable.run(&mut State::default(), &[("x", TensorArg::typed(&[count, 32], &x))]).unwrap().remove(0).1
}

#[test]
fn a_plan_of_an_earlier_process_is_used_and_gives_the_same_bits_checks_and_report() {
    let folder = tempfile::tempdir().unwrap();
    let first = aot(folder.path());
    let component = ModelComponent::new("layers", ModelVariant::encoder(4, 5));
    let made = first.get_or_compile_component(&component, &graph(), &options()).unwrap();
    assert_eq!((first.specialisations(), first.plans_found()), (1, 0));
    let again = first.get_or_specialize_aot("again", &graph(), &options(), &rows(20)).unwrap();
    assert!(Arc::ptr_eq(&made, &again), "a hit in memory");
    drop(first);
    let second = aot(folder.path());
    let found = second.get_or_specialize_aot("layers", &graph(), &options(), &rows(20)).unwrap();
    assert_eq!((second.specialisations(), second.plans_found(), second.len()), (0, 1, 1));
    assert_eq!(found.manifest(), made.manifest());
    for count in [1, 7, 20] {
        assert!(y(&found, count).bits_eq(&y(&made, count)), "{count} rows");
    }
    let x = values(31, 3);
    let bad = [("x", TensorArg::typed(&[1, 31], &x))];
    let refusal = |e: &Specialised| e.run(&mut State::default(), &bad).unwrap_err().to_string();
    assert_eq!(refusal(&found), refusal(&made));
    let other = second.get_or_compile("x", None, &rows(64)).unwrap();
    assert!(Arc::ptr_eq(other.compiled(), found.compiled()), "other sizes share the template that was found");
    assert_eq!(second.specialisations(), 1);
    let (found, made) = (found.compiled(), made.compiled());
    assert_eq!(found.graph().to_string(), made.graph().to_string());
    let fusions = |compiled: &CompiledGraph| format!("{:?}", compiled.report().unwrap().fusions);
    assert_eq!(fusions(found), fusions(made));
    assert!(found.tap(&[]).is_ok(), "its graph is known, so values can be tapped");
}

#[test]
fn a_plan_on_disk_cannot_serve_another_graph_other_options_or_another_device() {
    let folder = tempfile::tempdir().unwrap();
    drop(aot(folder.path()).get_or_specialize_aot("x", &graph(), &options(), &rows(8)).unwrap());
    let other: Graph = graph().to_string().replace("axis=1", "axis=0").parse().unwrap();
    let passes = PassOptions { skip: vec!["fuse_linear".to_owned()], ..PassOptions::default() };
    let session = Session::with_backend(Arc::new(ReferenceBackend::default()));
    weighted(&session);
    let reference = ModelCompilePipeline::of_session(session).with_aot(AotCache::new(folder.path(), 1 << 30));
    let cases = [
        (aot(folder.path()), other, options(), 8),
        (aot(folder.path()), graph(), CompileOptions { passes, ..options() }, 8),
        (aot(folder.path()), graph(), options(), 9),
        (reference, graph(), options(), 8),
    ];
    for (at, (pipeline, graph, options, count)) in cases.into_iter().enumerate() {
        let executable = pipeline.get_or_specialize_aot("x", &graph, &options, &rows(count)).unwrap();
        assert_eq!((pipeline.plans_found(), pipeline.specialisations()), (0, 1), "case {at}");
        let direct = pipeline.session().compile_with(&graph, &options).unwrap();
        let x = values(count * 32, 3);
        let wanted = direct.run(&[("x", TensorArg::typed(&[count, 32], &x))]).unwrap().remove(0).1;
        assert!(y(&executable, count).bits_eq(&wanted), "case {at}");
    }
}

#[test]
fn a_plan_on_disk_that_is_damaged_or_of_another_interface_is_made_anew() {
    let folder = tempfile::tempdir().unwrap();
    let wanted = {
        let pipeline = aot(folder.path());
        y(&pipeline.get_or_specialize_aot("x", &graph(), &options(), &rows(8)).unwrap(), 8)
    };
    let cache = AotCache::new(folder.path(), 1 << 30);
    let entry = cache.entries().unwrap().remove(0);
    let path = folder.path().join(entry.kind).join(entry.name);
    let whole = std::fs::read(&path).unwrap();
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 4;
        bytes
    };
    let broken =
        [whole[..whole.len() / 2].to_vec(), Vec::new(), flipped(9), flipped(whole.len() / 3), flipped(100)];
    for bytes in broken {
        std::fs::write(&path, bytes).unwrap();
        let pipeline = aot(folder.path());
        let executable = pipeline.get_or_specialize_aot("x", &graph(), &options(), &rows(8)).unwrap();
        assert_eq!((pipeline.plans_found(), pipeline.specialisations()), (0, 1));
        assert!(y(&executable, 8).bits_eq(&wanted));
        drop(pipeline);
        assert_eq!(std::fs::read(&path).unwrap().len(), whole.len(), "it is there again");
    }
    let pipeline = aot(folder.path());
    let key = pipeline.executable_key(&pipeline.template_key(&graph(), &options()), "layers", &rows(8));
    let foreign = cpu(1).compile(&product(DType::F32)).unwrap().specialize(&rows(8)).unwrap();
    assert!(cache.store_plan(&aot::stamp(&**pipeline.session().backend()), key.bytes(), &foreign));
    let executable = pipeline.get_or_specialize_aot("x", &graph(), &options(), &rows(8)).unwrap();
    assert_eq!(
        (pipeline.plans_found(), pipeline.specialisations()),
        (0, 1),
        "a sound plan of something else"
    );
    assert!(y(&executable, 8).bits_eq(&wanted));
}

#[test]
fn sixteen_threads_asking_for_one_key_on_disk_read_it_once_and_missing_weights_are_told() {
    let folder = tempfile::tempdir().unwrap();
    drop(aot(folder.path()).get_or_specialize_aot("x", &graph(), &options(), &rows(8)).unwrap());
    let pipeline = aot(folder.path());
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| pipeline.get_or_specialize_aot("x", &graph(), &options(), &rows(8)).unwrap());
        }
    });
    assert_eq!((pipeline.plans_found(), pipeline.len()), (1, 1));
    let required = CompileOptions { weights_required: true, ..options() };
    let bare = ModelCompilePipeline::of_session(cpu(1)).with_aot(AotCache::new(folder.path(), 1 << 30));
    let error = bare.get_or_specialize_aot("x", &graph(), &required, &rows(8)).unwrap_err().to_string();
    assert!(error.contains("w1") && error.contains("bias"), "{error}");
    assert!(bare.get_or_specialize_aot("x", &graph(), &options(), &rows(8)).is_ok());
    let error = bare.ensure_template(&graph(), &required).unwrap_err().to_string();
    assert!(error.contains("w2"), "a template that is here answers for its weights too: {error}");
}
