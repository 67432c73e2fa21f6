//! Where settings come from: the command line, the environment, the file, in this order of rank.
//!
//! clap knows the first two. A key of the file becomes the default of its flag, after it was read as that flag's value
//! would be, so all three are checked by the same rules.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, CommandFactory, FromArgMatches};

use super::{Cli, Command};
use crate::api::ConfiguredPrompt;

/// What a command line asks for, and where each of its settings came from.
#[derive(Debug)]
pub struct Invocation {
    pub command: Command,
    /// Every setting of the command, in the order of its help.
    pub settings: Vec<Setting>,
}

/// One setting's value as it was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting {
    /// The flag without its dashes, which is also the file's key.
    pub name: String,
    /// The environment variable.
    pub variable: String,
    /// `None`: not set, and no default but what the meaning says.
    pub value: Option<String>,
    pub origin: Origin,
}

/// Where a setting's value came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    Flag,
    Environment,
    File,
    Default,
}

impl Origin {
    pub fn as_str(self) -> &'static str {
        match self {
            Origin::Flag => "flag",
            Origin::Environment => "environment",
            Origin::File => "file",
            Origin::Default => "default",
        }
    }
}

/// Why a command line was not understood.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A wrong flag or variable, or a request for help or the version, which clap prints.
    #[error(transparent)]
    Usage(#[from] clap::Error),
    #[error(transparent)]
    File(#[from] FileError),
    /// A variable that its setting refuses.
    #[error("environment variable {variable}: {message}")]
    Variable { variable: String, message: String },
}

/// What is wrong with the file that `--config` names.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("cannot read the settings file {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{}, line {line}: not TOML: {message}", path.display())]
    Syntax {
        path: PathBuf,
        line: usize,
        message: String,
    },
    #[error("{}: no setting is called `{key}`{}", path.display(), hint.as_ref().map(|h| format!("; did you mean `{h}`?")).unwrap_or_default())]
    UnknownKey {
        path: PathBuf,
        key: String,
        hint: Option<String>,
    },
    #[error("{}: `{key}` is given twice; keep one", path.display())]
    Twice { path: PathBuf, key: String },
    #[error("{}: `{key}`: {message}", path.display())]
    Value {
        path: PathBuf,
        key: String,
        message: String,
    },
}

/// Reads a command line, its first word being the program's name, with the environment and the file it names.
///
/// # Errors
/// [`ConfigError`], also where help or the version was asked for: clap's error prints these and exits with 0.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Invocation, ConfigError> {
    let args: Vec<OsString> = args.into_iter().collect();
    let mut command = command();
    let (mut keys, mut pins) = (Vec::new(), Vec::new());
    if let Some(path) = config_path(&args) {
        (keys, pins) = read_file(&path, &command)?;
        command = with_defaults(command, &keys);
    }
    let matches = match command.try_get_matches_from_mut(&args) {
        Ok(matches) => matches,
        Err(error) => return Err(blame_variable(error, &command)),
    };
    let mut parsed = Cli::from_arg_matches(&matches)?;
    if let Command::Serve(serve) = &mut parsed.command {
        serve.pins = pins;
    }
    let settings = match matches.subcommand() {
        Some((name, matches)) => match command.find_subcommand(name) {
            Some(subcommand) => settings(subcommand, matches, &keys),
            None => Vec::new(),
        },
        None => Vec::new(),
    };
    Ok(Invocation {
        command: parsed.command,
        settings,
    })
}

/// The whole command line with every setting's variable.
pub(super) fn command() -> clap::Command {
    Cli::command().mut_subcommands(|subcommand| {
        subcommand.mut_args(|arg| {
            if !is_setting(&arg) {
                return arg;
            }
            let variable = variable(&arg);
            arg.env(variable).hide_env_values(true)
        })
    })
}

pub(super) fn is_setting(arg: &Arg) -> bool {
    arg.get_long().is_some() && !["help", "version"].contains(&arg.get_id().as_str())
}

/// May the file set it? It does not name itself.
pub(super) fn has_key(arg: &Arg) -> bool {
    is_setting(arg) && arg.get_id() != "config"
}

pub(super) fn variable(arg: &Arg) -> String {
    format!("SCONCE_{}", arg.get_id().as_str().to_uppercase())
}

fn config_path(args: &[OsString]) -> Option<PathBuf> {
    let mut words = args.iter().skip(1).take_while(|word| *word != "--");
    while let Some(word) = words.next() {
        if word == "--config" {
            return words.next().map(PathBuf::from);
        }
        if let Some(path) = word.to_str().and_then(|word| word.strip_prefix("--config=")) {
            return Some(PathBuf::from(path));
        }
    }
    std::env::var_os("SCONCE_CONFIG")
        .filter(|path| !path.is_empty())
        .map(PathBuf::from)
}

/// The file's keys with their values as a command line would write them.
type Keys = Vec<(String, String)>;

/// The file's keys and its prompts to pin.
fn read_file(path: &Path, command: &clap::Command) -> Result<(Keys, Vec<ConfiguredPrompt>), FileError> {
    let text = std::fs::read_to_string(path).map_err(|source| FileError::Read {
        path: path.into(),
        source,
    })?;
    let mut table: toml::Table = text.parse().map_err(|error: toml::de::Error| FileError::Syntax {
        path: path.into(),
        line: text[..error.span().map_or(0, |span| span.start)].matches('\n').count() + 1,
        message: error.message().to_owned(),
    })?;
    let pins = read_pins(path, table.remove("pin"))?;
    let mut keys = Keys::new();
    for (key, value) in &table {
        let name = key.replace('_', "-");
        let args: Vec<&Arg> = args_named(command, &name);
        if args.is_empty() {
            return Err(FileError::UnknownKey {
                path: path.into(),
                key: key.clone(),
                hint: similar(command, &name),
            });
        }
        if keys.iter().any(|(other, _)| *other == name) {
            return Err(FileError::Twice {
                path: path.into(),
                key: name,
            });
        }
        let refuse = |message| FileError::Value {
            path: path.into(),
            key: key.clone(),
            message,
        };
        let value = as_word(value).map_err(refuse)?;
        for arg in args {
            check(arg, OsStr::new(&value)).map_err(refuse)?;
        }
        keys.push((name, value));
    }
    Ok((keys, pins))
}

/// The tables `[[pin]]`, which are no setting of one value.
fn read_pins(path: &Path, tables: Option<toml::Value>) -> Result<Vec<ConfiguredPrompt>, FileError> {
    let pins = tables.map(toml::Value::try_into).transpose();
    let pins = pins.map_err(|error: toml::de::Error| FileError::Value {
        path: path.into(),
        key: "pin".to_owned(),
        message: error.message().to_owned(),
    })?;
    Ok(pins.unwrap_or_default())
}

/// Every command's argument of this name: one file serves them all.
fn args_named<'a>(command: &'a clap::Command, name: &str) -> Vec<&'a Arg> {
    let subcommands = command.get_subcommands();
    subcommands
        .flat_map(|subcommand| subcommand.get_arguments())
        .filter(|arg| has_key(arg) && arg.get_long() == Some(name))
        .collect()
}

/// A TOML value as a command line would write it.
fn as_word(value: &toml::Value) -> Result<String, String> {
    match value {
        toml::Value::String(text) => Ok(text.clone()),
        toml::Value::Integer(number) => Ok(number.to_string()),
        toml::Value::Float(number) => Ok(number.to_string()),
        toml::Value::Boolean(truth) => Ok(truth.to_string()),
        toml::Value::Array(items) if !items.iter().any(toml::Value::is_array) => {
            Ok(items.iter().map(as_word).collect::<Result<Vec<_>, _>>()?.join(","))
        }
        other => Err(format!("a {} is not a setting's value", other.type_str())),
    }
}

/// Reads a value as the flag's own, alone.
fn check(arg: &Arg, value: &OsStr) -> Result<(), String> {
    let name = arg.get_long().unwrap_or_default();
    let mut word = OsString::from(format!("--{name}="));
    word.push(value);
    let probe = arg.clone().required(false).env(Resettable::Reset);
    let outcome = clap::Command::new("sconce")
        .no_binary_name(true)
        .arg(probe)
        .try_get_matches_from([word]);
    outcome.map(drop).map_err(|error| one_line(&error))
}

/// clap's message without its usage lines.
fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let lines = text.lines().map(str::trim);
    let said: Vec<&str> = lines
        .take_while(|line| !line.starts_with("Usage") && !line.starts_with("For more"))
        .collect();
    let said = said.join(" ");
    let said = said.trim();
    said.strip_prefix("error: ").unwrap_or(said).to_owned()
}

/// The setting whose name is most like this one, as clap judges it.
fn similar(command: &clap::Command, name: &str) -> Option<String> {
    let args = command
        .get_subcommands()
        .flat_map(|subcommand| subcommand.get_arguments())
        .filter(|arg| has_key(arg));
    let mut names: Vec<String> = args.filter_map(|arg| arg.get_long().map(str::to_owned)).collect();
    names.sort();
    names.dedup();
    let probe = names.into_iter().map(|name| Arg::new(name.clone()).long(name));
    let mut probe = clap::Command::new("sconce")
        .no_binary_name(true)
        .disable_help_flag(true)
        .args(probe);
    let error = probe.try_get_matches_from_mut([format!("--{name}=")]).err()?;
    match error.get(ContextKind::SuggestedArg)? {
        ContextValue::String(flag) => Some(flag.trim_start_matches('-').to_owned()),
        _ => None,
    }
}

fn with_defaults(command: clap::Command, keys: &[(String, String)]) -> clap::Command {
    command.mut_subcommands(|subcommand| {
        subcommand.mut_args(|arg| {
            match keys
                .iter()
                .find(|(key, _)| has_key(&arg) && arg.get_long() == Some(key))
            {
                Some((_, value)) => arg.required(false).default_value(value.clone()),
                None => arg,
            }
        })
    })
}

/// clap does not say that a refused value came from the environment; this does.
fn blame_variable(error: clap::Error, command: &clap::Command) -> ConfigError {
    if !matches!(error.kind(), ErrorKind::ValueValidation | ErrorKind::InvalidValue) {
        return error.into();
    }
    let Some(ContextValue::String(flag)) = error.get(ContextKind::InvalidArg) else {
        return error.into();
    };
    let Some(ContextValue::String(value)) = error.get(ContextKind::InvalidValue) else {
        return error.into();
    };
    let name = flag
        .trim_start_matches('-')
        .split([' ', '=', '['])
        .next()
        .unwrap_or_default();
    let variable = args_named(command, name).first().map(|arg| variable(arg));
    match variable {
        Some(variable) if std::env::var(&variable).as_ref() == Ok(value) => ConfigError::Variable {
            variable,
            message: one_line(&error),
        },
        _ => error.into(),
    }
}

fn settings(command: &clap::Command, matches: &ArgMatches, keys: &[(String, String)]) -> Vec<Setting> {
    let args = command.get_arguments().filter(|arg| is_setting(arg));
    args.map(|arg| {
        let id = arg.get_id().as_str();
        let name = arg.get_long().unwrap_or_default().to_owned();
        let words = matches
            .get_raw(id)
            .map(|values| values.map(|value| value.to_string_lossy()).collect::<Vec<_>>());
        let origin = match matches.value_source(id) {
            Some(ValueSource::CommandLine) => Origin::Flag,
            Some(ValueSource::EnvVariable) => Origin::Environment,
            _ if keys.iter().any(|(key, _)| *key == name) => Origin::File,
            _ => Origin::Default,
        };
        Setting {
            variable: variable(arg),
            value: words.map(|words| words.join(",")),
            origin,
            name,
        }
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Buckets, Device, Schedule, Serve, WindowPolicy};
    use std::time::Duration;

    fn read(words: &[&str]) -> Result<Invocation, ConfigError> {
        parse(
            std::iter::once("sconce")
                .chain(words.iter().copied())
                .map(OsString::from),
        )
    }

    fn serve(words: &[&str]) -> Serve {
        match read(&[&["serve"], words].concat()).unwrap().command {
            Command::Serve(settings) => settings,
            other => panic!("{other:?}"),
        }
    }

    fn with_file(text: &str, words: &[&str]) -> Result<Invocation, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        read(&[words, &["--config", file.path().to_str().unwrap()]].concat())
    }

    fn complaint(text: &str) -> String {
        let message = with_file(text, &["serve"]).unwrap_err().to_string();
        assert_eq!(message.lines().count(), 1, "{message}");
        message
    }

    #[test]
    fn clap_accepts_the_definition() {
        command().debug_assert();
    }

    #[test]
    fn defaults() {
        let settings = serve(&[]);
        assert_eq!(settings.choice.model, "smollm2-135m-instruct");
        assert_eq!((settings.http.host.as_str(), settings.http.port), ("127.0.0.1", 8080));
        assert_eq!(settings.model.device, Device::Auto);
        assert_eq!(settings.model.threads, None);
        assert_eq!(settings.model.block_size, 16);
        assert!(!settings.model.no_prefix_cache);
        assert_eq!(settings.batching.max_batch, 100);
        assert_eq!(settings.batching.batch_window, Duration::from_millis(20));
        assert_eq!(settings.batching.window_policy, WindowPolicy::Adaptive);
        assert_eq!(settings.batching.schedule, Schedule::Continuous);
        assert_eq!(settings.batching.buckets, Buckets::default());
        assert_eq!(settings.http.request_timeout, Duration::from_secs(600));
        assert_eq!(settings.http.max_body, 4 << 20);
    }

    #[test]
    fn a_flag_outranks_the_file_and_the_file_the_default() {
        let text = "max-batch = 7\nport = 9000\nbuckets = [10, 20]\nno_prefix_cache = true\nbatch-window = 0\n";
        let invocation = with_file(text, &["serve", "--port", "9001"]).unwrap();
        let Command::Serve(settings) = &invocation.command else {
            panic!()
        };
        assert_eq!(settings.http.port, 9001);
        assert_eq!(settings.batching.max_batch, 7);
        assert_eq!(settings.batching.buckets, Buckets::new(vec![10, 20]).unwrap());
        assert_eq!(settings.batching.batch_window, Duration::ZERO);
        assert!(settings.model.no_prefix_cache);
        let origin = |name: &str| {
            invocation
                .settings
                .iter()
                .find(|setting| setting.name == name)
                .unwrap()
                .origin
        };
        assert_eq!(origin("port"), Origin::Flag);
        assert_eq!(origin("no-prefix-cache"), Origin::File);
        assert_eq!(origin("host"), Origin::Default);
    }

    #[test]
    fn a_switch_can_be_switched_back() {
        assert!(serve(&["--no-prefix-cache"]).model.no_prefix_cache);
        let invocation = with_file("no-prefix-cache = true", &["serve", "--no-prefix-cache=false"]).unwrap();
        let Command::Serve(settings) = invocation.command else {
            panic!()
        };
        assert!(!settings.model.no_prefix_cache);
    }

    #[test]
    fn one_file_serves_every_command() {
        let invocation = with_file("port = 9000\nlog-format = 'json'", &["pull"]).unwrap();
        assert!(invocation.settings.iter().all(|setting| setting.name != "port"));
        assert_eq!(invocation.command.common().log_format, crate::config::LogFormat::Json);
    }

    #[test]
    fn the_file_is_checked_as_flags_are() {
        assert!(
            complaint("max-batch = 5000")
                .ends_with("`max-batch`: invalid value '5000' for '--max-batch <SEQUENCES>': 5000 is not in 1..=4096")
        );
        assert!(complaint("max-bach = 5").ends_with("no setting is called `max-bach`; did you mean `max-batch`?"));
        assert!(complaint("zebra = 5").ends_with("no setting is called `zebra`"));
        assert!(complaint("config = 'other.toml'").contains("no setting is called `config`"));
        assert!(complaint("help = true").contains("no setting is called `help`"));
        assert!(complaint("port = true").contains("`port`: invalid value 'true'"));
        assert!(complaint("schedule = 'static'").contains("continuous, dynamic, sequential"));
        assert!(complaint("[serve]\nport = 1").contains("no setting is called `serve`"));
        assert!(complaint("[port]\nport = 1").contains("`port`: a table is not"));
        assert!(complaint("port = 1\n\nhost = ").contains(", line 3: not TOML"));
        assert!(complaint("max-batch = 1\nmax_batch = 2").contains("given twice"));
        assert!(complaint("block-size = 24").contains("power of two"));
    }

    #[test]
    fn prompts_to_pin_are_tables_of_the_file() {
        let text = "port = 9000\n[[pin]]\nprompt = 'Once'\n[[pin]]\ntenant = 'a'\n\
                    messages = [{role = 'system', content = 'Be brief.'}]\n";
        let Command::Serve(settings) = with_file(text, &["serve"]).unwrap().command else {
            panic!()
        };
        assert_eq!((settings.http.port, settings.pins.len()), (9000, 2));
        assert!(serve(&[]).pins.is_empty());
        assert!(complaint("[[pin]]\ntext = 'Once'").contains("`pin`: unknown field `text`"));
        assert!(complaint("pin = 'Once'").contains("`pin`: invalid type"));
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = read(&["serve", "--config", "/nowhere/sconce.toml"]).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("cannot read the settings file /nowhere/sconce.toml"),
            "{error}"
        );
    }

    #[test]
    fn values_out_of_range_are_usage_errors() {
        let bad = [
            "--max-batch=0",
            "--max-batch=4097",
            "--block-size=24",
            "--buckets=5,5",
            "--port=70000",
            "--batch-window=2m",
            "--kv-memory=1KiB",
            "--step-tokens=0",
            "--device=gpu",
            "--request-timeout=0",
            "--queue=0",
        ];
        for flag in bad {
            let error = read(&["serve", flag]).unwrap_err();
            assert!(
                matches!(&error, ConfigError::Usage(error) if error.exit_code() == 2),
                "{flag}: {error}"
            );
        }
    }

    #[test]
    fn every_setting_has_its_own_variable() {
        for subcommand in command().get_subcommands() {
            for arg in subcommand.get_arguments().filter(|arg| is_setting(arg)) {
                let expected = format!("SCONCE_{}", arg.get_long().unwrap().replace('-', "_").to_uppercase());
                assert_eq!(arg.get_env(), Some(OsStr::new(&expected)));
            }
        }
    }
}
