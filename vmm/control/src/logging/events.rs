//! What the log stands on: events alone. Nothing of the project opens a span, and the registry that keeps them has a
//! table of 32 KiB from the start, in every guest's process.

use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::registry::{Data, LookupSpan};

/// Takes events, for the layers above it to write, and no span: whoever opens one has one that is disabled.
#[derive(Debug)]
pub(super) struct Events;

impl Subscriber for Events {
    fn register_callsite(&self, of: &'static Metadata<'static>) -> Interest {
        if of.is_event() {
            Interest::always()
        } else {
            Interest::never()
        }
    }

    fn enabled(&self, of: &Metadata<'_>) -> bool {
        of.is_event()
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        // None is enabled, so nobody asks for one.
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

impl<'a> LookupSpan<'a> for Events {
    type Data = Data<'a>;

    fn span_data(&'a self, _: &Id) -> Option<Data<'a>> {
        None
    }
}
