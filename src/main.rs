//! The command line: `sconce serve`, `pull`, `loadtest`, `tune`, `bench`, `doctor`, `key`.

#![forbid(unsafe_code)]

use std::io::IsTerminal;
use std::process::ExitCode;

use sconce::commands;
use sconce::config::{self, Command, Common, ConfigError, Invocation, LogFormat};
use tracing_subscriber::EnvFilter;

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
    start_logging(invocation.command.common());
    match run(invocation) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(invocation: Invocation) -> Result<(), Box<dyn std::error::Error>> {
    match invocation.command {
        Command::Serve(settings) => commands::serve::run(settings)?,
        Command::Pull(settings) => commands::pull::run(&settings)?,
        Command::Loadtest(settings) => commands::loadtest::run(*settings)?,
        Command::Tune(settings) => commands::tune::run(settings)?,
        Command::Bench(settings) => commands::bench::run(settings)?,
        Command::Key(settings) => commands::key::run(&settings)?,
        Command::Doctor(settings) => commands::doctor::run(&settings, &invocation.settings)?,
    }
    Ok(())
}

fn start_logging(settings: &Common) {
    // The filter was read once already, when the setting was.
    let filter = EnvFilter::new(&settings.log_level);
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match settings.log_format {
        LogFormat::Text => lines.init(),
        LogFormat::Json => lines.json().init(),
    }
}
