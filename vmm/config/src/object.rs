//! Objects of JSON within others, which are read as nothing else: derived code also takes an array, by the order of the
//! fields.

use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

/// Reads an object, or `null`.
pub(crate) fn optional<'de, T: DeserializeOwned, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    let object: Option<Map<String, Value>> = Option::deserialize(deserializer)?;
    let read = object.map(|object| T::deserialize(Value::Object(object)));
    read.transpose().map_err(D::Error::custom)
}
