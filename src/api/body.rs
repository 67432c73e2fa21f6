//! From a body's bytes to a value, and the work that must not hold up other requests.

use axum::body::Bytes;
use serde::de::DeserializeOwned;

use super::error::ApiError;

/// Bodies larger than this are parsed, rendered and tokenized on a thread of their own: above it the work takes
/// milliseconds.
const LARGE: usize = 32 << 10;

/// Runs `work` on the body: small bodies at once, large ones where they block nobody.
pub(super) async fn read<T: Send + 'static>(
    body: Bytes,
    work: impl FnOnce(&[u8]) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if body.len() <= LARGE {
        return work(&body);
    }
    let span = tracing::Span::current();
    match tokio::task::spawn_blocking(move || span.in_scope(|| work(&body))).await {
        Ok(result) => result,
        // The request's own, as if it had been read here: it is counted where others are.
        Err(failure) => match failure.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(ApiError::internal("The server ended before it had read this request.")),
        },
    }
}

/// Parses JSON; an error says where in the body it is, and which field it concerns.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let text = std::str::from_utf8(body).map_err(|e| {
        ApiError::invalid(
            "",
            format!("The body is not valid UTF-8: the byte at {} is wrong.", e.valid_up_to()),
        )
    })?;
    let mut json = serde_json::Deserializer::from_str(text);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|e| {
        let path = Some(e.path().to_string())
            .filter(|path| path != "." && e.inner().is_data())
            .unwrap_or_default();
        let what = match (e.inner().is_data(), path.as_str()) {
            (false, _) => "is not valid JSON".to_string(),
            (true, "") => "has a wrong value".to_string(),
            (true, path) => format!("has a wrong value for `{path}`"),
        };
        ApiError::invalid(path, format!("The body {what}: {}.", e.inner()))
    })?;
    json.end()
        .map_err(|e| ApiError::invalid("", format!("The body is not valid JSON: {e}.")))?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::super::types::Body;
    use super::*;

    fn error(body: &[u8]) -> serde_json::Value {
        parse::<Body>(body).map(|_| ()).unwrap_err().body()["error"].take()
    }

    #[tokio::test]
    async fn a_panic_is_the_readers_own_wherever_a_body_is_read() {
        for size in [1, LARGE + 1] {
            let reading = read(vec![b' '; size].into(), |_| -> Result<(), _> { panic!("injected") });
            let ended = tokio::spawn(reading).await;
            assert!(ended.unwrap_err().is_panic(), "{size}");
        }
    }

    #[test]
    fn an_error_says_where() {
        assert!(
            error(b"{\"a\": ")["message"]
                .as_str()
                .unwrap()
                .contains("line 1 column")
        );
        assert!(
            error(b"{} x")["message"]
                .as_str()
                .unwrap()
                .contains("trailing characters")
        );
        assert!(
            error(b"{\"prompt\": \"\xff\"}")["message"]
                .as_str()
                .unwrap()
                .contains("UTF-8: the byte at 12")
        );
        let wrong = error(br#"{"messages": [{"role": "user"}, {"role": 7}]}"#);
        assert_eq!(wrong["param"], "messages[1].role");
        assert!(
            wrong["message"]
                .as_str()
                .unwrap()
                .contains("invalid type: integer `7`, expected a string")
        );
    }
}
