//! JSON as files hold it: fields in file order, duplicate keys refused, size and depth bounded.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use super::ImportError;

/// Deepest nesting of arrays and objects that is read.
pub const MAX_JSON_DEPTH: usize = 64;

/// A JSON value with its object fields in file order.
#[derive(Debug, Clone, PartialEq)]
pub enum Json {
    /// `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// Any number.
    Number(serde_json::Number),
    /// A string.
    String(String),
    /// An array.
    Array(Vec<Json>),
    /// An object; names are unique.
    Object(Vec<(String, Json)>),
}

/// Where and why a text is not the JSON that is accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JsonFault {
    /// Byte offset in the text.
    pub offset: usize,
    /// What is wrong there.
    pub message: String,
}

impl Json {
    /// Parses a whole text.
    ///
    /// # Errors
    /// Invalid UTF-8, invalid JSON, a key twice in one object, nesting deeper than [`MAX_JSON_DEPTH`],
    /// anything after the value.
    pub fn parse(bytes: &[u8]) -> Result<Json, JsonFault> {
        let text = std::str::from_utf8(bytes).map_err(|error| JsonFault {
            offset: error.valid_up_to(),
            message: "invalid UTF-8".to_owned(),
        })?;
        let mut parser = serde_json::Deserializer::from_str(text);
        let value = Depth(0).deserialize(&mut parser).and_then(|value| parser.end().map(|()| value));
        value.map_err(|error| JsonFault {
            offset: offset_of(text, error.line(), error.column()),
            message: without_position(&error),
        })
    }

    /// The field `name` of an object.
    pub fn field(&self, name: &str) -> Option<&Json> {
        match self {
            Json::Object(fields) => fields.iter().find(|(key, _)| key == name).map(|(_, value)| value),
            _ => None,
        }
    }

    /// What kind of value it is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Json::Null => "null",
            Json::Bool(_) => "a boolean",
            Json::Number(_) => "a number",
            Json::String(_) => "a string",
            Json::Array(_) => "an array",
            Json::Object(_) => "an object",
        }
    }

    /// The value as text, cut to `limit` characters.
    pub fn brief(&self, limit: usize) -> String {
        let text = self.to_string();
        match text.char_indices().nth(limit) {
            Some((cut, _)) => format!("{}...", &text[..cut]),
            None => text,
        }
    }
}

impl fmt::Display for Json {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quoted = |text: &str| serde_json::Value::from(text).to_string();
        match self {
            Json::Null => f.write_str("null"),
            Json::Bool(value) => write!(f, "{value}"),
            Json::Number(value) => write!(f, "{value}"),
            Json::String(value) => f.write_str(&quoted(value)),
            Json::Array(values) => {
                f.write_str("[")?;
                for (i, value) in values.iter().enumerate() {
                    write!(f, "{}{value}", if i == 0 { "" } else { ", " })?;
                }
                f.write_str("]")
            }
            Json::Object(fields) => {
                f.write_str("{")?;
                for (i, (name, value)) in fields.iter().enumerate() {
                    write!(f, "{}{}: {value}", if i == 0 { "" } else { ", " }, quoted(name))?;
                }
                f.write_str("}")
            }
        }
    }
}

/// Reads and parses a JSON file of at most `max_bytes`.
///
/// # Errors
/// [`ImportError::Io`], [`ImportError::TooLarge`], [`ImportError::Json`].
pub fn read_json_file(path: &Path, max_bytes: u64) -> Result<Json, ImportError> {
    let bytes = read_bounded(path, max_bytes)?;
    Json::parse(&bytes).map_err(|fault| ImportError::Json {
        path: path.to_path_buf(),
        offset: fault.offset,
        message: fault.message,
    })
}

/// Reads a regular file of at most `max_bytes`.
///
/// # Errors
/// [`ImportError::Io`], [`ImportError::TooLarge`].
pub(crate) fn read_bounded(path: &Path, max_bytes: u64) -> Result<Vec<u8>, ImportError> {
    let io = |source| ImportError::Io { path: path.to_path_buf(), source };
    let metadata = std::fs::metadata(path).map_err(io)?;
    if !metadata.is_file() {
        return Err(io(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file")));
    }
    let too_large = |bytes| ImportError::TooLarge {
        path: path.to_path_buf(),
        found_bytes: bytes,
        limit_bytes: max_bytes,
    };
    if metadata.len() > max_bytes {
        return Err(too_large(metadata.len()));
    }
    let mut bytes = Vec::new();
    File::open(path).map_err(io)?.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > max_bytes {
        return Err(too_large(bytes.len() as u64));
    }
    Ok(bytes)
}

fn offset_of(text: &str, line: usize, column: usize) -> usize {
    let line_start: usize = text.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum();
    (line_start + column.saturating_sub(1)).min(text.len())
}

fn without_position(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(cut) => text[..cut].to_owned(),
        None => text,
    }
}

struct Depth(usize);

impl<'de> DeserializeSeed<'de> for Depth {
    type Value = Json;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Json, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl Depth {
    fn deeper<E: serde::de::Error>(&self) -> Result<usize, E> {
        if self.0 >= MAX_JSON_DEPTH {
            return Err(E::custom(format!("nested deeper than {MAX_JSON_DEPTH}")));
        }
        Ok(self.0 + 1)
    }
}

impl<'de> Visitor<'de> for Depth {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
        Ok(Json::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
        Ok(Json::Number(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
        Ok(Json::Number(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Json, E> {
        serde_json::Number::from_f64(value).map(Json::Number).ok_or_else(|| E::custom("number is not finite"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Json, E> {
        Ok(Json::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Json, E> {
        Ok(Json::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Json, A::Error> {
        let depth = self.deeper()?;
        let mut values = Vec::new();
        while let Some(value) = access.next_element_seed(Depth(depth))? {
            values.push(value);
        }
        Ok(Json::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Json, A::Error> {
        let depth = self.deeper()?;
        let mut fields: Vec<(String, Json)> = Vec::new();
        while let Some(name) = access.next_key::<String>()? {
            fields.push((name, access.next_value_seed(Depth(depth))?));
        }
        let mut names: Vec<&str> = fields.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(A::Error::custom(format!("duplicate key `{}`", pair[0])));
        }
        Ok(Json::Object(fields))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_keep_file_order() {
        let json = Json::parse(br#"{"z": 1, "a": [true, null, -2.5], "m": "x\n"}"#).unwrap();
        assert_eq!(json.to_string(), r#"{"z": 1, "a": [true, null, -2.5], "m": "x\n"}"#);
        assert_eq!(json.field("m"), Some(&Json::String("x\n".into())));
    }

    #[test]
    fn duplicate_key_is_refused_at_any_depth() {
        let fault = Json::parse(br#"{"a": {"b": 1, "c": 2, "b": 1}}"#).unwrap_err();
        assert_eq!(fault.message, "duplicate key `b`");
    }

    #[test]
    fn invalid_utf8_names_its_offset() {
        let fault = Json::parse(b"{\"a\": \"\xff\"}").unwrap_err();
        assert_eq!((fault.offset, fault.message.as_str()), (7, "invalid UTF-8"));
    }

    #[test]
    fn nesting_bomb_is_refused() {
        let bomb = "[".repeat(100_000);
        assert!(Json::parse(bomb.as_bytes()).unwrap_err().message.contains("deep"));
        let deep = |n: usize| format!("{}{}", "[".repeat(n), "]".repeat(n));
        assert!(Json::parse(deep(MAX_JSON_DEPTH).as_bytes()).is_ok());
        assert!(Json::parse(deep(MAX_JSON_DEPTH + 1).as_bytes()).is_err());
    }

    #[test]
    fn syntax_fault_names_its_byte() {
        let fault = Json::parse(b"{\n  \"a\": 1,\n  \"b\": x\n}").unwrap_err();
        assert_eq!(fault.offset, 19);
        assert!(Json::parse(b"{} {}").is_err());
        assert!(Json::parse(b"").is_err());
    }

    #[test]
    fn number_beyond_every_float_is_refused() {
        assert!(Json::parse(b"1e999").is_err());
        assert_eq!(Json::parse(b"18446744073709551615").unwrap().to_string(), "18446744073709551615");
    }
}
