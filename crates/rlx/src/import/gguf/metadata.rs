//! Metadata: keys with typed values.

use std::collections::HashMap;
use std::path::Path;

use super::super::ImportError;
use super::cursor::Cursor;
use crate::weights::LoadError;

/// Longest key.
const MAX_KEY_BYTES: usize = 65_535;

macro_rules! values {
    ($($code:literal $variant:ident($type:ty) $what:literal;)*) => {
        /// A value of the metadata.
        #[derive(Debug, Clone, PartialEq)]
        #[non_exhaustive]
        pub enum Value {
            $(#[doc = $what] $variant($type),)*
            /// True or false.
            Bool(bool),
            /// Text.
            String(String),
            /// Values of one kind.
            Array(Array),
        }

        /// Values of one kind.
        #[derive(Debug, Clone, PartialEq)]
        #[non_exhaustive]
        pub enum Array {
            $(#[doc = $what] $variant(Vec<$type>),)*
            /// True or false.
            Bool(Vec<bool>),
            /// Texts.
            String(Vec<String>),
        }

        impl Value {
            /// What kind of value it is, for messages.
            pub fn kind(&self) -> String {
                match self {
                    $(Value::$variant(value) => format!("{} {value}", stringify!($type)),)*
                    Value::Bool(value) => format!("bool {value}"),
                    Value::String(_) => "a string".to_owned(),
                    Value::Array(array) => format!("an array of {}", array.len()),
                }
            }

            /// The number of this value's type in files.
            pub(super) fn code(&self) -> u32 {
                match self {
                    $(Value::$variant(_) => $code,)*
                    Value::Bool(_) => BOOL,
                    Value::String(_) => STRING,
                    Value::Array(_) => ARRAY,
                }
            }

            pub(super) fn write(&self, out: &mut Vec<u8>) {
                match self {
                    $(Value::$variant(value) => out.extend_from_slice(&value.to_le_bytes()),)*
                    Value::Bool(value) => out.push(u8::from(*value)),
                    Value::String(text) => write_string(text, out),
                    Value::Array(array) => array.write(out),
                }
            }
        }

        impl Array {
            /// Number of values.
            pub fn len(&self) -> usize {
                match self {
                    $(Array::$variant(values) => values.len(),)*
                    Array::Bool(values) => values.len(),
                    Array::String(values) => values.len(),
                }
            }

            /// True if there are none.
            pub fn is_empty(&self) -> bool {
                self.len() == 0
            }

            fn write(&self, out: &mut Vec<u8>) {
                let code = match self {
                    $(Array::$variant(_) => $code,)*
                    Array::Bool(_) => BOOL,
                    Array::String(_) => STRING,
                };
                out.extend_from_slice(&u32::to_le_bytes(code));
                out.extend_from_slice(&(self.len() as u64).to_le_bytes());
                match self {
                    $(Array::$variant(values) => {
                        values.iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
                    })*
                    Array::Bool(values) => out.extend(values.iter().map(|value| u8::from(*value))),
                    Array::String(values) => values.iter().for_each(|text| write_string(text, out)),
                }
            }
        }

        fn number(cursor: &mut Cursor<'_>, code: u32) -> Result<Option<Value>, LoadError> {
            match code {
                $($code => Ok(Some(Value::$variant(<$type>::from_le_bytes(cursor.array("a number")?)))),)*
                _ => Ok(None),
            }
        }

        fn numbers(cursor: &mut Cursor<'_>, code: u32) -> Result<Option<Array>, LoadError> {
            match code {
                $($code => {
                    let count = cursor.count(size_of::<$type>(), "array length")?;
                    let mut values = Vec::with_capacity(count);
                    for _ in 0..count {
                        values.push(<$type>::from_le_bytes(cursor.array("array values")?));
                    }
                    Ok(Some(Array::$variant(values)))
                })*
                _ => Ok(None),
            }
        }
    };
}

values! {
    0 U8(u8) "Unsigned, 8 bits.";
    1 I8(i8) "Signed, 8 bits.";
    2 U16(u16) "Unsigned, 16 bits.";
    3 I16(i16) "Signed, 16 bits.";
    4 U32(u32) "Unsigned, 32 bits.";
    5 I32(i32) "Signed, 32 bits.";
    6 F32(f32) "binary32.";
    10 U64(u64) "Unsigned, 64 bits.";
    11 I64(i64) "Signed, 64 bits.";
    12 F64(f64) "binary64.";
}

const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

pub(super) fn write_string(text: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

impl Value {
    /// A whole number of any width.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::U8(value) => Some(value.into()),
            Value::U16(value) => Some(value.into()),
            Value::U32(value) => Some(value.into()),
            Value::U64(value) => Some(value),
            Value::I8(value) => value.try_into().ok(),
            Value::I16(value) => value.try_into().ok(),
            Value::I32(value) => value.try_into().ok(),
            Value::I64(value) => value.try_into().ok(),
            _ => None,
        }
    }

    /// Any number.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Value::F32(value) => Some(value.into()),
            Value::F64(value) => Some(value),
            _ => self.as_u64().map(|value| value as f64),
        }
    }
}

/// Keys and values, in file order; keys are unique.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata {
    entries: Vec<(String, Value)>,
    places: HashMap<String, usize>,
    path: std::path::PathBuf,
}

impl Metadata {
    /// Nothing yet; `path` names the file in messages.
    pub fn new(path: &Path) -> Self {
        Metadata { path: path.to_path_buf(), ..Metadata::default() }
    }

    /// Adds an entry; false, and nothing changed, where the key is taken.
    pub fn insert(&mut self, key: &str, value: Value) -> bool {
        if self.places.contains_key(key) {
            return false;
        }
        self.places.insert(key.to_owned(), self.entries.len());
        self.entries.push((key.to_owned(), value));
        true
    }

    /// The file they come from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All entries, in file order.
    pub fn entries(&self) -> &[(String, Value)] {
        &self.entries
    }

    /// The value of a key.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.entries.get(*self.places.get(key)?).map(|(_, value)| value)
    }

    fn read<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        pick: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ImportError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let wrong = || ImportError::Field {
            path: self.path.clone(),
            field: key.to_owned(),
            expected: expected.to_owned(),
            found: value.kind(),
        };
        pick(value).map(Some).ok_or_else(wrong)
    }

    /// A whole number, if the key is there.
    ///
    /// # Errors
    /// [`ImportError::Field`] for another kind of value.
    pub fn u64(&self, key: &str) -> Result<Option<u64>, ImportError> {
        self.read(key, "a whole number", Value::as_u64)
    }

    /// A number, if the key is there.
    ///
    /// # Errors
    /// [`ImportError::Field`] for another kind of value.
    pub fn f64(&self, key: &str) -> Result<Option<f64>, ImportError> {
        self.read(key, "a number", Value::as_f64)
    }

    /// True or false, if the key is there.
    ///
    /// # Errors
    /// [`ImportError::Field`] for another kind of value.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, ImportError> {
        self.read(key, "true or false", |value| match value {
            Value::Bool(value) => Some(*value),
            _ => None,
        })
    }

    /// A text, if the key is there.
    ///
    /// # Errors
    /// [`ImportError::Field`] for another kind of value.
    pub fn string(&self, key: &str) -> Result<Option<&str>, ImportError> {
        self.read(key, "a string", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// Texts, if the key is there.
    ///
    /// # Errors
    /// [`ImportError::Field`] for another kind of value.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>, ImportError> {
        self.read(key, "an array of strings", |value| match value {
            Value::Array(Array::String(texts)) => Some(texts.as_slice()),
            _ => None,
        })
    }

    /// Numbers of f32, if the key is there.
    ///
    /// # Errors
    /// [`ImportError::Field`] for another kind of value.
    pub fn f32s(&self, key: &str) -> Result<Option<&[f32]>, ImportError> {
        self.read(key, "an array of f32", |value| match value {
            Value::Array(Array::F32(values)) => Some(values.as_slice()),
            _ => None,
        })
    }

    /// Numbers of i32, if the key is there; u32 below 2^31 count as such.
    ///
    /// # Errors
    /// [`ImportError::Field`] for another kind of value.
    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>, ImportError> {
        self.read(key, "an array of i32", |value| match value {
            Value::Array(Array::I32(values)) => Some(values.clone()),
            Value::Array(Array::U32(values)) => values.iter().map(|&v| v.try_into().ok()).collect(),
            _ => None,
        })
    }

    /// The value that `pick` reads, or an error that names the key.
    ///
    /// # Errors
    /// [`ImportError::MissingField`], and those of `pick`.
    pub fn required<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        pick: impl Fn(&'a Self, &str) -> Result<Option<T>, ImportError>,
    ) -> Result<T, ImportError> {
        pick(self, key)?.ok_or_else(|| ImportError::MissingField {
            path: self.path.clone(),
            field: key.to_owned(),
            expected: expected.to_owned(),
        })
    }
}

fn truth(cursor: &mut Cursor<'_>) -> Result<bool, LoadError> {
    let at = cursor.at();
    match cursor.array::<1>("a truth value")? {
        [0] => Ok(false),
        [1] => Ok(true),
        [other] => Err(cursor.fault(at, "0 or 1", other.to_string())),
    }
}

fn array(cursor: &mut Cursor<'_>) -> Result<Array, LoadError> {
    let at = cursor.at();
    let code = cursor.u32("type of array values")?;
    if let Some(values) = numbers(cursor, code)? {
        return Ok(values);
    }
    match code {
        BOOL => {
            let count = cursor.count(1, "array length")?;
            (0..count).map(|_| truth(cursor)).collect::<Result<_, _>>().map(Array::Bool)
        }
        STRING => {
            let count = cursor.count(size_of::<u64>(), "array length")?;
            let mut texts = Vec::with_capacity(count);
            for _ in 0..count {
                texts.push(cursor.string(usize::MAX, "a string")?.to_owned());
            }
            Ok(Array::String(texts))
        }
        ARRAY => Err(cursor.fault(at, "an array of numbers, truth values or strings", "an array of arrays")),
        _ => Err(cursor.fault(at, "a value type from 0 to 12", code.to_string())),
    }
}

/// Reads `count` keys and values.
pub(super) fn read(cursor: &mut Cursor<'_>, count: usize, path: &Path) -> Result<Metadata, LoadError> {
    let mut metadata = Metadata::new(path);
    for _ in 0..count {
        let start = cursor.at();
        let key = cursor.string(MAX_KEY_BYTES, "a key")?;
        let at = cursor.at();
        let code = cursor.u32("type of a value")?;
        let value = match (number(cursor, code)?, code) {
            (Some(value), _) => value,
            (None, BOOL) => Value::Bool(truth(cursor)?),
            (None, STRING) => Value::String(cursor.string(usize::MAX, "a string")?.to_owned()),
            (None, ARRAY) => Value::Array(array(cursor)?),
            _ => return Err(cursor.fault(at, "a value type from 0 to 12", code.to_string())),
        };
        if !metadata.insert(key, value) {
            return Err(cursor.fault(start, "each key once", format!("`{key}` again")));
        }
    }
    Ok(metadata)
}
