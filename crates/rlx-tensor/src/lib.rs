//! Data: dtypes, shapes, symbolic dims, aligned and mapped storage.

pub mod storage;
