//! How the choices of one request end beside each other, with an engine that a test speaks for.

use std::sync::Mutex;

use serde_json::{Value, json};

use super::super::testing::{self, events, post, token, tokenizer};
use super::*;

const CHAT: &str = "/v1/chat/completions";
/// What is waited for comes long before.
const LIMIT: Duration = Duration::from_secs(60);
const OVERTAKEN: Event = Event::Failed(Failure::TooBusy {
    retry_after: Duration::from_secs(3),
});
const EXPIRED: Event = Event::Failed(Failure::DeadlinePassed);

fn asking(extra: &Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "Hello"}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

/// The token of "Hi".
fn hi() -> Event {
    Event::Token(token(tokenizer().encode("Hi", false).unwrap()[0]))
}

/// A server whose engine sends to each choice of a request what stands in its place, and then nothing more.
fn telling(choices: Vec<Vec<Event>>) -> Arc<Server> {
    testing::server(move |requests| {
        for (request, events) in requests.iter().zip(&choices) {
            for event in events {
                let _ = request.events.send(event.clone());
            }
        }
        Ok(())
    })
}

/// A server whose engine hands its requests to the test.
fn held() -> (Arc<Server>, Arc<Mutex<Vec<Request>>>) {
    let held = Arc::new(Mutex::new(Vec::new()));
    let keeper = held.clone();
    let server = testing::server(move |requests| {
        keeper.lock().unwrap().extend(requests);
        Ok(())
    });
    (server, held)
}

/// The requests, once they have come.
async fn come(held: &Mutex<Vec<Request>>) -> Vec<Request> {
    let come = async {
        loop {
            let requests = std::mem::take(&mut *held.lock().unwrap());
            if !requests.is_empty() {
                return requests;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(LIMIT, come).await.expect("the request comes")
}

/// Each choice's text, finish reason and stop reason.
fn choices(answer: &Value) -> Vec<(&str, &str, Option<&str>)> {
    let choices = answer["choices"].as_array().unwrap().iter();
    let shown = choices.map(|choice| {
        let (text, finish) = (&choice["message"]["content"], &choice["finish_reason"]);
        (
            text.as_str().unwrap(),
            finish.as_str().unwrap(),
            choice["stop_reason"].as_str(),
        )
    });
    shown.collect()
}

#[tokio::test]
async fn a_choice_that_ends_without_a_token_leaves_the_others_theirs() {
    for (given_up, cause) in [(OVERTAKEN, "overtaken"), (EXPIRED, "deadline_passed")] {
        let server = telling(vec![
            vec![given_up],
            vec![hi(), Event::Finished(FinishReason::Stop)],
            vec![hi(), Event::Finished(FinishReason::Deadline)],
        ]);
        let (status, answer) = post(&server, CHAT, asking(&json!({"n": 3}))).await;
        let cut = Some("deadline");
        assert_eq!(
            (status, choices(&answer)),
            (
                200,
                vec![("", "length", cut), ("Hi", "stop", None), ("Hi", "length", cut)]
            )
        );
        assert_eq!(answer["usage"]["completion_tokens"], 2);
        let streamed = events(&server, CHAT, asking(&json!({"n": 3, "stream": true}))).await;
        let ends = streamed
            .iter()
            .filter(|event| event.contains("\"finish_reason\":\""))
            .count();
        assert_eq!((ends, streamed.last().unwrap().as_str()), (3, "[DONE]"), "{streamed:?}");
        let text = (server.metrics_text)();
        assert!(
            text.contains(&format!("sconce_cuts_total{{cause=\"{cause}\"}} 2")),
            "{text}"
        );
    }
}

#[tokio::test]
async fn choices_that_all_end_without_a_token_are_one_failure() {
    for (given_up, expected) in [(OVERTAKEN, (429, "overtaken")), (EXPIRED, (504, "deadline_passed"))] {
        let server = telling(vec![vec![given_up.clone()], vec![given_up]]);
        for stream in [false, true] {
            let (status, answer) = post(&server, CHAT, asking(&json!({"n": 2, "stream": stream}))).await;
            assert_eq!(
                (status, answer["error"]["code"].as_str().unwrap()),
                expected,
                "{answer}"
            );
        }
    }
}

#[tokio::test]
async fn a_deadline_is_kept_while_the_engine_is_silent() {
    for (first, status) in [(Some(hi()), 200), (None, 504)] {
        let (server, held) = held();
        let body = asking(&json!({"n": 2, "timeout_ms": 2000}));
        let asked = tokio::spawn(async move { post(&server, CHAT, body).await });
        let requests = come(&held).await;
        if let Some(token) = first {
            requests[0].events.send(token).unwrap();
        }
        let answer = tokio::time::timeout(LIMIT, asked).await.expect("it is not waited for");
        let answer = answer.unwrap();
        assert_eq!(answer.0, status, "{}", answer.1);
        if status == 200 {
            let cut = Some("deadline");
            assert_eq!(choices(&answer.1), [("Hi", "length", cut), ("", "length", cut)]);
        }
        for request in requests {
            assert!(request.events.is_closed());
            assert_eq!(request.ended.get(), Some(&FinishReason::Deadline));
        }
    }
}

#[tokio::test]
async fn the_engine_learns_whether_an_answer_ended_or_its_client_left() {
    let (server, held) = held();
    let body = asking(&json!({"n": 2, "stop": "Hi"}));
    let asked = tokio::spawn(async move { post(&server, CHAT, body).await });
    let requests = come(&held).await;
    requests[0].events.send(hi()).unwrap();
    requests[0].events.closed().await;
    assert_eq!(requests[0].ended.get(), Some(&FinishReason::Stop));
    asked.abort();
    requests[1].events.closed().await;
    assert_eq!(requests[1].ended.get(), None);
}
