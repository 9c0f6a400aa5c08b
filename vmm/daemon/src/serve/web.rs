//! The address for reading (`--web`): by which names it may be called, and what it shows of guests.
//!
//! A browser keeps what a page of one site may read apart from other sites by their names. A name can be made to mean
//! any address (DNS rebinding), so that a page from elsewhere could read what is served here, from a browser that
//! reaches this address. It would still call this address by its own name: so only names that are known to be the
//! daemon's are answered (RFC 9110, 7.4). An address is no name, and cannot be made to mean another one.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::{Extension, Request, State as Of};
use axum::http::header::HOST;
use axum::http::uri::Authority;
use axum::middleware::Next;
use axum::response::Response;
use serde::Serialize;

use super::fault::Fault;
use super::peer::Caller;
use super::record::State;
use super::status::{MemorySplit, VmStatus};

/// How the daemon serves its address for reading.
#[derive(Clone, Debug)]
pub struct WebOptions {
    /// The address.
    pub address: SocketAddr,
    /// Names and addresses by which it may be called, beside `localhost` and its own: in lower case.
    pub hosts: Vec<String>,
    /// Whether it serves all that only reads, and not just the page.
    pub all: bool,
}

/// The name of a host as a request says it, without its port, brackets and the dot of the root; `None` where it is
/// none.
fn host_of(authority: &str) -> Option<String> {
    let authority = authority.parse::<Authority>().ok()?;
    if authority.as_str().contains('@') {
        return None;
    }
    let host = authority.host();
    let host = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .unwrap_or(host);
    Some(host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase())
}

/// Whether a connection to `local` may be called by this name.
fn is_known(host: &str, local: IpAddr, hosts: &[String]) -> bool {
    if host == "localhost" || host.ends_with(".localhost") || hosts.iter().any(|name| name == host)
    {
        return true;
    }
    match host.parse::<IpAddr>() {
        Ok(address) => {
            let address = address.to_canonical();
            address.is_loopback() || address == local.to_canonical()
        }
        Err(_) => false,
    }
}

/// Refuses requests that call this address by a name that it is not known to have.
///
/// # Errors
/// `Misdirected`.
pub async fn only_known_hosts(
    Of(hosts): Of<Arc<[String]>>,
    Extension(caller): Extension<Caller>,
    request: Request,
    next: Next,
) -> Result<Response, Fault> {
    let Caller::Web(local) = caller else {
        return Ok(next.run(request).await);
    };
    let mut named = request.headers().get_all(HOST).iter();
    // There is one in every request of HTTP/1.1 (RFC 9112, 3.2), and the target of a request may name one as well.
    let first = named.next().map(|host| host.to_str().unwrap_or_default());
    let more = named.next().map(|_| "");
    let target = request.uri().authority().map(Authority::as_str);
    for name in [Some(first.unwrap_or_default()), more, target]
        .into_iter()
        .flatten()
    {
        let is_known = host_of(name).is_some_and(|host| is_known(&host, local, &hosts));
        if !is_known {
            return Err(Fault::Misdirected(name.to_owned()));
        }
    }
    Ok(next.run(request).await)
}

/// What the page shows of a guest.
#[derive(Serialize)]
pub struct PageGuest {
    id: String,
    state: State,
    vcpus: u8,
    mem_size_mib: u32,
    end: Option<PageEnd>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<MemorySplit>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_s: Option<f64>,
}

/// Why a guest has ended.
#[derive(Serialize)]
struct PageEnd {
    text: String,
}

impl From<VmStatus> for PageGuest {
    fn from(status: VmStatus) -> Self {
        Self {
            id: status.id,
            state: status.state,
            vcpus: status.vcpus,
            mem_size_mib: status.mem_size_mib,
            end: status.end.map(|end| PageEnd {
                text: end.report.text,
            }),
            memory: status.memory,
            cpu_s: status.cpu_s,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_called_by_its_own_names_alone() {
        let hosts = ["guests.example".to_owned(), "198.51.100.1".to_owned()];
        let known = |authority: &str, local: &str| {
            host_of(authority).is_some_and(|host| is_known(&host, local.parse().unwrap(), &hosts))
        };
        for good in [
            "localhost",
            "LocalHost:8080",
            "a.localhost",
            "127.0.0.1:8080",
            "127.1.2.3",
            "[::1]:80",
            "192.0.2.1:8080",
            "[::ffff:192.0.2.1]",
            "guests.example",
            "Guests.Example.:8080",
            "198.51.100.1",
        ] {
            assert!(known(good, "192.0.2.1"), "{good}");
            let mapped = known(good, "::ffff:192.0.2.1");
            assert!(mapped, "{good}");
        }
        for bad in [
            "",
            "evil.example",
            "localhost.evil.example",
            "evillocalhost",
            "guests.example.evil",
            "192.0.2.2",
            "0.0.0.0",
            "[2001:db8::1]",
            "localhost@evil.example",
            "evil.example@localhost",
            "a b",
            "3221225985",
        ] {
            assert!(!known(bad, "192.0.2.1"), "{bad}");
        }
    }
}
