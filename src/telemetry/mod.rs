//! Metrics and tracing: what the server says of itself.
