//! Attributes of ops as data, so that printing, parsing, hashing and comparing need no code per op.

use rlx_tensor::{DType, Dim};

/// One attribute value.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum AttrValue {
    /// A truth value.
    Bool(bool),
    /// An integer.
    Int(i64),
    /// A float; printed so that it reads back to the same bits.
    Float(f64),
    /// A word or quoted text.
    Str(String),
    /// A dtype.
    DType(DType),
    /// Dim expressions.
    Dims(Vec<Dim>),
    /// Integers.
    Ints(Vec<i64>),
    /// Floats.
    Floats(Vec<f64>),
    /// An optional attribute that is absent.
    None,
}

/// Attributes in declaration order.
pub type Attrs = Vec<(&'static str, AttrValue)>;

/// An attribute that is missing, unknown or of the wrong kind.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AttrError {
    /// The op needs it.
    #[error("op {op} needs attribute {name}")]
    Missing {
        /// The op.
        op: &'static str,
        /// The attribute.
        name: &'static str,
    },
    /// The op has no such attribute.
    #[error("op {op} has no attribute {name}")]
    Unknown {
        /// The op.
        op: &'static str,
        /// The attribute.
        name: String,
    },
    /// The value is of another kind, or out of range.
    #[error("attribute {name} of op {op}: expected {expected}, found {found:?}")]
    Kind {
        /// The op.
        op: &'static str,
        /// The attribute.
        name: &'static str,
        /// What it should be.
        expected: &'static str,
        /// What it was.
        found: AttrValue,
    },
}

/// A Rust type that can stand as an attribute.
pub trait AttrField: Sized {
    /// What a message calls this kind of value.
    const EXPECTED: &'static str;
    /// The attribute form.
    fn to_attr(&self) -> AttrValue;
    /// Back from the attribute form; `None` if it is of another kind.
    fn from_attr(value: &AttrValue) -> Option<Self>;
}

macro_rules! integer_field {
    ($($ty:ty),*) => {$(
        impl AttrField for $ty {
            const EXPECTED: &'static str = concat!("an integer (", stringify!($ty), ")");
            fn to_attr(&self) -> AttrValue {
                AttrValue::Int(i64::try_from(*self).unwrap_or(i64::MAX))
            }
            fn from_attr(value: &AttrValue) -> Option<Self> {
                match value {
                    AttrValue::Int(v) => <$ty>::try_from(*v).ok(),
                    _ => None,
                }
            }
        }
    )*};
}
integer_field!(usize, i64);

macro_rules! field {
    ($ty:ty, $expected:literal, $variant:ident, $get:expr, $set:expr) => {
        impl AttrField for $ty {
            const EXPECTED: &'static str = $expected;
            fn to_attr(&self) -> AttrValue {
                AttrValue::$variant($set(self))
            }
            fn from_attr(value: &AttrValue) -> Option<Self> {
                match value {
                    AttrValue::$variant(v) => $get(v),
                    _ => None,
                }
            }
        }
    };
}
field!(bool, "true or false", Bool, |v: &bool| Some(*v), |v: &bool| *v);
field!(f64, "a float", Float, |v: &f64| Some(*v), |v: &f64| *v);
field!(String, "text", Str, |v: &String| Some(v.clone()), |v: &String| v.clone());
field!(DType, "a dtype", DType, |v: &DType| Some(*v), |v: &DType| *v);
field!(Vec<Dim>, "a list of dims", Dims, |v: &Vec<Dim>| Some(v.clone()), |v: &Vec<Dim>| v.clone());
field!(
    Dim,
    "a dim",
    Dims,
    |v: &Vec<Dim>| match v.as_slice() {
        [only] => Some(only.clone()),
        _ => None,
    },
    |v: &Dim| vec![v.clone()]
);
field!(Vec<i64>, "a list of integers", Ints, |v: &Vec<i64>| Some(v.clone()), |v: &Vec<i64>| v.clone());
field!(Vec<f64>, "a list of floats", Floats, |v: &Vec<f64>| Some(v.clone()), |v: &Vec<f64>| v.clone());
field!(
    Vec<usize>,
    "a list of sizes",
    Ints,
    |v: &Vec<i64>| v.iter().map(|&i| usize::try_from(i).ok()).collect(),
    |v: &Vec<usize>| v.iter().map(|&i| i64::try_from(i).unwrap_or(i64::MAX)).collect()
);

impl<T: AttrField> AttrField for Option<T> {
    const EXPECTED: &'static str = T::EXPECTED;
    fn to_attr(&self) -> AttrValue {
        self.as_ref().map_or(AttrValue::None, T::to_attr)
    }
    fn from_attr(value: &AttrValue) -> Option<Self> {
        match value {
            AttrValue::None => Some(None),
            _ => T::from_attr(value).map(Some),
        }
    }
}

/// Declares an enum whose variants are words in the text form.
macro_rules! attr_enum {
    ($(#[$doc:meta])* pub enum $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum $name { $($(#[$vdoc])* $variant,)* }

        impl $name {
            /// Every variant, in declaration order.
            pub const ALL: &'static [$name] = &[$($name::$variant,)*];
            /// The word in text forms.
            pub const fn name(self) -> &'static str {
                match self { $($name::$variant => $text,)* }
            }
        }

        impl $crate::attrs::AttrField for $name {
            const EXPECTED: &'static str = concat!("one of", $(" ", $text),*);
            fn to_attr(&self) -> $crate::attrs::AttrValue {
                $crate::attrs::AttrValue::Str(self.name().to_owned())
            }
            fn from_attr(value: &$crate::attrs::AttrValue) -> Option<Self> {
                let $crate::attrs::AttrValue::Str(word) = value else { return None };
                $name::ALL.iter().copied().find(|v| v.name() == word)
            }
        }
    };
}
pub(crate) use attr_enum;

/// Declares an op's struct with its text name; printing, parsing and comparing derive from the fields.
macro_rules! op_struct {
    ($(#[$doc:meta])* pub struct $name:ident = $text:literal { $($(#[$fdoc:meta])* $field:ident: $ty:ty,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq)]
        pub struct $name { $($(#[$fdoc])* pub $field: $ty,)* }

        impl $crate::op::OpAttrs for $name {
            const NAME: &'static str = $text;
            fn to_attrs(&self) -> $crate::attrs::Attrs {
                vec![$((stringify!($field), $crate::attrs::AttrField::to_attr(&self.$field)),)*]
            }
            fn from_attrs(attrs: &[(String, $crate::attrs::AttrValue)]) -> Result<Self, $crate::attrs::AttrError> {
                let lookup = $crate::attrs::AttrLookup { op: $text, attrs };
                lookup.reject_unknown(&[$(stringify!($field)),*])?;
                Ok(Self { $($field: lookup.field(stringify!($field))?,)* })
            }
        }
    };
}
pub(crate) use op_struct;

pub(crate) struct AttrLookup<'a> {
    pub(crate) op: &'static str,
    pub(crate) attrs: &'a [(String, AttrValue)],
}

impl AttrLookup<'_> {
    pub(crate) fn reject_unknown(&self, known: &[&str]) -> Result<(), AttrError> {
        match self.attrs.iter().find(|(name, _)| !known.contains(&name.as_str())) {
            Some((name, _)) => Err(AttrError::Unknown { op: self.op, name: name.clone() }),
            None => Ok(()),
        }
    }

    pub(crate) fn field<T: AttrField>(&self, name: &'static str) -> Result<T, AttrError> {
        let found = self.attrs.iter().find(|(n, _)| n == name).map(|(_, v)| v);
        match found {
            Some(value) => T::from_attr(value).ok_or_else(|| AttrError::Kind {
                op: self.op,
                name,
                expected: T::EXPECTED,
                found: value.clone(),
            }),
            None => T::from_attr(&AttrValue::None).ok_or(AttrError::Missing { op: self.op, name }),
        }
    }
}
