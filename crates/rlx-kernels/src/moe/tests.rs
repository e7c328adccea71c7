use super::*;

fn route(isa: Isa, logits: &[f32], experts: usize, k: usize, routing: Routing) -> (Vec<f32>, Vec<i32>) {
    let rows = logits.len() / experts;
    let (mut weights, mut chosen) = (vec![0.0; rows * k], vec![-1; rows * k]);
    let args = RouteArgs {
        logits: logits.as_ptr(),
        logits_stride: experts,
        experts,
        k,
        routing,
        weights: weights.as_mut_ptr(),
        chosen: chosen.as_mut_ptr(),
    };
    for row in 0..rows {
        // SAFETY: the vectors hold the rows.
        unsafe { route_entry(isa).expect("a scalar row exists")(&args, row) };
    }
    (weights, chosen)
}

#[test]
fn weights_follow_their_definition() {
    for (experts, k) in [(4, 2), (8, 1), (60, 4), (33, 20)] {
        let rows = 5;
        let logits: Vec<f32> = (0..rows * experts).map(|i| ((i * 7919) % 37) as f32 / 9.0).collect();
        let routings = [
            Routing::SoftmaxThenTop { renormalise: false },
            Routing::SoftmaxThenTop { renormalise: true },
            Routing::TopThenSoftmax,
        ];
        for routing in routings {
            let (scalar, places) = route(Isa::Scalar, &logits, experts, k, routing);
            for r in 0..rows {
                let row = &logits[r * experts..(r + 1) * experts];
                let mut order: Vec<usize> = (0..experts).collect();
                order.sort_by(|a, b| row[*b].total_cmp(&row[*a]).then(a.cmp(b)));
                let exps: Vec<f64> = row.iter().map(|x| f64::from(*x).exp()).collect();
                let chosen: f64 = order[..k].iter().map(|e| exps[*e]).sum();
                let all: f64 = exps.iter().sum();
                let divisor = if routing == routings[0] { all } else { chosen };
                for i in 0..k {
                    assert_eq!(places[r * k + i] as usize, order[i]);
                    assert!((f64::from(scalar[r * k + i]) - exps[order[i]] / divisor).abs() < 1e-6);
                }
            }
            for isa in Isa::available() {
                assert_eq!(route(isa, &logits, experts, k, routing), (scalar.clone(), places.clone()));
            }
        }
    }
}

#[test]
fn grouping_is_a_stable_sort_and_combining_undoes_it() {
    let (rows, k, experts, cols) = (7, 2, 5, 19);
    let chosen: Vec<i32> = (0..rows * k).map(|i| [3, 0, 3, 4, 0, 3][i % 6]).collect();
    for isa in Isa::available() {
        let mut starts = vec![-1; experts + 1];
        let (mut row_of_place, mut place_of) = (vec![-1; rows * k], vec![-1; rows * k]);
        let args = GroupArgs {
            chosen: chosen.as_ptr(),
            rows,
            k,
            experts,
            starts: starts.as_mut_ptr(),
            row_of_place: row_of_place.as_mut_ptr(),
            place_of: place_of.as_mut_ptr(),
        };
        // SAFETY: the vectors have the documented lengths.
        unsafe { group_entry(isa).expect("a scalar row exists")(&args, 0) };
        for e in 0..experts {
            let group = starts[e] as usize..starts[e + 1] as usize;
            let want: Vec<i32> =
                (0..rows * k).filter(|i| chosen[*i] as usize == e).map(|i| (i / k) as i32).collect();
            assert_eq!(row_of_place[group], want);
        }
        assert_eq!(starts[experts] as usize, rows * k);
        let y: Vec<f32> = (0..rows * k * cols).map(|i| row_of_place[i / cols] as f32 + 1.0).collect();
        let weights: Vec<f32> = (0..rows * k).map(|i| if i % k == 0 { 0.75 } else { 0.25 }).collect();
        let residual = vec![10.0f32; rows * cols];
        let mut out = vec![0.0f32; rows * cols];
        let args = CombineArgs {
            y: y.as_ptr(),
            y_stride: cols,
            weights: weights.as_ptr(),
            place_of: place_of.as_ptr(),
            k,
            cols,
            residual: residual.as_ptr(),
            residual_stride: cols,
            out: out.as_mut_ptr(),
            out_stride: cols,
        };
        for row in 0..rows {
            // SAFETY: the vectors hold the rows.
            unsafe { combine_entry(isa).expect("a scalar row exists")(&args, row) };
        }
        for (i, v) in out.iter().enumerate() {
            assert_eq!(*v, 10.0 + (i / cols) as f32 + 1.0);
        }
    }
}
