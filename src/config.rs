//! Every setting once: flag, environment variable, TOML key, default, range and meaning.
//!
//! A field below is the only place where its setting is defined. Its name gives the flag (`--max-batch`), the
//! variable (`SCONCE_MAX_BATCH`) and the key in the file that `--config` names (`max-batch`); its doc comment is the
//! help text and the line in `docs/settings.md`. A flag outranks a variable, which outranks the file, which outranks
//! the default; [`parse`] applies that order.

pub mod load;
mod reference;
mod sources;
mod values;

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{BoolishValueParser, RangedU64ValueParser};
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

use crate::api::ConfiguredPrompt;
pub use crate::batching::{Buckets, CacheScope, Schedule, WindowPolicy};
use crate::batching::{MAX_BATCH, MAX_STEP_TOKENS};
pub use load::{Loadtest, Tune};
pub use reference::reference;
pub use sources::{ConfigError, FileError, Invocation, Origin, Setting, parse};
pub use values::{Device, ValueError};

/// An inference server that turns one GPU into a dependable service
#[derive(Debug, Parser)]
#[command(
    name = "sconce",
    version,
    arg_required_else_help = true,
    disable_help_subcommand = true
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a model over HTTP with OpenAI's API
    Serve(Serve),
    /// Fetch a model into the cache and print where it lies
    Pull(Pull),
    /// Send a server requests as its users would and report what they would feel
    Loadtest(Box<Loadtest>),
    /// Find the settings that hold the most requests a second within a latency target
    Tune(Tune),
    /// Measure the model without HTTP, beside what the device can do
    Bench(Bench),
    /// Show what this machine offers and what the settings would be
    Doctor(Doctor),
    /// Make an API key: print the secret once, and the lines for the file of `--api-keys`
    Key(Key),
}

/// Settings of `sconce serve`.
#[derive(Debug, Clone, Args)]
pub struct Serve {
    #[command(flatten)]
    pub choice: ModelChoice,
    #[command(flatten)]
    pub model: Model,
    #[command(flatten)]
    pub batching: Batching,
    #[command(flatten)]
    pub http: Http,
    /// Prompts that stay in the prefix cache: the file's `[[pin]]` tables. They have no flag.
    #[arg(skip)]
    pub pins: Vec<ConfiguredPrompt>,
    #[command(flatten)]
    pub life: Life,
    #[command(flatten)]
    pub common: Common,
}

/// Settings of `sconce pull`.
#[derive(Debug, Clone, Args)]
pub struct Pull {
    #[command(flatten)]
    pub choice: ModelChoice,
    #[command(flatten)]
    pub common: Common,
}

/// Settings of `sconce bench`.
#[derive(Debug, Clone, Args)]
pub struct Bench {
    #[command(flatten)]
    pub choice: ModelChoice,
    #[command(flatten)]
    pub model: Model,
    #[command(flatten)]
    pub batching: Batching,
    #[command(flatten)]
    pub common: Common,
    /// Write what was measured as JSON
    #[arg(long, help_heading = "Output", value_name = "PATH")]
    pub save_json: Option<PathBuf>,
}

/// Settings of `sconce doctor`.
#[derive(Debug, Clone, Args)]
pub struct Doctor {
    #[command(flatten)]
    pub serve: Serve,
    /// Print JSON instead of text
    #[arg(
        long,
        help_heading = "Output",
        value_name = "BOOL",
        default_value = "false",
        default_missing_value = "true"
    )]
    #[arg(action = ArgAction::Set, num_args = 0..=1, require_equals = true)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub json: bool,
}

/// Settings of `sconce key`.
#[derive(Debug, Clone, Args)]
pub struct Key {
    /// Whose key it is
    pub name: String,
    #[command(flatten)]
    pub common: Common,
}

/// Which model.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelChoice {
    /// The built-in model's name, a GGUF file, a Hugging Face folder, or a hub id such as `org/name`
    #[arg(long, default_value = "smollm2-135m-instruct")]
    pub model: String,
}

/// Where and how the model runs, and the memory it may keep.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model")]
pub struct Model {
    /// Where the model runs: `auto` takes the first GPU if this build and machine have one
    #[arg(long, value_name = "auto|cpu|cuda[:N]", default_value = "auto", value_parser = values::device)]
    pub device: Device,
    /// The type of weights and KV cache; on the CPU sums stay in f32, only a processor with AVX-512 BF16 multiplies in bf16,
    /// and matrices that a file has in fewer bits stay small in f32 too; `auto` is f32 on the CPU and bf16 on a GPU
    #[arg(long, default_value = "auto")]
    pub dtype: Dtype,
    /// The most tokens in a sequence, prompt and answer together; unset, the model's own limit as far as the KV cache
    /// holds it
    #[arg(long, value_name = "TOKENS", value_parser = count(2, 1 << 24))]
    pub max_model_len: Option<usize>,
    /// Where weights come from: the model's files, or random numbers for the shape in a `config.json`, to measure speed
    #[arg(long, default_value = "files")]
    pub load_format: LoadFormat,
    /// Multiply by a GGUF file's matrices as they are quantized, with activations rounded to 8 bits: on a CPU with AVX2
    /// faster, on a GPU smaller and without CUDA graphs; else they are multiplied as numbers of `--dtype`
    #[arg(long, value_name = "BOOL", default_value = "false", default_missing_value = "true")]
    #[arg(action = ArgAction::Set, num_args = 0..=1, require_equals = true)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub quantized: bool,
    /// Memory for the KV cache, such as `640MiB` or `2GiB`; unset, half of what is free once the weights are loaded, at
    /// most 640MiB, and at least what `--max-model-len` needs; on a GPU what `--gpu-memory` leaves
    #[arg(long, value_name = "BYTES", value_parser = |s: &str| values::bytes(s, 1 << 20, 1 << 44))]
    pub kv_memory: Option<u64>,
    /// The share of a GPU's memory for weights, steps and KV cache together, 0.1 to 0.98
    #[arg(long, value_name = "SHARE", default_value = "0.9", value_parser = values::gpu_memory)]
    pub gpu_memory: f64,
    /// Run a GPU's decode steps as CUDA graphs, captured at start
    #[arg(long, value_name = "BOOL", default_value = "true", default_missing_value = "true")]
    #[arg(action = ArgAction::Set, num_args = 0..=1, require_equals = true)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub cuda_graphs: bool,
    /// Plan and enqueue a GPU's next step while it runs this one
    #[arg(long, value_name = "BOOL", default_value = "true", default_missing_value = "true")]
    #[arg(action = ArgAction::Set, num_args = 0..=1, require_equals = true)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub overlap: bool,
    /// Tokens in a KV-cache block: a power of two, 1 to 256
    #[arg(long, value_name = "TOKENS", default_value = "16", value_parser = values::block_size)]
    pub block_size: usize,
    /// Do not keep the blocks of ended sequences for prompts that begin alike
    #[arg(long, value_name = "BOOL", default_value = "false", default_missing_value = "true")]
    #[arg(action = ArgAction::Set, num_args = 0..=1, require_equals = true)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub no_prefix_cache: bool,
    /// Whose requests find each other's cached prefixes
    #[arg(long, default_value = "tenant")]
    pub cache_scope: CacheScope,
    /// The share of the KV cache that pinned prompts may hold, 0 to 1; less where the longest sequence would not fit
    /// beside them
    #[arg(long, value_name = "SHARE", default_value = "0.25", value_parser = values::share)]
    pub pin_memory: f64,
    /// A step that runs longer than this is hung: its engine is given up and started again, or on a GPU, where any other
    /// engine would wait behind it, the server ends
    #[arg(long, value_name = "DURATION", default_value = "5m")]
    #[arg(value_parser = |s: &str| values::duration(s, Duration::from_millis(100), Duration::from_secs(24 * 3600)))]
    pub step_timeout: Duration,
    /// Threads that compute; unset, one a core
    #[arg(long, value_parser = count(1, 1024))]
    pub threads: Option<usize>,
}

/// How requests are gathered into steps.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Batching")]
pub struct Batching {
    /// The most sequences that run at once, 1 to 4096
    #[arg(long, value_name = "SEQUENCES", default_value = "100", value_parser = count(1, MAX_BATCH))]
    pub max_batch: usize,
    /// The longest a request waits for company before its batch closes, such as `20ms` or `0`, at most `60s`
    #[arg(long, value_name = "DURATION", default_value = "20ms")]
    #[arg(value_parser = |s: &str| values::duration(s, Duration::ZERO, Duration::from_secs(60)))]
    pub batch_window: Duration,
    /// When a batch closes before its window is over
    #[arg(long, default_value = "adaptive")]
    pub window_policy: WindowPolicy,
    /// How requests share the device
    #[arg(long, default_value = "continuous")]
    pub schedule: Schedule,
    /// Boundaries between prompt lengths that run together, in tokens, ascending
    #[arg(
        long,
        value_name = "TOKENS,...",
        default_value_t = Buckets::default()
    )]
    pub buckets: Buckets,
    /// The most tokens in a step: long prompts run in chunks of what decodes leave of it
    #[arg(long, value_name = "TOKENS", default_value = "512", value_parser = count(1, MAX_STEP_TOKENS))]
    pub step_tokens: usize,
    /// The most requests that wait; one more is refused with status 429
    #[arg(long, value_name = "REQUESTS", default_value = "1024", value_parser = count(1, 1_000_000))]
    pub queue: usize,
    /// The most prompt tokens of requests that wait; unset, no limit besides `--queue`
    #[arg(long, value_name = "TOKENS", value_parser = count(1, 1 << 40))]
    pub queue_tokens: Option<usize>,
    /// The most requests that wait or run; unset, no limit besides `--queue` and `--max-batch`
    #[arg(long, value_name = "REQUESTS", value_parser = count(1, 1_000_000))]
    pub max_in_flight: Option<usize>,
    /// The share of these three limits that one API key may take, above 0, at most 1
    #[arg(long, value_name = "SHARE", default_value = "0.5", value_parser = values::some_share)]
    pub key_share: f64,
}

/// The HTTP side.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "HTTP")]
pub struct Http {
    /// The address to listen on; `0.0.0.0` is every IPv4 interface
    #[arg(long, default_value = "127.0.0.1")]
    pub host: String,
    /// The port to listen on; 0 takes any free one
    #[arg(long, default_value = "8080")]
    pub port: u16,
    /// The model's name in requests and answers; unset, the name in `--model`
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// A request that has not ended after this long is cut off; a client may ask for less
    #[arg(long, value_name = "DURATION", default_value = "10m")]
    #[arg(value_parser = |s: &str| values::duration(s, Duration::from_millis(1), Duration::from_secs(7 * 24 * 3600)))]
    pub request_timeout: Duration,
    /// A request's head, and then its body, must each come within this; a connection without requests is closed after it
    #[arg(long, value_name = "DURATION", default_value = "30s")]
    #[arg(value_parser = |s: &str| values::duration(s, Duration::from_millis(10), Duration::from_secs(3600)))]
    pub read_timeout: Duration,
    /// A client that takes nothing of its answer for this long, or makes it wait for ten times as long in all, is cut off,
    /// and its request cancelled
    #[arg(long, value_name = "DURATION", default_value = "30s")]
    #[arg(value_parser = |s: &str| values::duration(s, Duration::from_millis(10), Duration::from_secs(3600)))]
    pub write_timeout: Duration,
    /// The most connections at a time; one more is answered with 503
    #[arg(long, value_name = "CONNECTIONS", default_value = "4096", value_parser = count(1, 1_000_000))]
    pub max_connections: usize,
    /// The largest request body
    #[arg(long, value_name = "BYTES", default_value = "4MiB", value_parser = |s: &str| values::bytes(s, 1 << 10, 1 << 30))]
    pub max_body: u64,
    /// Let clients change batching settings and the model through `/admin`; only with a `--host` that is a loopback address
    #[arg(long, value_name = "BOOL", default_value = "false", default_missing_value = "true")]
    #[arg(action = ArgAction::Set, num_args = 0..=1, require_equals = true)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub admin: bool,
    /// A TOML file of API keys, read again when it changes; every request but `/health` and `/ready` then needs one
    #[arg(long, value_name = "PATH")]
    pub api_keys: Option<PathBuf>,
    /// Answer everyone who reaches a `--host` that is no loopback address, without `--api-keys`
    #[arg(long, value_name = "BOOL", default_value = "false", default_missing_value = "true")]
    #[arg(action = ArgAction::Set, num_args = 0..=1, require_equals = true)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub allow_anonymous: bool,
}

/// From start to end.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Start and end")]
pub struct Life {
    /// Where the prefix cache is kept from one run to the next: read at the start, written at the end; unset, nowhere
    #[arg(long, value_name = "PATH")]
    pub cache_file: Option<PathBuf>,
    /// How long what runs may go on when the server is told to end; what is not done by then is ended with an error
    #[arg(long, value_name = "DURATION", default_value = "20s")]
    #[arg(value_parser = |s: &str| values::duration(s, Duration::ZERO, Duration::from_secs(24 * 3600)))]
    pub drain_timeout: Duration,
}

/// What every command takes.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Common")]
pub struct Common {
    /// A TOML file with settings; a key is a flag without its dashes
    #[arg(long, value_name = "PATH")]
    pub config: Option<PathBuf>,
    /// How log lines on standard error look
    #[arg(long, default_value = "text")]
    pub log_format: LogFormat,
    /// What is logged: a level, or levels by target such as `info,sconce=debug`
    #[arg(long, value_name = "FILTER", default_value = "info", value_parser = values::log_filter)]
    pub log_level: String,
    /// Where spans go by OTLP over HTTP, such as `http://127.0.0.1:4318`; only in a build with `--features otlp`
    #[arg(long, value_name = "URL", value_parser = values::otlp_endpoint)]
    pub otlp_endpoint: Option<String>,
}

/// What the model computes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    Auto,
    F32,
    Bf16,
    F16,
}

/// Where weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LoadFormat {
    /// The model's files
    Files,
    /// Random numbers; `--model` is a config.json, or a folder with one
    Dummy,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    Text,
    /// One object a line, for machines
    Json,
}

impl Command {
    /// What every command takes.
    pub fn common(&self) -> &Common {
        match self {
            Command::Serve(settings) => &settings.common,
            Command::Pull(settings) => &settings.common,
            Command::Loadtest(settings) => &settings.common,
            Command::Tune(settings) => &settings.common,
            Command::Bench(settings) => &settings.common,
            Command::Doctor(settings) => &settings.serve.common,
            Command::Key(settings) => &settings.common,
        }
    }
}

fn count(least: u64, most: u64) -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(least..=most)
}
