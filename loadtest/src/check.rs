//! What is asked of a server before any load is sent to it.

use std::{error::Error, io};

use reqwest::StatusCode;
use serde::Deserialize;

use crate::{
    client::{Api, Failure, Form, Prompt, Target},
    trace::Message,
};

/// Why no load is sent.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    #[error("`{url}` is not a URL such as http://127.0.0.1:8080")]
    Url { url: String },
    #[error("the HTTP client cannot start: {0}")]
    Client(#[from] reqwest::Error),
    #[error("no server answers at {url}: {reason}; start it, or give another `--url`")]
    Unreachable { url: String, reason: String },
    #[error(
        "{url} shows a certificate that this system does not believe ({reason}); name its file in `SSL_CERT_FILE`, or \
         believe any with `--insecure`"
    )]
    Certificate { url: String, reason: rustls::Error },
    #[error("{url} refuses with status 401: give its key with `--api-key`")]
    Key { url: String },
    #[error("{url}/v1/models answers with status {status}: the server is not ready, or does not speak OpenAI's API")]
    Status { url: String, status: u16 },
    #[error("{url} does not list its models; name one with `--served-model-name`")]
    NoList { url: String },
    #[error("{url} has no model `{model}`; it has {}", has.join(", "))]
    NoModel {
        url: String,
        model: String,
        has: Vec<String>,
    },
    #[error("a first request to {url}{path} failed ({failure}); nothing was measured", path = api.path())]
    Probe { url: String, api: Api, failure: Failure },
}

#[derive(Deserialize)]
struct List {
    data: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    id: String,
}

/// The name of the model to ask for: the given one if the server has it, else the first that it lists.
///
/// # Errors
/// [`CheckError`]
pub async fn model(target: &Target, given: Option<&str>) -> Result<String, CheckError> {
    let url = target.url().to_owned();
    let response = target
        .get("/v1/models")
        .await
        .map_err(|error| unreachable(url.clone(), &error))?;
    match response.status() {
        StatusCode::OK => {}
        StatusCode::UNAUTHORIZED => return Err(CheckError::Key { url }),
        // The route is not there: the model cannot be checked, and the first request will tell.
        StatusCode::NOT_FOUND if given.is_some() => return Ok(given.unwrap_or_default().to_owned()),
        status => {
            return Err(CheckError::Status {
                url,
                status: status.as_u16(),
            });
        }
    }
    let list: Option<List> = response.json().await.ok();
    let has: Vec<String> = list.map_or(Vec::new(), |list| list.data.into_iter().map(|entry| entry.id).collect());
    match (given, has.first()) {
        (Some(model), _) if has.is_empty() || has.iter().any(|name| name == model) => Ok(model.to_owned()),
        (Some(model), _) => Err(CheckError::NoModel {
            url,
            model: model.to_owned(),
            has,
        }),
        (None, Some(first)) => Ok(first.clone()),
        (None, None) => Err(CheckError::NoList { url }),
    }
}

/// Sends one small request as the run's will be.
///
/// # Errors
/// [`CheckError::Probe`]
pub async fn probe(target: &Target, api: Api, form: &Form) -> Result<(), CheckError> {
    let prompt = match api {
        Api::Chat => Prompt::Messages(vec![Message {
            role: "user".to_owned(),
            content: "Hello".to_owned(),
        }]),
        Api::Completions => Prompt::Text("Hello".to_owned()),
    };
    match target.ask(api, form.body(&prompt, 2), form.stream).await {
        Ok(_) => Ok(()),
        Err(failure) => Err(CheckError::Probe {
            url: target.url().to_owned(),
            api,
            failure,
        }),
    }
}

/// Is this an address that can be asked?
///
/// # Errors
/// [`CheckError::Url`]
pub fn url(text: &str) -> Result<(), CheckError> {
    let sound = reqwest::Url::parse(text).is_ok_and(|url| ["http", "https"].contains(&url.scheme()) && url.has_host());
    if sound {
        Ok(())
    } else {
        Err(CheckError::Url { url: text.to_owned() })
    }
}

fn unreachable(url: String, error: &reqwest::Error) -> CheckError {
    let mut cause: &(dyn Error + 'static) = error;
    loop {
        // An I/O error hides what it carries from `source`.
        let carried = cause.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        cause = match carried.map(|error| error as _).or(cause.source()) {
            Some(deeper) => deeper,
            None => break,
        };
    }
    match cause.downcast_ref::<rustls::Error>() {
        Some(reason @ rustls::Error::InvalidCertificate(_)) => CheckError::Certificate {
            url,
            reason: reason.clone(),
        },
        Some(rustls::Error::InvalidMessage(_)) => CheckError::Unreachable {
            url,
            reason: "what listens there does not speak TLS".to_owned(),
        },
        // The cause at the bottom says what happened; those above it say where.
        _ => CheckError::Unreachable {
            url,
            reason: cause.to_string(),
        },
    }
}
