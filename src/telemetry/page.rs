//! `docs/metrics.md`, written from the metrics themselves.

use std::fmt::Write;

use prometheus::{Registry, proto::MetricFamily};

use super::gpu;

const INTRODUCTION: &str = "\
<!-- Written from the code. After a change there: UPDATE_DOCS=1 cargo test metrics_page -->
# Metrics

`GET /metrics` answers in Prometheus' text format. Counters count from the server's start, so two readings give what
happened between them: `sconce_busy_seconds_total` over the seconds between is the share of time in which the device ran
a step; `sconce_occupancy_steps_total` over `sconce_step_seconds_count` is the mean occupancy; one less the ratio of the
packed to the padded `sconce_prefill_positions_total` is the padding waste that packing saved;
`sconce_cached_tokens_total` over the sum of it and `sconce_prefill_tokens_total` is the prefix cache's hit rate by tokens,
the share of `hit` in `sconce_prefix_requests_total` that by requests. The labels shown are those that are there from the
start; further values, such as other routes, statuses and causes, join when they first occur.

| metric | type | labels | meaning |
| --- | --- | --- | --- |
";

/// The page's text: one row a metric that the registry holds.
pub fn page(registry: &Registry) -> String {
    let mut page = INTRODUCTION.to_owned();
    for family in registry.gather() {
        let kind = format!("{:?}", family.get_field_type()).to_lowercase();
        let meaning = family.help().trim_end_matches('.');
        // Writing to a String cannot fail.
        let _ = writeln!(
            page,
            "| `{}` | {kind} | {} | {meaning} |",
            family.name(),
            labels(&family)
        );
    }
    for (name, meaning) in gpu::described() {
        let _ = writeln!(page, "| `{name}` | gauge | | {meaning}; only with an NVIDIA GPU |");
    }
    page
}

/// A family's labels with the values seen.
fn labels(family: &MetricFamily) -> String {
    let Some(first) = family.get_metric().first() else {
        return String::new();
    };
    let names = first.get_label().iter().map(|label| label.name());
    let with_values = names.map(|name| {
        let pairs = family.get_metric().iter().flat_map(|metric| metric.get_label());
        let values: Vec<_> = pairs
            .filter(|pair| pair.name() == name)
            .map(|pair| format!("`{}`", pair.value()))
            .collect();
        format!("{name}: {}", values.join(", "))
    });
    with_values.collect::<Vec<_>>().join("; ")
}
