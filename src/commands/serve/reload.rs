//! SIGHUP: the settings are read again, and those that can change while the server runs do.

use std::{io, sync::Arc};

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    api::{self, ConfiguredPrompt},
    batching::Change,
    config::{self, Batching, Command, Setting},
    telemetry::log_level,
};

/// Settings that can change while the server runs. The API keys' file is watched by itself.
const CHANGEABLE: [&str; 7] = [
    "schedule",
    "window-policy",
    "batch-window",
    "max-batch",
    "step-tokens",
    "request-timeout",
    "log-level",
];

/// Hangups from now on; without this one would end the process.
pub fn hangups() -> io::Result<Signal> {
    signal(SignalKind::hangup())
}

/// Reads the settings again at every hangup. `written` are those that the server was started with, `pins` its prompts to
/// pin.
pub async fn on_hangup(
    mut hangups: Signal,
    server: Arc<api::Server>,
    written: Vec<Setting>,
    pins: Vec<ConfiguredPrompt>,
) {
    while hangups.recv().await.is_some() {
        match reload(&server, &written, &pins).await {
            Ok(()) => tracing::info!("settings read again"),
            Err(why) => tracing::error!("the settings stay as they are: {why}"),
        }
    }
}

/// Changes all that can change, or nothing; the error says why nothing.
async fn reload(server: &Arc<api::Server>, written: &[Setting], pins: &[ConfiguredPrompt]) -> Result<(), String> {
    let invocation = config::parse(std::env::args_os()).map_err(|error| error.to_string())?;
    let Command::Serve(settings) = invocation.command else {
        return Err("this is not `serve`".into());
    };
    let engine = server.engine().ok_or("the model is still being loaded")?;
    let changed = server.configure(&engine, change(&settings.batching)).await;
    changed.map_err(|error| error.to_string())?;
    server.set_request_timeout(Some(settings.http.request_timeout));
    log_level::set(&settings.common.log_level);
    let mut waiting = fixed_differences(written, &invocation.settings);
    if settings.pins != pins {
        waiting.push("[[pin]]");
    }
    if !waiting.is_empty() {
        tracing::warn!(
            "settings that differ and change with the next start: {}",
            waiting.join(", ")
        );
    }
    Ok(())
}

fn change(settings: &Batching) -> Change {
    Change {
        schedule: Some(settings.schedule),
        window_policy: Some(settings.window_policy),
        window: Some(settings.batch_window),
        max_batch: Some(settings.max_batch),
        step_tokens: Some(settings.step_tokens),
    }
}

/// Names of the settings that have another value now and cannot take it.
fn fixed_differences<'a>(before: &[Setting], now: &'a [Setting]) -> Vec<&'a str> {
    let differs = |setting: &&Setting| {
        let before = before.iter().find(|before| before.name == setting.name);
        before.is_none_or(|before| before.value != setting.value)
    };
    let fixed = now
        .iter()
        .filter(|setting| !CHANGEABLE.contains(&setting.name.as_str()));
    fixed.filter(differs).map(|setting| setting.name.as_str()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changeable_settings_exist_and_others_are_named() {
        let read = |words: &[&str]| {
            let words = ["sconce", "serve"].iter().chain(words);
            config::parse(words.map(std::ffi::OsString::from)).unwrap().settings
        };
        let before = read(&[]);
        for name in CHANGEABLE {
            assert!(before.iter().any(|setting| setting.name == name), "{name}");
        }
        let now = read(&[
            "--max-batch=7",
            "--log-level=debug",
            "--block-size=32",
            "--kv-memory=2GiB",
        ]);
        assert_eq!(fixed_differences(&before, &now), ["kv-memory", "block-size"]);
        assert!(fixed_differences(&before, &before).is_empty());
    }
}
