//! Server-sent events, cut from a byte stream that breaks anywhere.
//!
//! Source: WHATWG HTML, section 9.2 "Server-sent events"; only `data` matters to OpenAI's API.

/// Collects bytes and gives the data of each event that is complete.
#[derive(Debug, Default)]
pub struct Events {
    /// Bytes after the last whole line.
    rest: Vec<u8>,
    data: String,
    has_data: bool,
}

impl Events {
    /// Takes more bytes and calls `found` with the data of every event that they complete.
    pub fn push(&mut self, bytes: &[u8], mut found: impl FnMut(&str)) {
        let mut bytes = bytes;
        while let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
            let (line, after) = bytes.split_at(end);
            bytes = &after[1..];
            if self.rest.is_empty() {
                self.line(line, &mut found);
            } else {
                let mut whole = std::mem::take(&mut self.rest);
                whole.extend_from_slice(line);
                self.line(&whole, &mut found);
            }
        }
        self.rest.extend_from_slice(bytes);
    }

    fn line(&mut self, line: &[u8], found: &mut impl FnMut(&str)) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            if std::mem::take(&mut self.has_data) {
                found(&self.data);
                self.data.clear();
            }
        } else if let Some(data) = line.strip_prefix(b"data:") {
            if self.has_data {
                self.data.push('\n');
            }
            let data = data.strip_prefix(b" ").unwrap_or(data);
            self.data.push_str(&String::from_utf8_lossy(data));
            self.has_data = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &[u8] =
        ": comment\r\ndata: {\"a\":\"é\"}\r\n\r\nevent: x\ndata: one\ndata:two\n\n\n\ndata: [DONE]\n\ndata: cut"
            .as_bytes();

    #[test]
    fn events_do_not_depend_on_where_the_bytes_break() {
        for size in 1..=STREAM.len() {
            let (mut events, mut found) = (Events::default(), Vec::new());
            for piece in STREAM.chunks(size) {
                events.push(piece, |data| found.push(data.to_owned()));
            }
            assert_eq!(found, ["{\"a\":\"é\"}", "one\ntwo", "[DONE]"], "{size}");
        }
    }
}
