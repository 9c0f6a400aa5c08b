//! Events: what has happened is kept for a while, and sent to all listeners.
//!
//! The numbers of events grow from one daemon to the next, so that a listener can say what it has seen last
//! (`Last-Event-ID`).

use std::collections::VecDeque;

use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::broadcast;
use utoipa::ToSchema;

use super::status::now_ms;
use host::printable::printable;

/// Events that are kept for later listeners, and most events that a listener may be behind.
const KEPT: usize = 256;

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// The daemon has started.
    DaemonStarted,
    /// The daemon ends. Its guests stay, unless `--stop-guests` was given.
    DaemonStopping,
    /// A guest was made.
    Created,
    /// A guest was found as an earlier daemon had left it.
    Attached,
    /// A guest was found whose record cannot be read.
    Unreadable,
    /// A guest runs.
    Started,
    /// A guest was paused.
    Paused,
    /// A guest was resumed.
    Resumed,
    /// A guest was asked to end.
    Stopping,
    /// A guest has ended in good order.
    Stopped,
    /// A guest has failed.
    Failed,
    /// A guest has ended, and will be started again.
    Restarting,
    /// A guest has failed too often to be started again.
    RestartsExhausted,
    /// A guest was deleted.
    Deleted,
    /// A guest was not admitted.
    Refused,
    /// A caller was turned away.
    CallerRefused,
    /// An image was registered.
    ImageAdded,
    /// An image was removed from the register.
    ImageRemoved,
    /// A guest became a template.
    TemplateCreated,
    /// A template was deleted.
    TemplateDeleted,
}

impl EventKind {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::DaemonStarted => "daemon_started",
            Self::DaemonStopping => "daemon_stopping",
            Self::Created => "created",
            Self::Attached => "attached",
            Self::Unreadable => "unreadable",
            Self::Started => "started",
            Self::Paused => "paused",
            Self::Resumed => "resumed",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Restarting => "restarting",
            Self::RestartsExhausted => "restarts_exhausted",
            Self::Deleted => "deleted",
            Self::Refused => "refused",
            Self::CallerRefused => "caller_refused",
            Self::ImageAdded => "image_added",
            Self::ImageRemoved => "image_removed",
            Self::TemplateCreated => "template_created",
            Self::TemplateDeleted => "template_deleted",
        }
    }
}

/// One event.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Event {
    /// Its number.
    pub id: u64,
    /// When it happened, in ms since 1970.
    pub time_ms: u64,
    /// What has happened.
    pub kind: EventKind,
    /// The guest, where it is about one.
    pub vm: Option<String>,
    /// Why, and what to do about it, for people.
    pub reason: Option<String>,
}

struct History {
    events: VecDeque<Event>,
    next: u64,
}

/// All events.
pub struct Events {
    history: Mutex<History>,
    listeners: broadcast::Sender<Event>,
}

impl Default for Events {
    fn default() -> Self {
        let history = History {
            events: VecDeque::new(),
            // Higher than any number of the daemon before, unless that had a thousand events a millisecond.
            next: now_ms().saturating_mul(1000),
        };
        Self {
            history: Mutex::new(history),
            listeners: broadcast::Sender::new(KEPT),
        }
    }
}

impl Events {
    /// Adds an event, and sends it to all listeners.
    pub fn tell(&self, kind: EventKind, vm: Option<&str>, reason: Option<String>) {
        // Listeners show it as it comes, and a guest's process may have written a part of it.
        let reason = reason.map(|reason| printable(&reason).into_owned());
        tracing::info!(vm, event = kind.name(), reason, "event");
        let mut history = self.history.lock();
        let event = Event {
            id: history.next,
            time_ms: now_ms(),
            kind,
            vm: vm.map(ToOwned::to_owned),
            reason,
        };
        history.next += 1;
        if history.events.len() == KEPT {
            history.events.pop_front();
        }
        history.events.push_back(event.clone());
        // Sent under the lock, so that events arrive in their order. It fails where there is no listener, which is
        // fine.
        let _ = self.listeners.send(event);
    }

    /// The kept events after number `last`, and a receiver of all later ones. A listener that is too far behind
    /// receives `Lagged`.
    pub fn listen(&self, last: Option<u64>) -> (Vec<Event>, broadcast::Receiver<Event>) {
        let history = self.history.lock();
        let kept = match last {
            Some(last) => history
                .events
                .iter()
                .filter(|event| event.id > last)
                .cloned()
                .collect(),
            None => Vec::new(),
        };
        (kept, self.listeners.subscribe())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_that_comes_back_misses_nothing() {
        let events = Events::default();
        for id in ["a", "b", "c"] {
            events.tell(EventKind::Created, Some(id), None);
        }
        let (all, _) = events.listen(Some(0));
        let (rest, mut receiver) = events.listen(Some(all[0].id));
        assert_eq!(
            rest.iter()
                .map(|e| e.vm.clone().unwrap())
                .collect::<Vec<_>>(),
            ["b", "c"]
        );
        events.tell(EventKind::Deleted, Some("a"), None);
        assert_eq!(receiver.try_recv().unwrap().kind, EventKind::Deleted);
        assert!(events.listen(None).0.is_empty());
        for _ in 0..2 * KEPT {
            events.tell(EventKind::Created, None, None);
        }
        assert_eq!(events.listen(Some(0)).0.len(), KEPT);
        assert!(matches!(
            receiver.try_recv(),
            Err(broadcast::error::TryRecvError::Lagged(_))
        ));
    }
}
