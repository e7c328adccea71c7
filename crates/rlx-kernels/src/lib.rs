//! CPU speed: instruction-set dispatch, thread pool and kernel families.
