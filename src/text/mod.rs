//! From text to tokens and back: chat template, tokenizer, incremental detokenizer, stop strings.
