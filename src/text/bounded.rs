//! Chat templates that cannot take the machine: a model's file is not trusted to write a template that ends, or one that
//! makes little text.
//!
//! minijinja counts instructions, but one instruction can double a text, and thirty of those fill the memory. So the
//! operators that make texts are exchanged, once a template is compiled, for filters that count what they make, and so
//! is everything that is written out.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};

use minijinja::machinery::{CodeGenerator, Instruction, Instructions, eval, make_string_output, parse};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Serde, Tuple, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Output, State, Value, context};
use serde::{Serialize, Serializer};

use super::Message;

/// Bytes of text that one rendering may make, what it throws away again included: so much, and so much more for each
/// byte of the messages, whose number has a bound of its own.
const TEXT_ONCE: usize = 8 << 20;
const TEXT_A_BYTE: usize = 16;
/// What an item of a list takes besides its text.
const ITEM: usize = 64;
/// A template's source: the longest in use have some 20 KB.
const MOST_SOURCE: usize = 256 << 10;
/// Instructions for what a template does once, and for each message. Real ones take a tenth of it.
const FUEL_ONCE: u64 = 50_000;
const FUEL_A_MESSAGE: u64 = 1_000;
/// Lists and maps within one another.
const DEPTH: usize = 32;
/// Macros within macros.
const RECURSION: usize = 64;
const NAME: &str = "chat";

/// Filters that make about as much as they take, and the functions that call them and count it.
const FILTERS: [(&str, &str); 34] = [
    ("abs", "|abs"),
    ("attr", "|attr"),
    ("capitalize", "|capitalize"),
    ("chain", "|chain"),
    ("d", "|d"),
    ("default", "|default"),
    ("dictsort", "|dictsort"),
    ("e", "|e"),
    ("escape", "|escape"),
    ("float", "|float"),
    ("groupby", "|groupby"),
    ("int", "|int"),
    ("list", "|list"),
    ("lines", "|lines"),
    ("lower", "|lower"),
    ("map", "|map"),
    ("max", "|max"),
    ("min", "|min"),
    ("reject", "|reject"),
    ("rejectattr", "|rejectattr"),
    ("reverse", "|reverse"),
    ("safe", "|safe"),
    ("select", "|select"),
    ("selectattr", "|selectattr"),
    ("sort", "|sort"),
    ("split", "|split"),
    ("string", "|string"),
    ("sum", "|sum"),
    ("title", "|title"),
    ("tojson", "|tojson"),
    ("trim", "|trim"),
    ("unique", "|unique"),
    ("upper", "|upper"),
    ("zip", "|zip"),
];

thread_local! {
    /// The bytes of text that are left to the rendering that this thread runs: filters have nowhere else to keep it.
    static LEFT: Cell<usize> = const { Cell::new(0) };
}

/// A compiled template.
#[derive(Debug)]
pub(super) struct Program {
    instructions: Instructions<'static>,
    blocks: BTreeMap<&'static str, Instructions<'static>>,
}

impl Program {
    /// Compiles a template. Its source stays in memory for good: a program holds references into it, and a server loads
    /// few models.
    pub fn compile(source: String, syntax: SyntaxConfig) -> Result<Self, Error> {
        if source.len() > MOST_SOURCE {
            let message = format!("it has {} bytes; the most is {MOST_SOURCE}", source.len());
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
        let source: &'static str = source.leak();
        let tree = parse(source, NAME, syntax)?;
        let mut generator = CodeGenerator::new(NAME, source);
        generator.compile_stmt(&tree);
        let (mut instructions, mut blocks) = generator.finish();
        bound(&mut instructions)?;
        blocks.values_mut().try_for_each(bound)?;
        Ok(Self { instructions, blocks })
    }

    /// Renders with these variables, `messages` among them.
    pub fn render(
        &self,
        environment: &Environment<'static>,
        root: Value,
        messages: &[Message],
    ) -> Result<String, Error> {
        let mut environment = environment.clone();
        environment.set_fuel(Some(FUEL_ONCE + FUEL_A_MESSAGE * messages.len() as u64));
        let bytes: usize = messages.iter().map(|message| message.content.len()).sum();
        LEFT.set(TEXT_ONCE + TEXT_A_BYTE * bytes);
        // minijinja panics on some expressions that no template needs, such as an empty text backwards. Nothing of this
        // rendering is used then, and nothing but this rendering was changed by it.
        let rendered = catch_unwind(AssertUnwindSafe(|| self.run(&environment, root)));
        rendered.unwrap_or_else(|_| {
            let message = "it makes the renderer panic";
            Err(Error::new(ErrorKind::InvalidOperation, message))
        })
    }

    fn run(&self, environment: &Environment<'static>, root: Value) -> Result<String, Error> {
        let mut text = String::new();
        let mut output = make_string_output(&mut text);
        eval(
            environment,
            &self.instructions,
            root,
            &self.blocks,
            &mut output,
            AutoEscape::None,
        )?;
        Ok(text)
    }
}

/// Adds to an environment what the exchanged instructions call.
pub(super) fn prepare(environment: &mut Environment<'static>) {
    environment.set_recursion_limit(RECURSION);
    environment.set_formatter(emit);
    environment.add_filter("sconce_concat", |a: Value, b: Value| {
        weigh_unless_text(&a)?;
        weigh_unless_text(&b)?;
        made(format_args!("{a}{b}"))
    });
    environment.add_filter("sconce_add", add);
    environment.add_filter("sconce_mul", mul);
    environment.add_filter("replace", |text: Value, from: Value, to: Value| {
        replaced(&text_of(&text)?, &from, &to)
    });
    environment.add_filter("join", join);
    environment.add_filter("indent", indent);
    // Of these one call can make much out of little, and no chat needs them.
    for name in ["format", "center", "pprint", "urlencode", "batch", "slice"] {
        environment.remove_filter(name);
    }
    for name in ["lower", "upper"] {
        environment.remove_test(name);
    }
    environment.remove_global("debug");
    environment.add_function("|list of", list_of);
    environment.add_function("|map of", map_of);
    environment.add_function("|tuple of", tuple_of);
    environment.add_function("dict", dict);
    add_comparisons(environment);
    for (filter, function) in FILTERS {
        environment.add_function(function, |state: &mut State, args: Rest<Value>, named: Kwargs| {
            let mut args = args.0;
            weigh_all(&args)?;
            if let [value, rest @ ..] = args.as_slice() {
                charge_pieces(filter, value, rest)?;
            }
            if named.args().next().is_some() {
                weigh(&Value::from(named.clone()), DEPTH)?;
                args.push(named.into());
            }
            let value = state.apply_filter(filter, &args)?;
            weigh(&value, DEPTH).map(|()| value)
        });
    }
}

/// What a template calls as a method of a value: Python's methods, with those that can make much of little counted.
pub(super) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match (name, value.as_str(), args) {
        ("replace", Some(text), [from, to]) => replaced(text, from, to),
        ("join", Some(_), [items]) => join(items.clone(), Some(value.clone())),
        ("format" | "ljust" | "rjust" | "center" | "zfill" | "expandtabs", Some(_), _) => Err(Error::new(
            ErrorKind::UnknownMethod,
            format!("string has no method named {name}"),
        )),
        _ => {
            weigh_all(args)?;
            charge_pieces(name, value, args)?;
            let made = minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)?;
            weigh(&made, DEPTH).map(|()| made)
        }
    }
}

/// Exchanges what can make much of little, or take long over it, for what counts.
fn bound(instructions: &mut Instructions<'static>) -> Result<(), Error> {
    let mut at = 0;
    while let Some(instruction) = instructions.get_mut(at) {
        if let Instruction::CompareAndPreserve(_) = instruction {
            let message = "comparisons in a chain, as in `a < b < c`, are not supported";
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
        if let Some(counted) = counted(instruction) {
            *instruction = counted;
        }
        at += 1;
    }
    Ok(())
}

fn counted(instruction: &Instruction<'static>) -> Option<Instruction<'static>> {
    // No slot of those in which filters are remembered by name.
    const UNKEPT: u8 = u8::MAX;
    let operator = |filter| Some(Instruction::ApplyFilter(filter, Some(2), UNKEPT));
    let function = |name, count: usize| Some(Instruction::CallFunction(name, Some(u16::try_from(count).ok()?)));
    match instruction {
        Instruction::StringConcat => operator("sconce_concat"),
        Instruction::Add => operator("sconce_add"),
        Instruction::Mul => operator("sconce_mul"),
        Instruction::Eq => operator("sconce_eq"),
        Instruction::Ne => operator("sconce_ne"),
        Instruction::Lt => operator("sconce_lt"),
        Instruction::Lte => operator("sconce_le"),
        Instruction::Gt => operator("sconce_gt"),
        Instruction::Gte => operator("sconce_ge"),
        Instruction::In => operator("sconce_in"),
        Instruction::BuildList(Some(count)) => function("|list of", *count),
        Instruction::BuildTuple(Some(count)) => function("|tuple of", *count),
        Instruction::BuildMap(pairs) => function("|map of", 2 * *pairs),
        Instruction::ApplyFilter(name, count, _) => {
            let known = FILTERS.iter().find(|(filter, _)| filter == name);
            known.map(|(_, function)| Instruction::CallFunction(function, *count))
        }
        _ => None,
    }
}

fn too_much() -> Error {
    let message = "it makes too many bytes of text out of these messages";
    Error::new(ErrorKind::InvalidOperation, message)
}

fn charge(bytes: usize) -> Result<(), Error> {
    let left = LEFT.get().checked_sub(bytes).ok_or_else(too_much)?;
    LEFT.set(left);
    Ok(())
}

/// Charges for a value all that it shows, and refuses one that holds itself: whoever writes, compares or drops it goes
/// through all of that.
fn weigh(value: &Value, depth: usize) -> Result<(), Error> {
    if let Some(text) = value.as_str() {
        return charge(text.len());
    }
    charge(ITEM)?;
    let holds = matches!(
        value.kind(),
        ValueKind::Seq | ValueKind::Iterable | ValueKind::Map | ValueKind::Plain
    );
    let Some(items) = value.try_iter().ok().filter(|_| holds) else {
        return Ok(());
    };
    if depth == 0 {
        let message = format!("it puts more than {DEPTH} lists into one another");
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    for item in items {
        weigh(&item, depth - 1)?;
        if value.kind() == ValueKind::Map {
            weigh(&value.get_item(&item)?, depth - 1)?;
        }
    }
    Ok(())
}

fn weigh_all(values: &[Value]) -> Result<(), Error> {
    values.iter().try_for_each(|value| weigh(value, DEPTH))
}

/// The pairs of a map as its instruction finds them: key, value, key, value.
fn map_of(pairs: Rest<Value>) -> Result<Value, Error> {
    weigh_all(&pairs)?;
    Ok(Value::from(Serde(Pairs(pairs.0))))
}

/// Keys and values in turn, which become a map in their order.
struct Pairs(Vec<Value>);

impl Serialize for Pairs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.chunks_exact(2).map(|pair| (&pair[0], &pair[1])))
    }
}

fn tuple_of(items: Rest<Value>) -> Result<Value, Error> {
    weigh_all(&items)?;
    Ok(Value::from(Tuple::from(items.0)))
}

fn dict(value: Option<Value>, named: Kwargs) -> Result<Value, Error> {
    weigh_all(value.as_slice())?;
    weigh(&Value::from(named.clone()), DEPTH)?;
    minijinja::functions::dict(value, named)
}

fn list_of(items: Rest<Value>) -> Result<Value, Error> {
    weigh_all(&items)?;
    Ok(Value::from(items.0))
}

/// A text that is charged as it grows.
struct Counted<'a>(&'a mut dyn Write);

impl Write for Counted<'_> {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        charge(part.len()).map_err(|_| fmt::Error)?;
        self.0.write_str(part)
    }
}

/// Charges for the list that a text is to be cut into, before it is: a short piece takes more than its bytes.
fn charge_pieces(name: &str, value: &Value, args: &[Value]) -> Result<(), Error> {
    let Some(text) = value.as_str() else {
        return Ok(());
    };
    let pieces = match (name, args.first().and_then(Value::as_str)) {
        ("split", Some(by)) => text.matches(by).count() + 1,
        ("split" | "splitlines" | "lines", _) => text.split_whitespace().count() + text.lines().count(),
        ("list" | "map" | "sort" | "unique" | "zip" | "groupby" | "min" | "max", _) => text.len(),
        _ => 0,
    };
    charge(pieces.saturating_mul(ITEM))
}

/// The value as text, if that is not too much.
pub(super) fn text_of(value: &Value) -> Result<String, Error> {
    weigh_unless_text(value)?;
    Ok(value.to_string())
}

fn weigh_unless_text(value: &Value) -> Result<(), Error> {
    value.as_str().map_or_else(|| weigh(value, DEPTH), |_| Ok(()))
}

fn made(text: fmt::Arguments) -> Result<Value, Error> {
    let mut made = String::new();
    Counted(&mut made).write_fmt(text).map_err(|_| too_much())?;
    Ok(Value::from(made))
}

fn emit(output: &mut Output, _: &mut State, value: &Value) -> Result<(), Error> {
    weigh_unless_text(value)?;
    write!(Counted(output), "{value}").map_err(|_| too_much())
}

fn replaced(text: &str, from: &Value, to: &Value) -> Result<Value, Error> {
    let (from, to) = (&text_of(from)?, &text_of(to)?);
    let found = text.matches(from).count();
    charge(found.saturating_mul(to.len()).saturating_add(text.len()))?;
    Ok(Value::from(text.replace(from, to)))
}

fn join(items: Value, with: Option<Value>) -> Result<Value, Error> {
    let with = with.map_or(Ok(String::new()), |with| text_of(&with))?;
    let mut made = String::new();
    weigh_unless_text(&items)?;
    for (i, item) in items.try_iter()?.enumerate() {
        let with = if i == 0 { "" } else { with.as_str() };
        write!(Counted(&mut made), "{with}{item}").map_err(|_| too_much())?;
    }
    Ok(Value::from(made))
}

/// Jinja's `indent`: each line but the first `width` deeper, empty ones only if `blank`.
fn indent(
    text: Value,
    width: Option<usize>,
    first: Option<bool>,
    blank: Option<bool>,
    named: Kwargs,
) -> Result<String, Error> {
    let width = width.or(named.get("width")?).unwrap_or(4);
    let first = first.or(named.get("first")?).unwrap_or(false);
    let blank = blank.or(named.get("blank")?).unwrap_or(false);
    named.assert_all_used()?;
    let text = text_of(&text)?;
    charge(
        text.split('\n')
            .count()
            .saturating_mul(width)
            .saturating_add(text.len()),
    )?;
    let deeper = |(i, line): (usize, &str)| {
        let width = if (i > 0 || first) && (blank || !line.is_empty()) {
            width
        } else {
            0
        };
        " ".repeat(width) + line
    };
    Ok(text.split('\n').enumerate().map(deeper).collect::<Vec<_>>().join("\n"))
}

fn add(state: &mut State, a: Value, b: Value) -> Result<Value, Error> {
    if let (Some(a), Some(b)) = (a.as_str(), b.as_str()) {
        return made(format_args!("{a}{b}"));
    }
    weigh_all(&[a.clone(), b.clone()])?;
    plain(state, "a + b", a, b)
}

fn mul(state: &mut State, a: Value, b: Value) -> Result<Value, Error> {
    let (value, times) = if b.kind() == ValueKind::Number {
        (&a, &b)
    } else {
        (&b, &a)
    };
    if let (Some(length), Some(times)) = (value.as_str().map(str::len).or(value.len()), times.as_usize()) {
        let each = if value.as_str().is_some() { 1 } else { ITEM };
        charge(length.saturating_mul(times).saturating_mul(each))?;
    }
    weigh_all(&[a.clone(), b.clone()])?;
    plain(state, "a * b", a, b)
}

/// Whether `item in container`.
fn contains(state: &State, item: Value, container: Value) -> Result<bool, Error> {
    if let (Some(item), Some(container)) = (item.as_str(), container.as_str()) {
        charge(container.len())?;
        return Ok(container.contains(item));
    }
    weigh_all(&[item.clone(), container.clone()])?;
    plain(state, "a in b", item, container).map(|found| found.is_true())
}

/// What minijinja itself makes of it.
fn plain(state: &State, expression: &'static str, a: Value, b: Value) -> Result<Value, Error> {
    state.env().compile_expression(expression)?.eval(context! { a, b })
}

type Compare = fn(&Value, &Value) -> bool;

/// Comparisons, under the names of their filter and of their tests.
const COMPARISONS: [(&str, &[&str], Compare); 6] = [
    ("sconce_eq", &["eq", "equalto", "=="], |a, b| a == b),
    ("sconce_ne", &["ne", "!="], |a, b| a != b),
    ("sconce_lt", &["lt", "lessthan", "<"], |a, b| a < b),
    ("sconce_le", &["le", "<="], |a, b| a <= b),
    ("sconce_gt", &["gt", "greaterthan", ">"], |a, b| a > b),
    ("sconce_ge", &["ge", ">="], |a, b| a >= b),
];

fn add_comparisons(environment: &mut Environment<'static>) {
    for (filter, tests, compare) in COMPARISONS {
        let compare = move |a: Value, b: Value| {
            weigh_all(&[a.clone(), b.clone()])?;
            Ok::<_, Error>(compare(&a, &b))
        };
        environment.add_filter(filter, compare);
        for test in tests {
            environment.add_test(*test, compare);
        }
    }
    environment.add_filter("sconce_in", |state: &mut State, a: Value, b: Value| {
        contains(state, a, b)
    });
    environment.add_test("in", |state: &mut State, a: Value, b: Value| contains(state, a, b));
}
