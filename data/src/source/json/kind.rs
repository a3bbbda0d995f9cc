//! The types of JSON values, worked out while they are parsed.

use arrow::datatypes::{DataType, Field};
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use std::fmt;
use std::sync::Arc;

/// What all values seen at a place are.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Kind {
    /// Only `null` so far, or nothing.
    Unknown,
    Bool,
    Int,
    Float,
    Text,
    List(Box<Kind>),
    /// In the order in which the keys are first seen.
    Object(Vec<(String, Kind)>),
}

impl Kind {
    /// Makes room for the value that `json` has.
    pub(super) fn widen(&mut self, json: &[u8]) -> Result<(), String> {
        let mut parser = serde_json::Deserializer::from_slice(json);
        let seen = Widen(self).deserialize(&mut parser).and_then(|()| parser.end());
        // The parser's own line is always the first.
        seen.map_err(|error| error.to_string().replace(" at line 1 column ", ", at character "))
    }

    pub(super) fn data_type(&self) -> DataType {
        match self {
            Self::Unknown => DataType::Null,
            Self::Bool => DataType::Boolean,
            Self::Int => DataType::Int64,
            Self::Float => DataType::Float64,
            Self::Text => DataType::Utf8,
            Self::List(items) => {
                DataType::List(Arc::new(Field::new_list_field(items.data_type(), true)))
            }
            Self::Object(fields) => {
                let field =
                    |(name, kind): &(String, Self)| Field::new(name, kind.data_type(), true);
                DataType::Struct(fields.iter().map(field).collect())
            }
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Unknown => "null",
            Self::Bool => "true or false",
            Self::Int | Self::Float => "a number",
            Self::Text => "text",
            Self::List(_) => "a list",
            Self::Object(_) => "an object",
        }
    }

    fn is_nested(&self) -> bool {
        matches!(self, Self::List(_) | Self::Object(_))
    }

    /// Numbers widen to floats, other simple values to text; lists and objects to nothing.
    fn meet<E: Error>(&mut self, other: Self) -> Result<(), E> {
        let wider = match (&*self, other) {
            (a, Self::Unknown) => a.clone(),
            (Self::Unknown, b) => b,
            (Self::List(_), Self::List(_)) | (Self::Object(_), Self::Object(_)) => return Ok(()),
            (a, b) if a.is_nested() || b.is_nested() => {
                return Err(E::custom(format!("{} where it was {} before", b.name(), a.name())));
            }
            (a, b) if *a == b => b,
            (Self::Int | Self::Float, Self::Int | Self::Float) => Self::Float,
            _ => Self::Text,
        };
        *self = wider;
        Ok(())
    }

    fn field(&mut self, key: &str) -> &mut Self {
        let Self::Object(fields) = self else { return self };
        let at = fields.iter().position(|(name, _)| name == key).unwrap_or_else(|| {
            fields.push((key.to_owned(), Self::Unknown));
            fields.len() - 1
        });
        &mut fields[at].1
    }
}

/// Widens a kind by the value that is parsed.
struct Widen<'a>(&'a mut Kind);

impl<'de> DeserializeSeed<'de> for Widen<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Widen<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        self.0.meet(Kind::Bool)
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        self.0.meet(Kind::Int)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<(), E> {
        self.0.meet(if i64::try_from(value).is_ok() { Kind::Int } else { Kind::Float })
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        self.0.meet(Kind::Float)
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        self.0.meet(Kind::Text)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        self.0.meet::<A::Error>(Kind::List(Box::new(Kind::Unknown)))?;
        if let Kind::List(kind) = self.0 {
            while items.next_element_seed(Widen(&mut *kind))?.is_some() {}
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        self.0.meet::<A::Error>(Kind::Object(Vec::new()))?;
        while let Some(key) = entries.next_key::<String>()? {
            let value = entries.next_value_seed(Widen(self.0.field(&key)));
            value.map_err(|error| A::Error::custom(format!("{key:?}: {error}")))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(values: &[&str]) -> Result<DataType, String> {
        let mut kind = Kind::Unknown;
        values.iter().try_for_each(|json| kind.widen(json.as_bytes()))?;
        Ok(kind.data_type())
    }

    #[test]
    fn kinds_widen() {
        assert_eq!(kind(&["null"]), Ok(DataType::Null));
        assert_eq!(kind(&["1", "null", "-5"]), Ok(DataType::Int64));
        assert_eq!(kind(&["1", "2.5"]), Ok(DataType::Float64));
        assert_eq!(kind(&["18446744073709551615"]), Ok(DataType::Float64));
        assert_eq!(kind(&["true", "1"]), Ok(DataType::Utf8));
        let floats = DataType::new_list(DataType::Float64, true);
        assert_eq!(kind(&["[]", "[1, null]", "[0.5]"]), Ok(floats));
        let fields =
            vec![Field::new("z", DataType::Int64, true), Field::new("a", DataType::Utf8, true)];
        assert_eq!(kind(&[r#"{"z": 1}"#, r#"{"a": "x"}"#]), Ok(DataType::Struct(fields.into())));
    }

    #[test]
    fn lists_and_objects_stay_what_they_are() {
        let error = kind(&[r#"{"a": {"b": [1]}}"#, r#"{"a": {"b": 1}}"#]).expect_err("a list");
        assert!(error.starts_with(r#""a": "b": a number where it was a list before"#), "{error}");
        assert!(kind(&["{\"a\": 1} 2"]).expect_err("two values").contains("trailing characters"));
    }
}
