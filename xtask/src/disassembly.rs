//! Hot loops of the kernels, read as assembly: accumulators that do not fit in registers show as vectors stored on the stack.

use std::path::{Path, PathBuf};

use crate::config::Config;
use crate::process;

/// Multiply-adds that make a loop hot, and the least share of its instructions.
const LEAST_PRODUCTS: usize = 8;
const LEAST_SHARE: usize = 3;

/// Fewer hot loops than this mean that the reading, not the code, has changed.
const LEAST_LOOPS: usize = 40;

const FOLDER: &str = "target/disassembly";

/// Parts of the names of loops that may spill, each with its reason.
const KNOWN: &[(&str, &str)] = &[
    (
        "9attention3few8StepRows",
        "seven and eight rows of a 16-bit cache on AVX2: two vectors too many, read from the first level",
    ),
    ("9attention4many5Group", "instances of eight keys, which AVX2 has and never calls: it takes four"),
    (
        "4gemm4taps4TapsKj7_Kj2",
        "seven rows by two panels of a convolution: fewer rows read more weights, to be measured",
    ),
    (
        "6format5Dense",
        "rows of block formats with minima or halves: fewer rows unpack more often, to be measured",
    ),
];

/// Compiles the kernels to assembly and looks through every hot innermost loop.
pub fn run(config: &Config) -> Result<(), String> {
    if !cfg!(target_arch = "x86_64") {
        println!("skipped: the check reads x86-64 assembly");
        return Ok(());
    }
    let args =
        ["rustc", "--release", "--locked", "--package", "rlx-kernels", "--lib", "--target-dir", FOLDER];
    let emit =
        ["--", "--emit=asm", "-C", "codegen-units=1", "-C", "lto=off", "-C", "symbol-mangling-version=v0"];
    let folder = config.root.join(FOLDER).join("release/deps");
    process::run(process::command("cargo", &args, &config.root).args(emit))?;
    let path = assembly(&folder)?;
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let loops = hot_loops(&text);
    let (known, spilling): (Vec<&HotLoop>, Vec<&HotLoop>) =
        loops.iter().filter(|hot| hot.spills > 0).partition(|hot| hot.reason().is_some());
    println!("{} hot loops, {} with vectors on the stack", loops.len(), known.len() + spilling.len());
    for hot in known {
        println!("known: {} spills in {}: {}", hot.spills, hot.function, hot.reason().unwrap_or_default());
    }
    if loops.len() < LEAST_LOOPS {
        return Err(format!("found {} hot loops, expected {LEAST_LOOPS} at least", loops.len()));
    }
    match spilling.is_empty() {
        true => Ok(()),
        false => Err(spilling.iter().map(|hot| format!("{hot:?}")).collect::<Vec<_>>().join("\n")),
    }
}

/// The newest assembly of the kernels in a folder.
fn assembly(folder: &Path) -> Result<PathBuf, String> {
    let failed = |e: std::io::Error| format!("{}: {e}", folder.display());
    let mut newest = None;
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("rlx_kernels-") && name.ends_with(".s") {
            newest = newest
                .max(Some((entry.metadata().and_then(|m| m.modified()).map_err(failed)?, entry.path())));
        }
    }
    newest.map(|(_, path)| path).ok_or_else(|| format!("{}: no assembly of the kernels", folder.display()))
}

/// An innermost loop with many multiply-adds.
#[derive(Debug, PartialEq, Eq)]
struct HotLoop {
    function: String,
    instructions: usize,
    products: usize,
    spills: usize,
}

impl HotLoop {
    fn reason(&self) -> Option<&'static str> {
        KNOWN.iter().find(|(part, _)| self.function.contains(part)).map(|(_, reason)| *reason)
    }
}

/// The hot innermost loops of a text in AT&T syntax: from a label to a jump back to it, with no other such jump between.
fn hot_loops(text: &str) -> Vec<HotLoop> {
    let (mut function, mut labels, mut instructions) = ("", Vec::new(), Vec::new());
    let (mut found, mut last_loop) = (Vec::new(), 0);
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default();
        if let Some(label) = line.strip_suffix(':').or_else(|| line.trim_end().strip_suffix(':')) {
            if !label.starts_with(".L") {
                function = label;
                labels.clear();
            }
            labels.push((label, instructions.len()));
            continue;
        }
        let instruction = line.trim();
        if instruction.is_empty() || instruction.starts_with('.') {
            continue;
        }
        instructions.push(instruction);
        let Some(target) = instruction.strip_prefix('j').and_then(|rest| rest.split_whitespace().nth(1))
        else {
            continue;
        };
        let Some(&(_, start)) = labels.iter().rev().find(|(label, _)| *label == target) else { continue };
        if start >= last_loop {
            found.extend(hot_loop(function, &instructions[start..]));
            last_loop = instructions.len();
        }
    }
    found
}

fn hot_loop(function: &str, body: &[&str]) -> Option<HotLoop> {
    let is_product =
        |line: &&&str| ["vfmadd", "vfnmadd", "vdpbf16ps", "vpdpb"].iter().any(|p| line.starts_with(p));
    let products = body.iter().filter(is_product).count();
    let spills = body.iter().filter(|line| line.ends_with("(%rsp)") && line.contains("mm")).count();
    let hot = products >= LEAST_PRODUCTS && products * LEAST_SHARE >= body.len();
    hot.then(|| HotLoop { function: function.to_owned(), instructions: body.len(), products, spills })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(body: &str) -> String {
        format!("kernel:\n\txorl\t%eax, %eax\n.LBB0_1:\n{body}\tincq\t%rax\n\tjne\t.LBB0_1\n\tretq\n")
    }

    #[test]
    fn a_loop_of_multiply_adds_is_hot_and_its_stack_operands_count() {
        let products = "\tvfmadd231ps\t%zmm0, %zmm1, %zmm2\n".repeat(8);
        let clean = hot_loops(&function(&products));
        assert_eq!(clean.len(), 1);
        assert_eq!((clean[0].function.as_str(), clean[0].products, clean[0].spills), ("kernel", 8, 0));
        let spilled = hot_loops(&function(&format!("{products}\tvmovaps\t%zmm2, 64(%rsp)\n")));
        assert_eq!(spilled[0].spills, 1);
    }

    #[test]
    fn loops_around_loops_and_loops_of_other_work_are_not_hot() {
        let products = "\tvfmadd231ps\t%zmm0, %zmm1, %zmm2\n".repeat(8);
        let inner = format!("\tmovq\t(%rsp), %rcx\n.LBB0_2:\n{products}\tdecq\t%rcx\n\tjne\t.LBB0_2\n");
        let found = hot_loops(&function(&inner));
        assert_eq!(found.iter().map(|hot| hot.spills).collect::<Vec<_>>(), [0]);
        assert!(hot_loops(&function(&"\taddps\t%xmm0, %xmm1\n".repeat(30))).is_empty());
    }
}
