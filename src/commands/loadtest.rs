//! `sconce loadtest`: reads what is asked for, refuses what cannot be run, runs it, and writes the reports.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use sconce_loadtest::{
    Live,
    arrivals::{ArrivalKind, Arrivals},
    check::{self, CheckError},
    client::{Api, Form, Target},
    files,
    report::{
        self, Report, Run,
        compare::ReportError,
        figures::{Figure, figures},
    },
    rubric::{Loads, Plan, execute},
    run::{Asked, Load},
    slo::Metric,
    tokens::{TokenizerError, Tokens},
    trace::{self, TraceError},
    workload::{Lengths, Vocabulary, Workload},
};
use tokio::signal::unix::SignalKind;

use super::{
    OutputError, say,
    signals::{SIGNALLED_TWICE, stop_at},
};
use crate::config::load::{self, Loadtest, LoadtestAction};

/// For how long requests are sent where neither a number nor a duration is given.
const USUAL: Duration = Duration::from_secs(30);

/// Why a load test was not run, or its report not written.
#[derive(Debug, thiserror::Error)]
pub enum LoadtestError {
    #[error(transparent)]
    Check(#[from] CheckError),
    #[error(transparent)]
    Trace(#[from] TraceError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Report(#[from] ReportError),
    #[error("{0}")]
    Settings(&'static str),
    #[error("no rate from {0} requests/s down keeps the SLO: there is no highest rate to refer to")]
    NoRate(f64),
    #[error("no request was answered; see the errors above")]
    NoAnswer,
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot start: {0}")]
    Start(#[from] io::Error),
    #[error(transparent)]
    Output(#[from] OutputError),
}

/// Runs the command.
///
/// # Errors
/// [`LoadtestError`]; bad input is refused before any load is sent.
pub fn run(settings: Loadtest) -> Result<(), LoadtestError> {
    if let Some(LoadtestAction::Compare {
        reports,
        save_html,
        save_svg,
    }) = &settings.action
    {
        return compare(reports, save_html.as_deref(), save_svg.as_deref());
    }
    let (workload, load, loads) = checked(&settings)?;
    prepare_folders(&settings)?;
    files::raise_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let asking = settings.clone();
    // On a worker, what this task spawns runs without waking another thread, and so starts sooner.
    let measuring = runtime.spawn(async move {
        let plan = plan(&asking, workload, load, loads).await?;
        let (mut stop, twice) = stop_at(&[SignalKind::interrupt()])?;
        tokio::spawn(async move {
            if twice.await.is_ok() {
                std::process::exit(SIGNALLED_TWICE);
            }
        });
        Ok::<_, LoadtestError>(execute(&plan, &mut Live::new(), &mut stop).await)
    });
    let report = runtime.block_on(measuring).map_err(io::Error::other)??;
    say(report::table::text(&report).trim_end())?;
    write_reports(&settings.reports, &report)?;
    if report.runs.is_empty() && !report.interrupted {
        let first = report.search.first().map_or(settings.load.rate, |probe| probe.rate);
        return Err(LoadtestError::NoRate(first));
    }
    match report.runs.iter().any(|run| run.requests.answered > 0) || report.interrupted {
        true => Ok(()),
        false => Err(LoadtestError::NoAnswer),
    }
}

/// What is to be sent, as far as the settings and the files that they name say it.
fn checked(settings: &Loadtest) -> Result<(Workload, Load, Loads), LoadtestError> {
    let (workload, arrivals) = wanted(settings)?;
    let loads = loads_of(&settings.load, &arrivals)?;
    let mut promised = settings.load.slo.iter().flat_map(|slo| &slo.0);
    if settings.asked.no_stream && promised.any(|promise| promise.metric != Metric::E2e) {
        return Err(LoadtestError::Settings(
            "whole answers (`--no-stream`) have an E2E alone: promises of ttft, tpot and itl need streams",
        ));
    }
    Ok((workload, load_of(&settings.load, arrivals)?, loads))
}

/// The workload and the arrivals, with the files that they name.
fn wanted(settings: &Loadtest) -> Result<(Workload, Arrivals), LoadtestError> {
    let mut workload = workload(&settings.workload, settings.asked.api)?;
    let load = &settings.load;
    let arrivals = match arrival_kind(load)? {
        ArrivalKind::Poisson => Arrivals::Poisson { rate: load.rate },
        ArrivalKind::Constant => Arrivals::Constant { rate: load.rate },
        ArrivalKind::Gamma => Arrivals::Gamma {
            rate: load.rate,
            burstiness: load.burstiness,
        },
        ArrivalKind::Burst => Arrivals::Burst,
        ArrivalKind::Steps => {
            const NEEDED: &str = "step arrivals need `--steps`, such as `--steps 1:30s,4:30s`";
            Arrivals::Steps(load.steps.clone().ok_or(LoadtestError::Settings(NEEDED))?.0)
        }
        ArrivalKind::Trace => trace_arrivals(load, &mut workload)?,
    };
    recorded(&mut workload, &settings.workload)?;
    Ok((workload, arrivals))
}

/// The arrivals that are named or that a file, steps or a rate of `inf` imply. What would not be heeded is refused.
fn arrival_kind(load: &load::Load) -> Result<ArrivalKind, LoadtestError> {
    let own_rates = match (&load.trace, &load.steps) {
        (Some(_), Some(_)) => return Err(LoadtestError::Settings("`--trace` and `--steps` exclude each other")),
        (Some(_), None) => Some(ArrivalKind::Trace),
        (None, Some(_)) => Some(ArrivalKind::Steps),
        (None, None) => None,
    };
    match (own_rates, load.arrivals) {
        (Some(kind), named) if named.is_some_and(|named| named != kind) => Err(LoadtestError::Settings(
            "`--trace` goes with trace arrivals and `--steps` with step arrivals; leave `--arrivals` out",
        )),
        (Some(_), _) | (_, Some(ArrivalKind::Trace | ArrivalKind::Steps)) if load.rate.is_infinite() => Err(
            LoadtestError::Settings("a trace and steps have rates of their own; leave `--rate inf` out"),
        ),
        (Some(kind), _) => Ok(kind),
        (None, _) if load.rate.is_infinite() => Ok(ArrivalKind::Burst),
        (None, named) => Ok(named.unwrap_or(ArrivalKind::Poisson)),
    }
}

/// The workload that the settings name and change, with its file of prompts.
pub fn workload(settings: &load::Workload, api: Option<Api>) -> Result<Workload, LoadtestError> {
    let mut workload = settings.workload.workload();
    workload.api = api.unwrap_or(workload.api);
    workload.prompt = settings.prompt_tokens.unwrap_or(workload.prompt);
    workload.output = settings.output_tokens.unwrap_or(workload.output);
    workload.shared_prefix = settings.shared_prefix.unwrap_or(workload.shared_prefix);
    workload.turns = settings.turns;
    workload.think_time = settings.think_time;
    if let Some(path) = &settings.prompts {
        workload.lines = trace::read(path)?;
        workload.name = path.display().to_string();
    }
    if workload.api == Api::Chat && workload.token_ids {
        const CHAT: &str = "token ids need `--api completions`; choose another workload for a chat";
        return Err(LoadtestError::Settings(CHAT));
    }
    if workload.token_ids && (workload.shared_prefix > 0 || workload.turns != Lengths::Fixed(1)) {
        const ALONE: &str = "prompts of token ids share nothing: `--shared-prefix` and `--turns` need a workload of words, such as `completion`";
        return Err(LoadtestError::Settings(ALONE));
    }
    recorded(&mut workload, settings)?;
    Ok(workload)
}

/// Recorded prompts have their own beginnings and ends.
fn recorded(workload: &mut Workload, settings: &load::Workload) -> Result<(), LoadtestError> {
    let conversations = workload.lines.iter().any(|line| line.messages.is_some());
    if workload.api == Api::Completions && conversations {
        return Err(LoadtestError::Settings("conversations (`messages`) need `--api chat`"));
    }
    let recorded = conversations || workload.lines.iter().any(|line| line.prompt.is_some());
    workload.ignore_eos = settings.ignore_eos.unwrap_or(!recorded);
    if recorded {
        workload.shared_prefix = settings.shared_prefix.unwrap_or(0);
    }
    Ok(())
}

/// A trace brings the times and, unless another file does, what is asked.
fn trace_arrivals(load: &load::Load, workload: &mut Workload) -> Result<Arrivals, LoadtestError> {
    let path = load.trace.as_ref();
    let path = path.ok_or(LoadtestError::Settings("trace arrivals need a file: `--trace PATH`"))?;
    let mut lines = trace::read(path)?;
    let times = trace::times(path, &mut lines)?;
    if workload.lines.is_empty() {
        workload.lines = lines;
        workload.name = path.display().to_string();
    }
    Ok(Arrivals::Trace(times))
}

/// How much is sent.
fn load_of(settings: &load::Load, arrivals: Arrivals) -> Result<Load, LoadtestError> {
    if !settings.warmup.is_zero() && !arrivals.is_stationary() {
        return Err(LoadtestError::Settings(
            "a warm-up goes with poisson, constant and gamma arrivals",
        ));
    }
    if matches!(arrivals, Arrivals::Burst) && settings.requests.is_none() {
        return Err(LoadtestError::Settings("all at once needs a number: `--requests N`"));
    }
    let endless = arrivals.is_stationary() && settings.requests.is_none();
    Ok(Load {
        arrivals,
        requests: settings.requests,
        duration: settings.duration.or(endless.then_some(USUAL)),
        warmup: settings.warmup,
        seed: settings.seed,
        part: 0,
    })
}

fn loads_of(settings: &load::Load, arrivals: &Arrivals) -> Result<Loads, LoadtestError> {
    match (settings.rubric, settings.target_qps, &settings.slo) {
        (false, None, _) => Ok(Loads::One),
        (false, Some(_), _) => Err(LoadtestError::Settings("`--target-qps` goes with `--rubric`")),
        (true, _, _) if arrivals.rate().is_none() => Err(LoadtestError::Settings(
            "a rubric needs arrivals with a rate: no burst, and no trace whose times are all the same",
        )),
        (true, Some(rate), _) => Ok(Loads::Target(rate)),
        (true, None, Some(_)) => Ok(Loads::Highest),
        (true, None, None) => Err(LoadtestError::Settings(
            "a rubric needs `--target-qps`, or an `--slo` to search the highest rate with",
        )),
    }
}

async fn plan(settings: &Loadtest, workload: Workload, load: Load, loads: Loads) -> Result<Plan, LoadtestError> {
    let (asked, token_counts) = asked(&settings.asked, workload, settings.workload.tokenizer.as_deref()).await?;
    Ok(Plan {
        asked,
        load,
        slo: settings.load.slo.clone(),
        loads,
        token_counts,
    })
}

/// The server, checked, and the words to ask it with; also how their lengths were counted.
pub async fn asked(
    settings: &load::Asked,
    workload: Workload,
    tokenizer: Option<&Path>,
) -> Result<(Asked, String), LoadtestError> {
    check::url(&settings.url)?;
    let mut target =
        Target::new(&settings.url, settings.api_key.clone(), settings.timeout).map_err(CheckError::from)?;
    if settings.insecure {
        target = target.with_any_certificate().map_err(CheckError::from)?;
    }
    let target = target.with_deadline(settings.deadline);
    let model = check::model(&target, settings.served_model_name.as_deref()).await?;
    let form = Form {
        model,
        stream: !settings.no_stream,
        ignore_eos: workload.ignore_eos,
    };
    let tokens = Tokens::find(tokenizer, &target, &form.model).await?;
    let (vocabulary, counted) = match Vocabulary::measured(&tokens, &target, &form.model).await {
        Some(vocabulary) => (vocabulary, tokens),
        None => (Vocabulary::estimated(), Tokens::Unknown),
    };
    check::probe(&target, workload.api, &form).await?;
    let asked = Asked {
        target,
        form,
        workload: Arc::new(workload),
        vocabulary: Arc::new(vocabulary),
    };
    Ok((asked, counted.describe().to_owned()))
}

/// A folder that cannot be written is found out before the load, not after it.
fn prepare_folders(settings: &Loadtest) -> Result<(), LoadtestError> {
    let reports = &settings.reports;
    let files = [&reports.save_json, &reports.save_html, &reports.save_hdr];
    let parents = files.into_iter().flatten().filter_map(|path| path.parent());
    let folders = [&reports.output_dir, &reports.save_svg].into_iter().flatten();
    folders.map(PathBuf::as_path).chain(parents).try_for_each(folder)
}

/// Makes a folder where there is none.
pub fn folder(path: &Path) -> Result<(), LoadtestError> {
    if path.as_os_str().is_empty() {
        return Ok(());
    }
    fs::create_dir_all(path).map_err(|source| LoadtestError::Write {
        path: path.into(),
        source,
    })
}

fn write_reports(settings: &load::Reports, report: &Report) -> Result<(), LoadtestError> {
    let in_folder = |name: &str| settings.output_dir.as_ref().map(|folder| folder.join(name));
    // A report is plain data: numbers, strings and maps with string keys.
    let json = serde_json::to_string_pretty(report).expect("plain data");
    for path in [settings.save_json.clone(), in_folder("report.json")]
        .into_iter()
        .flatten()
    {
        write(&path, &json)?;
    }
    let page = report::html::page(std::slice::from_ref(report));
    for path in [settings.save_html.clone(), in_folder("report.html")]
        .into_iter()
        .flatten()
    {
        write(&path, &page)?;
    }
    if let Some(folder) = &settings.save_svg {
        write_figures(folder, &figures(std::slice::from_ref(report)))?;
    }
    if let Some(path) = &settings.save_hdr {
        let logs: String = match &report.runs[..] {
            [run] => run.hdr_log.clone(),
            runs => runs.iter().map(Run::labelled_log).collect(),
        };
        write(path, &logs)?;
    }
    for (index, run) in report.runs.iter().enumerate() {
        if let Some(path) = in_folder(&format!("load-{}.hlog", index + 1)) {
            write(&path, &run.hdr_log)?;
        }
    }
    Ok(())
}

/// Writes a file and says so.
pub fn write(path: &Path, text: &str) -> Result<(), LoadtestError> {
    fs::write(path, text).map_err(|source| LoadtestError::Write {
        path: path.into(),
        source,
    })?;
    Ok(say(format_args!("wrote {}", path.display()))?)
}

/// Writes charts into a folder, each as a file of its own.
pub fn write_figures(folder: &Path, figures: &[Figure]) -> Result<(), LoadtestError> {
    let file = |figure: &Figure| folder.join(format!("{}.svg", figure.name));
    figures.iter().try_for_each(|figure| write(&file(figure), &figure.svg))
}

fn compare(paths: &[PathBuf], save_html: Option<&Path>, save_svg: Option<&Path>) -> Result<(), LoadtestError> {
    let reports = report::compare::read(paths)?;
    say(report::compare::text(&reports).trim_end())?;
    if let Some(path) = save_html {
        write(path, &report::html::page(&reports))?;
    }
    match save_svg {
        Some(path) => folder(path).and_then(|()| write_figures(path, &figures(&reports))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        ffi::OsString,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use axum::{
        Json, Router,
        http::StatusCode,
        routing::{get, post},
    };
    use serde_json::json;

    use super::*;
    use crate::config::{self, Command};

    fn settings(arguments: &str) -> Loadtest {
        let arguments = format!("sconce loadtest {arguments}");
        match config::parse(arguments.split_whitespace().map(OsString::from)).map(|asked| asked.command) {
            Ok(Command::Loadtest(settings)) => *settings,
            other => panic!("{arguments}: {other:?}"),
        }
    }

    /// Why the settings are refused before a server is asked anything.
    fn refusal(arguments: &str) -> String {
        let settings = settings(arguments);
        let refused = checked(&settings).map(|_| ());
        refused.expect_err(arguments).to_string()
    }

    #[test]
    fn token_ids_have_nothing_before_them() {
        for more in ["--shared-prefix 100", "--turns 3", "--turns 1..2"] {
            let said = refusal(&format!("--workload random {more}"));
            assert!(said.contains("token ids"), "{said}");
        }
        for sound in [
            "--workload random --turns 1",
            "--workload completion --shared-prefix 100",
        ] {
            assert!(checked(&settings(sound)).is_ok(), "{sound}");
        }
    }

    #[test]
    fn what_would_not_be_heeded_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let trace = file("trace", "{\"timestamp\": 1}\n{\"timestamp\": 3}\n{\"timestamp\": 5}\n");
        let at_once = file("at-once", "{\"timestamp\": 3}\n{\"timestamp\": 3}\n");
        let implied = |arguments: &str| checked(&settings(arguments)).unwrap().1.arrivals;
        assert_eq!(implied(&format!("--trace {trace}")).rate(), Some(0.5));
        assert_eq!(implied("--steps 1:30s,3:30s").rate(), Some(2.0));
        assert_eq!(implied("--arrivals constant --rate inf --requests 3"), Arrivals::Burst);
        assert_eq!(implied(""), Arrivals::Poisson { rate: 1.0 });
        for (arguments, reason) in [
            (format!("--arrivals poisson --trace {trace}"), "--trace"),
            ("--arrivals constant --steps 1:30s".to_owned(), "--steps"),
            (format!("--steps 1:30s --trace {trace}"), "exclude"),
            (format!("--rate inf --trace {trace}"), "--rate inf"),
            ("--rate inf --steps 1:30s".to_owned(), "--rate inf"),
            ("--rate inf --arrivals steps".to_owned(), "--rate inf"),
            ("--arrivals trace".to_owned(), "--trace"),
            ("--arrivals steps".to_owned(), "--steps"),
            (format!("--rubric --target-qps 2 --trace {at_once}"), "a rate"),
            ("--rubric --target-qps 2 --rate inf --requests 3".to_owned(), "a rate"),
        ] {
            let said = refusal(&arguments);
            assert!(said.contains(reason), "{arguments}: {said}");
        }
    }

    #[test]
    fn what_whole_answers_do_not_have_cannot_be_promised_of_them() {
        for promise in ["ttft.p99=1s", "e2e.p99=9s,tpot.p99=1s", "itl.max=1s"] {
            let said = refusal(&format!("--no-stream --slo {promise}"));
            assert!(said.contains("--no-stream"), "{said}");
            assert!(checked(&settings(&format!("--slo {promise}"))).is_ok());
        }
        assert!(checked(&settings("--no-stream --slo e2e.p99=9s")).is_ok());
    }

    /// A server whose `/tokenize` tells so many words' tokens and then no more; gives its URL.
    async fn forgetful(words: usize) -> String {
        let asked = Arc::new(AtomicUsize::new(0));
        let tokenize = move || {
            let tokens = match asked.fetch_add(1, Ordering::Relaxed) {
                index if index < words => Ok(Json(json!({"tokens": [index]}))),
                _ => Err(StatusCode::INTERNAL_SERVER_ERROR),
            };
            async move { tokens }
        };
        let answer = async || Json(json!({"choices": [{"text": " a"}]}));
        let router = Router::new()
            .route("/v1/models", get(async || Json(json!({"data": [{"id": "mock"}]}))))
            .route("/v1/completions", post(answer))
            .route("/tokenize", post(tokenize));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async { axum::serve(listener, router).await });
        url
    }

    #[tokio::test]
    async fn lengths_are_said_to_be_counted_as_they_were() {
        for (words, counted) in [
            (0, "an estimate of one token a word"),
            (9, "an estimate of one token a word"),
            (usize::MAX, "the server's /tokenize"),
        ] {
            let url = forgetful(words).await;
            let settings = settings(&format!("--url {url} --workload completion --no-stream"));
            let workload = workload(&settings.workload, None).unwrap();
            let (asked, described) = asked(&settings.asked, workload, None).await.unwrap();
            assert_eq!(described, counted);
            assert_eq!(asked.vocabulary.has_ids(), words == usize::MAX);
        }
    }
}
