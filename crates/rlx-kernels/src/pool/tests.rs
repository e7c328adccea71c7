use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::*;

const HASTY: Patience = Patience { spins: 0, yields: 0 };

#[test]
fn every_tile_once_in_every_phase() {
    for threads in [1, 2, 3, 7] {
        for patience in [Patience::default(), HASTY] {
            let pool = Pool::with_patience(threads, patience);
            assert_eq!(pool.threads(), threads);
            let hits: Vec<AtomicUsize> = (0..100).map(|_| AtomicUsize::new(0)).collect();
            for run in 0..20 {
                pool.run(|team| {
                    for phase in 0..5 {
                        for tile in team.tiles(hits.len()) {
                            let before = hits[tile].fetch_add(1, Ordering::Relaxed);
                            assert_eq!(before, run * 5 + phase);
                        }
                        team.barrier();
                    }
                });
            }
            assert!(hits.iter().all(|hit| hit.load(Ordering::Relaxed) == 100));
        }
    }
}

#[test]
fn every_tile_once_where_workers_have_parts() {
    for threads in [1, 2, 3, 7] {
        let pool = Pool::with_patience(threads, HASTY);
        for n in [0, 1, 2, 5, 100] {
            let hits: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
            pool.run(|team| {
                for phase in 0..3 {
                    // One worker takes nothing: the others take its part.
                    let late = team.index() == phase % threads;
                    if !late || threads == 1 {
                        let tiles = team.near_tiles(n);
                        tiles.for_each(|tile| assert_eq!(hits[tile].fetch_add(1, Ordering::Relaxed), phase));
                    }
                    team.barrier();
                }
            });
            assert!(hits.iter().all(|hit| hit.load(Ordering::Relaxed) == 3), "{threads} of {n}");
        }
    }
    let alone: Vec<usize> = {
        let seen = Mutex::new(Vec::new());
        Pool::new(1).run(|team| lock(&seen).extend(team.near_tiles(5)));
        seen.into_inner().unwrap()
    };
    assert_eq!(alone, [0, 1, 2, 3, 4]);
}

#[test]
fn workers_have_distinct_indices_and_borrow_the_callers_data() {
    let pool = Pool::new(4);
    let mut seen = vec![0u8; 4];
    {
        let cells: Vec<Mutex<&mut u8>> = seen.iter_mut().map(Mutex::new).collect();
        pool.run(|team| {
            assert_eq!(team.count(), 4);
            **lock(&cells[team.index()]) += 1;
        });
    }
    assert_eq!(seen, [1, 1, 1, 1]);
}

#[test]
fn a_barrier_orders_writes() {
    let pool = Pool::with_patience(3, HASTY);
    let slots: Vec<AtomicU64> = (0..3).map(|_| AtomicU64::new(0)).collect();
    pool.run(|team| {
        for round in 1..200u64 {
            slots[team.index()].store(round, Ordering::Relaxed);
            team.barrier();
            for slot in &slots {
                assert_eq!(slot.load(Ordering::Relaxed), round);
            }
            team.barrier();
        }
    });
}

#[test]
fn a_panic_in_any_worker_reaches_the_caller_and_leaves_the_pool_usable() {
    for patience in [Patience::default(), HASTY] {
        let pool = Pool::with_patience(3, patience);
        for culprit in 0..3 {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.run(|team| {
                    for tile in team.tiles(10) {
                        std::hint::black_box(tile);
                    }
                    team.barrier();
                    if team.index() == culprit {
                        resume_unwind(Box::new(culprit));
                    }
                    team.barrier();
                    for tile in team.tiles(10) {
                        std::hint::black_box(tile);
                    }
                });
            }));
            let payload = outcome.expect_err("the run panics");
            assert_eq!(payload.downcast_ref::<usize>(), Some(&culprit));
            let total = AtomicUsize::new(0);
            pool.run(|team| {
                for tile in team.tiles(10) {
                    total.fetch_add(tile, Ordering::Relaxed);
                }
                team.barrier();
            });
            assert_eq!(total.load(Ordering::Relaxed), 45);
        }
    }
}

#[test]
fn concurrent_runs_take_turns() {
    let pool = Pool::new(2);
    let inside = AtomicUsize::new(0);
    let total = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    pool.run(|team| {
                        assert!(inside.fetch_add(1, Ordering::SeqCst) < 2);
                        for _ in team.tiles(4) {
                            total.fetch_add(1, Ordering::Relaxed);
                        }
                        team.barrier();
                        inside.fetch_sub(1, Ordering::SeqCst);
                        team.barrier();
                    });
                }
            });
        }
    });
    assert_eq!(total.load(Ordering::Relaxed), 4 * 50 * 4);
}

#[test]
fn misuse_is_reported() {
    let pool = Pool::new(2);
    let twice = catch_unwind(AssertUnwindSafe(|| {
        pool.run(|team| {
            assert_eq!(team.tiles(0).count(), 0);
            assert_eq!(team.tiles(0).count(), 0);
        });
    }));
    assert!(twice.is_err());
    let nested = catch_unwind(AssertUnwindSafe(|| pool.run(|_| pool.run(|_| ()))));
    assert!(nested.is_err());
    pool.run(|team| team.barrier());
}
