//! One request to an OpenAI-compatible server: what is sent, what comes back and when, and how it can fail.

use std::{
    error::Error,
    fmt, io,
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use reqwest::{Client, Request, Response, StatusCode};
use serde::{Deserialize, Serialize};

use crate::{sse::Events, tls, trace::Message};

/// The route that requests take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Api {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
}

impl Api {
    pub fn path(self) -> &'static str {
        match self {
            Api::Chat => "/v1/chat/completions",
            Api::Completions => "/v1/completions",
        }
    }
}

/// What is asked.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    Messages(Vec<Message>),
    Text(String),
    Tokens(Vec<u32>),
}

/// The fields of a request's body that do not change within a run.
#[derive(Debug, Clone)]
pub struct Form {
    pub model: String,
    pub stream: bool,
    /// Ask the server to go on past an end-of-sequence token, so that answers have the length that was asked for.
    pub ignore_eos: bool,
}

#[derive(Serialize)]
struct Body<'a> {
    model: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    messages: Option<&'a [Message]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt: Option<Text<'a>>,
    max_tokens: u32,
    temperature: f32,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    ignore_eos: bool,
    stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_options: Option<StreamOptions>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Text<'a> {
    Text(&'a str),
    Tokens(&'a [u32]),
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

impl Form {
    /// The request's body: greedy, at most `max_tokens` long.
    pub fn body(&self, prompt: &Prompt, max_tokens: u32) -> Vec<u8> {
        let (messages, prompt) = match prompt {
            Prompt::Messages(messages) => (Some(messages.as_slice()), None),
            Prompt::Text(text) => (None, Some(Text::Text(text))),
            Prompt::Tokens(tokens) => (None, Some(Text::Tokens(tokens))),
        };
        let body = Body {
            model: &self.model,
            messages,
            prompt,
            max_tokens,
            temperature: 0.0,
            ignore_eos: self.ignore_eos,
            stream: self.stream,
            stream_options: self.stream.then_some(StreamOptions { include_usage: true }),
        };
        // Strings and numbers alone: nothing in it can fail to become JSON.
        serde_json::to_vec(&body).expect("plain data")
    }
}

/// What came back, with the instants that latencies are counted to.
#[derive(Debug, Clone)]
pub struct Answer {
    /// When the first and the last piece of a streamed answer came; `None` for a whole answer.
    pub tokens: Option<(Instant, Instant)>,
    /// The gaps between pieces of a streamed answer.
    pub gaps: Vec<Duration>,
    pub end: Instant,
    /// From the server's usage; where it sends none, the number of pieces, and `None` for a whole answer.
    pub output_tokens: Option<u32>,
    /// `None` where the server does not say.
    pub prompt_tokens: Option<u32>,
    /// Those of the prompt that the server found in its prefix cache; `None` where it does not say.
    pub cached_tokens: Option<u32>,
    pub text: String,
}

/// How a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Failure {
    /// Nobody listened.
    Refused,
    /// The request's time was over.
    TimedOut,
    /// An HTTP status other than 200; 429 and 503 are a server's refusals.
    Status(u16),
    /// The stream ended before the answer did.
    BrokenStream,
    /// The answer was no JSON, or not in OpenAI's shape.
    BadJson,
    /// The stream brought an error instead of more of the answer.
    ErrorEvent,
    /// The connection broke before an answer began, or could not be made for another reason than a refusal.
    Connection,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Failure::Refused => f.write_str("refused"),
            Failure::TimedOut => f.write_str("timed_out"),
            Failure::Status(status) => write!(f, "status_{status}"),
            Failure::BrokenStream => f.write_str("broken_stream"),
            Failure::BadJson => f.write_str("bad_json"),
            Failure::ErrorEvent => f.write_str("error_event"),
            Failure::Connection => f.write_str("connection"),
        }
    }
}

impl Failure {
    fn of(error: &reqwest::Error) -> Failure {
        if error.is_timeout() {
            return Failure::TimedOut;
        }
        let mut source: Option<&(dyn Error + 'static)> = Some(error);
        while let Some(error) = source {
            if let Some(error) = error.downcast_ref::<io::Error>()
                && error.kind() == io::ErrorKind::ConnectionRefused
            {
                return Failure::Refused;
            }
            source = error.source();
        }
        Failure::Connection
    }
}

/// The parts of an answer or of a streamed piece that matter here.
#[derive(Debug, Deserialize)]
struct Reply {
    choices: Option<Vec<Choice>>,
    usage: Option<Usage>,
    error: Option<serde_json::Value>,
}

#[derive(Debug, Deserialize)]
struct Choice {
    text: Option<String>,
    #[serde(alias = "delta")]
    message: Option<Content>,
    finish_reason: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Content {
    content: Option<String>,
    /// Where a server sends a model's reasoning apart.
    #[serde(alias = "reasoning")]
    reasoning_content: Option<String>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
struct Usage {
    prompt_tokens: Option<u32>,
    completion_tokens: Option<u32>,
    prompt_tokens_details: Option<Details>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
struct Details {
    cached_tokens: Option<u32>,
}

impl Usage {
    fn cached(self) -> Option<u32> {
        self.prompt_tokens_details?.cached_tokens
    }
}

/// A kept connection that the server has closed breaks within a round trip.
const AT_ONCE: Duration = Duration::from_millis(500);

/// A server and how it is asked.
#[derive(Debug, Clone)]
pub struct Target {
    http: Client,
    /// Makes a connection for each request.
    unpooled: Client,
    url: String,
    key: Option<String>,
    timeout: Duration,
    deadline: Option<Duration>,
}

impl Target {
    /// A target at a base URL such as `http://127.0.0.1:8080`.
    ///
    /// # Errors
    /// A message where the HTTP client cannot be made.
    pub fn new(url: &str, key: Option<String>, timeout: Duration) -> Result<Self, reqwest::Error> {
        let url = url.trim_end_matches('/');
        Ok(Self {
            http: tls::client(url, false, true)?,
            unpooled: tls::client(url, false, false)?,
            url: url.strip_suffix("/v1").unwrap_or(url).to_owned(),
            key,
            timeout,
            deadline: None,
        })
    }

    /// The same target, believed whatever certificate it shows.
    ///
    /// # Errors
    /// As [`Target::new`].
    pub fn with_any_certificate(mut self) -> Result<Self, reqwest::Error> {
        self.http = tls::client(&self.url, true, true)?;
        self.unpooled = tls::client(&self.url, true, false)?;
        Ok(self)
    }

    /// The same target, told with each generation request how long its client waits (`x-request-timeout-ms`).
    pub fn with_deadline(self, deadline: Option<Duration>) -> Self {
        Self { deadline, ..self }
    }

    /// The base URL, without `/v1` and without a slash at its end.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A GET of a small page within five seconds.
    pub async fn get(&self, path: &str) -> Result<Response, reqwest::Error> {
        let request = self.http.get(format!("{}{path}", self.url));
        self.authorized(request).timeout(Duration::from_secs(5)).send().await
    }

    /// A POST of a small JSON object within ten seconds.
    pub async fn post(&self, path: &str, body: &serde_json::Value) -> Result<Response, reqwest::Error> {
        let request = self.http.post(format!("{}{path}", self.url)).json(body);
        self.authorized(request).timeout(Duration::from_secs(10)).send().await
    }

    fn authorized(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    /// Sends a generation request and reads its answer to the end.
    ///
    /// # Errors
    /// [`Failure`]
    pub async fn ask(&self, api: Api, body: Vec<u8>, stream: bool) -> Result<Answer, Failure> {
        let request = self.http.post(format!("{}{}", self.url, api.path()));
        let request = match self.deadline {
            Some(deadline) => request.header("x-request-timeout-ms", deadline.as_millis().to_string()),
            None => request,
        };
        let request = self
            .authorized(request)
            .header("content-type", "application/json")
            .timeout(self.timeout)
            .body(body);
        let request = request.build().map_err(|error| Failure::of(&error))?;
        let response = self.send(request).await.map_err(|error| Failure::of(&error))?;
        let status = response.status();
        if status != StatusCode::OK {
            // Read to its end, the body lets the connection serve again.
            let _ = response.bytes().await;
            return Err(Failure::Status(status.as_u16()));
        }
        if stream {
            streamed(response).await
        } else {
            whole(response).await
        }
    }
}

impl Target {
    /// Sends a request, and once more over a connection of its own where the first broke at once, before any answer: a
    /// server may close a connection after an answer just as the next request goes out over it (RFC 9112, 9.6), and
    /// clients try again. Where that fails too, the first failure is what counts.
    async fn send(&self, request: Request) -> Result<Response, reqwest::Error> {
        let begun = Instant::now();
        let again = request.try_clone();
        let error = match self.http.execute(request).await {
            Ok(response) => return Ok(response),
            Err(error) => error,
        };
        let closed = !error.is_connect() && Failure::of(&error) == Failure::Connection && begun.elapsed() < AT_ONCE;
        match again.filter(|_| closed) {
            Some(mut again) => {
                *again.timeout_mut() = Some(self.timeout.saturating_sub(begun.elapsed()));
                self.unpooled.execute(again).await.map_err(|_| error)
            }
            None => Err(error),
        }
    }
}

async fn whole(response: Response) -> Result<Answer, Failure> {
    let broken = |error: reqwest::Error| match Failure::of(&error) {
        Failure::Connection => Failure::BrokenStream,
        other => other,
    };
    let body = response.bytes().await.map_err(broken)?;
    let end = Instant::now();
    let reply: Reply = serde_json::from_slice(&body).map_err(|_| Failure::BadJson)?;
    let choice = reply.choices.as_ref().and_then(|choices| choices.first());
    let choice = choice.filter(|choice| choice.is_whole()).ok_or(Failure::BadJson)?;
    Ok(Answer {
        tokens: None,
        gaps: Vec::new(),
        end,
        output_tokens: reply.usage.and_then(|usage| usage.completion_tokens),
        prompt_tokens: reply.usage.and_then(|usage| usage.prompt_tokens),
        cached_tokens: reply.usage.and_then(Usage::cached),
        text: choice.piece().unwrap_or_default().to_owned(),
    })
}

impl Choice {
    /// Does it have what an answer is to have? A message's `content` may be null: the model said nothing.
    fn is_whole(&self) -> bool {
        self.text.is_some() || self.message.is_some()
    }

    fn piece(&self) -> Option<&str> {
        let content = || self.message.as_ref().and_then(|message| message.content.as_deref());
        let reasoning = || {
            self.message
                .as_ref()
                .and_then(|message| message.reasoning_content.as_deref())
        };
        self.text.as_deref().or_else(content).or_else(reasoning)
    }
}

/// What a stream has brought so far.
#[derive(Debug, Default)]
struct Progress {
    first: Option<Instant>,
    last: Option<Instant>,
    gaps: Vec<Duration>,
    pieces: u32,
    usage: Option<Usage>,
    text: String,
    finished: bool,
    done: bool,
}

async fn streamed(response: Response) -> Result<Answer, Failure> {
    let mut bytes = response.bytes_stream();
    let (mut events, mut progress) = (Events::default(), Progress::default());
    while let Some(piece) = bytes.next().await {
        let piece = match piece {
            Ok(piece) => piece,
            Err(error) if error.is_timeout() => return Err(Failure::TimedOut),
            Err(_) => return Err(Failure::BrokenStream),
        };
        let now = Instant::now();
        let mut failed = None;
        events.push(&piece, |data| {
            if let Err(failure) = progress.event(data, now) {
                failed.get_or_insert(failure);
            }
        });
        if let Some(failure) = failed {
            return Err(failure);
        }
    }
    let end = Instant::now();
    // A finish reason ends an answer too, where a server sends no `[DONE]`.
    if !progress.done && !progress.finished {
        return Err(Failure::BrokenStream);
    }
    Ok(progress.answer(end))
}

impl Progress {
    fn event(&mut self, data: &str, now: Instant) -> Result<(), Failure> {
        if data.trim() == "[DONE]" {
            self.done = true;
            return Ok(());
        }
        let reply: Reply = serde_json::from_str(data).map_err(|_| Failure::BadJson)?;
        if reply.error.is_some_and(|error| !error.is_null()) {
            return Err(Failure::ErrorEvent);
        }
        self.usage = reply.usage.or(self.usage);
        let choices = reply.choices.ok_or(Failure::BadJson)?;
        for choice in &choices {
            self.finished |= choice.finish_reason.is_some();
            let piece = choice.piece().unwrap_or_default();
            if !piece.is_empty() {
                self.text.push_str(piece);
                self.piece(now);
            }
        }
        Ok(())
    }

    fn piece(&mut self, now: Instant) {
        self.first.get_or_insert(now);
        if let Some(last) = self.last {
            self.gaps.push(now - last);
        }
        self.last = Some(now);
        self.pieces += 1;
    }

    fn answer(self, end: Instant) -> Answer {
        let usage = self.usage;
        Answer {
            // An answer without text has its first token at its end.
            tokens: Some((self.first.unwrap_or(end), self.last.unwrap_or(end))),
            gaps: self.gaps,
            end,
            output_tokens: usage.and_then(|usage| usage.completion_tokens).or(Some(self.pieces)),
            prompt_tokens: usage.and_then(|usage| usage.prompt_tokens),
            cached_tokens: usage.and_then(Usage::cached),
            text: self.text,
        }
    }
}
