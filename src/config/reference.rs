//! `docs/settings.md`, written from the same definition that reads the settings.

use std::collections::BTreeMap;
use std::fmt::Write;

use clap::Arg;

use super::sources::{command, has_key, is_setting, variable};

const INTRODUCTION: &str = "\
<!-- Written from src/config.rs. After a change there: UPDATE_DOCS=1 cargo test settings_page -->
# Settings

Every setting is a flag, an environment variable and a key in the TOML file that `--config` (or `SCONCE_CONFIG`) names.
A flag outranks a variable, a variable outranks the file, the file outranks the default; `sconce doctor` shows each
setting's value and where it came from. One file serves every command: a command reads the keys it knows, and a key that
no command knows is an error. A switch takes `=false` to switch it back, as in `--no-prefix-cache=false`.

The file may also have tables `[[pin]]`, prompts that stay in the prefix cache from the start on: each has a `prompt` or
`messages`, and is everyone's unless it names a `tenant` or a `cache-salt`.

Downloaded models are kept in `models` in the folder that `SCONCE_HOME` names; without it, in `sconce` in the user's cache
folder. Models from a hub lie in the hub's own cache (`HF_HOME`).
";

/// The page's text: a table for each command.
pub fn reference() -> String {
    let mut page = INTRODUCTION.to_owned();
    let mut shown = BTreeMap::new();
    for subcommand in command().get_subcommands() {
        let name = subcommand.get_name();
        let about = subcommand.get_about().map(ToString::to_string).unwrap_or_default();
        let rows: Vec<(String, String)> = subcommand
            .get_arguments()
            .filter(|arg| is_setting(arg))
            .map(|arg| (arg.get_long().unwrap_or_default().to_owned(), row(arg)))
            .collect();
        let (old, new): (Vec<_>, Vec<_>) = rows.into_iter().partition(|(_, row)| shown.contains_key(row));
        // Writing to a String cannot fail.
        let _ = write!(page, "\n## sconce {name}\n\n{about}.\n");
        if !old.is_empty() {
            let _ = write!(page, "\n{}\n", as_above(&old, &shown));
        }
        if !new.is_empty() {
            page.push_str("\n| flag | variable | TOML key | default | meaning |\n| --- | --- | --- | --- | --- |\n");
        }
        for (_, row) in new {
            page.push_str(&row);
            shown.insert(row, name.to_owned());
        }
    }
    page
}

/// Names the settings that an earlier command's table has.
fn as_above(rows: &[(String, String)], shown: &BTreeMap<String, String>) -> String {
    let mut by_command: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (flag, row) in rows {
        by_command.entry(&shown[row]).or_default().push(format!("`--{flag}`"));
    }
    let sentences = by_command
        .iter()
        .map(|(command, flags)| format!("As for `{command}`: {}.", flags.join(", ")));
    sentences.collect::<Vec<_>>().join(" ")
}

fn row(arg: &Arg) -> String {
    let flag = arg.get_long().unwrap_or_default();
    let key = if has_key(arg) {
        format!("`{flag}`")
    } else {
        "none".to_owned()
    };
    let defaults: Vec<String> = arg
        .get_default_values()
        .iter()
        .map(|value| value.to_string_lossy().into())
        .collect();
    let default = if defaults.is_empty() {
        "unset".to_owned()
    } else {
        format!("`{}`", defaults.join(","))
    };
    let mut meaning = arg.get_help().map(ToString::to_string).unwrap_or_default();
    let choices: Vec<String> = match arg.is_hide_possible_values_set() {
        true => Vec::new(),
        false => arg.get_possible_values().iter().map(choice).collect(),
    };
    if !choices.is_empty() {
        let _ = write!(meaning, ". One of {}", choices.join(", "));
    }
    let row = format!("`--{flag}` | `{}` | {key} | {default} | {meaning}", variable(arg));
    format!("| {row} |\n")
}

fn choice(value: &clap::builder::PossibleValue) -> String {
    match value.get_help() {
        Some(help) => format!("`{}` ({help})", value.get_name()),
        None => format!("`{}`", value.get_name()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_page_is_up_to_date() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/settings.md");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(path, reference()).unwrap();
        }
        let page = std::fs::read_to_string(path).unwrap();
        assert!(
            page == reference(),
            "docs/settings.md is old: run UPDATE_DOCS=1 cargo test settings_page"
        );
    }

    #[test]
    fn every_meaning_is_written() {
        for subcommand in command().get_subcommands() {
            for arg in subcommand.get_arguments().filter(|arg| is_setting(arg)) {
                assert!(arg.get_help().is_some(), "{} {arg}", subcommand.get_name());
            }
        }
    }
}
