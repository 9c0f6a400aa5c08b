//! The devices of a machine, in the order in which they are gone through.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::kinds::KINDS;
use crate::lifecycle::{Device, DeviceKind, DeviceState, SaveError, StateKey};
use crate::lock::lock;
use crate::metrics::Metric;
use crate::persist::RestoreError;

/// A device of a machine.
#[derive(Clone)]
pub struct DeviceEntry {
    /// Its name among those of its kind; without a meaning for a kind of which there is one.
    pub id: String,
    /// Its kind.
    pub kind: &'static DeviceKind,
    /// The device.
    pub device: Arc<Mutex<dyn Device>>,
    /// The same, for [`DeviceList::get`]: a mutex of its own type.
    typed: Arc<dyn Any + Send + Sync>,
}

/// What a device has done.
#[derive(Clone, Debug)]
pub struct DeviceMetrics {
    /// Its name among those of its kind.
    pub id: String,
    /// Its kind.
    pub kind: &'static DeviceKind,
    /// The values.
    pub metrics: Vec<Metric>,
}

/// All devices of a machine.
#[derive(Clone, Default)]
pub struct DeviceList(Vec<DeviceEntry>);

/// The states of a guest's devices, by the names and in the form that [`StateKey`] gives them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DeviceStates(BTreeMap<String, DeviceState>);

impl DeviceList {
    /// Adds a device behind the others: a device before its transport.
    pub fn add<D: Device + 'static>(&mut self, id: impl Into<String>, device: Arc<Mutex<D>>) {
        let kind = lock(&device).kind();
        self.0.push(DeviceEntry {
            id: id.into(),
            kind,
            typed: device.clone(),
            device,
        });
    }

    /// The device of type `D` that has the id, for what the host can ask of its kind alone.
    pub fn get<D: Device + 'static>(&self, id: &str) -> Option<Arc<Mutex<D>>> {
        self.all()
            .find_map(|(own, device)| (own == id).then_some(device))
    }

    /// The devices of type `D`, each with its id.
    pub fn all<D: Device + 'static>(&self) -> impl Iterator<Item = (&str, Arc<Mutex<D>>)> {
        self.0.iter().filter_map(|entry| {
            let device = entry.typed.clone().downcast::<Mutex<D>>().ok()?;
            Some((entry.id.as_str(), device))
        })
    }

    /// The devices, in their order.
    pub fn iter(&self) -> impl Iterator<Item = &DeviceEntry> {
        self.0.iter()
    }

    /// Pauses each. No vCPU runs.
    pub fn pause(&self) {
        for entry in &self.0 {
            lock(&entry.device).pause();
        }
    }

    /// Resumes each. No vCPU runs yet.
    pub fn resume(&self) {
        for entry in &self.0 {
            lock(&entry.device).resume();
        }
    }

    /// Resets each. No vCPU runs any more.
    pub fn reset(&self) {
        for entry in &self.0 {
            lock(&entry.device).reset();
        }
    }

    /// What each has done.
    pub fn metrics(&self) -> Vec<DeviceMetrics> {
        let entries = self.0.iter().filter(|entry| entry.kind.metrics.is_some());
        let read = entries.map(|entry| DeviceMetrics {
            id: entry.id.clone(),
            kind: entry.kind,
            metrics: lock(&entry.device).metrics(),
        });
        read.collect()
    }

    /// The states of all. They are paused.
    ///
    /// # Errors
    /// [`SaveError`].
    pub fn save(&self) -> Result<DeviceStates, SaveError> {
        let mut states = DeviceStates::default();
        for entry in &self.0 {
            let state = lock(&entry.device).save()?;
            states.put(entry, state);
        }
        Ok(states)
    }

    /// Gives each its state. They were just made, and are paused from then on.
    ///
    /// # Errors
    /// [`RestoreError`]: `OtherDevices` where the states are not of these devices. No device is of use then.
    pub fn restore(&self, states: DeviceStates) -> Result<(), RestoreError> {
        let mut states = states;
        for entry in &self.0 {
            let state = states.take(entry)?;
            lock(&entry.device).restore(&state)?;
        }
        states.check_all_taken()
    }
}

impl std::fmt::Debug for DeviceList {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names = self.0.iter().map(|entry| (entry.kind.name, &entry.id));
        f.debug_list().entries(names).finish()
    }
}

fn other_devices(what: impl Into<String>) -> RestoreError {
    RestoreError::OtherDevices(what.into())
}

impl DeviceStates {
    /// Whether there is a state of a kind of which a guest has one device at most.
    pub fn has(&self, kind: &DeviceKind) -> bool {
        match kind.state {
            StateKey::One(key) => self.0.get(key).is_some_and(|state| !state.is_null()),
            StateKey::Nothing | StateKey::ById(_) | StateKey::InOrder(_) => false,
        }
    }

    fn put(&mut self, entry: &DeviceEntry, state: DeviceState) {
        let empty_map = || DeviceState::Object(serde_json::Map::new());
        let empty_list = || DeviceState::Array(Vec::new());
        match entry.kind.state {
            StateKey::Nothing => {}
            StateKey::One(key) => {
                self.0.insert(key.to_owned(), state);
            }
            StateKey::ById(key) => {
                let states = self.0.entry(key.to_owned()).or_insert_with(empty_map);
                if let DeviceState::Object(states) = states {
                    states.insert(entry.id.clone(), state);
                }
            }
            StateKey::InOrder(key) => {
                let states = self.0.entry(key.to_owned());
                if let DeviceState::Array(states) = states.or_insert_with(empty_list) {
                    states.push(state);
                }
            }
        }
    }

    /// The state of a device, which is not there any more then: of those in order, the first that is left.
    fn take(&mut self, entry: &DeviceEntry) -> Result<DeviceState, RestoreError> {
        match entry.kind.state {
            StateKey::Nothing => Ok(DeviceState::Null),
            StateKey::One(key) => {
                let state = self.0.remove(key).filter(|state| !state.is_null());
                state.ok_or_else(|| other_devices(key))
            }
            StateKey::ById(key) => match self.0.get_mut(key) {
                Some(DeviceState::Object(states)) => states.remove(&entry.id),
                Some(_) | None => None,
            }
            .ok_or_else(|| other_devices(key)),
            StateKey::InOrder(key) => match self.0.get_mut(key) {
                Some(DeviceState::Array(states)) if !states.is_empty() => Ok(states.remove(0)),
                Some(_) | None => Err(other_devices(key)),
            },
        }
    }

    /// Refuses states that are left, as devices that the saved guest had are missing. What is named though there was
    /// none is `null`, or empty.
    fn check_all_taken(&self) -> Result<(), RestoreError> {
        match self.0.iter().find(|(key, state)| !is_none(key, state)) {
            Some((key, _)) => Err(other_devices(key)),
            None => Ok(()),
        }
    }
}

/// Whether what is left under a name is that there is no device of the kind, or no further one.
fn is_none(key: &str, state: &DeviceState) -> bool {
    KINDS.into_iter().any(|kind| match kind.state {
        StateKey::Nothing => false,
        StateKey::One(name) => name == key && state.is_null(),
        StateKey::ById(name) => {
            name == key && state.as_object().is_some_and(serde_json::Map::is_empty)
        }
        StateKey::InOrder(name) => name == key && state.as_array().is_some_and(Vec::is_empty),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::metrics::Metric;

    /// What was asked of all devices, in order.
    type Calls = Arc<Mutex<Vec<String>>>;

    struct Mock {
        name: &'static str,
        kind: &'static DeviceKind,
        calls: Calls,
        state: u64,
    }

    impl Mock {
        fn note(&self, call: &str) {
            self.calls
                .lock()
                .unwrap()
                .push(format!("{call} {}", self.name));
        }
    }

    impl Device for Mock {
        fn kind(&self) -> &'static DeviceKind {
            self.kind
        }

        fn pause(&mut self) {
            self.note("pause");
        }

        fn resume(&mut self) {
            self.note("resume");
        }

        fn save(&self) -> Result<DeviceState, SaveError> {
            Ok(self.state.into())
        }

        fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
            self.note("restore");
            self.state = crate::lifecycle::decode(self.kind.name, state)?;
            Ok(())
        }

        fn reset(&mut self) {
            self.note("reset");
        }

        fn metrics(&self) -> Vec<Metric> {
            vec![Metric::gauge("state", "What it has", self.state)]
        }
    }

    const ONE: &DeviceKind = &crate::virtio::rng::KIND;
    const BY_ID: &DeviceKind = &crate::virtio::block::KIND;
    const IN_ORDER: &DeviceKind = &crate::virtio::mmio::KIND;
    const NOTHING: &DeviceKind = &crate::legacy::pvpanic::KIND;

    /// A list of devices with the states 1, 2 and so on.
    fn list(devices: &[(&'static str, &'static DeviceKind)]) -> (DeviceList, Calls) {
        let (mut list, calls) = (DeviceList::default(), Calls::default());
        for (state, (name, kind)) in (1..).zip(devices) {
            let calls = calls.clone();
            let mock = Mock {
                name,
                kind,
                calls,
                state,
            };
            list.add(*name, Arc::new(Mutex::new(mock)));
        }
        (list, calls)
    }

    fn values(list: &DeviceList) -> Vec<DeviceState> {
        let saved = list.iter().map(|entry| lock(&entry.device).save().unwrap());
        saved.collect()
    }

    #[test]
    fn a_device_is_found_by_its_type_and_its_id() {
        use crate::legacy::CmosRtc;
        let (mut list, _) = list(&[("a", BY_ID), ("b", BY_ID)]);
        list.add("a", Arc::new(Mutex::new(CmosRtc::new())));
        assert_eq!(list.get::<Mock>("b").unwrap().lock().unwrap().state, 2);
        assert!(list.get::<CmosRtc>("a").is_some());
        assert!(list.get::<CmosRtc>("b").is_none());
        let mocks: Vec<_> = list.all::<Mock>().map(|(id, _)| id).collect();
        assert_eq!(mocks, ["a", "b"]);
    }

    #[test]
    fn each_is_asked_in_the_order_of_the_list() {
        let (list, calls) = list(&[("disk", BY_ID), ("its", IN_ORDER), ("rng", ONE)]);
        list.pause();
        list.resume();
        let states = list.save().unwrap();
        list.restore(states).unwrap();
        list.reset();
        let calls = std::mem::take(&mut *calls.lock().unwrap());
        let expected = ["pause", "resume", "restore", "reset"].into_iter();
        let expected =
            expected.flat_map(|call| ["disk", "its", "rng"].map(|name| format!("{call} {name}")));
        assert_eq!(calls, expected.collect::<Vec<_>>());
    }

    #[test]
    fn states_are_kept_by_kind_and_go_to_the_devices_they_are_of() {
        let devices = [
            ("b", BY_ID),
            ("x", IN_ORDER),
            ("a", BY_ID),
            ("y", IN_ORDER),
            ("rng", ONE),
        ];
        let states = list(&devices).0.save().unwrap();
        let json = json!({"drives": {"a": 3, "b": 1}, "transports": [2, 4], "entropy": 5});
        assert_eq!(serde_json::to_value(&states).unwrap(), json);
        // The order of the drives may be another; that of the transports is what tells them apart.
        let others = [
            ("a", BY_ID),
            ("x", IN_ORDER),
            ("b", BY_ID),
            ("y", IN_ORDER),
            ("rng", ONE),
        ];
        let (restored, _) = list(&others);
        restored
            .restore(serde_json::from_value(json).unwrap())
            .unwrap();
        assert_eq!(values(&restored), [3, 2, 1, 4, 5]);
    }

    #[test]
    fn a_device_without_a_state_has_none_in_the_snapshot() {
        let (list, _) = list(&[("p", NOTHING)]);
        assert_eq!(list.save().unwrap(), DeviceStates::default());
        let error = list.restore(DeviceStates::default()).unwrap_err();
        assert!(
            matches!(error, RestoreError::Malformed { .. }),
            "the mock wants a number"
        );
    }

    #[test]
    fn states_of_other_devices_are_refused_and_named() {
        let one_each = [("a", BY_ID), ("a's", IN_ORDER), ("rng", ONE)];
        for (states, missing) in [
            (json!({}), "drives"),
            (
                json!({"drives": {"b": 1}, "transports": [2], "entropy": 3}),
                "drives",
            ),
            (
                json!({"drives": {"a": 1, "b": 4}, "transports": [2], "entropy": 3}),
                "drives",
            ),
            (
                json!({"drives": {"a": 1}, "transports": [], "entropy": 3}),
                "transports",
            ),
            (
                json!({"drives": {"a": 1}, "transports": [2, 4], "entropy": 3}),
                "transports",
            ),
            (
                json!({"drives": {"a": 1}, "transports": [2], "entropy": null}),
                "entropy",
            ),
            (
                json!({"drives": {"a": 1}, "transports": [2], "entropy": 3, "vsock": {}}),
                "vsock",
            ),
            (
                json!({"drives": {"a": 1}, "transports": [2], "entropy": 3, "net": {}}),
                "net",
            ),
            (
                json!({"drives": 1, "transports": [2], "entropy": 3}),
                "drives",
            ),
        ] {
            let (list, _) = list(&one_each);
            let error = list
                .restore(serde_json::from_value(states).unwrap())
                .unwrap_err();
            assert!(
                matches!(&error, RestoreError::OtherDevices(what) if what == missing),
                "{error}"
            );
        }
    }

    #[test]
    fn a_snapshot_names_kinds_of_which_the_guest_had_no_device() {
        let (list, _) = list(&[("rng", ONE)]);
        let states = json!({
            "drives": {}, "pmem": {}, "entropy": 7, "balloon": null, "vsock": null, "transports": []
        });
        list.restore(serde_json::from_value(states).unwrap())
            .unwrap();
        assert_eq!(values(&list), [7]);
    }

    #[test]
    fn metrics_are_of_the_kinds_that_have_some() {
        let (list, _) = list(&[("a", BY_ID), ("a's", IN_ORDER), ("rng", ONE)]);
        let metrics = list.metrics();
        let ids: Vec<_> = metrics.iter().map(|metrics| metrics.id.as_str()).collect();
        assert_eq!(ids, ["a", "rng"]);
    }
}
