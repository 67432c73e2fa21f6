//! Several reports side by side.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
};

use super::{
    Report, Run, SCHEMA,
    remarks::remarks,
    table::{MAIN, UTILISATION, markdown, percentiles, table, turns},
};

/// Why a file is no report.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is not a load test's report: {source}", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("{} has schema {found}, and this program reads schema {SCHEMA}", path.display())]
    Schema { path: PathBuf, found: u64 },
}

/// Reads reports; each run's label then begins with its file's name (or folder's, where the files are called alike).
///
/// # Errors
/// [`ReportError`] names the file.
pub fn read(paths: &[PathBuf]) -> Result<Vec<Report>, ReportError> {
    let names = names(paths);
    paths.iter().zip(names).map(|(path, name)| one(path, &name)).collect()
}

fn one(path: &Path, name: &str) -> Result<Report, ReportError> {
    let text = std::fs::read_to_string(path).map_err(|source| ReportError::Read {
        path: path.into(),
        source,
    })?;
    let not_json = |source| ReportError::Json {
        path: path.into(),
        source,
    };
    let value: serde_json::Value = serde_json::from_str(&text).map_err(not_json)?;
    if let Some(found) = value["schema"].as_u64().filter(|&found| found != u64::from(SCHEMA)) {
        return Err(ReportError::Schema {
            path: path.into(),
            found,
        });
    }
    let mut report: Report = serde_json::from_value(value).map_err(not_json)?;
    report.name = name.to_owned();
    for run in &mut report.runs {
        run.label = format!("{name} {}", run.label);
    }
    Ok(report)
}

/// The shortest ends of the paths that tell them apart.
fn names(paths: &[PathBuf]) -> Vec<String> {
    let stem = |path: &PathBuf| path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let folder = |path: &PathBuf| {
        let folder = path.parent().and_then(Path::file_name).unwrap_or_default();
        folder.to_string_lossy().into_owned()
    };
    let whole = |path: &PathBuf| path.display().to_string();
    let differ = |names: &Vec<String>| names.iter().collect::<BTreeSet<_>>().len() == names.len();
    let stems: Vec<String> = paths.iter().map(stem).collect();
    let folders: Vec<String> = paths.iter().map(folder).collect();
    [stems, folders]
        .into_iter()
        .find(|names| differ(names) && names.iter().all(|name| !name.is_empty()))
        .unwrap_or_else(|| paths.iter().map(whole).collect())
}

/// The tables of several reports for a terminal.
pub fn text(reports: &[Report]) -> String {
    let runs: Vec<Run> = reports.iter().flat_map(|report| report.runs.clone()).collect();
    let (titles, rows) = percentiles(&runs);
    let mut text = format!(
        "{}\n{}\n{}",
        table(&MAIN, &runs),
        markdown(&titles, &rows),
        table(&UTILISATION, &runs)
    );
    let (titles, rows) = turns(&runs);
    if !rows.is_empty() {
        text += &format!("\n{}", markdown(&titles, &rows));
    }
    let workloads: BTreeSet<_> = reports
        .iter()
        .map(|report| (&report.workload, &report.arrivals))
        .collect();
    if workloads.len() > 1 {
        text += "! the reports' workloads or arrivals differ\n";
    }
    for remark in reports.iter().flat_map(remarks) {
        text += &format!("! {remark}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::{report, run};

    #[test]
    fn a_report_without_the_latest_fields_is_read() {
        let mut report = serde_json::to_value(report(vec![run("50 %", 2.0)])).unwrap();
        let fields = report["runs"][0].as_object_mut().unwrap();
        fields.retain(|field, _| !["sent_rate", "unsettled"].contains(&field.as_str()));
        report["search"] = serde_json::json!([{"rate": 4.0, "slo_kept": true}]);
        let path = std::env::temp_dir().join(format!("sconce-old-report-{}.json", std::process::id()));
        std::fs::write(&path, report.to_string()).unwrap();
        let read = read(std::slice::from_ref(&path)).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(
            (read[0].runs[0].sent_rate, read[0].runs[0].offered_rate),
            (None, Some(2.0))
        );
        assert!(!read[0].search[0].late && read[0].search[0].slo_kept);
        assert!(text(&read).contains("50 %"));
    }

    #[test]
    fn names_tell_the_reports_apart() {
        let names = |paths: &[&str]| super::names(&paths.iter().map(PathBuf::from).collect::<Vec<_>>());
        assert_eq!(names(&["x/a.json", "x/b.json"]), ["a", "b"]);
        assert_eq!(names(&["x/vllm/report.json", "x/ours/report.json"]), ["vllm", "ours"]);
        assert_eq!(
            names(&["p/x/report.json", "q/x/report.json"]),
            ["p/x/report.json", "q/x/report.json"]
        );
    }
}
