//! Chat templates: any messages through the default model's, and templates that nobody of good will would write.

use std::path::Path;
use std::sync::LazyLock;

use proptest::prelude::*;
use sconce::text::{ChatTemplate, Message};

use super::{TOKENIZER, VOCABULARY, config, within_memory};

static DEFAULT: LazyLock<ChatTemplate> = LazyLock::new(|| {
    ChatTemplate::open(Path::new(VOCABULARY))
        .expect("the fixture")
        .expect("a template")
});

fn messages() -> impl Strategy<Value = Vec<Message>> {
    let text = || {
        prop_oneof![
            "\\PC{0,30}",
            "(<\\|im_start\\|>|<\\|im_end\\|>|<\\||\\|>|system|\\n|\u{FDD0}| ){0,10}"
        ]
    };
    let message = (
        prop::sample::select(vec!["system", "user", "assistant", "tool"]),
        text(),
        prop::option::of(text()),
    );
    let message = message.prop_map(|(role, content, name)| Message {
        role: role.to_owned(),
        content,
        name,
        tool_call_id: None,
    });
    prop::collection::vec(message, 0..8)
}

/// Statements that call, nest, double and loop, put together at random.
fn hostile() -> impl Strategy<Value = String> {
    let expression = prop::sample::select(vec![
        "x",
        "ns.x",
        "ns",
        "messages",
        "m.content",
        "x ~ x",
        "ns.x ~ ns.x",
        "ns.x + ns.x",
        "ns.x * 99",
        "ns.x * ns.x",
        "[ns.x, ns.x]",
        "{'a': ns.x, 'b': ns.x}",
        "(ns.x, ns.x)",
        "range(9999)",
        "range(99999999)",
        "ns.x | list",
        "ns.x | string",
        "ns.x | tojson",
        "ns.x | join(ns.x)",
        "ns.x | replace('a', ns.x)",
        "ns.x.replace('', ns.x)",
        "ns.x.split('')",
        "ns.x | upper",
        "ns.x | reverse",
        "ns.x | sort",
        "ns.x | map('upper') | list",
        "ns.x == ns.x",
        "ns.x in ns.x",
        "ns.x[::-1]",
        "ns.x[:-1]",
        "f(ns.x)",
        "dict(a=ns.x)",
        "namespace(x=ns.x)",
        "ns.x | items",
        "ns.x | dictsort",
        "9 ** 99999",
        "99999999999999999999 * 9",
        "1 / 0",
        "-1 % 0",
        "'%s' % ns.x",
        "ns.x | length",
        "strftime_now('%Y%Q')",
        "raise_exception(ns.x)",
        "ns.x | indent(99999)",
        "ns.x | unique | list",
        "x | default(ns.x)",
        "ns.x | groupby('a')",
        "ns.x.items()",
        "ns.x | zip(ns.x) | list",
        "ns.x | batch(9) | list",
        "ns.x | first",
        "ns.x | attr('x')",
        "loop.index",
        "ns.x | sum",
        "ns.x | min",
        "'a' * 9999",
        "ns.x | title",
        "cycler(ns.x)",
    ]);
    let statement = (0..9usize, expression).prop_map(|(kind, e)| match kind {
        0 => format!("{{{{ {e} }}}}"),
        1 | 2 => format!("{{% set ns.x = {e} %}}"),
        3 => format!("{{% set x = {e} %}}"),
        4 => format!("{{% set ns.x %}}{{{{ {e} }}}}{{{{ {e} }}}}{{% endset %}}"),
        5 => format!("{{% if {e} %}}{{% set ns.x = [ns.x] %}}{{% endif %}}"),
        6 => format!("{{% for m in {e} %}}{{% set ns.x = ns.x ~ m %}}{{% endfor %}}"),
        7 => format!("{{% filter upper %}}{{{{ {e} }}}}{{% endfilter %}}"),
        _ => format!("{{% for i in range(40) %}}{{% set ns.x = {e} %}}{{% endfor %}}"),
    });
    let body = prop::collection::vec(statement, 1..8).prop_map(|parts| parts.concat());
    (body, 0..4usize).prop_map(|(body, around)| {
        let begin = "{% set ns = namespace(x='aa') %}{% set x = 'b' %}";
        match around {
            0 => format!("{begin}{body}"),
            1 => format!("{begin}{{% for i in range(60) %}}{body}{{% endfor %}}"),
            2 => format!("{begin}{{% macro f(x) %}}{body}{{% endmacro %}}{{{{ f(ns.x) }}}}"),
            _ => format!("{begin}{{% for m in messages recursive %}}{body}{{{{ loop(messages) }}}}{{% endfor %}}"),
        }
    })
}

/// What a model's folder with this template makes of the messages.
fn render(template: &str, messages: &[Message]) -> Option<usize> {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("chat_template.jinja"), template).expect("writes");
    let template = ChatTemplate::open(folder.path()).ok().flatten()?;
    template.render(messages, true).ok().map(|text| text.len())
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn any_messages_render_and_open_no_turn(messages in messages()) {
        LazyLock::force(&DEFAULT);
        let (honest, marked) = within_memory(|| {
            let with = |text: fn(&str) -> String| {
                let each = |message: &Message| Message { content: text(&message.content), ..message.clone() };
                let text = DEFAULT.render(&messages.iter().map(each).collect::<Vec<_>>(), true).expect("renders");
                TOKENIZER.encode_chat(&text, false).expect("has tokens")
            };
            (with(|_| "x".into()), with(|text| TOKENIZER.defuse(text).into_owned()))
        });
        let control = |ids: &[u32]| ids.iter().filter(|id| TOKENIZER.is_special(**id)).count();
        prop_assert_eq!(control(&honest), control(&marked));
    }

    #[test]
    fn a_hostile_template_is_rendered_or_refused(template in hostile(), messages in messages()) {
        within_memory(|| render(&template, &messages));
    }

    #[test]
    fn what_is_no_template_is_refused(template in "(\\{%|%\\}|\\{\\{|\\}\\}|for|in|if|endif|x|'|\\(|\\)|\\[|~|\\|| |\\PC){0,40}") {
        within_memory(|| render(&template, &[]));
    }
}
