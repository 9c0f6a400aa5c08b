//! Requests about the networks of guests.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State as Of;
use serde::Serialize;
use utoipa::ToSchema;

use super::request::Context;
use crate::serve::daemon::Daemon;
use crate::serve::networks::NetworkStatus;
use crate::serve::status::VmStatus;
use crate::serve::task::blocking;
use host::report::chain;

/// Adds the counters of their taps to the status of guests, where the host tells them.
pub(super) async fn count(daemon: &Arc<Daemon>, vms: &mut [VmStatus]) {
    if vms.iter().all(|vm| vm.networks.is_empty()) {
        return;
    }
    let networks = daemon.networks.clone();
    let counters = blocking(move || networks.counters()).await;
    let counters = counters.unwrap_or_else(|fault| {
        tracing::error!(fault = %chain(&fault), "the counters of networks cannot be read");
        BTreeMap::new()
    });
    for interface in vms.iter_mut().flat_map(|vm| &mut vm.networks) {
        interface.counters = counters.get(&interface.address).map(|c| (*c).into());
    }
}

/// All networks.
#[derive(Serialize, ToSchema)]
pub(in crate::serve) struct NetworkList {
    /// In the order in which the daemon was given them.
    networks: Vec<NetworkStatus>,
}

/// The networks of the daemon: their addresses, what has passed, and their guests.
#[utoipa::path(get, path = "/networks", tag = "daemon", responses((status = 200, body = NetworkList)))]
pub(in crate::serve) async fn networks(Of(daemon): Context) -> Json<NetworkList> {
    let vms = daemon.all();
    let mut vms: Vec<_> = vms.iter().map(|vm| vm.status(false, false)).collect();
    count(&daemon, &mut vms).await;
    let networks = daemon.networks.all(&vms);
    Json(NetworkList { networks })
}
