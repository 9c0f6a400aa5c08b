//! The parent locator ([MS-VHDX] 2.6.2.6): which file a differencing disk stands on, and what that file was then.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::format::Guid;

/// The only type of locator that the specification knows (2.6.2.6.1).
const VHDX_TYPE: Guid = Guid::new(0xB04A_EFB7_D19E_4A81_B789_25B8_E944_5913);
const LINKAGE: &str = "parent_linkage";
const LINKAGE2: &str = "parent_linkage2";
const RELATIVE: &str = "relative_path";
const VOLUME: &str = "volume_path";
const ABSOLUTE: &str = "absolute_win32_path";

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawLocator {
    kind: Guid,
    reserved: U16,
    count: U16,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawPair {
    key_offset: U32,
    value_offset: U32,
    key_length: U16,
    value_length: U16,
}

/// What a child says of its parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentLocator {
    /// The parent's DataWriteGuid when the child was made.
    pub linkage: Guid,
    /// The DataWriteGuid that the parent gets while the child is merged into it.
    pub linkage2: Option<Guid>,
    /// From the folder of the child.
    pub relative_path: Option<String>,
    /// From a volume that Windows names by a GUID.
    pub volume_path: Option<String>,
    /// From a root, whose name says Windows; files made here say what the host does.
    pub absolute_path: Option<String>,
}

impl ParentLocator {
    /// The locator of a child in `folder` on the parent at `parent`, both absolute.
    pub(crate) fn new(linkage: Guid, folder: &Path, parent: &Path) -> Self {
        Self {
            linkage,
            linkage2: None,
            relative_path: relative(folder, parent).map(|path| path.replace('/', "\\")),
            volume_path: None,
            absolute_path: parent.to_str().map(str::to_owned),
        }
    }

    /// Whether the parent may have this DataWriteGuid.
    pub(crate) fn links_to(&self, data_write_guid: Guid) -> bool {
        self.linkage == data_write_guid || self.linkage2 == Some(data_write_guid)
    }

    /// The files that the parent can be, in the order in which they are to be tried, for a child in `folder`. Paths of
    /// Windows lead nowhere here and are left out.
    pub fn candidates(&self, folder: &Path) -> Vec<PathBuf> {
        let here = |path: &String| path.replace('\\', "/");
        let mut candidates = Vec::new();
        if let Some(path) = self.relative_path.as_ref().map(here) {
            let path = path.strip_prefix("./").unwrap_or(&path);
            if !path.starts_with('/') && !has_drive(path) && !path.is_empty() {
                candidates.push(folder.join(path));
            }
        }
        for path in [&self.volume_path, &self.absolute_path]
            .into_iter()
            .flatten()
        {
            // One slash: two begin the name of a host or volume of Windows.
            if path.starts_with('/') && !path.starts_with("//") {
                candidates.push(PathBuf::from(path));
            }
        }
        candidates.dedup();
        candidates
    }

    /// Every path it has, for a message.
    pub(crate) fn paths(&self) -> impl Iterator<Item = (&'static str, &str)> {
        [
            (RELATIVE, &self.relative_path),
            (VOLUME, &self.volume_path),
            (ABSOLUTE, &self.absolute_path),
        ]
        .into_iter()
        .filter_map(|(key, path)| Some((key, path.as_deref()?)))
    }

    /// Takes an item apart; the error says what was expected.
    pub(crate) fn parse(item: &[u8]) -> Result<Self, String> {
        let (head, rest) = RawLocator::read_from_prefix(item)
            .map_err(|_| format!("expected at least 20 bytes, found {}", item.len()))?;
        if head.kind != VHDX_TYPE {
            return Err(format!(
                "expected a locator of the type {VHDX_TYPE}, found {}",
                head.kind
            ));
        }
        let count = usize::from(head.count.get());
        let pairs = <[RawPair]>::ref_from_prefix_with_elems(rest, count)
            .map_err(|_| format!("expected {count} entries to fit {} bytes", item.len()))?
            .0;
        let text = |offset: U32, length: U16| {
            let start = offset.get() as usize;
            let bytes = item.get(start..start.saturating_add(usize::from(length.get())))?;
            let units = <[U16]>::ref_from_bytes(bytes).ok()?;
            String::from_utf16(&units.iter().map(|unit| unit.get()).collect::<Vec<_>>()).ok()
        };
        let mut values = HashMap::new();
        for (number, pair) in pairs.iter().enumerate() {
            let key = text(pair.key_offset, pair.key_length);
            let value = text(pair.value_offset, pair.value_length);
            let (Some(key), Some(value)) = (key, value) else {
                return Err(format!(
                    "expected key and value of entry {number} inside the item, in UTF-16"
                ));
            };
            if values.insert(key.clone(), value).is_some() {
                return Err(format!("expected the key {key:?} once, found it again"));
            }
        }
        let guid = |key: &str, text: &String| {
            Guid::parse(text).ok_or_else(|| format!("expected a GUID as {key}, found {text:?}"))
        };
        let linkage = values
            .get(LINKAGE)
            .ok_or_else(|| format!("expected the key {LINKAGE}, found none"))?;
        let locator = Self {
            linkage: guid(LINKAGE, linkage)?,
            linkage2: values
                .get(LINKAGE2)
                .map(|text| guid(LINKAGE2, text))
                .transpose()?
                .filter(|guid| *guid != Guid::ZERO),
            relative_path: values.remove(RELATIVE),
            volume_path: values.remove(VOLUME),
            absolute_path: values.remove(ABSOLUTE),
        };
        if locator.paths().next().is_none() {
            return Err(format!(
                "expected one of the keys {RELATIVE}, {VOLUME}, {ABSOLUTE}, found none"
            ));
        }
        Ok(locator)
    }

    /// The item as it lies on disk.
    pub(crate) fn to_disk(&self) -> Vec<u8> {
        let mut pairs: Vec<(&str, String)> = vec![(LINKAGE, format!("{{{}}}", self.linkage))];
        if let Some(linkage2) = self.linkage2 {
            pairs.push((LINKAGE2, format!("{{{linkage2}}}")));
        }
        pairs.extend(self.paths().map(|(key, path)| (key, path.to_owned())));
        let head = RawLocator {
            kind: VHDX_TYPE,
            reserved: 0.into(),
            count: (pairs.len() as u16).into(),
        };
        let mut item = head.as_bytes().to_vec();
        let mut texts = Vec::new();
        let base = item.len() + pairs.len() * size_of::<RawPair>();
        let mut place = |text: &str| {
            let offset = base + texts.len();
            texts.extend(text.encode_utf16().flat_map(u16::to_le_bytes));
            (
                U32::new(offset as u32),
                U16::new((base + texts.len() - offset) as u16),
            )
        };
        for (key, value) in &pairs {
            let (key_offset, key_length) = place(key);
            let (value_offset, value_length) = place(value);
            let pair = RawPair {
                key_offset,
                value_offset,
                key_length,
                value_length,
            };
            item.extend_from_slice(pair.as_bytes());
        }
        item.extend_from_slice(&texts);
        item
    }
}

fn has_drive(path: &str) -> bool {
    path.as_bytes().get(1) == Some(&b':')
}

/// The way from a folder to a file, both absolute and without links.
fn relative(folder: &Path, file: &Path) -> Option<String> {
    let mut from = folder.components().peekable();
    let mut to = file.components().peekable();
    while from.peek().is_some() && from.peek() == to.peek() {
        from.next();
        to.next();
    }
    let up = from.count();
    let down: PathBuf = to.collect();
    let mut path = if up == 0 {
        ".".to_owned()
    } else {
        vec![".."; up].join("/")
    };
    path.push('/');
    path.push_str(down.to_str()?);
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn locator() -> ParentLocator {
        ParentLocator::new(
            Guid::random(),
            Path::new("/srv/guests/7"),
            Path::new("/srv/images/Grüße.vhdx"),
        )
    }

    #[test]
    fn a_locator_is_read_as_it_was_written() {
        let plain = locator();
        let merging = ParentLocator {
            linkage2: Some(Guid::random()),
            volume_path: Some("\\\\?\\Volume{1}\\a.vhdx".into()),
            ..locator()
        };
        for locator in [plain, merging] {
            assert_eq!(ParentLocator::parse(&locator.to_disk()), Ok(locator));
        }
    }

    #[test]
    fn the_parent_is_looked_for_from_the_child_then_from_the_root_and_never_on_windows() {
        let mut found = locator();
        assert_eq!(
            found.relative_path.as_deref(),
            Some("..\\..\\images\\Grüße.vhdx")
        );
        assert_eq!(
            found.candidates(Path::new("/mnt/guests/7")),
            [
                PathBuf::from("/mnt/guests/7/../../images/Grüße.vhdx"),
                PathBuf::from("/srv/images/Grüße.vhdx")
            ]
        );
        found.absolute_path = Some("C:\\images\\a.vhdx".into());
        found.relative_path = Some("C:\\a.vhdx".into());
        found.volume_path = Some("\\\\?\\Volume{1}\\a.vhdx".into());
        assert!(found.candidates(Path::new("/")).is_empty());
        let child = ParentLocator::new(
            Guid::ZERO,
            Path::new("/images"),
            Path::new("/images/a.vhdx"),
        );
        assert_eq!(child.relative_path.as_deref(), Some(".\\a.vhdx"));
        assert_eq!(
            child.candidates(Path::new("/images")),
            [PathBuf::from("/images/a.vhdx")]
        );
    }

    #[test]
    fn items_that_are_no_locator_are_refused_with_what_was_expected() {
        let good = locator().to_disk();
        let parsed = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut item = good.clone();
            change(&mut item);
            ParentLocator::parse(&item).unwrap_err()
        };
        for (change, expected) in [
            (
                &(|item: &mut Vec<u8>| item.truncate(10)) as &dyn Fn(&mut Vec<u8>),
                "at least 20 bytes",
            ),
            (&|item| item[0] ^= 1, "of the type"),
            (&|item| item[18] = 255, "entries to fit"),
            (&|item| item[23] = 255, "inside the item"),
            (&|item| item[28] = 1, "inside the item"),
            (&|item| item[18] = 0, "expected the key parent_linkage"),
            (&|item| item[18] = 1, "expected one of the keys"),
        ] {
            let error = parsed(change);
            assert!(error.contains(expected), "{error}");
        }
    }
}
