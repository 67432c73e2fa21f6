//! Faults that a request asks for by its id, so that tests can see what becomes of it and of the others. Compiled into
//! tests and into builds with the feature `fault-injection`, and into no other.

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A logit of its row is not a number.
    NotANumber,
    /// A logit of its row is infinite.
    Infinity,
    /// Its sampler panics.
    Sampler,
    /// A forward pass with its row fails.
    Step,
    /// A forward pass with its row panics.
    StepPanic,
    /// A forward pass with its row, once, has no memory for more than one token.
    OutOfMemory,
    /// A forward pass with its row ends only when nobody waits for it any more.
    Hang,
    /// The device is lost in a forward pass with its row.
    DeviceLost,
    /// The engine's thread panics.
    Engine,
    /// The HTTP handler panics.
    Handler,
    /// The HTTP handler panics with its prompt's text in the message, as slicing the text out of its bounds would.
    Quote,
    /// Making text of its token panics.
    Detokenizer,
    /// Loading the model that has this name panics.
    Loader,
}

const NAMES: [(&str, Fault); 13] = [
    ("nan", Fault::NotANumber),
    ("infinity", Fault::Infinity),
    ("sampler", Fault::Sampler),
    ("step", Fault::Step),
    ("step-panic", Fault::StepPanic),
    ("out-of-memory", Fault::OutOfMemory),
    ("hang", Fault::Hang),
    ("device-lost", Fault::DeviceLost),
    ("engine", Fault::Engine),
    ("handler", Fault::Handler),
    ("quote", Fault::Quote),
    ("detokenizer", Fault::Detokenizer),
    ("loader", Fault::Loader),
];

impl Fault {
    /// The fault that a request id asks for, and after how many generated tokens: `fault.NAME.TOKENS`, whatever follows.
    pub fn of(id: &str) -> Option<(Self, usize)> {
        let mut parts = id.strip_prefix("fault.")?.split('.');
        let name = parts.next()?;
        let (_, fault) = NAMES.iter().find(|(known, _)| *known == name)?;
        Some((*fault, parts.next()?.parse().ok()?))
    }

    /// Panics if the request asks for this fault after `tokens` tokens.
    pub fn panic_if_asked(self, id: &str, tokens: usize) {
        if Self::of(id) == Some((self, tokens)) {
            panic!("injected: {self:?}")
        }
    }

    /// Panics with this text if the request asks for that.
    pub fn quote_if_asked(id: &str, text: impl FnOnce() -> String) {
        if Self::of(id) == Some((Self::Quote, 0)) {
            panic!("injected: {}", text())
        }
    }
}
