//! Every setting once: flag, environment variable, TOML key, default, range and meaning.
