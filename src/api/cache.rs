//! The prefix cache for people and for whoever keeps prompts in it: `GET /v1/cache`, and `/v1/cache/prompts` to pin
//! prompts, list and unpin them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::{Extension, Json};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::mpsc::unbounded_channel;

use super::bounded::{Given, Prompts};
use super::deadline::overdue;
use super::error::ApiError;
use super::middleware::Caller;
use super::params::cache_salt;
use super::types::Messages;
use super::{Model, Server, body, completions, messages};
use crate::batching::{AUTOMATIC_PIN_REQUESTS, CachedPrefix, PinError};
use crate::engine::{CacheReport, Handle, PinFailed, PinInfo, PinRequest};
use crate::request::{Failure, FinishReason, Request, Sampling, Tenant, TokenId};

/// The longest time for which a prompt is pinned, in seconds: ten years.
const MAX_TTL: f64 = 3650.0 * 24.0 * 3600.0;
/// Prefixes in a report, of each kind.
const SHOWN: usize = 10;

/// A prompt of the settings file that is to be pinned.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct ConfiguredPrompt {
    prompt: Option<String>,
    messages: Option<Messages>,
    /// Whose it is; without this and a salt it is everyone's.
    tenant: Option<String>,
    cache_salt: Option<String>,
}

/// Why a prompt of the settings file was not pinned.
#[derive(Debug, thiserror::Error)]
#[error("prompt {number} of the settings file's [[pin]] was not pinned: {message}")]
pub struct NotPinned {
    number: usize,
    message: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct PinBody {
    model: Option<String>,
    prompt: Prompts,
    messages: Option<Messages>,
    /// Whether the text ends where the assistant's turn begins: `false`, since requests go on in other ways.
    add_generation_prompt: Option<bool>,
    cache_salt: Option<String>,
    shared: Option<bool>,
    ttl_seconds: Option<f64>,
}

/// A prompt to pin, checked.
struct Asked {
    tokens: Vec<TokenId>,
    cache_salt: Option<String>,
    shared: bool,
    ttl: Option<Duration>,
}

#[derive(Debug, Serialize)]
pub(super) struct Pinned {
    id: String,
    object: &'static str,
    /// Pinned ones: the prompt's full blocks.
    tokens: usize,
    shared: bool,
    /// `null`: until it is unpinned.
    expires_in_seconds: Option<f64>,
}

impl Server {
    fn cache(&self) -> Result<Handle, ApiError> {
        self.engine().ok_or_else(ApiError::loading)
    }

    /// The way to change what is pinned.
    fn pins(&self) -> Result<Handle, ApiError> {
        if self.settings.pinning {
            return self.cache();
        }
        Err(ApiError::forbidden(
            "forbidden",
            "This server can be reached from other machines and knows no API keys, so clients may not pin prompts. \
             Pin them in the settings file, or listen on a loopback address.",
        ))
    }
}

/// `GET /v1/cache`
pub(super) async fn show(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
) -> Result<Json<Value>, ApiError> {
    let report = server.cache()?.cache_report(caller.tenant.name.clone()).await?;
    Ok(Json(readable(report)))
}

/// `GET /v1/cache/prompts`
pub(super) async fn list(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
) -> Result<Json<Value>, ApiError> {
    let report = server.cache()?.cache_report(caller.tenant.name.clone()).await?;
    let data: Vec<_> = report.prompts.into_iter().map(pinned).collect();
    Ok(Json(json!({"object": "list", "data": data})))
}

/// `POST /v1/cache/prompts`
pub(super) async fn pin(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    bytes: Bytes,
) -> Result<Json<Pinned>, ApiError> {
    let arrival = Instant::now();
    let engine = server.pins()?;
    let shared = server.clone();
    let asked = body::read(bytes, move |bytes| checked(&*shared.model()?, body::parse(bytes)?)).await?;
    let pin = PinRequest {
        id: format!("pin-{:016x}", rand::random::<u64>()),
        owner: Some(caller.tenant.name.clone()),
        shared: asked.shared,
        ttl: asked.ttl,
    };
    let prompt_tokens = asked.tokens.len();
    let mut reservation = caller.reserve(prompt_tokens, 0)?;
    let mut request = request(asked.tokens, asked.cache_salt, caller.tenant.clone(), arrival);
    request.id = caller.id;
    request.deadline = server.request_timeout().map(|timeout| arrival + timeout);
    let (deadline, ended) = (request.deadline, request.ended.clone());
    // It is used from then on, even if its client does not wait for the answer.
    let admitted = || {
        if let Some(reservation) = reservation.as_mut() {
            reservation.used(prompt_tokens);
        }
    };
    let pinning = engine.pin(request, pin, admitted);
    let answer = match deadline {
        Some(deadline) => tokio::select! {
            answer = pinning => answer?,
            () = overdue(deadline) => {
                // The engine is not to take it for one whose client left.
                let _ = ended.set(FinishReason::Deadline);
                return Err(Failure::DeadlinePassed.into());
            }
        },
        None => pinning.await?,
    };
    Ok(Json(pinned(answer)))
}

/// `DELETE /v1/cache/prompts/{id}`
pub(super) async fn unpin(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let owner = caller.tenant.name.clone();
    if server.pins()?.unpin(id.clone(), owner).await? {
        Ok(Json(json!({"id": id, "object": "cache.prompt", "deleted": true})))
    } else {
        Err(ApiError::unknown_pin(&id))
    }
}

/// Pins the settings file's prompts, in their order.
pub async fn pin_configured(model: &Model, engine: &Handle, prompts: &[ConfiguredPrompt]) -> Result<(), NotPinned> {
    for (number, prompt) in (1..).zip(prompts) {
        let refuse = |message| NotPinned { number, message };
        let ConfiguredPrompt {
            prompt,
            messages,
            tenant,
            cache_salt: salt,
        } = prompt.clone();
        let shared = tenant.is_none() && salt.is_none();
        let tenant = tenant.map_or_else(Tenant::anyone, |name| Tenant { name, weight: 1 });
        let body = PinBody {
            prompt: prompt.map_or(Prompts::Missing, |text| Prompts::One(Given::Text(text))),
            messages,
            cache_salt: salt,
            shared: Some(shared),
            ..PinBody::default()
        };
        let asked = checked(model, body).map_err(|error| refuse(error.to_string()))?;
        let pin = PinRequest {
            id: format!("configured-{number}"),
            owner: None,
            shared,
            ttl: None,
        };
        let request = request(asked.tokens, asked.cache_salt, Arc::new(tenant), Instant::now());
        engine
            .pin(request, pin, || ())
            .await
            .map_err(|error| refuse(error.to_string()))?;
    }
    Ok(())
}

fn checked(model: &Model, body: PinBody) -> Result<Asked, ApiError> {
    model.served_name(body.model.as_deref())?;
    let shared = body.shared.unwrap_or(false);
    let cache_salt = cache_salt(body.cache_salt)?;
    if shared && cache_salt.is_some() {
        let message = "A shared prompt is everyone's; leave `cache_salt` or `shared` out.";
        return Err(ApiError::invalid("cache_salt", message));
    }
    let ttl = match body.ttl_seconds {
        Some(ttl) if !(ttl > 0.0 && ttl <= MAX_TTL) => {
            let message = format!("`ttl_seconds` must be more than 0 and at most {MAX_TTL}.");
            return Err(ApiError::invalid("ttl_seconds", message));
        }
        ttl => ttl.map(Duration::from_secs_f64),
    };
    let tokens = match (body.prompt, body.messages) {
        (Prompts::Missing, Some(messages)) => {
            let end = body.add_generation_prompt.unwrap_or(false);
            messages::prompt(model, Some(messages), end)?.tokens
        }
        (prompt, None) => completions::only_prompt(model, prompt)?.tokens,
        _ => return Err(ApiError::invalid("prompt", "Send either `prompt` or `messages`.")),
    };
    Ok(Asked {
        tokens,
        cache_salt,
        shared,
        ttl,
    })
}

fn request(prompt: Vec<TokenId>, cache_salt: Option<String>, tenant: Arc<Tenant>, arrival: Instant) -> Request {
    Request {
        id: "pin".to_string(),
        tenant,
        priority: 0,
        prompt,
        cache_salt,
        sampling: Sampling::default(),
        arrival,
        deadline: None,
        span: tracing::Span::current(),
        // The engine's handle puts its own in place.
        events: unbounded_channel().0,
        ended: Arc::default(),
    }
}

fn pinned(info: PinInfo) -> Pinned {
    Pinned {
        id: info.id,
        object: "cache.prompt",
        tokens: info.tokens,
        shared: info.shared,
        expires_in_seconds: info.expires_in.map(|left| left.as_secs_f64()),
    }
}

/// The report as people read it: sizes, shares, and prefixes by their lengths alone.
fn readable(mut report: CacheReport) -> Value {
    let (blocks, pins) = (report.blocks, report.pins);
    let total = blocks.free + blocks.held + blocks.cached + blocks.pinned;
    let share = |part: u64, rest: u64| (part + rest > 0).then(|| part as f64 / (part + rest) as f64);
    let prefixes = &mut report.prefixes;
    prefixes.sort_unstable_by_key(|prefix| (prefix.tokens, prefix.requests));
    let largest: Vec<_> = prefixes.iter().rev().take(SHOWN).map(prefix).collect();
    prefixes.sort_unstable_by_key(|prefix| (prefix.requests, prefix.tokens));
    let most_used: Vec<_> = prefixes.iter().rev().take(SHOWN).map(prefix).collect();
    json!({
        "object": "cache",
        "block_size": report.block_size,
        "blocks": {
            "total": total, "free": blocks.free, "held": blocks.held, "cached": blocks.cached, "pinned": blocks.pinned,
        },
        "requests": {"hit": report.hits, "miss": report.misses, "hit_rate": share(report.hits, report.misses)},
        "prompt_tokens": {
            "cached": report.cached_tokens, "computed": report.prefill_tokens,
            "hit_rate": share(report.cached_tokens, report.prefill_tokens),
        },
        "saved_prefill_seconds": report.saved_seconds,
        "evictions": pins.evictions,
        "pins": {
            "prompts": report.prompts.len(), "budget_blocks": pins.budget, "asked_blocks": pins.asked,
            "automatic_blocks": pins.automatic, "automatic_after_requests": AUTOMATIC_PIN_REQUESTS,
        },
        "prefixes": {"largest": largest, "most_used": most_used},
    })
}

fn prefix(prefix: &CachedPrefix) -> Value {
    json!({"tokens": prefix.tokens, "requests": prefix.requests, "pinned": prefix.pinned})
}

impl From<PinFailed> for ApiError {
    fn from(failed: PinFailed) -> Self {
        match failed {
            PinFailed::Refused(refused) => refused.into(),
            PinFailed::Failed(failure) => failure.into(),
            PinFailed::Pin(error) => Self::not_pinned(
                match error {
                    PinError::BelowBlock { .. } => StatusCode::BAD_REQUEST,
                    PinError::NoPrefixCache | PinError::OverBudget { .. } | PinError::TooMany => StatusCode::CONFLICT,
                    PinError::Gone => StatusCode::INTERNAL_SERVER_ERROR,
                },
                &error.to_string(),
            ),
        }
    }
}
