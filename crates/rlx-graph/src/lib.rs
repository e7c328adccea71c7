//! Meaning: the graph, its ops, text form, verifier, reference interpreter, rewrites and passes.
