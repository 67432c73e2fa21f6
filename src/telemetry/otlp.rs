//! Spans for an OpenTelemetry collector, by OTLP over HTTP.
//!
//! What is sent: a span a client request, below it its time in the queue, its prefill and its decode; and a span a
//! step, linked to the requests that it admitted. The standard variables apply, such as `OTEL_TRACES_SAMPLER` and
//! `OTEL_EXPORTER_OTLP_HEADERS`.

use axum::http::{HeaderMap, StatusCode};
use opentelemetry::{
    propagation::TextMapPropagator,
    trace::{Status, TracerProvider},
};
use opentelemetry_http::HeaderExtractor;
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig};
use opentelemetry_sdk::{Resource, propagation::TraceContextPropagator, trace::SdkTracerProvider};
use tracing::{Level, Span, Subscriber};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::{Layer, filter::Targets, registry::LookupSpan};

/// Sends spans in the background; dropping it sends the last ones.
#[derive(Debug)]
pub struct Exporter(SdkTracerProvider);

impl Drop for Exporter {
    fn drop(&mut self) {
        if let Err(error) = self.0.shutdown() {
            tracing::warn!(%error, "the last spans were not sent");
        }
    }
}

/// A layer that sends this program's spans to the collector at `endpoint`, its address without a path.
///
/// # Errors
/// The address cannot be used, or a standard variable has a wrong value.
pub fn spans_to<S>(endpoint: &str) -> Result<(impl Layer<S> + use<S>, Exporter), ExporterBuildError>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    // The exporter's HTTP client is one of those that need it.
    sconce_loadtest::tls::prepare();
    let exporter = SpanExporter::builder()
        .with_http()
        .with_endpoint(format!("{endpoint}/v1/traces"))
        .build()?;
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(Resource::builder().with_service_name("sconce").build())
        .build();
    let layer = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("sconce"))
        .with_location(false)
        .with_threads(false)
        .with_tracked_inactivity(false)
        // The exporter's own spans and events would feed on themselves.
        .with_filter(Targets::new().with_target("sconce", Level::DEBUG));
    Ok((layer, Exporter(provider)))
}

/// Makes a request's span part of its client's trace, if the client named one (W3C `traceparent`).
pub fn continue_trace(span: &Span, headers: &HeaderMap) {
    span.record("otel.kind", "server");
    let context = TraceContextPropagator::new().extract(&HeaderExtractor(headers));
    // Fails where no collector was asked for: then there is no trace to be part of.
    let _ = span.set_parent(context);
}

/// Says in a request's span how it ended.
pub fn end(span: &Span, status: Option<StatusCode>, outcome: &'static str) {
    span.set_attribute("sconce.outcome", outcome);
    if let Some(status) = status {
        span.set_attribute("http.response.status_code", i64::from(status.as_u16()));
        if status.is_server_error() {
            span.set_status(Status::error(outcome));
        }
    }
}
