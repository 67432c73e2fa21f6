//! Every `unsafe` says why it is sound. (Clippy has a lint for it, which does not see comments inside macros, where the
//! kernels' are.)

use std::path::{Path, PathBuf};

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The lines whose `unsafe` has no reason: a function's stands in its docs, all others' in a comment above.
fn unreasoned(text: &str) -> Vec<usize> {
    let lines: Vec<&str> = text.lines().collect();
    let uses = |line: &str| {
        let code = line.split("//").next().unwrap_or_default();
        code.contains("unsafe {") || code.contains("unsafe impl") || code.contains("unsafe fn")
    };
    let reasoned = |at: usize| {
        let above = &lines[at.saturating_sub(8)..at];
        if lines[at].contains("unsafe fn") {
            return above.iter().any(|line| line.contains("# Safety"));
        }
        above.iter().rev().take(3).any(|line| line.contains("// SAFETY:"))
    };
    (0..lines.len())
        .filter(|&at| uses(lines[at]) && !reasoned(at))
        .map(|at| at + 1)
        .collect()
}

#[test]
fn every_unsafe_has_its_reason() {
    let mut files = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
    assert!(files.len() > 10);
    for file in files {
        let lines = unreasoned(&std::fs::read_to_string(&file).unwrap());
        assert!(
            lines.is_empty(),
            "{}: no `// SAFETY:` or `# Safety` above lines {lines:?}",
            file.display()
        );
    }
}

#[test]
fn a_missing_reason_is_found() {
    assert_eq!(unreasoned("let a = 1;\nlet b = unsafe { *p };\n"), [2]);
    assert_eq!(unreasoned("// SAFETY: p is alive.\nlet b = unsafe { *p };\n"), []);
    assert_eq!(unreasoned("/// # Safety\n/// p is alive.\npub unsafe fn f() {}\n"), []);
    assert_eq!(unreasoned("pub unsafe fn f() {}\n"), [1]);
}
