use super::*;

fn noise(n: usize, seed: usize) -> Vec<f32> {
    let special = [0.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e-42, 1.0, -2.5];
    (0..n)
        .map(|i| {
            if (i + seed).is_multiple_of(11) {
                special[(i / 11 + seed) % 8]
            } else {
                ((i * 7919 + seed * 31) % 1013) as f32 / 100.0 - 5.0
            }
        })
        .collect()
}

fn placed<T>(at: *const T, layout: &Layout, operand: usize) -> Placed {
    Placed { at: at.cast::<u8>().cast_mut(), strides: layout.strides[operand], inner: layout.inner[operand] }
}

/// Runs a program of f32 operands; the last shape is the output's.
fn map(isa: Isa, program: &Program, inputs: &[&[f32]], shapes: &[&[usize]]) -> Vec<f32> {
    let shape = shapes[shapes.len() - 1];
    let layout = Layout::broadcast(shape, shapes).expect("shapes broadcast");
    let mut out = vec![9.0f32; shape.iter().product()];
    let places: Vec<Placed> =
        inputs.iter().enumerate().map(|(i, x)| placed(x.as_ptr(), &layout, i)).collect();
    let target = [placed(out.as_mut_ptr(), &layout, inputs.len())];
    let args = MapArgs {
        program,
        inputs: places.as_ptr(),
        outputs: target.as_ptr(),
        outer: layout.outer,
        cols: layout.cols,
    };
    for tile in 0..args.tiles() {
        // SAFETY: the vectors have the shapes of the layout.
        unsafe { map_entry(isa).expect("a scalar row exists")(&args, tile) };
    }
    out
}

fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

#[test]
fn every_operation_agrees_between_instruction_sets_at_odd_lengths() {
    for n in [1, 15, 17, 255, 257, 1000] {
        let (a, b) = (noise(n, 1), noise(n, 5));
        for op in Unary::ALL {
            let program = Program::unary(*op);
            let want = map(Isa::Scalar, &program, &[&a], &[&[n], &[n]]);
            for isa in Isa::available() {
                let got = map(isa, &program, &[&a], &[&[n], &[n]]);
                assert!(got.iter().zip(&want).all(|(x, y)| same(*x, *y)), "{} {isa} {n}", op.name());
            }
        }
        for op in Binary::ALL {
            let program = Program::binary(*op);
            let want = map(Isa::Scalar, &program, &[&a, &b], &[&[n], &[n], &[n]]);
            for isa in Isa::available() {
                let got = map(isa, &program, &[&a, &b], &[&[n], &[n], &[n]]);
                assert!(got.iter().zip(&want).all(|(x, y)| same(*x, *y)), "{} {isa} {n}", op.name());
            }
        }
    }
}

#[test]
fn operations_mean_what_they_say() {
    let (x, y) = ([1.5f32, -2.0, 0.0, f32::NAN], [2.0f32, -2.0, -1.0, 1.0]);
    let unary = |op| map(Isa::detect(), &Program::unary(op), &[&x], &[&[4], &[4]]);
    let binary = |op| map(Isa::detect(), &Program::binary(op), &[&x, &y], &[&[4], &[4], &[4]]);
    assert_eq!(unary(Unary::Neg)[..3], [-1.5, 2.0, 0.0]);
    assert_eq!(unary(Unary::Sign)[..3], [1.0, -1.0, 0.0]);
    assert_eq!(unary(Unary::Square)[..3], [2.25, 4.0, 0.0]);
    assert_eq!(unary(Unary::Round)[..3], [2.0, -2.0, 0.0]);
    assert_eq!(unary(Unary::Not), [0.0, 0.0, 1.0, 0.0]);
    assert_eq!(unary(Unary::IsNan), [0.0, 0.0, 0.0, 1.0]);
    assert!((unary(Unary::Cos)[0] - 1.5f32.cos()).abs() < 1e-7);
    assert_eq!(binary(Binary::Sub)[..3], [-0.5, 0.0, 1.0]);
    assert_eq!(binary(Binary::Pow)[..2], [2.25, 0.25]);
    assert_eq!(binary(Binary::Less), [1.0, 0.0, 0.0, 0.0]);
    assert_eq!(binary(Binary::GreaterEqual), [0.0, 1.0, 1.0, 0.0]);
    assert_eq!(binary(Binary::NotEqual), [1.0, 0.0, 1.0, 1.0]);
    assert_eq!(binary(Binary::Xor), [0.0, 0.0, 1.0, 0.0]);
    assert!(binary(Binary::Max)[3].is_nan() && binary(Binary::Min)[3].is_nan());
    assert_eq!(binary(Binary::Max)[..3], [2.0, -2.0, 0.0]);
}

#[test]
fn broadcasting_follows_the_shapes() {
    let shape = [3, 4, 5, 300];
    let shapes: [&[usize]; 4] = [&[3, 4, 5, 300], &[4, 1, 300], &[3, 1, 1, 1], &[1, 5, 1]];
    let strides = |dims: &[usize], at: [usize; 4]| {
        let mut index = 0;
        for (d, size) in dims.iter().enumerate() {
            let i = at[4 - dims.len() + d];
            index = index * size + if *size == 1 { 0 } else { i };
        }
        index
    };
    let full = noise(3 * 4 * 5 * 300, 2);
    for other in shapes {
        let b = noise(other.iter().product(), 4);
        let got = map(Isa::detect(), &Program::binary(Binary::Sub), &[&full, &b], &[&shape, other, &shape]);
        let mut i = 0;
        for d0 in 0..3 {
            for d1 in 0..4 {
                for d2 in 0..5 {
                    for d3 in 0..300 {
                        assert!(same(got[i], full[i] - b[strides(other, [d0, d1, d2, d3])]), "{other:?} {i}");
                        i += 1;
                    }
                }
            }
        }
    }
    let error = Layout::broadcast(&[2, 3], &[&[2]]).unwrap_err();
    assert!(error.to_string().contains("[2]"), "{error}");
}

#[test]
fn a_long_program_with_narrow_operands_matches_its_steps() {
    let (a, b) = (Operand::Input(0), Operand::Input(1));
    let r = Operand::Register;
    let instrs = [
        Instr { work: Work::Binary(Binary::Add, a, b), to: Target::Register(0) },
        Instr { work: Work::Unary(Unary::Silu, r(0)), to: Target::Register(1) },
        Instr { work: Work::Fma(r(1), Operand::Constant(2.0), a), to: Target::Register(0) },
        Instr { work: Work::Select(Operand::Input(2), r(0), Operand::Constant(-1.0)), to: Target::Output(0) },
        Instr { work: Work::Binary(Binary::Less, r(1), b), to: Target::Output(1) },
    ];
    let program = Program::build(&[Kind::F32, Kind::Bf16, Kind::Bool], &[Kind::F16, Kind::Bool], &instrs)
        .expect("valid");
    let n = 531;
    let x: Vec<f32> = (0..n).map(|i| (i as f32) / 100.0 - 2.0).collect();
    let y: Vec<u16> = x.iter().map(|v| crate::isa::half::f32_to_bf16(v * 0.7 + 0.1)).collect();
    let mask: Vec<u8> = (0..n).map(|i| (i % 3) as u8).collect();
    let shape: &[usize] = &[n];
    let layout = Layout::broadcast(shape, &[shape; 5]).expect("equal shapes");
    for isa in Isa::available() {
        let (mut half, mut flags) = (vec![0u16; n], vec![7u8; n]);
        let inputs = [
            placed(x.as_ptr(), &layout, 0),
            placed(y.as_ptr(), &layout, 1),
            placed(mask.as_ptr(), &layout, 2),
        ];
        let outputs = [placed(half.as_mut_ptr(), &layout, 3), placed(flags.as_mut_ptr(), &layout, 4)];
        let args = MapArgs {
            program: &program,
            inputs: inputs.as_ptr(),
            outputs: outputs.as_ptr(),
            outer: layout.outer,
            cols: layout.cols,
        };
        for tile in 0..args.tiles() {
            // SAFETY: the vectors have the shapes of the layout.
            unsafe { map_entry(isa).expect("a scalar row exists")(&args, tile) };
        }
        for i in 0..n {
            let w = f64::from(crate::isa::half::bf16_to_f32(y[i]));
            let t = f64::from(x[i]) + w;
            let silu = t / (1.0 + (-t).exp());
            let want = if mask[i] != 0 { silu * 2.0 + f64::from(x[i]) } else { -1.0 };
            let got = f64::from(crate::isa::half::f16_to_f32(half[i]));
            assert!((got - want).abs() <= want.abs() / 1024.0 + 1e-6, "{isa} {i}: {got} against {want}");
            if (silu - w).abs() > 1e-5 {
                assert_eq!(flags[i], u8::from(silu < w), "{isa} {i}");
            }
        }
    }
    assert!(!program.allows_in_place(0, 0));
    assert!(program.allows_in_place(2, 1), "bytes over bytes");
    assert!(program.allows_in_place(1, 0), "two bytes over two");
    assert!(Program::unary(Unary::Exp).allows_in_place(0, 0));
}

#[test]
fn bad_programs_are_refused() {
    let instr = |work, to| Instr { work, to };
    let read = instr(Work::Unary(Unary::Neg, Operand::Register(2)), Target::Output(0));
    let one = [Kind::F32];
    assert_eq!(Program::build(&one, &one, &[read]), Err(ProgramError::Unwritten { at: 0, register: 2 }));
    let input = instr(Work::Unary(Unary::Neg, Operand::Input(1)), Target::Output(0));
    assert_eq!(Program::build(&one, &one, &[input]), Err(ProgramError::Undeclared { at: 0, operand: 1 }));
    assert_eq!(Program::build(&one, &one, &[]), Err(ProgramError::Output { output: 0, writers: 0 }));
    let good = instr(Work::Unary(Unary::Neg, Operand::Input(0)), Target::Register(30));
    let out = instr(Work::Unary(Unary::Neg, Operand::Input(0)), Target::Output(0));
    assert!(matches!(Program::build(&one, &one, &[good, out]), Err(ProgramError::TooMany { .. })));
}

#[test]
fn integers_stay_integers() {
    let a: Vec<i64> = vec![i64::MAX, -7, 9_007_199_254_740_993, 5];
    let b: Vec<i64> = vec![1, 2, 0, 5];
    let shape: &[usize] = &[4];
    let layout = Layout::broadcast(shape, &[shape; 3]).expect("equal shapes");
    let run = |op: IntegerOp, out: *mut u8| {
        let args = IntegerArgs {
            op,
            dtype: IntegerType::I64,
            a: placed(a.as_ptr(), &layout, 0),
            b: placed(b.as_ptr(), &layout, 1),
            out: placed(out, &layout, 2),
            outer: layout.outer,
            cols: layout.cols,
        };
        for isa in Isa::available() {
            // SAFETY: the vectors have the shapes of the layout; there is one tile.
            unsafe { integer_entry(isa).expect("a scalar row exists")(&args, 0) };
        }
    };
    let values = |op| {
        let mut out = [0i64; 4];
        run(op, out.as_mut_ptr().cast());
        out
    };
    assert_eq!(values(IntegerOp::Add), [i64::MIN, -5, 9_007_199_254_740_993, 10]);
    assert_eq!(values(IntegerOp::Div), [i64::MAX, -3, 0, 1]);
    assert_eq!(values(IntegerOp::Rem), [0, -1, 0, 0]);
    assert_eq!(values(IntegerOp::Min), [1, -7, 0, 5]);
    let mut flags = [9u8; 4];
    run(IntegerOp::LessEqual, flags.as_mut_ptr());
    assert_eq!(flags, [0, 1, 0, 1]);
    let mask = [1u8, 0, 0, 2];
    let mut out = [0i64; 4];
    let args = SelectArgs {
        element_bytes: 8,
        mask: placed(mask.as_ptr(), &layout, 0),
        a: placed(a.as_ptr(), &layout, 0),
        b: placed(b.as_ptr(), &layout, 1),
        out: placed(out.as_mut_ptr(), &layout, 2),
        outer: layout.outer,
        cols: layout.cols,
    };
    for isa in Isa::available() {
        // SAFETY: the arrays have the shapes of the layout; there is one tile.
        unsafe { select_entry(isa).expect("a scalar row exists")(&args, 0) };
        assert_eq!(out, [i64::MAX, 2, 0, 5]);
    }
}

/// Programs that are chains: `round((a - 3) * 0.02 [+ (b + 5) * 0.03] / 0.07) + zero` within bounds, or without the way to codes.
fn chain_program(inputs: &[Kind], output: Kind) -> Program {
    let (r, c) = (Operand::Register, Operand::Constant);
    let to = Target::Register;
    let mut instrs = vec![
        Instr { work: Work::Binary(Binary::Sub, Operand::Input(0), c(3.0)), to: to(0) },
        Instr { work: Work::Binary(Binary::Mul, r(0), c(0.02)), to: to(0) },
    ];
    if inputs.len() == 2 {
        instrs.push(Instr { work: Work::Binary(Binary::Add, Operand::Input(1), c(5.0)), to: to(1) });
        instrs.push(Instr { work: Work::Binary(Binary::Mul, c(0.03), r(1)), to: to(1) });
        instrs.push(Instr { work: Work::Binary(Binary::Add, r(1), r(0)), to: to(0) });
    }
    if output != Kind::F32 {
        instrs.push(Instr { work: Work::Binary(Binary::Div, r(0), c(0.07)), to: to(0) });
        instrs.push(Instr { work: Work::Unary(Unary::Round, r(0)), to: to(0) });
        instrs.push(Instr { work: Work::Binary(Binary::Add, r(0), c(7.0)), to: to(0) });
        instrs.push(match output {
            Kind::U8 => Instr { work: Work::Unary(Unary::Relu, r(0)), to: to(0) },
            _ => Instr { work: Work::Binary(Binary::Max, r(0), c(-100.0)), to: to(0) },
        });
        let top = if inputs[0] == Kind::F32 { 300.0 } else { 120.0 };
        instrs.push(Instr { work: Work::Binary(Binary::Min, r(0), c(top)), to: to(0) });
    }
    instrs.push(Instr { work: Work::Unary(Unary::Copy, r(0)), to: Target::Output(0) });
    Program::build(inputs, &[output], &instrs).expect("valid")
}

#[test]
fn chains_and_tables_give_what_the_interpreter_gives() {
    use Kind::{F32, I8, U8};
    let n = 331;
    let floats: Vec<f32> = noise(n, 3).iter().map(|x| x * 40.0).collect();
    let bytes: Vec<u8> = (0..n).map(|i| (i * 37 % 256) as u8).collect();
    let cases: [(&[Kind], Kind); 7] = [
        (&[U8, I8], U8),
        (&[F32], U8),
        (&[F32], I8),
        (&[I8], F32),
        (&[U8, F32], I8),
        (&[U8], U8),
        (&[I8], U8),
    ];
    for (inputs, output) in cases {
        let program = chain_program(inputs, output);
        let chain = Chain::of(&program).expect("a chain");
        for (cols, other) in [(n, n), (n, 1), (64, 64), (7, 7)] {
            let shape: &[usize] = &[cols];
            let layout = Layout::broadcast(shape, &[shape, &[other], shape]).expect("broadcasts");
            let at = |kind: Kind| if kind == F32 { floats.as_ptr().cast() } else { bytes.as_ptr() };
            let places: Vec<Placed> =
                inputs.iter().enumerate().map(|(i, kind)| placed(at(*kind), &layout, i)).collect();
            let run = |isa: Isa, way: usize| {
                let mut out = vec![9u8; cols * 4];
                let target = [placed(out.as_mut_ptr(), &layout, 2)];
                let (outer, cols) = (layout.outer, layout.cols);
                let map = MapArgs {
                    program: &program,
                    inputs: places.as_ptr(),
                    outputs: target.as_ptr(),
                    outer,
                    cols,
                };
                // SAFETY: the vectors have the shapes of the layout; there is one tile.
                unsafe {
                    match way {
                        0 => map_entry(isa).expect("a scalar row exists")(&map, 0),
                        1 => chain_entry(isa).expect("a scalar row exists")(
                            &ChainArgs { map, chain: &chain },
                            0,
                        ),
                        _ => Table::of(isa, &program).expect("one byte to one").run_tile(&map, 0),
                    }
                }
                out
            };
            let want = run(Isa::Scalar, 0);
            for isa in Isa::available() {
                assert_eq!(run(isa, 1), want, "{inputs:?} {output:?} {isa} {cols}");
                if inputs.len() == 1 && inputs[0] != F32 && output != F32 {
                    assert_eq!(run(isa, 2), want, "table of {inputs:?} {isa} {cols}");
                }
            }
        }
    }
    assert!(Chain::of(&Program::binary(Binary::Add)).is_none(), "floats alone have the interpreter");
    assert!(Table::of(Isa::Scalar, &chain_program(&[F32], U8)).is_none());
}
