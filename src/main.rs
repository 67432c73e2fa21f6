//! The command line: `sconce serve`, `pull`, `loadtest`, `tune`, `bench`, `doctor`, `key`.

#![forbid(unsafe_code)]

use std::error::Error;
use std::io::IsTerminal;
use std::process::ExitCode;

use sconce::commands;
use sconce::config::{self, Command, Common, ConfigError, Invocation, LogFormat};
use sconce::telemetry::{log_level, log_panics};
use tracing_subscriber::{Layer, layer::SubscriberExt, util::SubscriberInitExt};

/// What sends spans; dropping it sends the last ones.
#[cfg(feature = "otlp")]
type Exporter = Option<sconce::telemetry::otlp::Exporter>;
#[cfg(not(feature = "otlp"))]
type Exporter = Option<std::convert::Infallible>;

/// What a wrong command line, variable or settings file exits with, as clap does.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let invocation = match config::parse(std::env::args_os()) {
        Ok(invocation) => invocation,
        Err(ConfigError::Usage(error)) => error.exit(),
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(USAGE);
        }
    };
    // Kept until the end, when the last spans go out.
    let _exporter = match start_logging(invocation.command.common()) {
        Ok(exporter) => exporter,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(USAGE);
        }
    };
    log_panics();
    let log_format = invocation.command.common().log_format;
    let Err(error) = run(invocation) else {
        return ExitCode::SUCCESS;
    };
    // Whoever reads objects gets one, if errors are logged at all.
    if log_format == LogFormat::Json && tracing::enabled!(tracing::Level::ERROR) {
        tracing::error!(%error, "ended");
    } else {
        eprintln!("error: {error}");
    }
    ExitCode::FAILURE
}

fn run(invocation: Invocation) -> Result<(), Box<dyn Error>> {
    match invocation.command {
        Command::Serve(settings) => commands::serve::run(settings, invocation.settings)?,
        Command::Pull(settings) => commands::pull::run(&settings)?,
        Command::Loadtest(settings) => commands::loadtest::run(*settings)?,
        Command::Tune(settings) => commands::tune::run(settings)?,
        Command::Bench(settings) => commands::bench::run(settings)?,
        Command::Key(settings) => commands::key::run(&settings)?,
        Command::Doctor(settings) => commands::doctor::run(&settings, &invocation.settings)?,
    }
    Ok(())
}

/// Log lines to standard error and, where asked for, spans to a collector.
fn start_logging(settings: &Common) -> Result<Exporter, Box<dyn Error>> {
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        // It would tell of a line that cannot be written on standard error itself, and panic where nobody reads that.
        .log_internal_errors(false)
        .with_ansi(std::io::stderr().is_terminal());
    let lines = match settings.log_format {
        LogFormat::Text => lines.boxed(),
        // The innermost span has what the list of all of them would repeat.
        LogFormat::Json => lines.json().with_span_list(false).boxed(),
    };
    let filter = log_level::filter(&settings.log_level);
    let registry = tracing_subscriber::registry().with(lines.with_filter(filter));
    #[cfg(feature = "otlp")]
    if let Some(endpoint) = &settings.otlp_endpoint {
        let (spans, exporter) = sconce::telemetry::otlp::spans_to(endpoint)?;
        registry.with(spans).init();
        return Ok(Some(exporter));
    }
    registry.init();
    Ok(None)
}
