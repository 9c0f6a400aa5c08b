//! Why a request is refused or has failed, and its response: the status code, and a `fault_message` as the guests' own
//! API has it.

use std::io;

use axum::Json;
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use super::admission::Refusal;
use super::network_fault::NetworkFault;
use super::record::State;
use config::{ConfigError, DeviceIdError};
use host::report::chain;
use network::HostError;

/// The error of a library, or a text.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// A request that is refused or has failed. `Display` leaves the source out: see [`chain`].
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The body is not of the expected shape.
    #[error("the body of the request")]
    Json(#[from] serde_json::Error),
    /// The body cannot be read, or is too long.
    #[error("the body of the request: {1}")]
    Body(StatusCode, String),
    /// The query is not of the expected shape.
    #[error("the query of the request: {0}")]
    Query(String),
    /// A file that the query names cannot be looked at.
    #[error("the query of the request: path: {name}")]
    QueryFile {
        /// Its name.
        name: String,
        /// The host's error.
        source: io::Error,
    },
    /// The guest's configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A value is wrong.
    #[error("{field}: {value:.80?} is not {expected}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What would be right.
        expected: &'static str,
    },
    /// The path of a socket would be longer than the host allows.
    #[error(
        "id: {0:?} is too long for the state folder: the paths of its sockets would have more than 107 bytes"
    )]
    LongPath(String),
    /// The guest ended before it had begun.
    #[error("the guest could not start: {0}")]
    DidNotStart(String),
    /// The caller may not call the daemon.
    #[error("user {0} may not call this daemon; see --allow-uid and --socket-group")]
    Forbidden(u32),
    /// The address for reading does not change anything.
    #[error("this address is for reading alone: use the socket")]
    ReadOnly,
    /// A text that is no name of a device.
    #[error(transparent)]
    DeviceId(#[from] DeviceIdError),
    /// The address for reading is called by a name that it is not known to have.
    #[error(
        "{0:.80?} is not known to be the name of this address: coppice serve --web-host NAME says that it is"
    )]
    Misdirected(String),
    /// The caller has too many connections.
    #[error("there are too many connections of this caller: close some")]
    TooManyConnections,
    /// No such guest.
    #[error("there is no guest {0:.80}")]
    NoVm(String),
    /// No such image.
    #[error("there is no image {0:.80}")]
    NoImage(String),
    /// The daemon admits no guest that is loaded from a snapshot by way of its own API.
    #[error(
        "a guest of the daemon goes on from a template: POST /vms with \"template\" makes it, or use coppice run --restore"
    )]
    LoadsTemplates,
    /// No such template.
    #[error("there is no template {0:.80}")]
    NoTemplate(String),
    /// The name of a template is taken.
    #[error("there is a template {0} already")]
    TemplateExists(String),
    /// Something needs the template.
    #[error("template {template} is used by {by}: delete that first")]
    TemplateUsed {
        /// The template.
        template: String,
        /// What uses it.
        by: String,
    },
    /// A file of the guest cannot be a part of a template.
    #[error("the guest cannot become a template")]
    NotForTemplate(#[source] io::Error),
    /// The disk that a disk would be merged into is a template's.
    #[error(
        "the disk of {drive} stands on that of template {template}, which its clones need as it is: delete the template first"
    )]
    OnTemplate {
        /// The drive.
        drive: String,
        /// The template.
        template: String,
    },
    /// No such path.
    #[error("there is nothing at {1:.200} for {0}")]
    NoPath(Method, String),
    /// The path does not have that method.
    #[error("{0} is not for {1:.200}")]
    Method(Method, String),
    /// The name is taken.
    #[error("there is a guest {0} already, made otherwise")]
    Exists(String),
    /// Not in this state.
    #[error("guest {id} is {state}: {advice}")]
    WrongState {
        /// The guest.
        id: String,
        /// Its state.
        state: State,
        /// What to do first.
        advice: &'static str,
    },
    /// A guest needs the image.
    #[error("image {image} is used by guest {vm}: delete that first")]
    ImageUsed {
        /// The image.
        image: String,
        /// One of its guests.
        vm: String,
    },
    /// The host has no room for the guest.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// All users of the range have a guest.
    #[error("every user from {first} to {last} has a guest already: see --jail uids=")]
    NoUser {
        /// The first.
        first: u32,
        /// The last.
        last: u32,
    },
    /// Another guest has the identifier.
    #[error("vsock.guest_cid: another guest has {0}: leave it out, and one is made up")]
    CidTaken(u32),
    /// An interface cannot be in a network.
    #[error(transparent)]
    Network(#[from] NetworkFault),
    /// The host does not have the network of a guest.
    #[error("the network of the guest cannot be had")]
    HostNetwork(#[from] HostError),
    /// The state folder.
    #[error("the state folder")]
    Store(#[source] io::Error),
    /// The host starts no process.
    #[error("the process of the guest cannot be started")]
    Spawn(#[source] io::Error),
    /// The guest's process has too many requests in hand.
    #[error("guest {0} has too many requests in hand: try again")]
    Busy(String),
    /// The guest's process cannot be reached, or its response cannot be understood.
    #[error("the process of guest {id} cannot be asked")]
    Unreachable {
        /// The guest.
        id: String,
        /// Why.
        source: Failure,
    },
    /// The guest's process does not answer in time.
    #[error("the process of guest {0} does not answer")]
    Silent(String),
    /// The guest's process cannot be ended.
    #[error("the process of guest {0} does not end, even when killed: it waits for the host")]
    Unkillable(String),
    /// The guest's process refuses.
    #[error("{1}")]
    Guest(StatusCode, String),
    /// The daemon itself.
    #[error("the daemon failed")]
    Internal(#[source] Failure),
}

/// The body of the response to a request that is refused or has failed.
#[derive(Debug, Serialize, ToSchema)]
pub struct FaultBody {
    /// Why, for people.
    pub fault_message: String,
}

impl Fault {
    /// The status code.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Body(status, _) | Self::Guest(status, _) => *status,
            Self::Json(_)
            | Self::Query(_)
            | Self::QueryFile { .. }
            | Self::Config(_)
            | Self::DeviceId(_)
            | Self::Invalid { .. }
            | Self::Network(_)
            | Self::LongPath(_) => StatusCode::BAD_REQUEST,
            Self::DidNotStart(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Forbidden(_) | Self::ReadOnly => StatusCode::FORBIDDEN,
            Self::Misdirected(_) => StatusCode::MISDIRECTED_REQUEST,
            Self::NoVm(_) | Self::NoImage(_) | Self::NoTemplate(_) | Self::NoPath(..) => {
                StatusCode::NOT_FOUND
            }
            Self::Method(..) => StatusCode::METHOD_NOT_ALLOWED,
            Self::Exists(_)
            | Self::CidTaken(_)
            | Self::TemplateExists(_)
            | Self::LoadsTemplates
            | Self::WrongState { .. }
            | Self::ImageUsed { .. }
            | Self::TemplateUsed { .. }
            | Self::NotForTemplate(_)
            | Self::OnTemplate { .. } => StatusCode::CONFLICT,
            Self::Refused(_) | Self::NoUser { .. } => StatusCode::INSUFFICIENT_STORAGE,
            Self::Store(error) | Self::Spawn(error)
                if error.kind() == io::ErrorKind::StorageFull =>
            {
                StatusCode::INSUFFICIENT_STORAGE
            }
            // A record that could not be read again is not written.
            Self::Store(error) if error.kind() == io::ErrorKind::FileTooLarge => {
                StatusCode::PAYLOAD_TOO_LARGE
            }
            Self::Store(_) | Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Spawn(_) | Self::HostNetwork(_) | Self::Busy(_) | Self::TooManyConnections => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::Unreachable { .. } => StatusCode::BAD_GATEWAY,
            Self::Silent(_) | Self::Unkillable(_) => StatusCode::GATEWAY_TIMEOUT,
        }
    }
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        let status = self.status();
        let is_callers = matches!(
            self,
            Self::Refused(_) | Self::NoUser { .. } | Self::TooManyConnections
        );
        if status.is_server_error() && !is_callers {
            tracing::warn!(fault = %chain(&self), "a request failed");
        } else {
            tracing::debug!(fault = %chain(&self), "a request is refused");
        }
        let body = FaultBody {
            fault_message: chain(&self).to_string(),
        };
        (status, Json(body)).into_response()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::serve::store::named;

    #[test]
    fn a_failure_names_the_file_and_the_error_of_the_host_once() {
        let full = io::Error::from_raw_os_error(libc::ENOSPC);
        let expected = format!("the state folder: /s/vm.json: {full}");
        let fault = Fault::Store(named(Path::new("/s/vm.json"))(full));
        assert_eq!(chain(&fault).to_string(), expected);
        assert_eq!(fault.status(), StatusCode::INSUFFICIENT_STORAGE);
        let fault = Fault::Unreachable {
            id: "g".to_owned(),
            source: io::Error::from_raw_os_error(libc::EMFILE).into(),
        };
        assert!(chain(&fault).to_string().ends_with("(os error 24)"));
    }
}
