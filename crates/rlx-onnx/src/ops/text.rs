//! Strings.

use super::Row;
use crate::error::{Refusal, invalid, unsupported};
use crate::lower::Host;
use crate::value::{ElementType, TextTensor, Value, from_floats};
use regex::Regex;
use rlx_graph::eval::{broadcast_dims, broadcast_indices, from_i64};
use rlx_tensor::{DType, Tensor};
use std::collections::HashMap;

/// The rows of this family.
pub const ROWS: &[Row] = &[
    Row::host("StringConcat", concat),
    Row::host("StringSplit", split),
    Row::host("StringNormalizer", normalize),
    Row::host("TfIdfVectorizer", tf_idf),
    Row::host("RegexFullMatch", full_match),
];

fn concat(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let (a, b) = (h.value(0)?.text()?, h.value(1)?.text()?);
    let Some(dims) = broadcast_dims(&a.dims, &b.dims) else { return invalid("operands do not broadcast") };
    let pairs = broadcast_indices(&dims, &a.dims).into_iter().zip(broadcast_indices(&dims, &b.dims));
    let items = pairs.map(|(i, j)| format!("{}{}", a.items[i], b.items[j])).collect();
    Ok(vec![Value::Text(TextTensor { dims, items })])
}

fn pieces(text: &str, delimiter: &str, most: usize) -> Vec<String> {
    if !delimiter.is_empty() {
        return text.splitn(most.saturating_add(1), delimiter).map(str::to_owned).collect();
    }
    let mut rest = text.trim_start();
    let mut found = Vec::new();
    while !rest.is_empty() && found.len() < most {
        let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
        found.push(rest[..end].to_owned());
        rest = rest[end..].trim_start();
    }
    if !rest.trim_end().is_empty() {
        found.push(rest.trim_end().to_owned());
    }
    found
}

fn split(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let x = h.value(0)?.text()?;
    let delimiter = h.node.text("delimiter", "")?;
    let most = h.node.int_opt("maxsplit")?.and_then(|m| usize::try_from(m).ok()).unwrap_or(usize::MAX - 1);
    let all: Vec<Vec<String>> = x.items.iter().map(|s| pieces(s, delimiter, most)).collect();
    let width = all.iter().map(Vec::len).max().unwrap_or(0);
    let counts: Vec<i64> = all.iter().map(|p| p.len() as i64).collect();
    let mut items = Vec::new();
    for mut row in all {
        row.resize(width, String::new());
        items.extend(row);
    }
    let mut dims = x.dims.clone();
    dims.push(width);
    let counts = Tensor::from_slice(&x.dims, &counts)?;
    Ok(vec![Value::Text(TextTensor { dims, items }), counts.into()])
}

fn normalize(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let x = h.value(0)?.text()?;
    let exact = h.node.flag("is_case_sensitive", false)?;
    let stop = h.node.texts_opt("stopwords")?.unwrap_or_default();
    let same = |a: &str, b: &str| if exact { a == b } else { a.to_lowercase() == b.to_lowercase() };
    let kept = x.items.iter().filter(|item| !stop.iter().any(|s| same(s, item)));
    let change = |item: &String| match h.node.text("case_change_action", "NONE")? {
        "LOWER" => Ok(item.to_lowercase()),
        "UPPER" => Ok(item.to_uppercase()),
        "NONE" => Ok(item.clone()),
        other => invalid(format!("case_change_action {other:?} is unknown")),
    };
    let mut items = kept.map(change).collect::<Result<Vec<_>, Refusal>>()?;
    if items.is_empty() {
        items.push(String::new());
    }
    let dims = match x.dims.len() {
        1 => vec![items.len()],
        2 if x.dims[0] == 1 => vec![1, items.len()],
        _ => return unsupported(format!("dims {:?}", x.dims)),
    };
    Ok(vec![Value::Text(TextTensor { dims, items })])
}

/// Words of a pool or of an operand, whichever they are made of.
fn words(value: &Value) -> Result<Vec<String>, Refusal> {
    match value {
        Value::Text(text) => Ok(text.items.clone()),
        other => Ok(other.ints()?.iter().map(i64::to_string).collect()),
    }
}

fn tf_idf(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let x = words(h.value(0)?)?;
    let dims = h.dims(0)?;
    let least = h.node.int("min_gram_length", 1)?.max(1) as usize;
    let most = h.node.int("max_gram_length", 1)?.max(1) as usize;
    let skips = h.node.int("max_skip_count", 0)?.max(0) as usize;
    let starts = h.node.ints_opt("ngram_counts")?.unwrap_or_default();
    let indexes = h.node.ints_opt("ngram_indexes")?.unwrap_or_default();
    let weights = h.node.floats_opt("weights")?;
    let pool: Vec<String> = match (h.node.texts_opt("pool_strings")?, h.node.ints_opt("pool_int64s")?) {
        (Some(texts), _) => texts.to_vec(),
        (None, Some(ints)) => ints.iter().map(i64::to_string).collect(),
        _ => return invalid("there is no pool"),
    };
    let mut grams: HashMap<&[String], usize> = HashMap::new();
    let mut number = 0;
    for (i, &start) in starts.iter().enumerate() {
        let end = starts.get(i + 1).map_or(pool.len(), |&e| e.max(0) as usize);
        let part = pool.get(start.max(0) as usize..end);
        let Some(part) = part else { return invalid("ngram_counts do not fit the pool") };
        for gram in part.chunks_exact(i + 1) {
            grams.insert(gram, number);
            number += 1;
        }
    }
    let width = indexes.iter().max().map_or(0, |&m| m.max(0) as usize + 1);
    let row_len = dims.last().copied().unwrap_or(1);
    let mut out = Vec::new();
    for row in x.chunks(row_len.max(1)) {
        let mut counts = vec![0f64; width];
        let mut factors = vec![1f64; width];
        for n in least..=most {
            for distance in 1..=if n == 1 { 1 } else { skips + 1 } {
                for first in 0..row.len().saturating_sub((n - 1) * distance) {
                    let gram: Vec<String> = (0..n).map(|j| row[first + j * distance].clone()).collect();
                    let Some(&found) = grams.get(gram.as_slice()) else { continue };
                    let Some(&at) = indexes.get(found) else { return invalid("ngram_indexes are too few") };
                    counts[at as usize] += 1.0;
                    factors[at as usize] =
                        weights.as_ref().and_then(|w| w.get(found).copied()).unwrap_or(1.0);
                }
            }
        }
        let value = |i: usize| match h.node.text("mode", "TF") {
            Ok("TF") => counts[i],
            Ok("IDF") => counts[i].min(1.0) * factors[i],
            _ => counts[i] * factors[i],
        };
        out.extend((0..width).map(value));
    }
    let mut result = dims[..dims.len().saturating_sub(1)].to_vec();
    result.push(width);
    Ok(vec![from_floats(ElementType::Plain(DType::F32), &result, &out)?])
}

fn full_match(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let x = h.value(0)?.text()?;
    let pattern = h.node.text("pattern", "")?;
    let whole = format!(r"\A(?:{pattern})\z");
    let regex = Regex::new(&whole).map_err(|e| Refusal::Invalid(format!("pattern {pattern:?}: {e}")))?;
    let found: Vec<i64> = x.items.iter().map(|s| i64::from(regex.is_match(s))).collect();
    Ok(vec![from_i64(&x.dims, DType::Bool, &found)?.into()])
}
