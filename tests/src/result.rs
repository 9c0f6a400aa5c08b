//! What a scenario came to.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What a scenario measured, by name; the unit is part of the name.
pub type Figures = BTreeMap<String, serde_json::Value>;

/// Why a scenario failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Something that the scenario claims does not hold.
    #[error("{0}")]
    Claim(String),
    /// The machine did not do its part.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// What the machine said.
        source: std::io::Error,
    },
    /// JSON that is none.
    #[error("JSON")]
    Json(#[from] serde_json::Error),
}

impl Failure {
    /// A broken claim.
    pub fn claim<T>(claim: impl Into<String>) -> Result<T, Self> {
        Err(Self::Claim(claim.into()))
    }

    /// Names what was tried.
    pub fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// A scenario's result, as the agent writes it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// The scenario.
    pub name: String,
    /// Seconds it took, of the lab's host.
    pub seconds: f64,
    /// Why it failed, where it did.
    pub failure: Option<String>,
    /// What it measured.
    pub figures: Figures,
    /// Consoles and logs of its guests.
    pub log: String,
}

/// What the agent is to do.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    /// Scenarios in order.
    pub scenarios: Vec<String>,
}
