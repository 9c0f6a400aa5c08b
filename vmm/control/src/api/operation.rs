//! What an operation of a guest's REST API is: how it is asked for, what it takes and answers, and what the host daemon
//! has to know of it.

use super::description::{Answer, RequestBody};
use super::handler::Handler;
use super::keep::{GuestSettings, Keep, SettingsError};
use super::response::Fault;
use crate::control::ControlError;

/// Methods of requests (RFC 9110, 9.3, and RFC 5789). No operation has another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestMethod {
    /// `GET`: nothing changes.
    Get,
    /// `PUT`.
    Put,
    /// `PATCH`.
    Patch,
}

impl RequestMethod {
    /// As HTTP has it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
        }
    }
}

/// What an operation does to the disks of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskEffect {
    /// Nothing.
    None,
    /// It names another file, or changes the one that there is.
    Changes,
    /// It names another file where its body has a `path_on_host`.
    MayReplace,
    /// The disk of a drive goes on in a new file, a child of the one that it has.
    DriveChild,
    /// The disk of a pmem device does.
    PmemChild,
    /// The disk is merged into its parent.
    Merge,
}

/// What the host has to have room for, before an operation is done on a guest that has not started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reservation {
    /// Nothing.
    None,
    /// RAM and vCPUs.
    Memory,
    /// A context identifier that no other guest has.
    Cid,
    /// Addresses in a network.
    Network,
}

/// What an operation does to the life of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LifeEffect {
    /// Nothing.
    None,
    /// It can start the guest.
    CanStart,
    /// It pauses or resumes the guest.
    ChangesState,
    /// The guest goes on from a snapshot.
    Loads,
}

/// An operation of a guest's API.
pub struct GuestOperation {
    /// The method of the request.
    pub method: RequestMethod,
    /// The path, with one part in braces for a name at most.
    pub path: &'static str,
    /// What it does, in a sentence.
    pub summary: &'static str,
    /// What becomes of disks.
    pub disk: DiskEffect,
    /// What is admitted first.
    pub reservation: Reservation,
    /// What becomes of the guest.
    pub life: LifeEffect,
    pub(super) handler: &'static dyn Handler,
    /// What it changes of the settings that are kept over restarts of the process, if it changes any.
    pub(super) keep: Option<&'static dyn Keep>,
}

/// Whether a part of a path stands for a name.
fn is_name(part: &str) -> bool {
    part.starts_with('{')
}

impl GuestOperation {
    pub(super) const fn new(
        method: RequestMethod,
        path: &'static str,
        summary: &'static str,
        handler: &'static dyn Handler,
    ) -> Self {
        Self {
            method,
            path,
            summary,
            disk: DiskEffect::None,
            reservation: Reservation::None,
            life: LifeEffect::None,
            handler,
            keep: None,
        }
    }

    pub(super) const fn kept(mut self, keep: &'static dyn Keep) -> Self {
        self.keep = Some(keep);
        self
    }

    pub(super) const fn disk(mut self, disk: DiskEffect) -> Self {
        self.disk = disk;
        self
    }

    pub(super) const fn reserves(mut self, reservation: Reservation) -> Self {
        self.reservation = reservation;
        self
    }

    pub(super) const fn life(mut self, life: LifeEffect) -> Self {
        self.life = life;
        self
    }

    /// The body that a request has; `None` where it has none.
    pub fn body(&self) -> Option<RequestBody> {
        self.handler.body()
    }

    /// What it is answered with.
    pub fn answer(&self) -> Answer {
        self.handler.answer()
    }

    /// Whether what it changes is part of the guest's settings, and so is kept over restarts of the process.
    pub fn is_kept(&self) -> bool {
        self.keep.is_some()
    }

    /// What a request with `name` in its path makes of settings; nothing of those that are not kept.
    ///
    /// # Errors
    /// Where the request is wrong, or the settings would be.
    pub fn applied_to(
        &self,
        settings: &GuestSettings,
        name: &str,
        body: &[u8],
    ) -> Result<GuestSettings, SettingsError> {
        let mut applied = settings.clone();
        if let Some(keep) = self.keep {
            keep.apply(&mut applied, name, body)?;
            let valid = applied.config.validate();
            valid.map_err(|error| Fault::from(ControlError::from(error)))?;
        }
        Ok(applied)
    }

    /// Whether it changes something.
    pub fn changes(&self) -> bool {
        self.method != RequestMethod::Get
    }

    /// What stands for the name in its path, if anything does.
    pub fn parameter(&self) -> Option<&'static str> {
        let name = segments_of(self.path).find(|part| is_name(part))?;
        Some(name.trim_matches(['{', '}']))
    }

    /// The name in a path, empty where it has none; `None` where the path is not this operation's.
    pub(super) fn name_in<'p>(&self, path: &'p str) -> Option<&'p str> {
        let mut name = "";
        let mut own = segments_of(self.path);
        for segment in segments_of(path) {
            match own.next()? {
                part if is_name(part) => name = segment,
                same if same == segment => {}
                _ => return None,
            }
        }
        own.next().is_none().then_some(name)
    }
}

/// The parts of a path between its slashes.
pub fn segments_of(path: &str) -> impl Iterator<Item = &str> {
    path.trim_start_matches('/').split_terminator('/')
}
