//! A response as server-sent events: a chunk for each addition, then the usage if asked for, then `[DONE]`.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::unfold;

use super::choice::Delta;
use super::error::ApiError;
use super::generation::Generation;
use super::shape::Head;
use super::types::Usage;
use crate::request::Failure;

/// Waits for the first addition, so that a request that fails before it has its status, then streams. When the client
/// goes away the stream is dropped, and the generation with it.
pub(super) async fn respond(mut generation: Generation, head: Head, include_usage: bool) -> Result<Response, ApiError> {
    let first = generation.next().await;
    if let Some(Err(failure)) = first {
        return Err(failure.into());
    }
    let mut chunks = Chunks {
        generation,
        head,
        include_usage,
        ready: VecDeque::new(),
        ended: false,
    };
    chunks.begin()?;
    chunks.add(first);
    let events = unfold(chunks, |mut chunks| async move {
        let event = chunks.next().await?;
        Some((Ok::<_, Infallible>(event), chunks))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response())
}

struct Chunks {
    generation: Generation,
    head: Head,
    include_usage: bool,
    /// Events that wait for the client to read.
    ready: VecDeque<Event>,
    ended: bool,
}

impl Chunks {
    async fn next(&mut self) -> Option<Event> {
        while self.ready.is_empty() && !self.ended {
            let addition = self.generation.next().await;
            self.add(addition);
        }
        self.ready.pop_front()
    }

    /// The role of each choice, where the shape tells it.
    fn begin(&mut self) -> Result<(), ApiError> {
        for index in 0..self.generation.count() {
            if let Some(chunk) = self.head.first_chunk(index, self.no_usage()) {
                self.ready
                    .push_back(Event::default().data(chunk.map_err(|e| ApiError::internal(e.to_string()))?));
            }
        }
        Ok(())
    }

    /// Chunks before the last show `"usage": null` if the last one will show it.
    fn no_usage(&self) -> Option<Option<Usage>> {
        self.include_usage.then_some(None)
    }

    fn add(&mut self, addition: Option<Result<(usize, Delta), Failure>>) {
        let chunk = match addition {
            Some(Ok((index, delta))) => self.head.chunk(index, delta, self.no_usage()),
            Some(Err(failure)) => return self.fail(failure.into()),
            None => return self.end(),
        };
        match chunk {
            Ok(chunk) => self.ready.push_back(Event::default().data(chunk)),
            Err(error) => self.fail(ApiError::internal(error.to_string())),
        }
    }

    fn end(&mut self) {
        if self.include_usage {
            match self.head.usage_chunk(self.generation.usage(), self.generation.timing()) {
                Ok(chunk) => self.ready.push_back(Event::default().data(chunk)),
                Err(error) => return self.fail(ApiError::internal(error.to_string())),
            }
        }
        self.ready.push_back(Event::default().data("[DONE]"));
        self.ended = true;
    }

    /// The status is sent already: the error is the stream's last event.
    fn fail(&mut self, error: ApiError) {
        self.ready.push_back(Event::default().data(error.body().to_string()));
        self.ended = true;
    }
}
