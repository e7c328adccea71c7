//! `config.json`, read so that nothing that matters is ignored: every field that is read is recorded, and
//! [`ConfigReader::finish`] names those that nobody asked for.

use std::collections::HashSet;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::super::ImportError;
use super::super::json::{Json, JsonFault, read_json_file};

/// Largest `config.json` that is read.
pub const MAX_CONFIG_BYTES: u64 = 16 << 20;
/// Largest count or size that a field may claim without a range of its own.
pub const MAX_CONFIG_SIZE: u64 = 1 << 32;

/// A checked view of a JSON object. Clones and sections share the record of what was read.
#[derive(Debug, Clone)]
pub struct ConfigReader {
    document: Arc<Document>,
    at: Vec<String>,
}

#[derive(Debug)]
struct Document {
    path: PathBuf,
    root: Json,
    read: Mutex<HashSet<Vec<String>>>,
}

/// A type that a field can be read as.
pub trait FromConfig: Sized {
    /// What such a field holds, for messages ("a whole number").
    fn expected() -> String;
    /// Converts, or says that it cannot.
    fn from_json(value: &Json) -> Option<Self>;
}

impl ConfigReader {
    /// Opens a file of at most [`MAX_CONFIG_BYTES`] that holds one object.
    ///
    /// # Errors
    /// [`ImportError::Io`], [`ImportError::TooLarge`], [`ImportError::Json`], [`ImportError::Field`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ImportError> {
        let path = path.as_ref();
        Self::of(path, read_json_file(path, MAX_CONFIG_BYTES)?)
    }

    /// Reads a text; `path` names it in messages.
    ///
    /// # Errors
    /// [`ImportError::Json`], [`ImportError::Field`].
    pub fn from_bytes(path: impl AsRef<Path>, bytes: &[u8]) -> Result<Self, ImportError> {
        let path = path.as_ref();
        let fault =
            |JsonFault { offset, message }| ImportError::Json { path: path.to_path_buf(), offset, message };
        Self::of(path, Json::parse(bytes).map_err(fault)?)
    }

    fn of(path: &Path, root: Json) -> Result<Self, ImportError> {
        if !matches!(root, Json::Object(_)) {
            return Err(ImportError::Field {
                path: path.to_path_buf(),
                field: "(top level)".to_owned(),
                expected: "an object".to_owned(),
                found: root.kind().to_owned(),
            });
        }
        let document = Document { path: path.to_path_buf(), root, read: Mutex::new(HashSet::new()) };
        Ok(ConfigReader { document: Arc::new(document), at: Vec::new() })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.document.path
    }

    /// True when the field is there and not `null`. Does not count as reading it.
    pub fn has(&self, field: &str) -> bool {
        !matches!(self.object().field(field), None | Some(Json::Null))
    }

    /// Reads a field that has to be there; `null` counts as absent.
    ///
    /// # Errors
    /// [`ImportError::MissingField`], [`ImportError::Field`].
    pub fn required<T: FromConfig>(&self, field: &str) -> Result<T, ImportError> {
        self.optional(field)?.ok_or_else(|| self.missing(field, T::expected()))
    }

    /// Reads a field that may be absent or `null`.
    ///
    /// # Errors
    /// [`ImportError::Field`].
    pub fn optional<T: FromConfig>(&self, field: &str) -> Result<Option<T>, ImportError> {
        self.mark(field);
        match self.object().field(field) {
            None | Some(Json::Null) => Ok(None),
            Some(value) => match T::from_json(value) {
                Some(parsed) => Ok(Some(parsed)),
                None => Err(self.wrong(field, T::expected(), value.brief(80))),
            },
        }
    }

    /// Reads a field, or takes `default` where it is absent or `null`.
    ///
    /// # Errors
    /// [`ImportError::Field`].
    pub fn or<T: FromConfig>(&self, field: &str, default: T) -> Result<T, ImportError> {
        Ok(self.optional(field)?.unwrap_or(default))
    }

    /// Reads a required number within `range`.
    ///
    /// # Errors
    /// [`ImportError::MissingField`], [`ImportError::Field`] also for a number out of range.
    pub fn required_in<T>(&self, field: &str, range: RangeInclusive<T>) -> Result<T, ImportError>
    where
        T: FromConfig + PartialOrd + Clone + std::fmt::Display,
    {
        let expected = || format!("{} from {} to {}", T::expected(), range.start(), range.end());
        self.optional_in(field, range.clone())?.ok_or_else(|| self.missing(field, expected()))
    }

    /// Reads an optional number within `range`.
    ///
    /// # Errors
    /// [`ImportError::Field`].
    pub fn optional_in<T>(&self, field: &str, range: RangeInclusive<T>) -> Result<Option<T>, ImportError>
    where
        T: FromConfig + PartialOrd + Clone + std::fmt::Display,
    {
        match self.optional::<T>(field)? {
            Some(value) if !range.contains(&value) => {
                let expected = format!("{} from {} to {}", T::expected(), range.start(), range.end());
                Err(self.wrong(field, expected, value.to_string()))
            }
            value => Ok(value),
        }
    }

    /// Reads a string that has to be one of `choices` (name, meaning), or takes `default` where it is absent.
    ///
    /// # Errors
    /// [`ImportError::Field`] listing the names that are supported; [`ImportError::MissingField`] when it is
    /// absent and there is no default.
    pub fn choice<T: Clone>(
        &self,
        field: &str,
        choices: &[(&str, T)],
        default: Option<T>,
    ) -> Result<T, ImportError> {
        let expected = || {
            let names: Vec<String> = choices.iter().map(|(name, _)| format!("\"{name}\"")).collect();
            format!("one of {}", names.join(", "))
        };
        match self.optional::<String>(field)? {
            None => default.ok_or_else(|| self.missing(field, expected())),
            Some(found) => match choices.iter().find(|(name, _)| *name == found) {
                Some((_, meaning)) => Ok(meaning.clone()),
                None => Err(self.wrong(field, expected(), format!("\"{found}\""))),
            },
        }
    }

    /// Refuses any value of `field` but `only` (or absence), for features that are not supported.
    ///
    /// # Errors
    /// [`ImportError::Field`].
    pub fn must_be<T>(&self, field: &str, only: T) -> Result<(), ImportError>
    where
        T: FromConfig + PartialEq + std::fmt::Debug,
    {
        match self.optional::<T>(field)? {
            Some(value) if value != only => {
                Err(self.wrong(field, format!("{only:?} (nothing else is supported)"), format!("{value:?}")))
            }
            _ => Ok(()),
        }
    }

    /// Opens a nested object; `None` where it is absent or `null`. Its fields are recorded one by one.
    ///
    /// # Errors
    /// [`ImportError::Field`].
    pub fn section(&self, field: &str) -> Result<Option<ConfigReader>, ImportError> {
        match self.object().field(field) {
            None | Some(Json::Null) => {
                self.mark(field);
                Ok(None)
            }
            Some(Json::Object(fields)) => {
                if fields.is_empty() {
                    self.mark(field);
                }
                let mut at = self.at.clone();
                at.push(field.to_owned());
                Ok(Some(ConfigReader { document: Arc::clone(&self.document), at }))
            }
            Some(other) => {
                self.mark(field);
                Err(self.wrong(field, "an object".to_owned(), other.brief(80)))
            }
        }
    }

    /// Names of the fields of this object, in file order. Does not count as reading them.
    pub fn field_names(&self) -> impl Iterator<Item = &str> {
        let fields = match self.object() {
            Json::Object(fields) => fields.as_slice(),
            _ => &[],
        };
        fields.iter().map(|(name, _)| name.as_str())
    }

    /// Declares fields as irrelevant to the result, whatever they hold. A dotted name reaches into a section.
    pub fn ignore(&self, fields: &[&str]) {
        for field in fields {
            let mut at = self.at.clone();
            at.extend(field.split('.').map(str::to_owned));
            self.record(at);
        }
    }

    /// An error about `field`, for checks that a range cannot say.
    pub fn wrong(&self, field: &str, expected: impl Into<String>, found: impl Into<String>) -> ImportError {
        ImportError::Field {
            path: self.document.path.clone(),
            field: self.dotted(field),
            expected: expected.into(),
            found: found.into(),
        }
    }

    /// Passes when every field of this object, and of the sections in it, was read, ignored or is `null`.
    ///
    /// # Errors
    /// [`ImportError::UnreadFields`] naming each with its value.
    pub fn finish(&self) -> Result<(), ImportError> {
        let read = self.document.read.lock().unwrap_or_else(PoisonError::into_inner);
        let mut unread = Vec::new();
        collect_unread(self.object(), &mut self.at.clone(), &read, &mut unread);
        if unread.is_empty() {
            return Ok(());
        }
        Err(ImportError::UnreadFields { path: self.document.path.clone(), fields: unread })
    }

    fn object(&self) -> &Json {
        self.at.iter().fold(&self.document.root, |value, name| value.field(name).unwrap_or(&Json::Null))
    }

    fn mark(&self, field: &str) {
        let mut at = self.at.clone();
        at.push(field.to_owned());
        self.record(at);
    }

    fn record(&self, at: Vec<String>) {
        self.document.read.lock().unwrap_or_else(PoisonError::into_inner).insert(at);
    }

    fn dotted(&self, field: &str) -> String {
        let mut parts = self.at.clone();
        parts.push(field.to_owned());
        parts.join(".")
    }

    fn missing(&self, field: &str, expected: String) -> ImportError {
        ImportError::MissingField { path: self.document.path.clone(), field: self.dotted(field), expected }
    }
}

fn collect_unread(
    value: &Json,
    at: &mut Vec<String>,
    read: &HashSet<Vec<String>>,
    unread: &mut Vec<(String, String)>,
) {
    let Json::Object(fields) = value else { return };
    for (name, value) in fields {
        at.push(name.clone());
        let opened = || read.iter().any(|path| path.len() > at.len() && path.starts_with(at));
        if !read.contains(at.as_slice()) && *value != Json::Null {
            if matches!(value, Json::Object(_)) && opened() {
                collect_unread(value, at, read, unread);
            } else {
                unread.push((at.join("."), value.brief(60)));
            }
        }
        at.pop();
    }
}

fn whole_number(value: &Json) -> Option<u64> {
    match value {
        Json::Number(number) => number.as_u64().or_else(|| {
            // Python writes some counts as 4096.0.
            let float = number.as_f64()?;
            (float >= 0.0 && float.fract() == 0.0 && float <= MAX_CONFIG_SIZE as f64).then_some(float as u64)
        }),
        _ => None,
    }
}

macro_rules! whole_numbers {
    ($($type:ty),*) => {$(
        impl FromConfig for $type {
            fn expected() -> String {
                format!("a whole number up to {}", MAX_CONFIG_SIZE.min(<$type>::MAX as u64))
            }

            fn from_json(value: &Json) -> Option<Self> {
                whole_number(value).filter(|&n| n <= MAX_CONFIG_SIZE).and_then(|n| n.try_into().ok())
            }
        }
    )*};
}

whole_numbers!(usize, u64, u32);

impl FromConfig for i64 {
    fn expected() -> String {
        "an integer".to_owned()
    }

    fn from_json(value: &Json) -> Option<Self> {
        match value {
            Json::Number(number) => number.as_i64().filter(|n| n.unsigned_abs() <= MAX_CONFIG_SIZE),
            _ => None,
        }
    }
}

impl FromConfig for f64 {
    fn expected() -> String {
        "a finite number".to_owned()
    }

    fn from_json(value: &Json) -> Option<Self> {
        match value {
            Json::Number(number) => number.as_f64().filter(|n| n.is_finite()),
            _ => None,
        }
    }
}

impl FromConfig for f32 {
    fn expected() -> String {
        "a finite number".to_owned()
    }

    fn from_json(value: &Json) -> Option<Self> {
        f64::from_json(value).map(|n| n as f32).filter(|n| n.is_finite())
    }
}

impl FromConfig for bool {
    fn expected() -> String {
        "true or false".to_owned()
    }

    fn from_json(value: &Json) -> Option<Self> {
        match value {
            Json::Bool(value) => Some(*value),
            _ => None,
        }
    }
}

impl FromConfig for String {
    fn expected() -> String {
        "a string".to_owned()
    }

    fn from_json(value: &Json) -> Option<Self> {
        match value {
            Json::String(value) => Some(value.clone()),
            _ => None,
        }
    }
}

impl FromConfig for Json {
    fn expected() -> String {
        "any value".to_owned()
    }

    fn from_json(value: &Json) -> Option<Self> {
        Some(value.clone())
    }
}

impl<T: FromConfig> FromConfig for Vec<T> {
    fn expected() -> String {
        format!("an array, each {}", T::expected())
    }

    fn from_json(value: &Json) -> Option<Self> {
        match value {
            Json::Array(values) => values.iter().map(T::from_json).collect(),
            _ => None,
        }
    }
}

/// One value, or an array of them: `eos_token_id` is written both ways.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OneOrMany<T>(pub Vec<T>);

impl<T: FromConfig> FromConfig for OneOrMany<T> {
    fn expected() -> String {
        format!("{}, or an array of them", T::expected())
    }

    fn from_json(value: &Json) -> Option<Self> {
        match value {
            Json::Array(_) => Vec::from_json(value).map(OneOrMany),
            one => T::from_json(one).map(|one| OneOrMany(vec![one])),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(text: &str) -> ConfigReader {
        ConfigReader::from_bytes("m/config.json", text.as_bytes()).unwrap()
    }

    #[test]
    fn unread_fields_are_named_with_their_values() {
        let cfg =
            reader(r#"{"hidden_size": 64, "new_norm": "odd", "rope_scaling": {"factor": 2.0, "beta": 3}}"#);
        assert_eq!(cfg.required::<usize>("hidden_size").unwrap(), 64);
        let rope = cfg.section("rope_scaling").unwrap().unwrap();
        assert_eq!(rope.required::<f32>("factor").unwrap(), 2.0);
        let text = cfg.finish().unwrap_err().to_string();
        assert!(text.contains(r#"`new_norm` = "odd""#) && text.contains("`rope_scaling.beta` = 3"), "{text}");
        assert!(!text.contains("hidden_size") && text.starts_with("m/config.json"), "{text}");
        cfg.ignore(&["new_norm", "rope_scaling.beta"]);
        cfg.finish().unwrap();
    }

    #[test]
    fn a_section_nobody_opened_is_one_unread_field() {
        let cfg = reader(r#"{"rope_scaling": {"factor": 2.0}, "none": null}"#);
        match cfg.finish() {
            Err(ImportError::UnreadFields { fields, .. }) => {
                assert_eq!(fields, [("rope_scaling".to_owned(), r#"{"factor": 2.0}"#.to_owned())]);
            }
            other => panic!("{other:?}"),
        }
        let cfg = reader(r#"{"rope_scaling": {"factor": 2.0}}"#);
        cfg.ignore(&["rope_scaling"]);
        cfg.finish().unwrap();
    }

    #[test]
    fn missing_and_wrong_fields_say_file_field_expected_and_found() {
        let cfg = reader(r#"{"layers": "two", "inner": {"heads": -1}, "n": null}"#);
        assert_eq!(
            cfg.required::<usize>("hidden_size").unwrap_err().to_string(),
            "m/config.json: field `hidden_size` is missing, expected a whole number up to 4294967296"
        );
        assert_eq!(
            cfg.required::<bool>("layers").unwrap_err().to_string(),
            "m/config.json: field `layers`: expected true or false, found \"two\""
        );
        let inner = cfg.section("inner").unwrap().unwrap();
        let text = inner.required::<usize>("heads").unwrap_err().to_string();
        assert!(text.contains("`inner.heads`") && text.ends_with("found -1"), "{text}");
        assert!(matches!(cfg.required::<usize>("n"), Err(ImportError::MissingField { .. })));
        assert!(cfg.section("layers").is_err());
    }

    #[test]
    fn numbers_are_bounded() {
        let cfg = reader(r#"{"a": 9223372036854775808, "b": 3.5, "c": 4096.0, "d": 1e300, "e": 5}"#);
        assert!(cfg.required::<usize>("a").is_err());
        assert!(cfg.required::<usize>("b").is_err());
        assert_eq!(cfg.required::<usize>("c").unwrap(), 4096);
        assert!(cfg.required::<f32>("d").is_err());
        assert_eq!(cfg.required_in::<u32>("e", 1..=5).unwrap(), 5);
        let text = cfg.required_in::<u32>("e", 1..=4).unwrap_err().to_string();
        assert!(text.contains("from 1 to 4, found 5"), "{text}");
    }

    #[test]
    fn one_or_many_reads_both_spellings() {
        let cfg = reader(r#"{"one": 2, "many": [2, 3], "bad": [2, "x"]}"#);
        assert_eq!(cfg.required::<OneOrMany<u32>>("one").unwrap().0, [2]);
        assert_eq!(cfg.required::<OneOrMany<u32>>("many").unwrap().0, [2, 3]);
        assert!(cfg.required::<OneOrMany<u32>>("bad").is_err());
    }

    #[test]
    fn choices_and_fixed_values_name_what_is_supported() {
        let cfg = reader(r#"{"act": "relu6", "bias": true}"#);
        let text = cfg.choice("act", &[("silu", 1), ("gelu", 2)], None).unwrap_err().to_string();
        assert!(text.contains(r#"one of "silu", "gelu", found "relu6""#), "{text}");
        assert_eq!(cfg.choice("absent", &[("silu", 1)], Some(7)).unwrap(), 7);
        assert!(cfg.must_be("bias", true).is_ok() && cfg.must_be("bias", false).is_err());
        assert!(cfg.must_be("absent", false).is_ok());
    }

    #[test]
    fn a_top_level_array_and_broken_json_are_refused() {
        assert!(matches!(ConfigReader::from_bytes("c", b"[1]"), Err(ImportError::Field { .. })));
        assert!(matches!(ConfigReader::from_bytes("c", b"{"), Err(ImportError::Json { .. })));
        assert!(matches!(ConfigReader::from_bytes("c", b"{\"\xfe\": 1}"), Err(ImportError::Json { .. })));
    }
}
