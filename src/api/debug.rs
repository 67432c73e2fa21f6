//! `GET /debug/trace?seconds=N`: records what the engine does for so long. There where `/admin` is.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{Uri, header};
use axum::response::{IntoResponse, Response};

use super::Server;
use super::error::ApiError;
use crate::telemetry::chrome_trace;

/// The longest recording in seconds.
const LONGEST: f64 = 60.0;
/// How long a recording is that does not say.
const USUAL: Duration = Duration::from_secs(5);

pub(super) async fn trace(State(server): State<Arc<Server>>, uri: Uri) -> Result<Response, ApiError> {
    let engine = server.admin_engine("GET", "/debug/trace")?;
    let recorded = engine.record(length(uri.query())?).await;
    let recording = recorded.map_err(|busy| ApiError::busy(&busy.to_string()))?;
    // Up to a hundred thousand notes are written out.
    let text = tokio::task::spawn_blocking(move || chrome_trace(&recording)).await;
    let text = text.map_err(|_| ApiError::internal("The server failed to write the trace."))?;
    Ok(([(header::CONTENT_TYPE, "application/json")], text).into_response())
}

fn length(query: Option<&str>) -> Result<Duration, ApiError> {
    let Some(query) = query else { return Ok(USUAL) };
    let seconds = query.strip_prefix("seconds=").and_then(|text| text.parse().ok());
    match seconds.filter(|seconds| (0.1..=LONGEST).contains(seconds)) {
        Some(seconds) => Ok(Duration::from_secs_f64(seconds)),
        None => Err(ApiError::invalid(
            "seconds",
            format!("Ask for `?seconds=N` with N between 0.1 and {LONGEST}."),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;

    #[tokio::test]
    async fn is_unknown_unless_admin_is_allowed() {
        let server = testing::server(|_| Ok(()));
        assert_eq!(testing::get(&server, "/debug/trace?seconds=1").await.0, 404);
    }

    #[test]
    fn a_recording_has_bounds() {
        assert_eq!(length(None), Ok(USUAL));
        assert_eq!(length(Some("seconds=0.5")), Ok(Duration::from_millis(500)));
        for wrong in [
            "",
            "seconds",
            "seconds=",
            "seconds=0",
            "seconds=61",
            "seconds=NaN",
            "seconds=-1",
            "minutes=1",
        ] {
            assert!(length(Some(wrong)).is_err(), "{wrong}");
        }
    }
}
