//! `sconce tune`: short load tests with different settings of one running server.

use std::{
    io::{self, BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use sconce_loadtest::{
    Live,
    arrivals::Arrivals,
    client::Target,
    report::Run,
    run::{Asked, Load, run as send},
    tune::{Experiment, Knobs, Search, page, table, toml},
    utilisation::settle,
    workload::Workload,
};
use tokio::sync::watch;

use super::loadtest::{self, LoadtestError};
use crate::config::load::{self, Experiments, Tune};

/// A model that is not loaded after this long will not be.
const LOADING: Duration = Duration::from_secs(600);
const SETTLING: Duration = Duration::from_secs(60);
const TIMEOUT: Duration = Duration::from_secs(120);

/// Why nothing was tuned.
#[derive(Debug, thiserror::Error)]
pub enum TuneError {
    #[error(transparent)]
    Loadtest(#[from] LoadtestError),
    #[error("cannot start a server to tune: {0}")]
    Start(#[from] io::Error),
    #[error("the server to tune ended before it was ready; its own words above say why")]
    Ended,
    #[error("{url}/admin/batching answers {answer}; start that server with `--admin`")]
    Admin { url: String, answer: String },
    #[error("no experiment was finished")]
    Nothing,
}

/// Runs the command.
///
/// # Errors
/// [`TuneError`]
pub fn run(settings: Tune) -> Result<(), TuneError> {
    let workload = loadtest::workload(&settings.workload, None)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let search = runtime.block_on(async {
        let (_server, url) = match &settings.experiments.url {
            Some(url) => (None, url.clone()),
            None => {
                let (server, url) = start_server(&settings).await?;
                (Some(server), url)
            }
        };
        experiments(&settings, workload, &url).await
    })?;
    let best = search.best().ok_or(TuneError::Nothing)?;
    println!(
        "Goodput under {} at {} requests/s, those on the Pareto front first:\n\n{}\nRecommended, for `serve --config`:\n\n{}",
        settings.experiments.slo,
        settings.experiments.rate,
        table(&search),
        toml(&best.knobs)
    );
    for reason in search.reasons() {
        println!("- {reason}");
    }
    if let Some(path) = &settings.experiments.save_toml {
        loadtest::write(path, &toml(&best.knobs))?;
    }
    if let Some(path) = &settings.experiments.save_html {
        loadtest::write(path, &page(&search))?;
    }
    Ok(())
}

/// A server of this program, ended when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a server on a free port and waits until its model is loaded; gives its URL too.
async fn start_server(settings: &Tune) -> Result<(Server, String), TuneError> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["serve", "--admin", "--host", "127.0.0.1", "--port", "0"]);
    command.args([
        "--model",
        &settings.choice.model,
        "--log-level",
        &settings.common.log_level,
    ]);
    if let Some(path) = &settings.common.config {
        command.arg("--config").arg(path);
    }
    let mut server = Server(command.stdout(Stdio::piped()).spawn()?);
    let stdout = server.0.stdout.take().ok_or(TuneError::Ended)?;
    let mut lines = BufReader::new(stdout).lines();
    let url = loop {
        let line = lines.next().ok_or(TuneError::Ended)??;
        if let Some(at) = line.find("http://") {
            break line[at..].split_whitespace().next().unwrap_or_default().to_owned();
        }
    };
    // Whatever else it prints must not fill the pipe.
    thread::spawn(move || lines.for_each(drop));
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

async fn experiments(settings: &Tune, workload: Workload, url: &str) -> Result<Search, TuneError> {
    let server = load::Asked {
        url: url.to_owned(),
        served_model_name: None,
        api_key: None,
        api: None,
        no_stream: false,
        timeout: TIMEOUT,
        deadline: None,
    };
    let (asked, _) = loadtest::asked(&server, workload, settings.workload.tokenizer.as_deref()).await?;
    let asked = Arc::new(asked);
    let begun = change(&asked.target, None).await?;
    let mut search = Search::new(begun.clone(), settings.experiments.max_experiments);
    let mut stop = loadtest::stop_at_signal();
    let mut live = Live::new();
    let mut outcome = Ok(());
    while let Some(knobs) = search.next() {
        live.begin(&format!(
            "experiment {} of at most {}",
            search.tried.len() + 1,
            settings.experiments.max_experiments
        ));
        match experiment(&settings.experiments, &asked, knobs, &mut live, &mut stop).await {
            Ok(Some(experiment)) => search.tell(experiment),
            Ok(None) => break,
            Err(error) => {
                outcome = Err(error);
                break;
            }
        }
        settle(&asked.target, SETTLING).await;
    }
    live.end();
    // A server that was running before goes on as it was.
    if outcome.is_ok() {
        change(&asked.target, Some(&begun)).await?;
    }
    outcome.map(|()| search)
}

/// Tries settings; `None` where the user ended it.
async fn experiment(
    settings: &Experiments,
    asked: &Asked,
    knobs: Knobs,
    live: &mut Live,
    stop: &mut watch::Receiver<bool>,
) -> Result<Option<Experiment>, TuneError> {
    let knobs = change(&asked.target, Some(&knobs)).await?;
    let load = Load {
        arrivals: Arrivals::Poisson { rate: settings.rate },
        requests: None,
        duration: Some(settings.duration),
        warmup: settings.warmup,
        seed: settings.seed,
    };
    let measured = send(asked, &load, live, stop, None).await;
    if measured.interrupted {
        return Ok(None);
    }
    let run = Run::of("experiment", Some(settings.rate), measured, Some(&settings.slo));
    Ok(Some(Experiment::of(knobs, run)))
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
