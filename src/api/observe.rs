//! What the HTTP side counts and times, as Prometheus metrics.

use std::time::Duration;

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry};

/// Causes of [`Observer::refused`] that stand at zero from the start: an error's code, where it has one. Any other
/// error's code joins them when it first happens.
const REFUSALS: [&str; 25] = [
    "queue_full",
    "queue_tokens",
    "in_flight",
    "key_share",
    "deadline",
    "model_loading",
    "shutting_down",
    "engine_lost",
    "invalid_request",
    "unsupported_value",
    "context_length_exceeded",
    "request_too_large",
    "body_too_large",
    "too_many_bytes",
    "headers_too_large",
    "malformed_head",
    "model_not_found",
    "unknown_url",
    "method_not_allowed",
    "invalid_api_key",
    "key_disabled",
    "not_admin",
    "foreign_host",
    "foreign_origin",
    "rate_limit_exceeded",
];
/// Causes of [`Observer::cut`] that stand at zero from the start.
const CUTS: [&str; 8] = [
    "overtaken",
    "client_gone",
    "deadline_passed",
    "not_a_number",
    "step_failed",
    "engine_lost",
    "shutting_down",
    "internal",
];

/// The HTTP side's own metrics. Times are seconds.
#[derive(Debug)]
pub struct Observer {
    requests: IntCounterVec,
    refusals: IntCounterVec,
    cuts: IntCounterVec,
    connections_cut: IntCounterVec,
    first_token: Histogram,
    per_token: Histogram,
    request: Histogram,
    prompt_tokens: IntCounter,
    completion_tokens: IntCounter,
    panics: IntCounterVec,
}

/// Where a request's own panic was caught.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place {
    Handler,
    Text,
}

impl Observer {
    /// Makes the metrics and registers them; fails where a name is taken already.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let histogram = |name: &str, help: &str, first: f64, factor: f64| {
            let buckets = prometheus::exponential_buckets(first, factor, 18)?;
            let histogram = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets))?;
            registry.register(Box::new(histogram.clone())).map(|()| histogram)
        };
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::new(name, help)?;
            registry.register(Box::new(counter.clone())).map(|()| counter)
        };
        let by_cause = |name: &str, help: &str, causes: &[&str]| {
            let counter = IntCounterVec::new(Opts::new(name, help), &["cause"])?;
            for cause in causes {
                counter.with_label_values(&[*cause]);
            }
            registry.register(Box::new(counter.clone())).map(|()| counter)
        };
        let requests = IntCounterVec::new(
            Opts::new(
                "sconce_http_requests_total",
                "HTTP requests answered, by route and status code.",
            ),
            &["route", "status"],
        )?;
        registry.register(Box::new(requests.clone()))?;
        let connections_cut = IntCounterVec::new(
            Opts::new(
                "sconce_connections_cut_total",
                "Connections closed on a client: one too many, one that kept its answer waiting for too long, or one that was \
                 too slow with the head of a request.",
            ),
            &["cause"],
        )?;
        registry.register(Box::new(connections_cut.clone()))?;
        // Counters that a client can see from the start, at zero.
        for cause in ["slow_head", "stalled", "too_many"] {
            connections_cut.with_label_values(&[cause]);
        }
        let panics = IntCounterVec::new(
            Opts::new(
                "sconce_request_panics_total",
                "Requests that failed by a panic of their own outside the engine, by place.",
            ),
            &["place"],
        )?;
        registry.register(Box::new(panics.clone()))?;
        // Counters that a client can see from the start, at zero.
        for place in ["handler", "text"] {
            panics.with_label_values(&[place]);
        }
        requests.with_label_values(&["/v1/chat/completions", "200"]);
        Ok(Self {
            requests,
            refusals: by_cause(
                "sconce_refusals_total",
                "Requests answered with an error before anything of them ran, by cause.",
                &REFUSALS,
            )?,
            cuts: by_cause(
                "sconce_cuts_total",
                "Requests that were taken and ended before their whole answer, by cause.",
                &CUTS,
            )?,
            connections_cut,
            panics,
            first_token: histogram(
                "sconce_time_to_first_token_seconds",
                "Time from a request's arrival to the first token of each choice.",
                0.001,
                2.0,
            )?,
            per_token: histogram(
                "sconce_time_per_output_token_seconds",
                "Mean time per output token after the first, of each choice.",
                0.0001,
                2.0,
            )?,
            request: histogram(
                "sconce_request_seconds",
                "Time from a request's arrival to its last token, all choices included.",
                0.001,
                2.0,
            )?,
            prompt_tokens: counter("sconce_prompt_tokens_total", "Prompt tokens of accepted requests.")?,
            completion_tokens: counter(
                "sconce_completion_tokens_total",
                "Tokens generated and sent to clients.",
            )?,
        })
    }

    pub(super) fn answered(&self, route: &str, status: u16) {
        self.requests
            .with_label_values(&[route, status.to_string().as_str()])
            .inc();
    }

    /// Nothing of the request ran; gives the cause back.
    pub(super) fn refused(&self, cause: &'static str) -> &'static str {
        self.refusals.with_label_values(&[cause]).inc();
        cause
    }

    /// The request was taken and did not get its whole answer; gives the cause back.
    pub(super) fn cut(&self, cause: &'static str) -> &'static str {
        self.cuts.with_label_values(&[cause]).inc();
        cause
    }

    pub(super) fn connection_cut(&self, cause: &str) {
        self.connections_cut.with_label_values(&[cause]).inc();
    }

    pub(super) fn panicked(&self, place: Place) {
        let place = match place {
            Place::Handler => "handler",
            Place::Text => "text",
        };
        self.panics.with_label_values(&[place]).inc();
    }

    pub(super) fn accepted(&self, prompt_tokens: usize) {
        self.prompt_tokens.inc_by(prompt_tokens as u64);
    }

    pub(super) fn token(&self) {
        self.completion_tokens.inc();
    }

    pub(super) fn first_token(&self, after: Duration) {
        self.first_token.observe(after.as_secs_f64());
    }

    /// A choice of `tokens` tokens ended; `decode` lies between its first and its last.
    pub(super) fn choice_finished(&self, tokens: usize, decode: Duration) {
        if tokens > 1 {
            self.per_token.observe(decode.as_secs_f64() / (tokens - 1) as f64);
        }
    }

    pub(super) fn request_finished(&self, after: Duration) {
        self.request.observe(after.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_reach_the_registry_under_their_names() {
        let registry = Registry::new();
        let observer = Observer::register(&registry).unwrap();
        observer.answered("/health", 200);
        observer.accepted(12);
        observer.first_token(Duration::from_millis(5));
        observer.choice_finished(1, Duration::ZERO);
        observer.choice_finished(3, Duration::from_millis(20));
        observer.request_finished(Duration::from_millis(30));
        let text = prometheus::TextEncoder::new()
            .encode_to_string(&registry.gather())
            .unwrap();
        for line in [
            "sconce_http_requests_total{route=\"/health\",status=\"200\"} 1",
            "sconce_prompt_tokens_total 12",
            "sconce_time_to_first_token_seconds_count 1",
            "sconce_time_per_output_token_seconds_count 1",
            "sconce_request_seconds_count 1",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
        assert!(Observer::register(&registry).is_err());
    }
}
