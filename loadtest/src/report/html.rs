//! One self-contained HTML file: tables and charts of one report, or of several side by side.

use std::fmt::Write;

use super::{
    Report, Run,
    figures::figures,
    remarks::remarks,
    table::{MAIN, UTILISATION, cells, percentiles, turns},
};

const STYLE: &str = "body{font:15px/1.45 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;\
color:#222;background:#fff}\
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:1.8em}.scroll{overflow-x:auto}\
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}\
th,td{padding:.3em .7em;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}\
th:first-child,td:first-child{text-align:left}figure{margin:1em 0}figure svg{max-width:100%;height:auto}\
.remark{color:#a33}pre{background:#f5f5f5;padding:1em;overflow-x:auto}dl{display:grid;grid-template-columns:max-content 1fr;\
gap:.1em 1em}dt{color:#555}dd{margin:0}";

/// The page.
pub fn page(reports: &[Report]) -> String {
    let runs: Vec<Run> = reports.iter().flat_map(|report| report.runs.clone()).collect();
    let mut body = String::new();
    for report in reports {
        body += &facts(report);
    }
    for (title, (titles, rows)) in [
        ("Loads", cells(&MAIN, &runs)),
        ("Latencies", percentiles(&runs)),
        ("Turns", turns(&runs)),
        ("Utilisation", cells(&UTILISATION, &runs)),
    ] {
        if titles.len() > 1 && !rows.is_empty() {
            body += &format!("<h2>{title}</h2>\n{}", table(&titles, &rows));
        }
    }
    body += &paragraphs(&reports.iter().flat_map(remarks).collect::<Vec<_>>());
    body += "<h2>Charts</h2>\n";
    for figure in figures(reports) {
        body += &format!("<figure>{}</figure>\n", figure.svg);
    }
    document("Load test", &body)
}

/// Remarks, each a paragraph.
pub(crate) fn paragraphs(remarks: &[String]) -> String {
    let paragraph = |remark: &String| format!("<p class=remark>{}</p>\n", escaped(remark));
    remarks.iter().map(paragraph).collect()
}

/// A whole page under its title.
pub(crate) fn document(title: &str, body: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\">\
         <title>{title}</title><style>{STYLE}</style>\n<body>\n<h1>{title}</h1>\n{body}</body></html>\n"
    )
}

fn facts(report: &Report) -> String {
    let mut facts = vec![
        ("report", report.name.clone()),
        ("model", report.model.clone()),
        ("server", report.url.clone()),
        ("workload", report.workload.clone()),
        ("arrivals", format!("{}, seed {}", report.arrivals, report.seed)),
        ("answers", if report.stream { "streamed" } else { "whole" }.to_owned()),
    ];
    facts.extend(report.slo.clone().map(|slo| ("SLO", slo)));
    facts.extend(
        report
            .target_rate
            .map(|rate| ("100 %", format!("{rate:.2} requests/s"))),
    );
    facts.extend(
        report
            .search_unfinished
            .then(|| ("100 %", "unknown: the search was ended early".to_owned())),
    );
    facts.retain(|(_, value)| !value.is_empty());
    let mut text = String::from("<dl>");
    for (name, value) in facts {
        // Writing to a String cannot fail.
        let _ = write!(text, "<dt>{name}</dt><dd>{}</dd>", escaped(&value));
    }
    text + "</dl>\n"
}

fn table(titles: &[&str], rows: &[Vec<String>]) -> String {
    let row = |tag: &str, cells: Vec<String>| {
        let cells: String = cells.iter().map(|cell| format!("<{tag}>{cell}</{tag}>")).collect();
        format!("<tr>{cells}</tr>\n")
    };
    let head = row("th", titles.iter().map(|title| escaped(title)).collect());
    let rows: String = rows
        .iter()
        .map(|cells| row("td", cells.iter().map(|cell| escaped(cell)).collect()))
        .collect();
    format!("<div class=scroll><table>{head}{rows}</table></div>\n")
}

/// Text as HTML shows it.
pub(crate) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}
