//! Errors as a client sees them: OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`.

use axum::extract::rejection::BytesRejection;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::engine::Refused;
use crate::request::Failure;
use crate::text::TextError;

/// One refusal or failure: what happened, to which parameter, and what the client may do.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ApiError {
    pub status: StatusCode,
    message: String,
    /// OpenAI's `type`.
    kind: &'static str,
    param: Option<String>,
    code: Option<&'static str>,
    /// Seconds after which another try may succeed.
    retry_after: Option<u16>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            kind,
            param: None,
            code,
            retry_after: None,
        }
    }

    /// A request that cannot be answered however often it is sent, with the parameter that is at fault.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        let param = Some(param.into()).filter(|param| !param.is_empty());
        Self {
            param,
            ..Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", None, message)
        }
    }

    /// A parameter that means something this server does not do.
    pub fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            code: Some("unsupported_value"),
            ..Self::invalid(param, message)
        }
    }

    /// `tokens` are at least so many, in a model whose prompt and answer together may have `limit`.
    pub fn context_length(param: &str, tokens: usize, limit: usize) -> Self {
        let message = format!(
            "The prompt has at least {tokens} tokens, and the model's context of {limit} tokens must hold the prompt \
             and at least one more. Shorten the prompt."
        );
        Self {
            code: Some("context_length_exceeded"),
            ..Self::invalid(param, message)
        }
    }

    pub fn unknown_model(name: &str, served: &[String]) -> Self {
        let message = format!("The model `{name}` does not exist here. Served: {}.", served.join(", "));
        let kind = "invalid_request_error";
        Self {
            param: Some("model".to_string()),
            ..Self::new(StatusCode::NOT_FOUND, kind, Some("model_not_found"), message)
        }
    }

    pub fn unknown_path(method: &str, path: &str) -> Self {
        let message = format!("There is no {method} {path}. See the README for the paths served.");
        Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            Some("unknown_url"),
            message,
        )
    }

    pub fn wrong_method(method: &str, path: &str) -> Self {
        let message = format!("{path} does not take {method}.");
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "invalid_request_error",
            Some("method_not_allowed"),
            message,
        )
    }

    pub fn body_unread(rejection: &BytesRejection, limit: usize) -> Self {
        let kind = "invalid_request_error";
        if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
            let message = format!("The body is larger than this server's limit of {limit} bytes.");
            return Self::new(StatusCode::PAYLOAD_TOO_LARGE, kind, Some("body_too_large"), message);
        }
        Self::new(
            StatusCode::BAD_REQUEST,
            kind,
            None,
            "The body could not be read to its end.",
        )
    }

    pub fn loading() -> Self {
        let message = "The model is still being loaded. Try again in a moment.";
        Self::unavailable("model_loading", message, 2)
    }

    pub fn shutting_down() -> Self {
        Self::unavailable(
            "shutting_down",
            "The server is shutting down. Send the request to another one.",
            5,
        )
    }

    /// The engine is being started again; `message` says what became of the request.
    pub fn engine_lost(message: &str) -> Self {
        Self::unavailable("engine_lost", &sentence(message), 1)
    }

    fn unavailable(code: &'static str, message: &str, retry_after: u16) -> Self {
        Self {
            retry_after: Some(retry_after),
            ..Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "service_unavailable",
                Some(code),
                message,
            )
        }
    }

    /// A change that cannot be made now, because another is being made.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::CONFLICT,
            "invalid_request_error",
            Some("change_in_progress"),
            message,
        )
    }

    /// Something this server should not have done; `message` goes to the client.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", None, message)
    }

    /// The body of the response, or the data of the event that ends a stream.
    pub fn body(&self) -> Value {
        json!({"error": {
            "message": self.message, "type": self.kind, "param": self.param, "code": self.code,
        }})
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::QueueFull { .. } => Self {
                retry_after: Some(1),
                ..Self::new(
                    StatusCode::TOO_MANY_REQUESTS,
                    "rate_limit_error",
                    Some("queue_full"),
                    sentence(&refused.to_string()),
                )
            },
            Refused::EngineLost => Self::engine_lost(&refused.to_string()),
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        let message = sentence(&failure.to_string());
        match failure {
            Failure::DeadlinePassed => Self::new(
                StatusCode::GATEWAY_TIMEOUT,
                "timeout_error",
                Some("deadline_passed"),
                message,
            ),
            Failure::EngineLost(_) => Self::engine_lost(&message),
            Failure::NotANumber | Failure::Step(_) | Failure::Sampler | Failure::Text => Self::internal(message),
        }
    }
}

impl From<TextError> for ApiError {
    fn from(error: TextError) -> Self {
        match error {
            TextError::TemplateRefused(_) | TextError::Template(_) => {
                Self::invalid("messages", sentence(&error.to_string()))
            }
            TextError::Encode(_) => Self::invalid("", sentence(&error.to_string())),
            TextError::Io { .. } | TextError::Format { .. } | TextError::Unsupported { .. } => {
                Self::internal("The model's text files failed.")
            }
        }
    }
}

/// The message with a capital letter and a full stop, as the API's other messages are written.
fn sentence(message: &str) -> String {
    let mut letters = message.chars();
    let first = letters
        .next()
        .map(|letter| letter.to_uppercase().to_string())
        .unwrap_or_default();
    format!("{first}{}.", letters.as_str().trim_end_matches('.'))
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shape_is_openais() {
        let body = ApiError::invalid("temperature", "Too hot.").body();
        assert_eq!(
            body,
            json!({"error": {"message": "Too hot.", "type": "invalid_request_error", "param": "temperature", "code": null}})
        );
    }

    #[test]
    fn a_refusal_says_when_to_come_back() {
        let response = ApiError::from(Refused::QueueFull { limit: 7 }).into_response();
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(response.headers()[header::RETRY_AFTER], "1");
        let response = ApiError::from(Refused::EngineLost).into_response();
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(response.headers().contains_key(header::RETRY_AFTER));
    }

    #[test]
    fn each_failure_has_its_status() {
        let status = |failure: Failure| ApiError::from(failure).status.as_u16();
        assert_eq!(status(Failure::DeadlinePassed), 504);
        assert_eq!(status(Failure::NotANumber), 500);
        assert_eq!(status(Failure::Step("lost".into())), 500);
        assert_eq!(status(Failure::EngineLost("lost".into())), 503);
    }
}
