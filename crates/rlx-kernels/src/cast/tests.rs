use super::*;

fn cast<A: Copy, B: Copy + Default>(
    isa: Isa,
    from: &[A],
    from_type: ElementType,
    to_type: ElementType,
) -> Vec<B> {
    assert_eq!(size_of::<A>(), from_type.bytes());
    assert_eq!(size_of::<B>(), to_type.bytes());
    let mut to = vec![B::default(); from.len()];
    let args = CastArgs {
        from: from.as_ptr().cast(),
        from_type,
        to: to.as_mut_ptr().cast(),
        to_type,
        n: from.len(),
    };
    for tile in 0..args.tiles() {
        // SAFETY: the vectors hold `n` elements of the asserted sizes.
        unsafe { cast_entry(isa).expect("a scalar row exists")(&args, tile) };
    }
    to
}

#[test]
fn floats_to_integers_truncate_and_saturate() {
    for isa in Isa::available() {
        let x = [1.9f32, -1.9, 3e9, -1e30, f32::NAN, f32::INFINITY];
        let y: Vec<i32> = cast(isa, &x, ElementType::F32, ElementType::I32);
        assert_eq!(y, [1, -1, i32::MAX, i32::MIN, 0, i32::MAX]);
        let y: Vec<u8> = cast(isa, &x, ElementType::F32, ElementType::Bool);
        assert_eq!(y, [1; 6]);
    }
}

#[test]
fn integers_do_not_pass_through_floats() {
    let x = [i64::MAX, (1 << 53) + 1, -3, 1 << 40];
    for isa in Isa::available() {
        let y: Vec<i32> = cast(isa, &x, ElementType::I64, ElementType::I32);
        assert_eq!(y, [-1, 1, -3, 0]);
        let back: Vec<i64> = cast(isa, &y, ElementType::I32, ElementType::I64);
        assert_eq!(back, [-1, 1, -3, 0]);
        let f: Vec<f64> = cast(isa, &x, ElementType::I64, ElementType::F64);
        assert_eq!(f[3], (1u64 << 40) as f64);
    }
}

#[test]
fn narrow_floats_round_once() {
    // Just above halfway between two f16 values, which an f32 in between would round onto the tie.
    let x = [1.0 + 1.0 / 2048.0 + 1e-12, 1.0 + 1.0 / 2048.0, f64::NAN, 1e300, -1e-300];
    let want = [0x3c01, 0x3c00, 0x7e00, 0x7c00, 0x8000];
    let tie = [(1i64 << 60) + (1 << 52) + 1, (1 << 60) + (1 << 52), -5];
    for isa in Isa::available() {
        let y: Vec<u16> = cast(isa, &x, ElementType::F64, ElementType::F16);
        assert_eq!(y, want);
        let y: Vec<u16> = cast(isa, &tie, ElementType::I64, ElementType::Bf16);
        assert_eq!(y, [0x5d81, 0x5d80, 0xc0a0]);
    }
}

#[test]
fn halves_round_trip_through_f32_at_odd_lengths() {
    for n in [1, 15, 16, 17, 33, 20_000] {
        let bits: Vec<u16> = (0..n).map(|i| (i * 37 % 0x7c00) as u16).collect();
        for half in [ElementType::F16, ElementType::Bf16] {
            for isa in Isa::available() {
                let wide: Vec<f32> = cast(isa, &bits, half, ElementType::F32);
                let back: Vec<u16> = cast(isa, &wide, ElementType::F32, half);
                assert_eq!(back, bits, "{isa} {half:?} {n}");
            }
        }
    }
}

#[test]
fn every_pair_keeps_small_numbers() {
    let values = [0u8, 1, 2, 5, 100];
    for a in ElementType::ALL {
        for b in ElementType::ALL {
            let mut first = vec![0u8; 5 * a.bytes()];
            let mut second = vec![0u8; 5 * b.bytes()];
            let mut last = vec![0u8; 5];
            let steps = [
                (values.as_ptr(), ElementType::U8, first.as_mut_ptr(), a),
                (first.as_ptr(), a, second.as_mut_ptr(), b),
                (second.as_ptr(), b, last.as_mut_ptr(), ElementType::U8),
            ];
            for (from, from_type, to, to_type) in steps {
                let args = CastArgs { from, from_type, to, to_type, n: 5 };
                // SAFETY: the vectors hold 5 elements of their types.
                unsafe { cast_entry(Isa::detect()).expect("a scalar row exists")(&args, 0) };
            }
            let through_bool = a == ElementType::Bool || b == ElementType::Bool;
            let want = values.map(|v| if through_bool { u8::from(v != 0) } else { v });
            assert_eq!(last, want, "{a:?} {b:?}");
        }
    }
}
