//! A server of known behaviour: a thread a connection, because a thread's sleep is exact to some ten microseconds.
#![allow(dead_code)] // each test program uses its own part

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use sconce_loadtest::{
    Live,
    arrivals::Arrivals,
    client::{Api, Form, Target},
    run::{Asked, Load, Measured, run},
    workload::{Preset, Vocabulary},
};

/// What a generation request gets.
pub struct Reply {
    pub wait: Duration,
    pub status: u16,
    /// Pieces of the body with the pause before each; without any the connection ends and nothing is answered.
    pub parts: Vec<(Duration, String)>,
    /// Does the body end as HTTP wants it, or does the connection break?
    pub whole: bool,
}

/// An event of a stream with one token.
pub fn token(text: &str) -> String {
    format!("data: {{\"choices\":[{{\"index\":0,\"text\":\"{text}\",\"finish_reason\":null}}]}}\n\n")
}

pub const END: &str = "data: {\"choices\":[{\"index\":0,\"text\":\"\",\"finish_reason\":\"length\"}]}\n\n\
    data: {\"choices\":[],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":2,\"total_tokens\":7}}\n\ndata: [DONE]\n\n";

impl Reply {
    /// Two tokens at once, after a wait.
    pub fn after(wait: Duration) -> Self {
        Self::stream(wait, vec![(Duration::ZERO, token(" a") + &token(" b") + END)])
    }

    pub fn stream(wait: Duration, parts: Vec<(Duration, String)>) -> Self {
        Self {
            wait,
            status: 200,
            parts,
            whole: true,
        }
    }

    /// No answer: the connection ends.
    pub fn none() -> Self {
        Self::stream(Duration::ZERO, Vec::new())
    }

    pub fn status(status: u16) -> Self {
        Self {
            status,
            ..Self::stream(Duration::ZERO, vec![(Duration::ZERO, "{\"error\":{}}".to_owned())])
        }
    }
}

pub struct Mock {
    pub url: String,
    /// The bodies of generation requests, in the order in which they came.
    pub bodies: Arc<Mutex<Vec<String>>>,
}

impl Mock {
    /// Answers the n-th generation request (from 0) with `reply(n)`, called when the request has been read.
    pub fn start(reply: impl Fn(usize) -> Reply + Send + Sync + 'static) -> Self {
        Self::serve("http", |stream| stream, reply)
    }

    /// One that another process started.
    pub fn at(url: &str) -> Self {
        Self {
            url: url.to_owned(),
            bodies: Arc::default(),
        }
    }

    fn serve<S: Read + Write + 'static>(
        scheme: &str,
        wrap: impl Fn(TcpStream) -> S + Send + Sync + 'static,
        reply: impl Fn(usize) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("{scheme}://{}", listener.local_addr().unwrap());
        let wrap = Arc::new(wrap);
        let (reply, count) = (Arc::new(reply), Arc::new(AtomicUsize::new(0)));
        let bodies = Arc::new(Mutex::new(Vec::new()));
        let kept = bodies.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (wrap, reply, count, bodies) = (wrap.clone(), reply.clone(), count.clone(), kept.clone());
                thread::spawn(move || {
                    stream.set_nodelay(true).unwrap();
                    connection(wrap(stream), &*reply, &count, &bodies)
                });
            }
        });
        Self { url, bodies }
    }

    /// The same over TLS, with a certificate that nobody has signed.
    pub fn start_secret(reply: impl Fn(usize) -> Reply + Send + Sync + 'static) -> Self {
        let signed = rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        let key = rustls::pki_types::PrivatePkcs8KeyDer::from(signed.signing_key.serialize_der());
        sconce_loadtest::tls::prepare();
        let settings = rustls::ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![signed.cert.der().clone()], key.into())
            .unwrap();
        let settings = Arc::new(settings);
        let over_tls = move |stream| {
            let tls = rustls::ServerConnection::new(settings.clone()).unwrap();
            rustls::StreamOwned::new(tls, stream)
        };
        Self::serve("https", over_tls, reply)
    }

    pub fn asked(&self, timeout: Duration) -> Asked {
        let mut workload = Preset::Completion.workload();
        workload.api = Api::Completions;
        Asked {
            target: Target::new(&self.url, None, timeout).unwrap(),
            form: Form {
                model: "mock".to_owned(),
                stream: true,
                ignore_eos: true,
            },
            workload: Arc::new(workload),
            vocabulary: Arc::new(Vocabulary::estimated()),
        }
    }
}

/// One server that takes requests in the order in which they come, each for its service time.
pub struct Queue {
    free_at: Mutex<Instant>,
    service: Box<dyn Fn(usize) -> Duration + Send + Sync>,
}

impl Queue {
    pub fn new(service: impl Fn(usize) -> Duration + Send + Sync + 'static) -> Self {
        Self {
            free_at: Mutex::new(Instant::now()),
            service: Box::new(service),
        }
    }

    pub fn reply(&self, index: usize) -> Reply {
        let now = Instant::now();
        let mut free_at = self.free_at.lock().unwrap();
        *free_at = now.max(*free_at) + (self.service)(index);
        Reply::after(*free_at - now)
    }
}

/// Sends requests and waits for all answers.
pub fn drive(asked: &Asked, arrivals: Arrivals, requests: u64) -> Measured {
    let load = Load {
        arrivals,
        requests: Some(requests),
        duration: None,
        warmup: Duration::ZERO,
        seed: 11,
        part: 0,
    };
    let (_sender, mut stop) = tokio::sync::watch::channel(false);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let asked = asked.clone();
    let task = runtime.spawn(async move { run(&asked, &load, &mut Live::new(), &mut stop, None).await });
    runtime.block_on(task).unwrap()
}

fn connection(
    stream: impl Read + Write,
    reply: &dyn Fn(usize) -> Reply,
    count: &AtomicUsize,
    bodies: &Mutex<Vec<String>>,
) {
    let mut reader = BufReader::new(stream);
    while let Some((path, body)) = request(&mut reader) {
        let writer = reader.get_mut();
        let done = match path.as_str() {
            "/v1/completions" | "/v1/chat/completions" => {
                let reply = reply(count.fetch_add(1, Ordering::SeqCst));
                bodies.lock().unwrap().push(body);
                answer(writer, reply)
            }
            "/v1/models" => answer(writer, page("{\"data\":[{\"id\":\"mock\"}]}")),
            _ => answer(writer, Reply::status(404)),
        };
        if done.is_none() {
            return;
        }
    }
}

fn page(text: &str) -> Reply {
    Reply::stream(Duration::ZERO, vec![(Duration::ZERO, text.to_owned())])
}

/// The path and the body; `None` when the client has gone.
fn request(reader: &mut BufReader<impl Read>) -> Option<(String, String)> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|&read| read > 0)?;
    let path = line.split_whitespace().nth(1)?.to_owned();
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok().filter(|&read| read > 0)?;
        if header.trim().is_empty() {
            break;
        }
        if let Some(value) = header.to_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some((path, String::from_utf8(body).ok()?))
}

fn answer(writer: &mut impl Write, reply: Reply) -> Option<()> {
    thread::sleep(reply.wait);
    if reply.parts.is_empty() {
        return None;
    }
    let mut bytes = format!("HTTP/1.1 {} X\r\ntransfer-encoding: chunked\r\n\r\n", reply.status).into_bytes();
    for (pause, part) in &reply.parts {
        if !pause.is_zero() {
            let ready = std::mem::take(&mut bytes);
            writer.write_all(&ready).and_then(|()| writer.flush()).ok()?;
            thread::sleep(*pause);
        }
        bytes.extend(format!("{:x}\r\n{part}\r\n", part.len()).bytes());
    }
    if reply.whole {
        bytes.extend(b"0\r\n\r\n");
    }
    writer.write_all(&bytes).and_then(|()| writer.flush()).ok()?;
    reply.whole.then_some(())
}

/// Sends a load and waits for all answers.
pub fn send(asked: &Asked, load: Load) -> Measured {
    let (_sender, mut stop) = tokio::sync::watch::channel(false);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let asked = asked.clone();
    let task = runtime.spawn(async move { run(&asked, &load, &mut Live::new(), &mut stop, None).await });
    runtime.block_on(task).unwrap()
}

/// What each connection brought, headers and all.
pub type Bytes = Arc<Mutex<Vec<Vec<u8>>>>;

/// Keeps the bytes that are read through it, at its connection's place.
struct Kept(TcpStream, Bytes, usize);

impl Read for Kept {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.0.read(buffer)?;
        self.1.lock().unwrap()[self.2].extend(&buffer[..read]);
        Ok(read)
    }
}

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

impl Mock {
    /// The same as `start`; gives what clients sent too.
    pub fn start_keeping(reply: impl Fn(usize) -> Reply + Send + Sync + 'static) -> (Self, Bytes) {
        let bytes = Bytes::default();
        let kept = bytes.clone();
        let keep = move |stream| {
            let mut connections = kept.lock().unwrap();
            connections.push(Vec::new());
            Kept(stream, kept.clone(), connections.len() - 1)
        };
        (Self::serve("http", keep, reply), bytes)
    }

    /// A server that answers at once, and on its metrics page always has one more request that runs.
    pub fn start_never_idle() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let bodies = Arc::new(Mutex::new(Vec::new()));
        let kept = bodies.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let bodies = kept.clone();
                thread::spawn(move || {
                    let mut reader = BufReader::new(stream);
                    while let Some((path, body)) = request(&mut reader) {
                        let reply = match path.as_str() {
                            "/metrics" => page("sconce_running 1\n"),
                            _ => Reply::after(Duration::ZERO),
                        };
                        if answer(reader.get_mut(), reply).is_none() {
                            return;
                        }
                        if path != "/metrics" {
                            bodies.lock().unwrap().push(body);
                        }
                    }
                });
            }
        });
        Self { url, bodies }
    }
}
