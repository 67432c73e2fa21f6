//! HTTP: routes, OpenAI types, server-sent events, errors, limits. Knows no tensor.
