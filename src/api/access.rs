//! The end of every request, told once: a log line with what it asked and cost, and a count of why it ended early.
//!
//! An [`Exchange`] goes with the request from its first byte to the last byte of its answer, or to the moment its
//! client leaves; what ends it is its drop. Nothing of a prompt or an answer is ever logged here.

use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::{Body, Bytes, HttpBody};
use axum::http::StatusCode;
use axum::response::Response;

use super::Server;
use super::error::Cause;
use super::generation::milliseconds;
use super::middleware::Caller;
use super::types::{Timing, Usage};
use crate::request::Tenant;

/// The outcome of a request whose client left before its end.
pub(super) const CLIENT_GONE: &str = "client_gone";
/// Routes that are asked every few seconds, whether or not the server is ready.
const PROBES: [&str; 3] = ["/health", "/ready", "/metrics"];
/// The outcome of an answer that no model was asked for.
const OK: &str = "ok";

/// Where a request's handler leaves word for its exchange.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// Whose request it is, once that is known.
    pub tenant: OnceLock<Arc<Tenant>>,
    pub generated: OnceLock<Generated>,
}

/// What the model did for a request; set once, when its sequences have ended or been given up.
#[derive(Debug)]
pub(super) struct Generated {
    pub model: String,
    pub usage: Usage,
    pub timing: Timing,
    pub end: End,
}

/// How a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// With its whole answer, for this finish reason.
    Finished(&'static str),
    /// Before it, for this cause.
    Cut(&'static str),
}

/// A request on its way. Logged and counted when dropped.
pub(super) struct Exchange {
    server: Arc<Server>,
    caller: Caller,
    /// A probe's look at the server, which is logged at `debug` and refused nothing.
    probe: bool,
    began: Instant,
    status: Option<StatusCode>,
    cause: Option<Cause>,
}

impl Exchange {
    pub fn begin(server: Arc<Server>, caller: Caller, route: &str) -> Self {
        Self {
            server,
            caller,
            probe: PROBES.contains(&route),
            began: Instant::now(),
            status: None,
            cause: None,
        }
    }

    /// The response's head is known; the exchange goes on in its body.
    pub fn answered(mut self, response: Response) -> Response {
        self.status = Some(response.status());
        // Only a look at the server that got its answer, or heard "not yet", is a probe.
        self.probe &= response.status().is_success() || response.status() == StatusCode::SERVICE_UNAVAILABLE;
        self.cause = response.extensions().get::<Cause>().copied();
        response.map(|body| Body::new(Watched { body, _exchange: self }))
    }

    /// Counts what kept the request from its whole answer, and says how it ended.
    fn settle(&self) -> &'static str {
        let observer = &self.server.observer;
        match (
            self.caller.report.generated.get().map(|generated| generated.end),
            self.cause,
        ) {
            (Some(End::Finished(reason)), _) => reason,
            (Some(End::Cut(cause)), _) => observer.cut(cause),
            (None, Some(Cause { label, cut: true })) => observer.cut(label),
            (None, Some(cause)) if self.probe => cause.label,
            (None, Some(cause)) => observer.refused(cause.label),
            (None, None) if self.status.is_some() => OK,
            (None, None) => observer.cut(CLIENT_GONE),
        }
    }

    /// Writes the request's line; `untold` are those that had none since the last.
    fn tell(&self, outcome: &str, generated: Option<&Generated>, untold: Option<u64>) {
        let span = &self.caller.span;
        let tenant = self.caller.report.tenant.get().map(|tenant| tenant.name.as_str());
        let status = self.status.map(|status| status.as_u16());
        let total_ms = milliseconds(self.began.elapsed());
        let Some(Generated {
            model, usage, timing, ..
        }) = generated
        else {
            tracing::info!(parent: span, status, tenant, outcome, total_ms, untold, "request ended");
            return;
        };
        tracing::info!(
            parent: span,
            status,
            tenant,
            outcome,
            model,
            prompt_tokens = usage.prompt_tokens,
            cached_tokens = usage.prompt_tokens_details.cached_tokens,
            completion_tokens = usage.completion_tokens,
            queue_ms = timing.queue_ms,
            window_ms = timing.window_ms,
            prefill_ms = timing.prefill_ms,
            decode_ms = timing.decode_ms,
            total_ms,
            untold,
            "request ended"
        );
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let outcome = self.settle();
        #[cfg(feature = "otlp")]
        crate::telemetry::otlp::end(&self.caller.span, self.status, outcome);
        let generated = self.caller.report.generated.get();
        // What the model worked for is always told; the rest may come at any rate.
        let worked = generated.is_some_and(|generated| generated.usage.completion_tokens > 0);
        if worked {
            self.tell(outcome, generated, None);
        } else if self.probe {
            tracing::debug!(parent: &self.caller.span, outcome, "request ended");
        } else if let Some(untold) = self.server.quota.take(Instant::now()) {
            self.tell(outcome, generated, (untold > 0).then_some(untold));
        }
    }
}

/// A response's body that takes its exchange along.
struct Watched {
    // Dropped first: a stream says how its generation ended.
    body: Body,
    _exchange: Exchange,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

/// Lines a second for requests that the model did nothing for: refusals under overload, and whatever clients try.
const LINES: u32 = 10;

/// What is left of [`LINES`]. Behind a lock because its numbers change together; held for a few instructions.
#[derive(Debug, Default)]
pub(super) struct Quota(Mutex<Second>);

#[derive(Debug, Default)]
struct Second {
    began: Option<Instant>,
    told: u32,
    untold: u64,
}

impl Quota {
    /// Whether a line may be written now, and how many were not since the last one.
    fn take(&self, now: Instant) -> Option<u64> {
        // Three numbers are whole at every point, whoever panicked.
        let mut second = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let over = |began: Instant| now.saturating_duration_since(began).as_secs() >= 1;
        if second.began.is_none_or(over) {
            (second.began, second.told) = (Some(now), 0);
        }
        if second.told == LINES {
            second.untold += 1;
            return None;
        }
        second.told += 1;
        Some(std::mem::take(&mut second.untold))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::time::Duration;

    use serde_json::{Value, json};
    use tracing::subscriber::DefaultGuard;

    use super::super::testing;
    use super::*;
    use crate::batching::Refusal;
    use crate::engine::Refused;
    use crate::request::{Event, Failure};

    /// Lines that this thread logs while it lives.
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Lines {
        fn at(level: tracing::Level) -> (Self, DefaultGuard) {
            let lines = Self::default();
            let writer = lines.clone();
            let subscriber = tracing_subscriber::fmt()
                .json()
                .with_max_level(level)
                .with_writer(move || writer.clone())
                .finish();
            (lines, tracing::subscriber::set_default(subscriber))
        }

        fn ends(&self) -> Vec<Value> {
            let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
            let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
            lines
                .filter(|line: &Value| line["fields"]["message"] == "request ended")
                .collect()
        }
    }

    fn hello(extra: &Value) -> Value {
        let mut body = json!({"messages": [{"role": "user", "content": "A secret question"}]});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        body
    }

    #[tokio::test]
    async fn an_answer_is_told_once_with_its_figures_and_without_its_text() {
        let (lines, _guard) = Lines::at(tracing::Level::DEBUG);
        let (server, seen) = testing::saying("Hidden");
        for extra in [json!({}), json!({"stream": true})] {
            let request = axum::http::Request::post("/v1/chat/completions").header("x-request-id", "mine-1");
            let response = testing::send(&server, request.body(Body::from(hello(&extra).to_string())).unwrap()).await;
            assert_eq!(response.headers()["x-request-id"], "mine-1");
            testing::text(response).await;
        }
        let ends = lines.ends();
        assert_eq!(ends.len(), 2, "{ends:?}");
        for line in &ends {
            let (fields, span) = (&line["fields"], &line["span"]);
            assert_eq!(line["level"], "INFO");
            assert_eq!(
                (&span["request_id"], &span["method"], &span["route"]),
                (&json!("mine-1"), &json!("POST"), &json!("/v1/chat/completions"))
            );
            assert_eq!(
                (
                    &fields["status"],
                    &fields["outcome"],
                    &fields["tenant"],
                    &fields["model"]
                ),
                (&json!(200), &json!("stop"), &json!("anyone"), &json!("smol"))
            );
            assert_eq!(fields["prompt_tokens"], json!(seen.lock().unwrap()[0].prompt.len()));
            assert_eq!(
                (&fields["cached_tokens"], &fields["queue_ms"]),
                (&json!(16), &json!(10.0))
            );
            assert!(
                ["total_ms", "window_ms", "prefill_ms", "decode_ms"]
                    .iter()
                    .all(|key| fields[key].is_number())
            );
        }
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        assert!(!text.contains("secret") && !text.contains("Hidden"), "{text}");
    }

    #[tokio::test]
    async fn a_flood_of_refusals_is_counted_whole_and_told_in_part() {
        let (lines, _guard) = Lines::at(tracing::Level::INFO);
        let server = testing::server(|_| {
            Err(Refused::Refused(Refusal {
                cause: crate::batching::Cause::Requests { limit: 1 },
                retry_after: std::time::Duration::from_secs(1),
            }))
        });
        for _ in 0..50 {
            assert_eq!(
                testing::post(&server, "/v1/chat/completions", hello(&json!({})))
                    .await
                    .0,
                429
            );
        }
        testing::get(&server, "/health").await;
        let text = (server.metrics_text)();
        assert!(
            text.contains("sconce_refusals_total{cause=\"queue_full\"} 50"),
            "{text}"
        );
        let ends = lines.ends();
        // Where the test is held up for more than a second, more lines are due.
        assert!((LINES as usize..50).contains(&ends.len()), "{}", ends.len());
        assert_eq!(
            (&ends[0]["fields"]["status"], &ends[0]["fields"]["outcome"]),
            (&json!(429), &json!("queue_full"))
        );
    }

    #[tokio::test]
    async fn cuts_are_counted_by_cause() {
        let failing = testing::server(|requests| {
            for request in requests {
                let _ = request.events.send(Event::Failed(Failure::DeadlinePassed));
            }
            Ok(())
        });
        assert_eq!(
            testing::post(&failing, "/v1/chat/completions", hello(&json!({})))
                .await
                .0,
            504
        );
        let text = (failing.metrics_text)();
        assert!(
            text.contains("sconce_cuts_total{cause=\"deadline_passed\"} 1"),
            "{text}"
        );

        let kept = Arc::new(Mutex::new(Vec::new()));
        let keeper = kept.clone();
        let silent = testing::server(move |requests| {
            keeper.lock().unwrap().extend(requests);
            Ok(())
        });
        let waiting = testing::post(&silent, "/v1/chat/completions", hello(&json!({})));
        assert!(tokio::time::timeout(Duration::from_millis(50), waiting).await.is_err());
        let text = (silent.metrics_text)();
        assert!(text.contains("sconce_cuts_total{cause=\"client_gone\"} 1"), "{text}");
        assert!(kept.lock().unwrap()[0].events.is_closed());
    }

    #[test]
    fn lines_are_limited_and_the_rest_counted() {
        let quota = Quota::default();
        let start = Instant::now();
        let told = |after| quota.take(start + Duration::from_millis(after));
        for _ in 0..LINES {
            assert_eq!(told(10), Some(0));
        }
        for _ in 0..500 {
            assert_eq!(told(900), None);
        }
        assert_eq!(told(1010), Some(500));
        assert_eq!(told(1020), Some(0));
    }
}
