//! Test data and runners shared by every backend.
