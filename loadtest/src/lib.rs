//! An open-loop load generator for OpenAI-compatible inference servers, and its reports.
//!
//! It knows a server by its HTTP API alone. [`arrivals`] says when requests go out, [`workload`] what they ask,
//! [`run`] sends them and [`recorder`] keeps what came of it; [`utilisation`] watches the server meanwhile; [`rubric`]
//! chooses the loads; [`report`] shows the results, [`tune`] decides which settings to try. [`check`] refuses bad input
//! before any load is sent.

#![forbid(unsafe_code)]

pub mod arrivals;
pub mod check;
pub mod client;
pub mod files;
mod intervals;
mod live;
mod pacer;
pub mod recorder;
pub mod report;
pub mod rubric;
pub mod run;
pub mod slo;
mod sse;
pub mod tls;
pub mod tokens;
pub mod trace;
pub mod tune;
pub mod utilisation;
pub mod workload;

pub use live::Live;
