//! The passes, one file each, and the list in which they run.
