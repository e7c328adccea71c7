//! Frames refuse what would make a run unsound.

use rlx_kernels::pool::Pool;
use rlx_kernels::schedule::{Frame, FrameError, RunControl, Schedule};
use std::sync::Arc;

#[test]
fn a_pool_with_more_workers_than_the_frame_has_scratch_for_is_refused() {
    let mut frame = Frame::new(Arc::new(Schedule::new()), 1, 64, &[], &[], 1).unwrap();
    frame.launch().run(&Pool::new(1), RunControl::default()).unwrap();
    let error = frame.launch().run(&Pool::new(2), RunControl::default()).unwrap_err();
    assert_eq!(error, FrameError::TooManyWorkers { frame: 1, pool: 2 });
}
