//! Models split over files named `NAME-00001-of-0000N.gguf`.

use std::path::{Path, PathBuf};

use super::super::ImportError;
use super::MAX_SPLITS;
use super::metadata::Metadata;
use crate::weights::LoadError;

/// The file name of part `number` (from 0) of `count`.
pub fn split_name(stem: &str, number: usize, count: usize) -> String {
    format!("{stem}-{:05}-of-{count:05}.gguf", number.saturating_add(1))
}

fn wrong(path: &Path, field: &str, expected: String, found: String) -> ImportError {
    ImportError::Field { path: path.to_path_buf(), field: field.to_owned(), expected, found }
}

/// The paths of all parts; none for a file that is whole.
pub(super) fn parts_of(path: &Path, metadata: &Metadata) -> Result<Vec<PathBuf>, ImportError> {
    let count = metadata.u64("split.count")?.unwrap_or(0);
    if count <= 1 {
        return Ok(Vec::new());
    }
    let Some(count) = usize::try_from(count).ok().filter(|&count| count <= usize::from(MAX_SPLITS)) else {
        return Err(wrong(path, "split.count", format!("at most {MAX_SPLITS}"), count.to_string()));
    };
    let number = metadata.u64("split.no")?.unwrap_or(0);
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("");
    let number = usize::try_from(number).ok().filter(|&number| number < count);
    let stem = number.and_then(|number| name.strip_suffix(&split_name("", number, count)));
    match stem {
        Some(stem) => {
            let folder = path.parent().unwrap_or(Path::new(""));
            Ok((0..count).map(|part| folder.join(split_name(stem, part, count))).collect())
        }
        None => {
            let expected = format!("a file named NAME{} or as another part", split_name("", 0, count));
            Err(wrong(path, "split.no", expected, format!("`{name}`")))
        }
    }
}

pub(super) fn check_part(
    path: &Path,
    metadata: &Metadata,
    number: usize,
    count: usize,
) -> Result<(), ImportError> {
    for (field, expected) in [("split.no", number), ("split.count", count)] {
        let found = metadata.u64(field)?;
        if found != Some(expected as u64) {
            let found = found.map_or("nothing".to_owned(), |found| found.to_string());
            return Err(wrong(path, field, expected.to_string(), found));
        }
    }
    Ok(())
}

pub(super) fn tensor_total(path: &Path, metadata: &Metadata) -> Result<Option<usize>, ImportError> {
    let total = metadata.u64("split.tensors.count")?;
    let as_size = |total| usize::try_from(total).map_err(|_| total);
    total.map(as_size).transpose().map_err(|total| {
        wrong(path, "split.tensors.count", "a number of tensors".to_owned(), total.to_string())
    })
}

pub(super) fn check_total(path: &Path, total: Option<usize>, found: usize) -> Result<(), LoadError> {
    match total {
        Some(total) if total != found => Err(LoadError::Header {
            file: path.to_path_buf(),
            offset: 0,
            expected: format!("{total} tensors in all parts"),
            found: found.to_string(),
        }),
        _ => Ok(()),
    }
}
