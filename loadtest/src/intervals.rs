//! A timeline of histograms: one of each kind for every second of a run, as HdrHistogram's log readers take them.

use std::{
    panic::resume_unwind,
    sync::mpsc,
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use hdrhistogram::{
    Histogram,
    serialization::{
        V2DeflateSerializer,
        interval_log::{IntervalLogWriterBuilder, Tag},
    },
};

use crate::recorder::histogram;

const INTERVAL: Duration = Duration::from_secs(1);

/// What one second measured.
struct Second {
    /// Which of the run.
    number: u32,
    /// So much of it has passed.
    passed: Duration,
    values: Vec<(&'static str, u64)>,
}

/// The second that goes on, and a thread that writes those that are over: that takes milliseconds, in which nothing else
/// could be sent.
pub struct Intervals {
    start: Instant,
    /// The number of the second that goes on.
    second: u32,
    /// What it measured, in the order in which it became known.
    values: Vec<(&'static str, u64)>,
    /// From the end of the first second on.
    writer: Option<Writer>,
}

struct Writer {
    seconds: mpsc::Sender<Second>,
    thread: JoinHandle<Vec<u8>>,
}

impl Intervals {
    /// For a run whose measured part begins at `start`.
    pub fn beginning(start: Instant) -> Self {
        Self {
            start,
            second: 0,
            values: Vec::new(),
            writer: None,
        }
    }

    /// A value in microseconds became known at `now`.
    pub fn record(&mut self, now: Instant, tag: &'static str, value: u64) {
        let second = now.saturating_duration_since(self.start).as_secs() as u32;
        if second > self.second {
            self.hand_over(INTERVAL);
            self.second = second;
        }
        self.values.push((tag, value));
    }

    /// Gives the second that goes on, of which so much has passed, to the writer.
    fn hand_over(&mut self, passed: Duration) {
        let room = self.values.len();
        let second = Second {
            number: self.second,
            passed,
            values: std::mem::replace(&mut self.values, Vec::with_capacity(room)),
        };
        let writer = self.writer.get_or_insert_with(|| {
            let (seconds, received) = mpsc::channel();
            let thread = thread::spawn(move || write(&received));
            Writer { seconds, thread }
        });
        // The writer takes seconds until there is nobody to send any.
        let _ = writer.seconds.send(second);
    }

    /// The whole log of a run that began at `began` and was that long.
    pub fn log(mut self, comment: &str, began: SystemTime, length: Duration) -> String {
        self.hand_over(length.saturating_sub(INTERVAL * self.second).min(INTERVAL));
        let mut log = Vec::new();
        // Writing into memory does not fail.
        let _ = IntervalLogWriterBuilder::new()
            .add_comment(comment)
            .with_start_time(began)
            .with_base_time(began)
            .begin_log_with(&mut log, &mut V2DeflateSerializer::new());
        if let Some(Writer { seconds, thread }) = self.writer {
            drop(seconds);
            log.extend(thread.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        String::from_utf8(log).unwrap_or_default()
    }
}

/// Writes seconds until there are no more.
fn write(seconds: &mpsc::Receiver<Second>) -> Vec<u8> {
    let (mut log, mut serializer) = (Vec::new(), V2DeflateSerializer::new());
    // By tag; emptied after each second.
    let mut histograms: Vec<(&'static str, Histogram<u64>)> = Vec::new();
    for second in seconds {
        for (tag, value) in second.values {
            let index = match histograms.iter().position(|(name, _)| *name == tag) {
                Some(index) => index,
                None => {
                    histograms.push((tag, histogram()));
                    histograms.len() - 1
                }
            };
            histograms[index].1.saturating_record(value);
        }
        // Writing into memory does not fail.
        let Ok(mut writer) = IntervalLogWriterBuilder::new().begin_log_with(&mut log, &mut serializer) else {
            continue;
        };
        let began = INTERVAL * second.number;
        for (tag, histogram) in histograms.iter_mut().filter(|(_, histogram)| !histogram.is_empty()) {
            let _ = writer.write_histogram(histogram, began, second.passed, Tag::new(tag));
            histogram.reset();
        }
    }
    log
}

impl std::fmt::Debug for Intervals {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Intervals")
            .field("second", &self.second)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use base64::{Engine, prelude::BASE64_STANDARD};
    use hdrhistogram::serialization::{
        Deserializer,
        interval_log::{IntervalLogIterator, LogEntry},
    };

    use super::*;

    #[test]
    fn a_reader_finds_every_second_under_its_tag() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut intervals = Intervals::beginning(start);
        for (ms, tag, value) in [
            (100, "e2e", 1000),
            (900, "e2e", 2000),
            (950, "ttft", 70),
            (1500, "e2e", 3000),
            (4200, "ttft", 90),
            (4300, "ttft", 4_000_000),
        ] {
            intervals.record(at(ms), tag, value);
        }
        let log = intervals.log("a run", SystemTime::now(), Duration::from_millis(4400));
        assert!(log.starts_with("#a run\n"), "{log}");
        let mut found = BTreeMap::new();
        let mut headers = 0;
        for entry in IntervalLogIterator::new(log.as_bytes()) {
            match entry.unwrap() {
                LogEntry::Interval(interval) => {
                    let bytes = BASE64_STANDARD.decode(interval.encoded_histogram()).unwrap();
                    let read: Histogram<u64> = Deserializer::new().deserialize(&mut bytes.as_slice()).unwrap();
                    let tag = interval.tag().unwrap().as_str().to_owned();
                    let key = (interval.start_timestamp().as_secs(), tag);
                    let value = (read.len(), read.max(), interval.duration().as_millis());
                    assert!(found.insert(key, value).is_none());
                }
                _ => headers += 1,
            }
        }
        let key = |second, tag: &str| (second, tag.to_owned());
        // Three significant digits: a bucket's highest value stands for all in it.
        let expected = BTreeMap::from([
            (key(0, "e2e"), (2, 2000, 1000)),
            (key(0, "ttft"), (1, 70, 1000)),
            (key(1, "e2e"), (1, 3001, 1000)),
            (key(4, "ttft"), (2, 4_001_791, 400)),
        ]);
        assert_eq!((found, headers), (expected, 2));
    }
}
