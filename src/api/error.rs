//! Errors as a client sees them: OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`.

use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::engine::Refused;
use crate::request::Failure;
use crate::text::TextError;

/// One refusal or failure: what happened, to which parameter, and what the client may do.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{message}")]
pub(super) struct ApiError {
    pub status: StatusCode,
    message: String,
    /// OpenAI's `type`.
    kind: &'static str,
    param: Option<String>,
    code: Option<&'static str>,
    /// Seconds after which another try may succeed.
    retry_after: Option<u16>,
    /// Whether the engine had taken the request.
    taken: bool,
}

/// Goes with an error's response to where it is counted and logged.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cause {
    /// See [`ApiError::cause`].
    pub label: &'static str,
    /// Whether something was under way when it happened: it cut the request off, and did not refuse it.
    pub cut: bool,
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
            taken: false,
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
        let message = format!("There is no {method} {path}. docs/http-api.md has the paths served.");
        Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            Some("unknown_url"),
            message,
        )
    }

    pub fn unknown_pin(id: &str) -> Self {
        let message = format!("You have no pinned prompt `{id}`. GET /v1/cache/prompts lists them.");
        Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            Some("prompt_not_found"),
            message,
        )
    }

    /// Why a prompt cannot be pinned, as the engine says it.
    pub fn not_pinned(status: StatusCode, message: &str) -> Self {
        Self::new(status, "invalid_request_error", Some("not_pinned"), sentence(message))
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

    pub fn head_too_large(limit: usize) -> Self {
        let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
        let message = format!("The path and headers are larger than this server's limit of {limit} bytes.");
        Self::new(status, "invalid_request_error", Some("headers_too_large"), message)
    }

    pub fn body_too_large(limit: usize) -> Self {
        let message = format!("The body is larger than this server's limit of {limit} bytes.");
        let status = StatusCode::PAYLOAD_TOO_LARGE;
        Self::new(status, "invalid_request_error", Some("body_too_large"), message)
    }

    pub fn body_too_slow(limit: Duration) -> Self {
        let message = format!("The body did not come within this server's limit of {limit:?}. Send it faster.");
        let status = StatusCode::REQUEST_TIMEOUT;
        Self::new(status, "invalid_request_error", Some("body_too_slow"), message)
    }

    pub fn body_unread() -> Self {
        Self::invalid("", "The body could not be read to its end.")
    }

    pub fn too_many_connections() -> Self {
        let message = "The server has all the connections that it takes. Try again.";
        Self::unavailable("too_many_connections", message, 1)
    }

    pub fn too_many_bytes() -> Self {
        let message = "The bodies of other requests take the memory that there is for them. Try again.";
        Self::unavailable("too_many_bytes", message, 1)
    }

    /// No key, or none that is known here.
    pub fn unauthorized(message: &str) -> Self {
        let kind = "invalid_request_error";
        Self::new(StatusCode::UNAUTHORIZED, kind, Some("invalid_api_key"), message)
    }

    /// A caller that may not do this.
    pub fn forbidden(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", Some(code), message)
    }

    /// A key has used up what it may; `kind` says of what.
    pub fn quota(kind: &'static str, message: impl Into<String>, retry_after: Option<u16>) -> Self {
        let code = Some("rate_limit_exceeded");
        Self {
            retry_after,
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, kind, code, message)
        }
    }

    /// Somebody else has what there is one of.
    pub fn busy(message: &str) -> Self {
        let kind = "invalid_request_error";
        Self {
            retry_after: Some(1),
            ..Self::new(StatusCode::CONFLICT, kind, Some("busy"), sentence(message))
        }
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

    /// A request that may fit later.
    fn for_now(code: &'static str, message: String, retry_after: Duration) -> Self {
        Self {
            retry_after: Some(u16::try_from(retry_after.as_secs()).unwrap_or(u16::MAX)),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some(code), message)
        }
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

    /// A request that went wrong while it ran.
    fn failed(code: &'static str, message: String) -> Self {
        Self {
            code: Some(code),
            ..Self::internal(message)
        }
    }

    /// What the error is counted and logged under: its code, where it has one.
    pub fn cause(&self) -> &'static str {
        self.code.unwrap_or(match self.status {
            StatusCode::BAD_REQUEST => "invalid_request",
            _ => "internal",
        })
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
            Refused::TooLarge(excess) => Self {
                code: Some("request_too_large"),
                ..Self::invalid("", sentence(&excess.to_string()))
            },
            Refused::Refused(refusal) => Self::for_now(
                refusal.cause.label(),
                sentence(&refusal.to_string()),
                refusal.retry_after,
            ),
            Refused::EngineLost => Self::engine_lost(&refused.to_string()),
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        let message = sentence(&failure.to_string());
        let error = match failure {
            Failure::DeadlinePassed => Self::new(
                StatusCode::GATEWAY_TIMEOUT,
                "timeout_error",
                Some("deadline_passed"),
                message,
            ),
            Failure::TooBusy { retry_after } => Self::for_now("overtaken", message, retry_after),
            Failure::NotANumber => Self::failed("not_a_number", message),
            Failure::Step(_) => Self::failed("step_failed", message),
            Failure::ShuttingDown => Self::unavailable("shutting_down", &message, 5),
            Failure::EngineLost(_) => Self::engine_lost(&message),
            Failure::Sampler => Self::failed("sampler_failed", message),
            Failure::Text => Self::failed("text_failed", message),
        };
        Self { taken: true, ..error }
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
        response.extensions_mut().insert(Cause {
            label: self.cause(),
            cut: self.taken || self.status == StatusCode::INTERNAL_SERVER_ERROR,
        });
        if let Some(seconds) = self.retry_after {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let scheme = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batching::{Cause, Refusal};

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
        let retry_after = Duration::from_secs(3);
        let cause = Cause::Requests { limit: 7 };
        let error = ApiError::from(Refused::Refused(Refusal { cause, retry_after }));
        assert_eq!(error.body()["error"]["code"], "queue_full");
        let overtaken = ApiError::from(Failure::TooBusy { retry_after });
        for response in [error.into_response(), overtaken.into_response()] {
            assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
            assert_eq!(response.headers()[header::RETRY_AFTER], "3");
        }
        let response = ApiError::from(Refused::EngineLost).into_response();
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(response.headers().contains_key(header::RETRY_AFTER));
    }

    #[test]
    fn each_failure_has_its_status() {
        let status = |failure: Failure| ApiError::from(failure).status.as_u16();
        assert_eq!(status(Failure::DeadlinePassed), 504);
        assert_eq!(status(Failure::ShuttingDown), 503);
        assert_eq!(status(Failure::NotANumber), 500);
        assert_eq!(status(Failure::Step("lost".into())), 500);
        assert_eq!(status(Failure::EngineLost("lost".into())), 503);
    }
}
