//! The model's chat template: a Jinja template that turns messages into the prompt text the model was trained on.
//!
//! Rendered as transformers does (`apply_chat_template`): `trim_blocks`, `lstrip_blocks`, Python's string methods,
//! `raise_exception`, `strftime_now`, and a `tojson` that writes as Python's `json.dumps` does.

use std::fmt::Write as _;
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind, context};
use serde::Serialize;

use super::bounded::{self, Program};
use super::marks::unmarked;
use super::{TextError, gguf, read_optional, read_optional_json, token_text};

/// One message of a conversation, as templates see it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Message {
    pub role: String,
    pub content: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
}

/// A model's chat template, compiled.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    program: Program,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// The template of a `.gguf` file or of a Hugging Face folder (`chat_template.jinja`, else `tokenizer_config.json`);
    /// `None` where the model has none, as base models do.
    pub fn open(path: &Path) -> Result<Option<Self>, TextError> {
        if path.is_dir() {
            return Self::open_folder(path);
        }
        let metadata = gguf::Metadata::open(path)?;
        let Some(source) = metadata.string("tokenizer.chat_template") else {
            return Ok(None);
        };
        let token = |name| metadata.token_text(name).unwrap_or_default();
        Self::new(source.to_string(), token("bos"), token("eos")).map(Some)
    }

    fn open_folder(path: &Path) -> Result<Option<Self>, TextError> {
        let config = read_optional_json(&path.join("tokenizer_config.json"))?;
        let file = read_optional(&path.join("chat_template.jinja"))?;
        let Some(source) = file.or_else(|| template_text(config.as_ref()?)) else {
            return Ok(None);
        };
        let token = |key| token_text(config.as_ref(), key).unwrap_or_default();
        Self::new(source, token("bos_token"), token("eos_token")).map(Some)
    }

    pub(super) fn new(source: String, bos: String, eos: String) -> Result<Self, TextError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let syntax = syntax.map_err(|e| TextError::Template(describe(&e)))?;
        environment.set_unknown_method_callback(bounded::method);
        bounded::prepare(&mut environment);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        let program = Program::compile(source, syntax).map_err(|e| TextError::Template(describe(&e)))?;
        Ok(Self {
            environment,
            program,
            bos,
            eos,
        })
    }

    /// The prompt for `messages`, ending where the assistant's turn begins if `add_generation_prompt`.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TextError> {
        let context = context! {
            messages => Value::from(Serde(messages)),
            add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
            tools => (),
            documents => (),
        };
        self.program
            .render(&self.environment, context, messages)
            .map_err(|e| match raised(&e) {
                Some(message) => TextError::TemplateRefused(unmarked(&message)),
                None => TextError::Template(unmarked(&describe(&e))),
            })
    }
}

/// `chat_template` of `tokenizer_config.json`: a string, or a list of named ones of which `default` is taken.
fn template_text(config: &serde_json::Value) -> Option<String> {
    match config.get("chat_template")? {
        serde_json::Value::String(text) => Some(text.clone()),
        serde_json::Value::Array(list) => {
            let named = list.iter().find(|entry| entry["name"] == "default").or(list.first())?;
            named["template"].as_str().map(str::to_string)
        }
        _ => None,
    }
}

/// What a template said when it called `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: Value) -> Result<Value, Error> {
    let message = bounded::text_of(&message)?;
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

fn raised(error: &Error) -> Option<String> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Some(message.clone());
        }
        cause = error.source();
    }
    None
}

/// The error without the template's surroundings, which may hold the messages.
fn describe(error: &Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_string);
    match error.line() {
        Some(line) => format!("{what} (line {line} of the template)"),
        None => what,
    }
}

fn strftime_now(format: &str) -> Result<String, Error> {
    let mut text = String::new();
    write!(text, "{}", chrono::Local::now().format(format))
        .map_err(|_| Error::new(ErrorKind::InvalidOperation, format!("`{format}` is no time format")))?;
    Ok(text)
}

fn tojson(value: Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Python's other options change nothing here: characters are never escaped, keys keep their order.
    let _: (Option<bool>, Option<bool>) = (options.get("ensure_ascii")?, options.get("sort_keys")?);
    options.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        Some(n) => {
            let indent = vec![b' '; n.min(16)];
            let style = serde_json::ser::PrettyFormatter::with_indent(&indent);
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, style))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)),
    };
    written.map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(Value::from_safe_string(String::from_utf8_lossy(&out).into_owned()))
}

/// One line with a space after each comma and colon, as Python writes it.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::super::tokenizer::tests::{REFERENCE, VOCABULARY};
    use super::*;

    fn message(role: &str, content: &str) -> Message {
        Message {
            role: role.to_string(),
            content: content.to_string(),
            name: None,
            tool_call_id: None,
        }
    }

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source.to_string(), "<s>".to_string(), "</s>".to_string()).unwrap()
    }

    fn render(source: &str) -> Result<String, TextError> {
        template(source).render(&[message("user", "Grüße \"<you>\"")], true)
    }

    #[test]
    fn reference_messages_render_to_the_reference_text() {
        let template = ChatTemplate::open(Path::new(VOCABULARY)).unwrap().unwrap();
        let mut seen = 0;
        for prompt in REFERENCE["prompts"].as_array().unwrap() {
            let Some(messages) = prompt["messages"].as_array() else {
                continue;
            };
            let text = |value: &serde_json::Value| value.as_str().unwrap().to_string();
            let messages: Vec<Message> = messages
                .iter()
                .map(|m| message(&text(&m["role"]), &text(&m["content"])))
                .collect();
            assert_eq!(
                template.render(&messages, true).unwrap(),
                text(&prompt["text"]),
                "{}",
                prompt["name"]
            );
            seen += 1;
        }
        assert!(seen > 5);
    }

    #[test]
    fn templates_find_what_transformers_gives_them() {
        let text = render("{{ bos_token }}{{ messages[-1].content.strip('G').split(' ')[0] }}{{ eos_token }}").unwrap();
        assert_eq!(text, "<s>rüße</s>");
        assert_eq!(
            render("{% if tools is none and not documents %}plain{% endif %}").unwrap(),
            "plain"
        );
        assert_eq!(
            render("{{ messages | tojson }}").unwrap(),
            r#"[{"role": "user", "content": "Grüße \"<you>\""}]"#
        );
        assert_eq!(render("{{ [1] | tojson(indent=2) }}").unwrap(), "[\n  1\n]");
        assert_eq!(
            render("{{ 'a\n\nb' | indent(2) }}{{ 'a\nb' | indent(width=1, first=true) }}").unwrap(),
            "a\n\n  b a\n b"
        );
        assert_eq!(
            render(
                "{{ 1 + 2 * 3 }}{{ 'a' ~ 1 ~ none }}{{ ([1] + [2])|length }}{{ {'a': {'b': 4}}.a.b }}{{ 'ab' * 2 }}"
            )
            .unwrap(),
            "7a1None24abab"
        );
        assert_eq!(render("{{ strftime_now('%Y') | length }}").unwrap(), "4");
        assert_eq!(
            render("{% for m in range(9) %}\n{% if m == 2 %}{% break %}{% endif %}\nx\n{% endfor %}").unwrap(),
            "x\nx\n"
        );
    }

    #[test]
    fn a_template_that_refuses_is_told_from_one_that_is_broken() {
        let refused = render("{{ raise_exception('roles must alternate') }}").unwrap_err();
        assert!(
            matches!(&refused, TextError::TemplateRefused(m) if m == "roles must alternate"),
            "{refused:?}"
        );
        assert!(matches!(render("{{ nothing.at.all }}"), Err(TextError::Template(_))));
        assert!(matches!(
            render("{{ strftime_now('%Q!') }}"),
            Err(TextError::Template(_))
        ));
        assert!(matches!(
            ChatTemplate::new("{% if %}".into(), String::new(), String::new()),
            Err(TextError::Template(_))
        ));
    }

    #[test]
    fn a_template_cannot_run_forever() {
        let nested = "{% for a in range(9000) %}{% for b in range(9000) %}{% for c in range(9000) %}{% endfor %}{% endfor %}{% endfor %}";
        assert!(matches!(render(nested), Err(TextError::Template(m)) if m.contains("fuel")));
    }

    #[test]
    fn a_template_cannot_fill_the_memory() {
        let grows = |step: &str| {
            format!(
                "{{% set ns = namespace(x='aa', l=['a']) %}}{{% for i in range(60) %}}{step}{{% endfor %}}{{{{ ns.x|length }}}}"
            )
        };
        for step in [
            "{% set ns.x = ns.x ~ ns.x %}",
            "{% set ns.x = ns.x + ns.x %}",
            "{% set ns.x = ns.x * 9 %}",
            "{% set ns.x = ns.x | replace('a', ns.x) %}",
            "{% set ns.x = ns.x.replace('a', 'aa') %}",
            "{% set ns.x = [ns.x, ns.x] | join %}",
            "{% set ns.x = ns.x.join([ns.x, ns.x]) %}",
            "{% set ns.x = [ns.x, ns.x] | string %}",
            "{% set ns.x = [ns.x, ns.x] | tojson %}",
            "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}",
            "{% set ns.l = [ns.l, ns.l] %}",
        ] {
            let error = render(&grows(step)).unwrap_err();
            assert!(
                matches!(&error, TextError::Template(m) if m.contains("bytes of text")),
                "{step}: {error}"
            );
        }
        for whole in [
            "{% set x = 'a' * 1000000 %}{% set ns = namespace(l=[]) %}{% for i in range(900) %}{% set ns.l = ns.l + [x|upper] %}{% endfor %}",
            "{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('a') }}",
            "{{ 'a' | indent(1000000000) }}",
            "{{ ''[::-1] }}",
            "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns | replace('a', ns) }}",
            "{% set ns = namespace() %}{% set ns.x = ns %}{{ 'a'.replace('a', ns) }}",
            "{% set ns = namespace() %}{% set ns.x = ns %}{{ ['a', 'b'] | join(ns) }}",
            "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns | safe }}",
            "{% set ns = namespace() %}{% set ns.x = ns %}{{ none | default(ns, true) }}",
            "{{ ['a'] * 100000000 }}",
            "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
            "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns | tojson }}",
            "{% set ns = namespace() %}{% set ns.x = ns %}{{ raise_exception(ns) }}",
            "{% set ns = namespace() %}{% set ns.x = ns %}{{ [ns, ns] | unique | list }}",
            "{% set x = 'a' * 1000000 %}{{ x.split('') }}",
            "{% set x = 'a' * 1000000 %}{{ x | list | length }}",
            "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns == [ns] or ns is eq namespace(x=ns) }}",
            "{% set ns = namespace(l=(1,)) %}{% for i in range(60) %}{% set ns.l = (ns.l, ns.l) %}{% endfor %}{{ ns.l == ns.l }}",
            "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{{ 2 in ns.l }}",
            "{% set ns = namespace(l=['a']) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l == ns.l }}",
            "{% set ns = namespace(l=['a']) %}{% for i in range(60) %}{% set ns.l = {'a': ns.l, 'b': ns.l} %}{% endfor %}{{ ns.l|string }}",
        ] {
            assert!(matches!(render(whole), Err(TextError::Template(_))), "{whole}");
        }
    }

    #[test]
    fn a_template_cannot_nest_without_end() {
        let nested = "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}done";
        assert!(matches!(render(nested), Err(TextError::Template(m)) if m.contains("into one another")));
    }

    #[test]
    fn a_folder_gives_its_template_in_any_of_three_ways() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let rendered = || {
            ChatTemplate::open(folder.path())
                .unwrap()
                .map(|t| t.render(&[], false).unwrap())
        };
        assert_eq!(rendered(), None);
        write(
            "tokenizer_config.json",
            r#"{"bos_token": {"content": "<b>"}, "chat_template": "one {{ bos_token }}"}"#,
        );
        assert_eq!(rendered().as_deref(), Some("one <b>"));
        write(
            "tokenizer_config.json",
            r#"{"chat_template": [{"name": "tool", "template": "no"}, {"name": "default", "template": "two"}]}"#,
        );
        assert_eq!(rendered().as_deref(), Some("two"));
        write("chat_template.jinja", "three");
        assert_eq!(rendered().as_deref(), Some("three"));
    }
}
