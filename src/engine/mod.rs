//! The one thread that owns the device: takes a plan, runs the model, samples, sends events.

use crate::request::Request;

/// The way into the engine, for the HTTP side. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Handle {}

/// Why the engine did not take a request. Nothing of it was queued.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("the queue is full ({limit} requests wait); try again later")]
    QueueFull { limit: usize },
    #[error("the server is shutting down")]
    ShuttingDown,
}

impl Handle {
    /// Queues all of `requests` (the choices and prompts of one client request), or none of them.
    pub fn submit(&self, requests: Vec<Request>) -> Result<(), Refused> {
        let _ = requests;
        Err(Refused::ShuttingDown)
    }
}
