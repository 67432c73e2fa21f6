//! Prometheus pages: sconce's own, and what vLLM's and llama.cpp's tell of the same things.

use std::collections::HashMap;

use serde::Deserialize;

use super::{Gauges, Utilisation};

/// The name given to the number of llama.cpp's slots, which its metrics do not have.
const SLOTS: &str = "slots";

/// Samples of a page by their name with labels, such as `sconce_kv_blocks{state="free"}`; those of one name are summed
/// under the bare name too.
#[derive(Debug, Clone, Default)]
pub struct Page(HashMap<String, f64>);

impl Page {
    /// Reads the text format of Prometheus, version 0.0.4. Lines that are no samples are passed over.
    pub fn read(text: &str) -> Self {
        let mut page = HashMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let split = match line.rfind('}') {
                Some(end) => end + 1,
                None => line.find(' ').unwrap_or(line.len()),
            };
            let (series, rest) = line.split_at(split);
            let Some(value) = rest
                .split_whitespace()
                .next()
                .and_then(|value| value.parse::<f64>().ok())
            else {
                continue;
            };
            page.insert(series.to_owned(), value);
            if let Some(brace) = series.find('{') {
                *page.entry(series[..brace].to_owned()).or_insert(0.0) += value;
            }
        }
        Self(page)
    }

    /// Reads llama.cpp's list of slots, which that server has even where it was started without metrics.
    pub fn of_slots(text: &str) -> Self {
        #[derive(Deserialize)]
        struct Slot {
            is_processing: bool,
        }
        let slots: Vec<Slot> = serde_json::from_str(text).unwrap_or_default();
        if slots.is_empty() {
            return Self::default();
        }
        let running = slots.iter().filter(|slot| slot.is_processing).count();
        Self(HashMap::from([
            ("llamacpp:requests_processing".to_owned(), running as f64),
            (SLOTS.to_owned(), slots.len() as f64),
        ]))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn get(&self, name: &str) -> Option<f64> {
        self.0.get(name).copied()
    }

    /// The first of several servers' names that is there.
    fn any(&self, names: &[&str]) -> Option<f64> {
        names.iter().find_map(|name| self.get(name))
    }

    pub fn cpu_seconds(&self) -> Option<f64> {
        self.get("process_cpu_seconds_total")
    }

    pub fn memory(&self) -> Option<u64> {
        self.get("process_resident_memory_bytes").map(|bytes| bytes as u64)
    }

    /// Whether sconce wrote it, which tells of its GPU if it has one.
    pub fn is_sconces(&self) -> bool {
        self.get("sconce_running").is_some()
    }

    /// What sconce tells of its GPU: the share of recent time in which a kernel ran, and the bytes in use.
    pub fn gpu(&self) -> Option<(f64, u64)> {
        let used = self.get("sconce_gpu_memory_used_bytes")?;
        Some((self.get("sconce_gpu_utilisation_ratio")?, used as u64))
    }

    pub fn gauges(&self) -> Gauges {
        let running = self.any(&[
            "sconce_running",
            "vllm:num_requests_running",
            "llamacpp:requests_processing",
        ]);
        let blocks = |state: &str| self.get(&format!("sconce_kv_blocks{{state=\"{state}\"}}"));
        let kv_use = match (blocks("free"), blocks("held"), blocks("cached")) {
            (Some(free), Some(held), Some(cached)) if free + held + cached > 0.0 => {
                let used = held + blocks("pinned").unwrap_or(0.0);
                Some(used / (free + used + cached))
            }
            _ => self.any(&[
                "vllm:kv_cache_usage_perc",
                "vllm:gpu_cache_usage_perc",
                "llamacpp:kv_cache_usage_ratio",
            ]),
        };
        Gauges {
            waiting: self.any(&[
                "sconce_waiting",
                "vllm:num_requests_waiting",
                "llamacpp:requests_deferred",
            ]),
            running,
            occupancy: running
                .zip(self.any(&["sconce_max_batch", SLOTS]))
                .map(|(running, most)| running / most),
            kv_use,
        }
    }
}

/// What the counters of two pages say of the time between them.
pub fn between(first: &Page, last: &Page, seconds: f64) -> Utilisation {
    let grown = |names: &[&str]| {
        let name = names.iter().find(|name| last.get(name).is_some())?;
        Some(last.get(name)? - first.get(name).unwrap_or(0.0))
    };
    let ratio = |above: &str, below: &str| {
        let below = grown(&[below]).filter(|&below| below > 0.0)?;
        Some(grown(&[above])? / below)
    };
    let milliseconds = |name: &str| ratio(&format!("{name}_sum"), &format!("{name}_count")).map(|mean| mean * 1e3);
    let computed = grown(&["sconce_prefill_tokens_total"]);
    let cached = grown(&["sconce_cached_tokens_total"]);
    let ours = cached
        .zip(computed)
        .filter(|(cached, computed)| cached + computed > 0.0);
    Utilisation {
        // A step counts when it ends, so one that began before the first look may count too much.
        busy: grown(&["sconce_busy_seconds_total"]).map(|busy| (busy / seconds).min(1.0)),
        occupancy: ratio("sconce_occupancy_steps_total", "sconce_step_seconds_count"),
        padding_waste: ratio(
            "sconce_prefill_positions_total{layout=\"packed\"}",
            "sconce_prefill_positions_total{layout=\"padded\"}",
        )
        .map(|used| 1.0 - used),
        prefix_hits: ours
            .map(|(cached, computed)| cached / (cached + computed))
            .or_else(|| ratio("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")),
        preemptions: grown(&["sconce_preemptions_total", "vllm:num_preemptions_total"]),
        window_wait_mean_ms: milliseconds("sconce_window_seconds"),
        queue_wait_mean_ms: milliseconds("sconce_queue_seconds")
            .or_else(|| milliseconds("vllm:request_queue_time_seconds")),
        step_mean_ms: milliseconds("sconce_step_seconds"),
        ..Utilisation::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(busy: f64, steps: u32, occupied: f64, packed: u32, padded: u32) -> Page {
        Page::read(&format!(
            "# HELP sconce_busy_seconds_total x\n# TYPE sconce_busy_seconds_total counter\n\
             sconce_busy_seconds_total {busy}\nsconce_step_seconds_count {steps}\nsconce_step_seconds_sum {busy}\n\
             sconce_occupancy_steps_total {occupied}\nsconce_prefill_positions_total{{layout=\"packed\"}} {packed}\n\
             sconce_prefill_positions_total{{layout=\"padded\"}} {padded}\nsconce_max_batch 10\nsconce_running 4\n\
             sconce_waiting 3\nsconce_kv_blocks{{state=\"free\"}} 60\nsconce_kv_blocks{{state=\"held\"}} 20\n\
             sconce_kv_blocks{{state=\"cached\"}} 10\nsconce_kv_blocks{{state=\"pinned\"}} 10\nsconce_cached_tokens_total 20\nsconce_prefill_tokens_total 60\n"
        ))
    }

    #[test]
    fn counters_become_shares_of_the_time_between() {
        let (first, last) = (page(10.0, 100, 50.0, 1000, 2000), page(14.0, 300, 130.0, 1900, 3200));
        let seen = between(&first, &last, 5.0);
        assert_eq!(seen.busy, Some(0.8));
        assert_eq!(seen.occupancy, Some(0.4));
        assert_eq!(seen.padding_waste, Some(0.25));
        assert_eq!(seen.step_mean_ms, Some(20.0));
        assert_eq!(seen.prefix_hits, None, "nothing was looked up");
        assert_eq!(seen.preemptions, None);
        let gauges = last.gauges();
        assert_eq!((gauges.waiting, gauges.running), (Some(3.0), Some(4.0)));
        assert_eq!((gauges.occupancy, gauges.kv_use), (Some(0.4), Some(0.3)));
        assert!(last.is_sconces() && last.gpu().is_none(), "it has no GPU");
    }

    #[test]
    fn a_server_tells_of_its_own_gpu() {
        let text = "sconce_running 1\nsconce_gpu_utilisation_ratio 0.75\nsconce_gpu_memory_used_bytes 3e9\n";
        assert_eq!(Page::read(text).gpu(), Some((0.75, 3_000_000_000)));
    }

    #[test]
    fn other_servers_tell_what_they_can() {
        let page = Page::read(
            "vllm:num_requests_running{engine=\"0\",model_name=\"a b\"} 7.0\nvllm:num_requests_waiting{engine=\"0\"} 2\n\
             vllm:kv_cache_usage_perc{engine=\"0\"} 0.5\nnonsense\n",
        );
        assert!(!page.is_sconces());
        let gauges = page.gauges();
        assert_eq!(
            (gauges.running, gauges.waiting, gauges.kv_use),
            (Some(7.0), Some(2.0), Some(0.5))
        );
        assert_eq!(between(&page, &page, 1.0), Utilisation::default());
        let slots = Page::of_slots(r#"[{"id": 0, "is_processing": true}, {"id": 1, "is_processing": false}]"#);
        let gauges = slots.gauges();
        assert_eq!((gauges.running, gauges.occupancy), (Some(1.0), Some(0.5)));
        assert!(Page::of_slots("{\"error\": {}}").is_empty());
    }
}
