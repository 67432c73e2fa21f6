//! How long a client is willing to wait: the header `x-request-timeout-ms` and the body's `timeout_ms`.

use std::time::{Duration, Instant};

use axum::http::HeaderMap;
use tokio::time::{Sleep, sleep_until};

use super::error::ApiError;

const HEADER: &str = "x-request-timeout-ms";
/// A day: whoever asks for more means that it does not matter.
const MOST: u64 = 24 * 3600 * 1000;
/// The engine sees between two steps that a deadline has passed. One that is in a step for so much longer, because the step
/// is long or hangs, is not waited for.
const GRACE: Duration = Duration::from_secs(1);

/// The header's time, if there is one.
pub(super) fn of_header(headers: &HeaderMap) -> Result<Option<Duration>, ApiError> {
    let Some(value) = headers.get(HEADER) else {
        return Ok(None);
    };
    let milliseconds = value.to_str().ok().and_then(|text| text.trim().parse().ok());
    milliseconds
        .ok_or_else(|| refused(HEADER))
        .and_then(|ms| of(HEADER, ms))
        .map(Some)
}

/// The body's time, if there is one.
pub(super) fn of_body(milliseconds: Option<u64>) -> Result<Option<Duration>, ApiError> {
    milliseconds.map(|ms| of("timeout_ms", ms)).transpose()
}

fn of(name: &str, milliseconds: u64) -> Result<Duration, ApiError> {
    match milliseconds {
        1..=MOST => Ok(Duration::from_millis(milliseconds)),
        _ => Err(refused(name)),
    }
}

fn refused(name: &str) -> ApiError {
    ApiError::invalid(
        name,
        format!("`{name}` must be a whole number of milliseconds from 1 to {MOST}."),
    )
}

/// The shortest of the times that are given.
pub(super) fn shortest(times: &[Option<Duration>]) -> Option<Duration> {
    times.iter().copied().flatten().min()
}

/// Until an engine should have said that a deadline has passed.
pub(super) fn overdue(deadline: Instant) -> Sleep {
    sleep_until((deadline + GRACE).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_whole_milliseconds() {
        let read = |value: &'static str| {
            of_header(&HeaderMap::from_iter([(
                HEADER.parse().unwrap(),
                value.parse().unwrap(),
            )]))
        };
        assert_eq!(read("1500"), Ok(Some(Duration::from_millis(1500))));
        assert_eq!(of_header(&HeaderMap::new()), Ok(None));
        for bad in ["0", "-5", "1.5", "soon", "", "86400001", "99999999999999999999999"] {
            let error = read(bad).unwrap_err();
            assert_eq!(
                (error.status.as_u16(), &error.body()["error"]["param"]),
                (400, &HEADER.into()),
                "{bad}"
            );
        }
    }

    #[test]
    fn the_shortest_time_counts() {
        let ms = |ms| Some(Duration::from_millis(ms));
        assert_eq!(shortest(&[ms(30), None, ms(20)]), ms(20));
        assert_eq!(shortest(&[None, None]), None);
        assert!(of_body(Some(0)).is_err());
    }
}
