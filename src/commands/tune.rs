//! `sconce tune`: short load tests with different settings of one running server.

use std::{
    io::{self, BufRead, BufReader},
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use sconce_loadtest::{
    Live,
    arrivals::Arrivals,
    client::Target,
    files,
    report::{Run, figures::Figure},
    run::{Asked, Load, run as send},
    tune::{self, Experiment, Knobs, Search, Trial, schedules, toml},
    utilisation::settle,
    workload::Workload,
};
use tokio::sync::{oneshot, watch};

use super::{
    OutputError,
    loadtest::{self, LoadtestError},
    say,
    signals::{self, SIGNALLED_TWICE},
};
use crate::config::load::{self, Experiments, Tune, TuneExperiment};

/// A model that is not loaded after this long will not be.
const LOADING: Duration = Duration::from_secs(600);
/// A server that still has requests after this long has them from someone else.
const SETTLING: Duration = Duration::from_secs(120);
const TIMEOUT: Duration = Duration::from_secs(120);

/// Why nothing was tuned.
#[derive(Debug, thiserror::Error)]
pub enum TuneError {
    #[error(transparent)]
    Loadtest(#[from] LoadtestError),
    #[error(transparent)]
    Output(#[from] OutputError),
    #[error("cannot start a server to tune: {0}")]
    Start(#[from] io::Error),
    #[error("the server to tune ended before it was ready; its own words above say why")]
    Ended,
    #[error("{url}/admin/batching answers {answer}; start that server with `--admin`")]
    Admin { url: String, answer: String },
    #[error("{url} still has requests two minutes after the last experiment; tune a server that nobody else uses")]
    Busy { url: String },
    #[error("no experiment was finished")]
    Nothing,
}

/// Runs the command.
///
/// # Errors
/// [`TuneError`]
pub fn run(settings: Tune) -> Result<(), TuneError> {
    let workload = loadtest::workload(&settings.workload, None)?;
    let experiments = &settings.experiments;
    let parents = [&experiments.save_toml, &experiments.save_html].into_iter().flatten();
    let parents = parents.filter_map(|path| path.parent());
    let mut folders = parents.chain(experiments.save_svg.as_deref());
    folders.try_for_each(loadtest::folder)?;
    files::raise_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let measured = runtime.block_on(async {
        let (mut stop, twice) = signals::stop_at(&signals::all_that_end())?;
        tokio::select! {
            measured = serve_and_measure(&settings, workload, &mut stop) => measured.map(Some),
            Ok(()) = twice => Ok(None),
        }
    });
    // A server that was started here has been ended in any case.
    let Some(Measured { tried, outcome }) = measured? else {
        std::process::exit(SIGNALLED_TWICE)
    };
    match tried {
        // Nothing to report: an error says why.
        tried if tried.count() == 0 => outcome.and(Err(TuneError::Nothing)),
        Tried::Front(search) => report_front(experiments, &search).and(outcome),
        Tried::Schedules(tried) => report_schedules(experiments, &tried).and(outcome),
    }
}

/// What was measured, and the error that ended it, if one did.
struct Measured {
    tried: Tried,
    outcome: Result<(), TuneError>,
}

/// What was measured, in the order of the measurements.
enum Tried {
    Front(Search),
    Schedules(Vec<Experiment>),
}

impl Tried {
    fn count(&self) -> usize {
        match self {
            Tried::Front(search) => search.tried.len(),
            Tried::Schedules(tried) => tried.len(),
        }
    }

    /// What to try next, and how many experiments there may be in all.
    fn next(&self, settings: &Experiments, begun: &Knobs) -> Option<(Trial, usize)> {
        match self {
            Tried::Front(search) => Some((search.next()?, settings.max_experiments)),
            Tried::Schedules(tried) => {
                let mut trials = schedules::trials(begun, &settings.rates);
                let count = trials.len();
                (tried.len() < count).then(|| (trials.swap_remove(tried.len()), count))
            }
        }
    }

    fn tell(&mut self, experiment: Experiment) {
        match self {
            Tried::Front(search) => search.tell(experiment),
            Tried::Schedules(tried) => tried.push(experiment),
        }
    }
}

fn report_front(settings: &Experiments, search: &Search) -> Result<(), TuneError> {
    let best = search.best().ok_or(TuneError::Nothing)?;
    say(format_args!(
        "Goodput under {}, those on the Pareto front first:\n\n{}\nRecommended, for `serve --config`:\n\n{}",
        settings.slo,
        with_remarks(tune::table(search), &search.tried),
        toml(&best.trial.knobs)
    ))?;
    for reason in search.reasons() {
        say(format_args!("- {reason}"))?;
    }
    if let Some(path) = &settings.save_toml {
        loadtest::write(path, &toml(&best.trial.knobs))?;
    }
    let figures: Vec<Figure> = tune::figure(search).into_iter().collect();
    write_charts(settings, &figures, || tune::page(search))
}

fn report_schedules(settings: &Experiments, tried: &[Experiment]) -> Result<(), TuneError> {
    if tried.is_empty() {
        return Err(TuneError::Nothing);
    }
    say(format_args!(
        "Goodput under {} in requests/s, E2E, busy share of the time, and sequences in a step:\n\n{}",
        settings.slo,
        with_remarks(schedules::table(tried), tried)
    ))?;
    write_charts(settings, &schedules::figures(tried), || schedules::page(tried))
}

/// A table, and below it what must be known of its experiments.
fn with_remarks(table: String, tried: &[Experiment]) -> String {
    tune::remarks(tried)
        .iter()
        .fold(table, |text, remark| text + &format!("! {remark}\n"))
}

fn write_charts(settings: &Experiments, figures: &[Figure], page: impl FnOnce() -> String) -> Result<(), TuneError> {
    if let Some(path) = &settings.save_html {
        loadtest::write(path, &page())?;
    }
    if let Some(folder) = &settings.save_svg {
        loadtest::write_figures(folder, figures)?;
    }
    Ok(())
}

/// A server of this program, ended when dropped.
struct Server(Child);

impl Server {
    /// In a process group of its own: Ctrl-C goes to all of the terminal's, and the server is to live until what was
    /// measured is at hand. Its standard output is a pipe.
    fn start(command: &mut Command) -> io::Result<Self> {
        let command = command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped());
        command.spawn().map(Self)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Measures, with a server of its own where none is named.
async fn serve_and_measure(
    settings: &Tune,
    workload: Workload,
    stop: &mut watch::Receiver<bool>,
) -> Result<Measured, TuneError> {
    if let Some(url) = &settings.experiments.url {
        return measure(settings, workload, url, stop).await;
    }
    let (_server, url) = tokio::select! {
        started = start_server(settings) => started?,
        _ = stop.changed() => return Err(TuneError::Nothing),
    };
    measure(settings, workload, &url, stop).await
}

/// Starts a server on a free port and waits until its model is loaded; gives its URL too.
async fn start_server(settings: &Tune) -> Result<(Server, String), TuneError> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["serve", "--admin", "--host", "127.0.0.1", "--port", "0"]);
    // A line for each request would run through the live view.
    command.args(["--model", &settings.choice.model, "--log-level", "warn"]);
    if let Some(path) = &settings.common.config {
        command.arg("--config").arg(path);
    }
    let mut server = Server::start(&mut command)?;
    let stdout = server.0.stdout.take().ok_or(TuneError::Ended)?;
    let (sender, printed) = oneshot::channel();
    thread::spawn(move || {
        let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
        let url = lines.find_map(|line| Some(line[line.find("http://")?..].split_whitespace().next()?.to_owned()));
        // Nobody waits for it where the server was ended meanwhile.
        let _ = sender.send(url);
        // Whatever else it prints must not fill the pipe.
        lines.for_each(drop);
    });
    let url = printed.await.ok().flatten().ok_or(TuneError::Ended)?;
    let target = target(&url)?;
    let begun = Instant::now();
    while !target
        .get("/ready")
        .await
        .is_ok_and(|response| response.status().is_success())
    {
        if server.0.try_wait()?.is_some() || begun.elapsed() > LOADING {
            return Err(TuneError::Ended);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok((server, url))
}

fn target(url: &str) -> Result<Target, LoadtestError> {
    Ok(Target::new(url, None, TIMEOUT).map_err(sconce_loadtest::check::CheckError::from)?)
}

async fn measure(
    settings: &Tune,
    workload: Workload,
    url: &str,
    stop: &mut watch::Receiver<bool>,
) -> Result<Measured, TuneError> {
    let server = load::Asked {
        url: url.to_owned(),
        served_model_name: None,
        api_key: settings.experiments.api_key.clone(),
        insecure: false,
        api: None,
        no_stream: false,
        timeout: TIMEOUT,
        deadline: None,
    };
    let (asked, _) = loadtest::asked(&server, workload, settings.workload.tokenizer.as_deref()).await?;
    let begun = change(&asked.target, None).await?;
    let settings = &settings.experiments;
    let mut tried = match settings.experiment {
        TuneExperiment::Front => Tried::Front(Search::new(begun.clone(), &settings.rates, settings.max_experiments)),
        TuneExperiment::Schedules => Tried::Schedules(Vec::new()),
    };
    let mut live = Live::new();
    let mut outcome = Ok(());
    while let Some((trial, count)) = tried.next(settings, &begun) {
        live.begin(&format!(
            "experiment {} of at most {count}, {}",
            tried.count() + 1,
            trial
        ));
        let part = tried.count() as u64;
        match experiment(settings, &asked, trial, part, &mut live, stop).await {
            Ok(Some(experiment)) => tried.tell(experiment),
            Ok(None) => break,
            Err(error) => {
                outcome = Err(error);
                break;
            }
        }
    }
    live.end();
    // A server that was running before goes on as it was, however this ended; one that was started here ends.
    if settings.url.is_some()
        && let Err(error) = change(&asked.target, Some(&begun)).await
    {
        eprintln!(
            "warning: the server keeps the last settings that were tried, for these could not be set again: {begun:?}: {error}"
        );
    }
    Ok(Measured { tried, outcome })
}

/// Tries settings on an idle server; `None` where the user ended it.
async fn experiment(
    settings: &Experiments,
    asked: &Asked,
    trial: Trial,
    part: u64,
    live: &mut Live,
    stop: &mut watch::Receiver<bool>,
) -> Result<Option<Experiment>, TuneError> {
    if !settle(&asked.target, SETTLING, stop).await {
        let url = asked.target.url().to_owned();
        return Err(TuneError::Busy { url });
    }
    if *stop.borrow() {
        return Ok(None);
    }
    let Trial { knobs, rate } = trial;
    let knobs = change(&asked.target, Some(&knobs)).await?;
    let load = Load {
        arrivals: Arrivals::Poisson { rate },
        requests: None,
        duration: Some(settings.duration),
        warmup: settings.warmup,
        seed: settings.seed,
        part,
    };
    let measured = send(asked, &load, live, stop, None).await;
    if measured.interrupted {
        return Ok(None);
    }
    let run = Run::of("experiment", Some(rate), measured, Some(&settings.slo));
    Ok(Some(Experiment::of(Trial { knobs, rate }, run)))
}

/// Changes a server's settings, or asks for them; gives those in force.
async fn change(target: &Target, knobs: Option<&Knobs>) -> Result<Knobs, TuneError> {
    const PATH: &str = "/admin/batching";
    let answer = match knobs {
        Some(knobs) => target.post(PATH, &serde_json::json!(knobs)).await,
        None => target.get(PATH).await,
    };
    let failed = |answer: String| TuneError::Admin {
        url: target.url().to_owned(),
        answer,
    };
    match answer {
        Ok(response) if response.status().is_success() => {
            response.json().await.map_err(|error| failed(error.to_string()))
        }
        Ok(response) => Err(failed(format!("with status {}", response.status()))),
        Err(error) => Err(failed(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        ffi::OsString,
        sync::{Arc, Mutex},
    };

    use axum::{
        Json, Router,
        http::StatusCode,
        routing::{get, post},
    };
    use serde_json::{Value, json};

    use super::*;
    use crate::config::{self, Command as Asked};

    const ANSWER: &str = "data: {\"choices\":[{\"index\":0,\"text\":\" a\",\"finish_reason\":\"length\"}]}\n\n\
        data: [DONE]\n\n";

    fn begun() -> Value {
        json!({
            "schedule": "continuous", "window_policy": "adaptive", "batch_window_ms": 3.0, "max_batch": 7,
            "step_tokens": 512,
        })
    }

    /// A server that takes settings where `takes` says so of what it was told so far, these included; gives its URL, and
    /// what it was told to take.
    async fn stubborn(takes: fn(&[Value]) -> bool) -> (String, Arc<Mutex<Vec<Value>>>) {
        let told = Arc::new(Mutex::new(Vec::new()));
        let log = told.clone();
        let change = move |Json(knobs): Json<Value>| {
            let mut log = log.lock().unwrap();
            log.push(knobs.clone());
            let status = if takes(&log) {
                StatusCode::OK
            } else {
                StatusCode::INTERNAL_SERVER_ERROR
            };
            async move { (status, Json(knobs)) }
        };
        let router = Router::new()
            .route("/v1/models", get(async || Json(json!({"data": [{"id": "mock"}]}))))
            .route("/v1/completions", post(async || ANSWER))
            .route("/admin/batching", get(async || Json(begun())).post(change));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async { axum::serve(listener, router).await });
        (url, told)
    }

    /// Tunes a server with a few short experiments.
    async fn tuned(url: &str, stop: &mut watch::Receiver<bool>) -> Measured {
        let arguments = format!(
            "sconce tune --url {url} --slo e2e.p99=1s --workload completion --duration 100ms --warmup 0s --max-experiments 2"
        );
        let arguments = arguments.split(' ').map(OsString::from);
        let Ok(Asked::Tune(settings)) = config::parse(arguments).map(|asked| asked.command) else {
            panic!("it is a command to tune");
        };
        let workload = loadtest::workload(&settings.workload, None).unwrap();
        serve_and_measure(&settings, workload, stop).await.unwrap()
    }

    #[tokio::test]
    async fn a_server_has_its_settings_back_after_an_error() {
        let (url, told) = stubborn(|told| told.last() == Some(&begun())).await;
        let (_sender, mut stop) = watch::channel(false);
        let Measured { tried, outcome } = tuned(&url, &mut stop).await;
        let error = outcome.unwrap_err().to_string();
        assert!(error.contains("status 500"), "{error}");
        assert_eq!(tried.count(), 1, "what was measured before stays");
        let told = told.lock().unwrap();
        let [.., refused, last] = &told[..] else {
            panic!("{told:?}");
        };
        assert_eq!((refused == &begun(), last == &begun()), (false, true), "{told:?}");
    }

    #[tokio::test]
    async fn experiments_are_not_lost_where_the_settings_do_not_come_back() {
        // It takes its own settings once, as the first experiment.
        let (url, told) = stubborn(|told| told.len() == 1 || told.last() != Some(&begun())).await;
        let (_sender, mut stop) = watch::channel(false);
        let Measured { tried, outcome } = tuned(&url, &mut stop).await;
        assert!(outcome.is_ok());
        assert_eq!(tried.count(), 2);
        assert_eq!(told.lock().unwrap().last(), Some(&begun()), "they were to come back");
    }

    #[tokio::test]
    async fn who_ends_it_before_an_experiment_waits_for_none() {
        let (url, told) = stubborn(|_| true).await;
        let (sender, mut stop) = watch::channel(false);
        sender.send_replace(true);
        let Measured { tried, outcome } = tuned(&url, &mut stop).await;
        assert!(outcome.is_ok());
        assert_eq!((tried.count(), told.lock().unwrap().clone()), (0, vec![begun()]));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_server_has_a_process_group_of_its_own_and_ends_when_dropped() {
        let server = Server::start(Command::new("sleep").arg("600")).unwrap();
        let id = server.0.id();
        let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap();
        // After the name in brackets: the state, the parent, the process group.
        let fields: Vec<&str> = stat[stat.rfind(')').unwrap()..].split_whitespace().collect();
        assert_eq!(fields[3], id.to_string());
        drop(server);
        assert!(!std::path::Path::new(&format!("/proc/{id}")).exists());
    }
}
