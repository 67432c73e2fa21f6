//! sconce: an inference server that turns one GPU into a dependable service.
//!
//! The folders show the way of a request: [`api`] parses and checks it, [`text`] turns it into tokens, [`batching`]
//! decides when it runs and beside whom, [`engine`] runs the model and sends tokens back, [`text`] turns them into
//! text again. [`request`] holds what every station knows of it. A module imports only what stands below it:
//! `main → commands → config → api → text, engine → batching → request`; `telemetry` is for all but the last two.

#![forbid(unsafe_code)]

pub mod api;
pub mod batching;
pub mod commands;
pub mod config;
pub mod engine;
#[cfg(any(test, feature = "fault-injection"))]
pub mod fault_injection;
pub mod request;
pub mod telemetry;
pub mod text;
