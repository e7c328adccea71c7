//! `unsafe` lives in four places: CPU kernels, aligned and mapped storage, device FFI, the functions of a page.

use super::{Finding, Tree};

/// Path prefixes where `unsafe` may stand.
const PLACES: &[&str] = &[
    "crates/rlx-kernels/",
    "crates/rlx-tensor/src/storage",
    "crates/rlx-gpu/src/ffi/",
    "examples/web/src/ffi",
];

pub fn check(tree: &Tree) -> Vec<Finding> {
    let outside = tree.sources.iter().filter(|file| !PLACES.iter().any(|place| file.path.starts_with(place)));
    let first = outside.filter_map(|file| {
        let at = (0..file.len()).find(|&at| file.is_ident(at, "unsafe"))?;
        Some(Finding {
            subject: file.path.clone(),
            line: file.line(at),
            message: format!("`unsafe` outside {}", PLACES.join(", ")),
        })
    });
    first.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsafe_outside_its_places_is_found() {
        let code = "fn f() { unsafe { g() } }";
        let tree = Tree::sample(&[
            ("crates/rlx-kernels/src/gemm/avx2.rs", code),
            ("crates/rlx-tensor/src/storage.rs", code),
            ("crates/rlx-tensor/src/storage/mapped.rs", code),
            ("crates/rlx-gpu/src/ffi/cuda.rs", code),
            ("crates/rlx/src/session.rs", code),
            ("crates/rlx/src/error.rs", "// unsafe\n#![forbid(unsafe_code)] const A: &str = \"unsafe\";"),
        ]);
        let found: Vec<_> = check(&tree).into_iter().map(|f| f.subject).collect();
        assert_eq!(found, ["crates/rlx/src/session.rs"]);
    }
}
