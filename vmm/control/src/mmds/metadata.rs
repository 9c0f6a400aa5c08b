//! The metadata of a guest: one JSON object of bounded size.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use parking_lot::{Mutex, MutexGuard};
use serde_json::{Map, Value};

use config::limits::MAX_BODY;

/// Why metadata are refused.
#[derive(Debug, thiserror::Error)]
pub enum MmdsError {
    /// Only an object can be extended and asked for parts.
    #[error("The metadata are not an object of JSON.")]
    NotAnObject,
    /// They would take too much memory of the guest's process.
    #[error("The metadata would be larger than the limit of {0} bytes.")]
    TooLarge(usize),
    /// There is nothing to change yet.
    #[error("The MMDS data store is not initialized: PUT /mmds comes before PATCH /mmds.")]
    NotInitialized,
}

/// Why a file of metadata cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("--metadata {}", path.display())]
pub struct MetadataFileError {
    path: PathBuf,
    source: io::Error,
}

/// The metadata of a guest.
#[derive(Debug)]
pub struct Mmds {
    held: Mutex<Option<Map<String, Value>>>,
    /// The most bytes that they may have as JSON.
    limit: usize,
}

impl Default for Mmds {
    /// An empty store that takes [`MAX_BODY`] bytes.
    fn default() -> Self {
        Self::with_limit(MAX_BODY)
    }
}

fn object(value: Value) -> Result<Map<String, Value>, MmdsError> {
    match value {
        Value::Object(object) => Ok(object),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            Err(MmdsError::NotAnObject)
        }
    }
}

impl Mmds {
    /// An empty store that takes so many bytes of JSON.
    pub fn with_limit(limit: usize) -> Self {
        Self {
            held: Mutex::new(None),
            limit,
        }
    }

    /// A store that has an object.
    pub fn holding(metadata: Map<String, Value>) -> Self {
        Self {
            held: Mutex::new(Some(metadata)),
            ..Self::default()
        }
    }

    /// What it has; an empty object where it has nothing.
    pub fn into_object(self) -> Map<String, Value> {
        self.held.into_inner().unwrap_or_default()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Option<Map<String, Value>>> {
        self.held.lock()
    }

    fn bounded(&self, metadata: Map<String, Value>) -> Result<Map<String, Value>, MmdsError> {
        // An object of JSON always has a text.
        let len = serde_json::to_vec(&metadata).map_or(usize::MAX, |text| text.len());
        if len <= self.limit {
            Ok(metadata)
        } else {
            Err(MmdsError::TooLarge(self.limit))
        }
    }

    /// All of them; an empty object where there are none.
    pub fn get(&self) -> Value {
        Value::Object(self.lock().clone().unwrap_or_default())
    }

    /// Replaces them.
    ///
    /// # Errors
    /// `NotAnObject`, `TooLarge`; they are as they were then.
    pub fn put(&self, metadata: Value) -> Result<(), MmdsError> {
        let metadata = self.bounded(object(metadata)?)?;
        *self.lock() = Some(metadata);
        Ok(())
    }

    /// Changes them as a JSON merge patch says (RFC 7396).
    ///
    /// # Errors
    /// `NotAnObject`, `TooLarge`, `NotInitialized`; they are as they were then.
    pub fn patch(&self, patch: Value) -> Result<(), MmdsError> {
        let patch = Value::Object(object(patch)?);
        let mut present = self.lock();
        let mut changed = Value::Object(present.clone().ok_or(MmdsError::NotInitialized)?);
        // The parser bounds how deep a patch is.
        json_patch::merge(&mut changed, &patch);
        *present = Some(self.bounded(object(changed)?)?);
        Ok(())
    }

    /// Replaces them by those of a file.
    ///
    /// # Errors
    /// [`MetadataFileError`].
    pub fn read(&self, path: &Path) -> Result<(), MetadataFileError> {
        let read = || -> io::Result<()> {
            let mut text = Vec::new();
            let longest = (self.limit as u64).saturating_add(1);
            File::open(path)?.take(longest).read_to_end(&mut text)?;
            if text.len() > self.limit {
                return Err(io::Error::other(MmdsError::TooLarge(self.limit)));
            }
            let metadata = serde_json::from_slice(&text)?;
            self.put(metadata).map_err(io::Error::other)
        };
        read().map_err(|source| MetadataFileError {
            path: path.to_owned(),
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use host::report::chain;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_patch_does_what_the_examples_of_rfc_7396_say() {
        // Appendix A, of those whose target is an object.
        let examples = [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (
                json!({"a": "b"}),
                json!({"b": "c"}),
                json!({"a": "b", "b": "c"}),
            ),
            (json!({"a": "b"}), json!({"a": null}), json!({})),
            (
                json!({"a": "b", "b": "c"}),
                json!({"a": null}),
                json!({"b": "c"}),
            ),
            (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "c"}), json!({"a": ["b"]}), json!({"a": ["b"]})),
            (
                json!({"a": {"b": "c"}}),
                json!({"a": {"b": "d", "c": null}}),
                json!({"a": {"b": "d"}}),
            ),
            (
                json!({"a": [{"b": "c"}]}),
                json!({"a": [1]}),
                json!({"a": [1]}),
            ),
            (
                json!({"e": null}),
                json!({"a": 1}),
                json!({"e": null, "a": 1}),
            ),
            (
                json!({}),
                json!({"a": {"bb": {"ccc": null}}}),
                json!({"a": {"bb": {}}}),
            ),
        ];
        for (target, patch, result) in examples {
            let mmds = Mmds::default();
            mmds.put(target).unwrap();
            mmds.patch(patch).unwrap();
            assert_eq!(mmds.get(), result);
        }
    }

    #[test]
    fn an_invalid_request_changes_nothing() {
        let mmds = Mmds::default();
        assert_eq!(mmds.get(), json!({}));
        assert!(matches!(
            mmds.patch(json!({"a": 1})),
            Err(MmdsError::NotInitialized)
        ));
        for wrong in [json!([]), json!(1), json!(null), json!("a")] {
            assert!(matches!(mmds.put(wrong), Err(MmdsError::NotAnObject)));
        }
        mmds.put(json!({"a": "x".repeat(30_000)})).unwrap();
        let more = json!({"b": "x".repeat(30_000)});
        assert!(matches!(
            mmds.patch(more.clone()),
            Err(MmdsError::TooLarge(MAX_BODY))
        ));
        assert!(mmds.get()["b"].is_null());
        assert!(matches!(
            mmds.put(json!({"b": more, "c": "x".repeat(30_000)})),
            Err(MmdsError::TooLarge(MAX_BODY))
        ));
    }

    #[test]
    fn a_store_takes_as_much_as_it_was_made_for() {
        let mmds = Mmds::with_limit(9);
        mmds.put(json!({"a": "12"})).unwrap_err();
        mmds.put(json!({"a": "1"})).unwrap();
        assert!(matches!(
            mmds.patch(json!({"a": "12"})),
            Err(MmdsError::TooLarge(9))
        ));
        assert_eq!(mmds.get(), json!({"a": "1"}));
    }

    #[test]
    fn a_file_is_read_whole_or_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.json");
        let mmds = Mmds::default();
        std::fs::write(&path, r#"{"a": 1}"#).unwrap();
        mmds.read(&path).unwrap();
        assert_eq!(mmds.get(), json!({"a": 1}));
        for wrong in ["[]".to_owned(), "{".to_owned(), " ".repeat(60_000)] {
            std::fs::write(&path, wrong).unwrap();
            let said = chain(&mmds.read(&path).unwrap_err()).to_string();
            assert!(said.contains("m.json"), "{said}");
        }
        assert_eq!(mmds.get(), json!({"a": 1}));
    }
}
