//! Results on standard output.

mod compiled;
mod devices;
mod steps;

pub use compiled::{Stage, print_report, print_stage, summary_text};
pub use devices::Devices;
pub use steps::{StepShare, steps_table};

use crate::failure::{Failure, Result, output_failure};
use serde::Serialize;
use std::io::Write as _;

/// Prints text as it is.
pub fn print(text: &str) -> Result<()> {
    print_bytes(text.as_bytes())
}

/// Prints bytes as they are.
pub fn print_bytes(bytes: &[u8]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).map_err(output_failure)
}

/// Prints one JSON object on one line.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string(value)
        .map_err(|error| Failure::new(error, "the result as JSON", "try again without --json"))?;
    print(&format!("{text}\n"))
}

/// Rows of cells as aligned columns, the first column to the left.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().enumerate().map(|(column, cell)| {
            let width = widths[column];
            if column == 0 { format!("{cell:width$}") } else { format!("{cell:>width$}") }
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// A row-major f32 matrix as a NumPy file, format version 1.0.
pub fn npy(rows: &[Vec<f32>]) -> Vec<u8> {
    let columns = rows.first().map_or(0, Vec::len);
    let shape = format!("({}, {columns})", rows.len());
    let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}");
    const PREFIX_BYTES: usize = 10;
    // The format wants the data 64-byte aligned and the header ended by a line break.
    let padded = (PREFIX_BYTES + header.len() + 1).next_multiple_of(64);
    header.push_str(&" ".repeat(padded - PREFIX_BYTES - header.len() - 1));
    header.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(rows.iter().flatten().flat_map(|value| value.to_le_bytes()));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = [vec!["a".to_owned(), "10".to_owned()], vec!["long".to_owned(), "9".to_owned()]];
        assert_eq!(table(&rows), "a     10\nlong   9\n");
    }

    #[test]
    fn an_npy_header_is_aligned_and_says_the_shape() {
        let bytes = npy(&[vec![1.0, 2.0], vec![3.0, -4.5]]);
        let header_bytes = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
        assert_eq!((10 + header_bytes) % 64, 0);
        let header = std::str::from_utf8(&bytes[10..10 + header_bytes]).expect("the header is ASCII");
        assert!(header.starts_with("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), }"));
        assert!(header.ends_with('\n'));
        assert_eq!(bytes[10 + header_bytes + 12..], (-4.5f32).to_le_bytes());
    }
}
