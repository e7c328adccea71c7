//! The text of a kernel: what goldens show and what is hashed.

use super::{ArgDef, Inst, Kernel, Stmt, Value};
use std::fmt;

fn values(list: &[Value]) -> String {
    list.iter().map(|v| format!("%{}", v.0)).collect::<Vec<_>>().join(", ")
}

fn mask(mask: &Option<Value>) -> String {
    mask.map_or(String::new(), |m| format!(" if %{}", m.0))
}

fn block(f: &mut fmt::Formatter<'_>, body: &[Stmt], depth: usize) -> fmt::Result {
    for Stmt { results, inst } in body {
        write!(f, "{:1$}", "", depth * 2)?;
        if !results.is_empty() {
            write!(f, "{} = ", values(results))?;
        }
        match inst {
            Inst::Const(literal) => writeln!(f, "const {literal:?}")?,
            Inst::Arg(arg) => writeln!(f, "arg {}", arg.0)?,
            Inst::Program => writeln!(f, "program")?,
            Inst::Lane => writeln!(f, "lane")?,
            Inst::Unary(function, x) => writeln!(f, "{function:?} %{}", x.0)?,
            Inst::Binary(function, a, b) => writeln!(f, "{function:?} %{}, %{}", a.0, b.0)?,
            Inst::Select(c, a, b) => writeln!(f, "select {}", values(&[*c, *a, *b]))?,
            Inst::Fma(a, b, c) => writeln!(f, "fma {}", values(&[*a, *b, *c]))?,
            Inst::Dot4(a, b, c) => writeln!(f, "dot4 {}", values(&[*a, *b, *c]))?,
            Inst::Lookup(x, table) => writeln!(f, "lookup %{} in {table:?}", x.0)?,
            Inst::Put { tile, at, values: list } => {
                writeln!(f, "put tile{}[%{}] <- {}", tile.0, at.0, values(list))?;
            }
            Inst::Take { tile, at } => writeln!(f, "take tile{}[%{}]", tile.0, at.0)?,
            Inst::Fragment { tile, at, pitch, lines } => {
                writeln!(f, "fragment tile{}[%{}] of {lines} by {pitch}", tile.0, at.0)?;
            }
            Inst::Mma { pairs, rows, columns, sums } => {
                let (rows, columns, sums) = (values(rows), values(columns), values(sums));
                writeln!(f, "mma {pairs:?} {rows} by {columns} to {sums}")?;
            }
            Inst::MmaBytes { rows, columns, sums } => {
                writeln!(f, "mma bytes {} by {} to {}", values(rows), values(columns), values(sums))?;
            }
            Inst::Barrier => writeln!(f, "barrier")?,
            Inst::Digit { linear, extents, axis } => {
                let extents: Vec<String> = extents.iter().map(|e| e.0.to_string()).collect();
                writeln!(f, "digit {axis} of %{} in [{}]", linear.0, extents.join(", "))?;
            }
            Inst::Load { view, at, mask: m } => {
                writeln!(f, "load view{}[{}]{}", view.0, values(at), mask(m))?;
            }
            Inst::Store { view, at, value, mask: m } => {
                writeln!(f, "store view{}[{}] <- %{}{}", view.0, values(at), value.0, mask(m))?;
            }
            Inst::Fold(function, x) => writeln!(f, "fold {function:?} %{}", x.0)?,
            Inst::Stage(x) => writeln!(f, "stage %{}", x.0)?,
            Inst::Peek { tile, at } => writeln!(f, "peek %{} at %{}", tile.0, at.0)?,
            Inst::Check { holds, mask, slot } => {
                writeln!(f, "check %{} if %{} else arg {}", holds.0, mask.0, slot.0)?;
            }
            Inst::Loop(l) => {
                writeln!(f, "for %{} in %{} .. %{} step {} {{", l.index.0, l.from.0, l.to.0, l.step)?;
                for c in &l.carried {
                    writeln!(f, "{:3$}%{} = carry %{}", "", c.param.0, c.first.0, depth * 2 + 2)?;
                }
                block(f, &l.body, depth + 1)?;
                let next: Vec<Value> = l.carried.iter().map(|c| c.next).collect();
                writeln!(f, "{:2$}}} -> {}", "", values(&next), depth * 2)?;
            }
        }
    }
    Ok(())
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "kernel {} lanes {} {{", self.name, self.lanes)?;
        for (i, def) in self.args.iter().enumerate() {
            let list =
                |parts: &[super::Arg]| parts.iter().map(|a| a.0.to_string()).collect::<Vec<_>>().join(" * ");
            match def {
                ArgDef::Size(at) => writeln!(f, "  arg {i} = size {at}")?,
                ArgDef::Known(value) => writeln!(f, "  arg {i} = {value}")?,
                ArgDef::Product(parts) => writeln!(f, "  arg {i} = product {}", list(parts))?,
                ArgDef::Base(view) => writeln!(f, "  arg {i} = base view{}", view.0)?,
                ArgDef::Stride(view, axis) => writeln!(f, "  arg {i} = stride view{} {axis}", view.0)?,
            }
        }
        for (i, view) in self.views.iter().enumerate() {
            let extents: Vec<String> = view.extents.iter().map(|e| e.0.to_string()).collect();
            let (access, binding, storage) = (view.access, view.binding, view.storage);
            let wide = if view.wide > 1 { format!(" by {}", view.wide) } else { String::new() };
            writeln!(f, "  view{i} = {access:?} {binding:?} {storage:?} [{}]{wide}", extents.join(", "))?;
        }
        for (i, tile) in self.tiles.iter().enumerate() {
            writeln!(f, "  tile{i} = {:?} [{}]", tile.element, tile.words)?;
        }
        if let Some(gemm) = &self.gemm {
            writeln!(f, "  library {gemm}")?;
        }
        block(f, &self.body, 1)?;
        writeln!(f, "}}")
    }
}
