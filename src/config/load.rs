//! Settings of `sconce loadtest` and `sconce tune`.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{ArgAction, Args, Subcommand};
use sconce_loadtest::arrivals::{ArrivalKind, Step};
use sconce_loadtest::client::Api;
use sconce_loadtest::slo::Slo;
use sconce_loadtest::workload::{Lengths, Preset};

use super::{Common, ModelChoice, count, values};

const DAY: Duration = Duration::from_secs(24 * 3600);

/// Settings of `sconce loadtest`.
#[derive(Debug, Clone, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Loadtest {
    #[command(subcommand)]
    pub action: Option<LoadtestAction>,
    #[command(flatten)]
    pub asked: Asked,
    #[command(flatten)]
    pub workload: Workload,
    #[command(flatten)]
    pub load: Load,
    #[command(flatten)]
    pub reports: Reports,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Debug, Clone, Subcommand)]
pub enum LoadtestAction {
    /// Set the reports of several load tests side by side
    Compare {
        /// Reports that `--save-json` or `--output-dir` wrote
        #[arg(required = true, num_args = 2.., value_name = "REPORT.json")]
        reports: Vec<PathBuf>,
        /// Write the comparison as one HTML file with charts
        #[arg(long, value_name = "PATH")]
        save_html: Option<PathBuf>,
        /// A folder for the charts, each as an SVG file
        #[arg(long, value_name = "PATH")]
        save_svg: Option<PathBuf>,
    },
}

/// Settings of `sconce tune`.
#[derive(Debug, Clone, Args)]
pub struct Tune {
    #[command(flatten)]
    pub choice: ModelChoice,
    #[command(flatten)]
    pub workload: Workload,
    #[command(flatten)]
    pub experiments: Experiments,
    #[command(flatten)]
    pub common: Common,
}

/// How settings are tried.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Experiments")]
pub struct Experiments {
    /// A server to tune that was started with `--admin`; unset, one is started with `--model`
    #[arg(long)]
    pub url: Option<String>,
    /// The key that requests carry as a bearer token
    #[arg(long, value_name = "KEY")]
    pub api_key: Option<String>,
    /// What is promised, such as `e2e.p99=2s,ttft.p99=500ms`; goodput counts the requests that keep it
    #[arg(long, value_name = "PROMISES", required = true)]
    pub slo: Slo,
    /// What is tried
    #[arg(long, default_value = "front")]
    pub experiment: TuneExperiment,
    /// The loads, in requests a second, such as `0.5,1,2`
    #[arg(long, value_name = "REQUESTS/S,...", default_value = "1,2", value_delimiter = ',', value_parser = positive)]
    pub rates: Vec<f64>,
    /// For how long an experiment sends
    #[arg(long, value_name = "DURATION", default_value = "20s")]
    #[arg(value_parser = |s: &str| values::duration(s, Duration::from_millis(100), DAY))]
    pub duration: Duration,
    /// For how long requests go at the same rate before those that are measured
    #[arg(long, value_name = "DURATION", default_value = "2s")]
    #[arg(value_parser = |s: &str| values::duration(s, Duration::ZERO, DAY))]
    pub warmup: Duration,
    /// The most experiments of a search along the front; its first ten compare schedules and windows
    #[arg(long, value_name = "EXPERIMENTS", default_value = "24", value_parser = count(1, 1000))]
    pub max_experiments: usize,
    /// Seed of arrivals, lengths and prompts: every experiment sends the same load, in other words
    #[arg(long, default_value = "1")]
    pub seed: u64,
    /// Write the recommended settings (of the front) as TOML for `serve --config`
    #[arg(long, value_name = "PATH")]
    pub save_toml: Option<PathBuf>,
    /// Write the experiments as one HTML file with charts
    #[arg(long, value_name = "PATH")]
    pub save_html: Option<PathBuf>,
    /// A folder for the charts, each as an SVG file
    #[arg(long, value_name = "PATH")]
    pub save_svg: Option<PathBuf>,
}

/// Which settings are tried under which load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum TuneExperiment {
    /// Searches along the Pareto front of goodput against P99 and recommends settings
    Front,
    /// Compares every schedule with windows of 0, 5, 20 and 50 ms under every load
    Schedules,
}

/// Which server is asked, and how.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Server")]
pub struct Asked {
    /// The server's address, such as `http://127.0.0.1:8080`
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    pub url: String,
    /// The model's name in requests; unset, the first that the server lists
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// The key that requests carry as a bearer token
    #[arg(long, value_name = "KEY")]
    pub api_key: Option<String>,
    /// Believe whatever certificate an HTTPS server shows; `SSL_CERT_FILE` names one to believe instead
    #[arg(long, value_name = "BOOL", default_value = "false", default_missing_value = "true")]
    #[arg(action = ArgAction::Set, num_args = 0..=1, require_equals = true)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub insecure: bool,
    /// The route that requests take; unset, the workload's
    #[arg(long)]
    pub api: Option<Api>,
    /// Ask for whole answers instead of streams
    #[arg(long, value_name = "BOOL", default_value = "false", default_missing_value = "true")]
    #[arg(action = ArgAction::Set, num_args = 0..=1, require_equals = true)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub no_stream: bool,
    /// A request without an end after this long counts as timed out
    #[arg(long, value_name = "DURATION", default_value = "5m")]
    #[arg(value_parser = |s: &str| values::duration(s, Duration::from_millis(1), DAY))]
    pub timeout: Duration,
    /// Tell the server with each request that its client waits no longer (the header `x-request-timeout-ms`)
    #[arg(long, value_name = "DURATION")]
    #[arg(value_parser = |s: &str| values::duration(s, Duration::from_millis(1), DAY))]
    pub deadline: Option<Duration>,
}

/// What requests ask.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Workload")]
pub struct Workload {
    /// A workload by name; the settings below change it
    #[arg(long, default_value = "chat")]
    pub workload: Preset,
    /// Prompt lengths in tokens: `128`, `64..192` or `lognormal:MEDIAN,SIGMA,MOST`
    #[arg(long, value_name = "LENGTHS")]
    pub prompt_tokens: Option<Lengths>,
    /// Answer lengths in tokens, written alike
    #[arg(long, value_name = "LENGTHS")]
    pub output_tokens: Option<Lengths>,
    /// Tokens that all prompts begin with: a chat's system message
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub shared_prefix: Option<u32>,
    /// Requests in a session, each with the answers before it, written as lengths are
    #[arg(long, value_name = "LENGTHS", default_value = "1")]
    pub turns: Lengths,
    /// The mean pause between an answer and its session's next request
    #[arg(long, value_name = "DURATION", default_value = "0")]
    #[arg(value_parser = |s: &str| values::duration(s, Duration::ZERO, DAY))]
    pub think_time: Duration,
    /// Whether answers go on past the model's end of text; unset, only where prompts are made up
    #[arg(long, value_name = "BOOL", value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub ignore_eos: Option<bool>,
    /// A JSONL file of prompts (`prompt`) or conversations (`messages`) to send
    #[arg(long, value_name = "PATH")]
    pub prompts: Option<PathBuf>,
    /// A `tokenizer.json` to make prompt lengths with, instead of the server's `/tokenize`
    #[arg(long, value_name = "PATH")]
    pub tokenizer: Option<PathBuf>,
}

/// When requests are sent, and how many.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Load")]
pub struct Load {
    /// When requests are sent; unset, `trace` with `--trace`, `steps` with `--steps`, else `poisson`
    #[arg(long)]
    pub arrivals: Option<ArrivalKind>,
    /// Requests a second, where neither a trace nor steps have their own; `inf` sends all at once
    #[arg(long, value_name = "REQUESTS/S", default_value = "1", value_parser = rate)]
    pub rate: f64,
    /// Shape of gamma arrivals: 1 is Poisson, less is burstier
    #[arg(long, value_name = "SHAPE", default_value = "0.5", value_parser = positive)]
    pub burstiness: f64,
    /// The rates of Poisson arrivals and how long each holds, such as `1:30s,4:30s`
    #[arg(long, value_name = "RATE:DURATION,...")]
    pub steps: Option<Steps>,
    /// A JSONL file with a `timestamp` in each line: when requests are sent; prompts and lengths in it are used too
    #[arg(long, value_name = "PATH")]
    pub trace: Option<PathBuf>,
    /// Requests to send; unset, as many as the duration holds
    #[arg(long, value_name = "REQUESTS", value_parser = clap::value_parser!(u64).range(1..))]
    pub requests: Option<u64>,
    /// For how long to send; unset, 30 s where no number of requests is given either
    #[arg(long, value_name = "DURATION")]
    #[arg(value_parser = |s: &str| values::duration(s, Duration::from_millis(1), DAY))]
    pub duration: Option<Duration>,
    /// For how long requests go at the same rate before those that are measured
    #[arg(long, value_name = "DURATION", default_value = "0")]
    #[arg(value_parser = |s: &str| values::duration(s, Duration::ZERO, DAY))]
    pub warmup: Duration,
    /// Seed of arrivals, lengths and prompts: the same seed sends the same load
    #[arg(long, default_value = "1")]
    pub seed: u64,
    /// What is promised, such as `e2e.p99=2s,ttft.p99=500ms`: of ttft, tpot, itl, e2e
    #[arg(long, value_name = "PROMISES")]
    pub slo: Option<Slo>,
    /// Run at 50, 80 and 100 % of `--target-qps`, or of the highest rate that keeps the SLO (then 120 % too)
    #[arg(long, value_name = "BOOL", default_value = "false", default_missing_value = "true")]
    #[arg(action = ArgAction::Set, num_args = 0..=1, require_equals = true)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub rubric: bool,
    /// The rate that the rubric's shares refer to; unset, it is searched for, from `--rate` on
    #[arg(long, value_name = "REQUESTS/S", value_parser = positive)]
    pub target_qps: Option<f64>,
}

/// Files that results are written to.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Output")]
pub struct Reports {
    /// A folder for `report.json`, `report.html` and an HdrHistogram log of each load
    #[arg(long, value_name = "PATH")]
    pub output_dir: Option<PathBuf>,
    /// Write the report as JSON
    #[arg(long, value_name = "PATH")]
    pub save_json: Option<PathBuf>,
    /// Write the report as one HTML file with charts
    #[arg(long, value_name = "PATH")]
    pub save_html: Option<PathBuf>,
    /// A folder for the charts, each as an SVG file
    #[arg(long, value_name = "PATH")]
    pub save_svg: Option<PathBuf>,
    /// Write the histograms as an HdrHistogram log; several loads follow one another under tags that begin with their labels
    #[arg(long, value_name = "PATH")]
    pub save_hdr: Option<PathBuf>,
}

/// Rates that hold one after the other.
#[derive(Debug, Clone, PartialEq)]
pub struct Steps(pub Vec<Step>);

impl std::str::FromStr for Steps {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let steps = text.split(',').map(|part| {
            let (rate, length) = part
                .split_once(':')
                .ok_or_else(|| format!("`{part}` is not a rate and a duration such as `4:30s`"))?;
            Ok(Step {
                rate: positive(rate.trim())?,
                length: values::duration(length.trim(), Duration::from_millis(1), DAY)
                    .map_err(|error| error.to_string())?,
            })
        });
        Ok(Steps(steps.collect::<Result<_, String>>()?))
    }
}

fn rate(text: &str) -> Result<f64, String> {
    match text {
        "inf" => Ok(f64::INFINITY),
        text => positive(text),
    }
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        // Below, times between requests would leave the clock's range.
        Ok(number) if (1e-6..=1e6).contains(&number) => Ok(number),
        _ => Err("a number from 0.000001 to 1000000 is needed".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_such_as_a_clock_can_follow() {
        assert_eq!((rate("inf"), rate("0.000001")), (Ok(f64::INFINITY), Ok(1e-6)));
        for bad in ["0", "-1", "1e-300", "1e7", "NaN", "infinity", "x"] {
            assert!(rate(bad).is_err(), "{bad}");
        }
        assert!("1:30s,1e-300:30s".parse::<Steps>().is_err());
    }
}
