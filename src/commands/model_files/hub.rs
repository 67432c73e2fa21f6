//! Models of the Hugging Face hub, kept in the hub's own cache, where other programs find them too.

use std::path::PathBuf;

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo};

use super::PullError;

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// Fetched where the repository has them, before the weights: weights in the cache then mean that these are there too.
const OPTIONAL: [&str; 4] = [
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
];

/// Is it `org/name` in the hub's letters, and not a path?
pub(super) fn is_id(model: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    let is_file = model.ends_with(".gguf") || model.ends_with(".safetensors");
    model.split_once('/').is_some_and(|(org, name)| part(org) && part(name)) && !is_file
}

/// The snapshot's folder; fetches what is missing of it.
pub(super) fn resolve(id: &str) -> Result<PathBuf, PullError> {
    let cache = Cache::from_env();
    if let Some(folder) = cached(&cache, id) {
        return Ok(folder);
    }
    let token = std::env::var("HF_TOKEN")
        .ok()
        .filter(|token| !token.is_empty())
        .or_else(|| cache.token());
    let fail = |why: String| PullError::Hub {
        id: id.to_owned(),
        why,
        needed: "config.json, tokenizer.json and the .safetensors files",
    };
    let api = ApiBuilder::from_env()
        .with_token(token)
        .with_retries(3)
        .build()
        .map_err(|error| fail(error.to_string()))?;
    fetch(&api.repo(Repo::model(id.to_owned()))).map_err(fail)
}

/// The folder of a whole model in the cache.
fn cached(cache: &Cache, id: &str) -> Option<PathBuf> {
    let repo = cache.repo(Repo::model(id.to_owned()));
    let config = repo.get("config.json")?;
    repo.get("tokenizer.json")?;
    if repo.get(SINGLE).is_none() {
        let index = std::fs::read_to_string(repo.get(INDEX)?).ok()?;
        for shard in shards(&index).ok()? {
            repo.get(&shard)?;
        }
    }
    config.parent().map(PathBuf::from)
}

fn fetch(repo: &ApiRepo) -> Result<PathBuf, String> {
    let files: Vec<String> = repo
        .info()
        .map_err(|error| explain(&error))?
        .siblings
        .into_iter()
        .map(|sibling| sibling.rfilename)
        .collect();
    let has = |name: &str| files.iter().any(|file| file == name);
    let get = |name: &str| {
        tracing::info!("fetching {name}");
        repo.get(name).map_err(|error| format!("{name}: {}", explain(&error)))
    };
    for needed in ["config.json", "tokenizer.json"] {
        if !has(needed) {
            return Err(format!("the repository has no {needed}"));
        }
    }
    let config = get("config.json")?;
    for name in ["tokenizer.json"].into_iter().chain(OPTIONAL).filter(|name| has(name)) {
        get(name)?;
    }
    let weights = match () {
        () if has(INDEX) => {
            let index = std::fs::read_to_string(get(INDEX)?).map_err(|error| format!("{INDEX}: {error}"))?;
            shards(&index)?
        }
        () if has(SINGLE) => vec![SINGLE.to_owned()],
        () => return Err(format!("the repository has neither {SINGLE} nor {INDEX}")),
    };
    let folder = config.parent().map(PathBuf::from).unwrap_or_default();
    for name in weights {
        if get(&name)?.parent() != Some(&folder) {
            return Err("the repository changed while it was fetched; try again".to_owned());
        }
    }
    Ok(folder)
}

/// The files that an index names, each once.
fn shards(index: &str) -> Result<Vec<String>, String> {
    let index: serde_json::Value = serde_json::from_str(index).map_err(|error| format!("{INDEX}: {error}"))?;
    let map = index["weight_map"]
        .as_object()
        .ok_or(format!("{INDEX} has no weight_map"))?;
    let mut names: Vec<String> = map
        .values()
        .filter_map(|name| name.as_str().map(str::to_owned))
        .collect();
    names.sort();
    names.dedup();
    if names
        .iter()
        .any(|name| name.contains(['/', '\\']) || name.starts_with('.'))
    {
        return Err(format!("{INDEX} names a file outside of the repository's folder"));
    }
    Ok(names)
}

fn explain(error: &ApiError) -> String {
    let text = error.to_string();
    let hint = match () {
        () if text.contains("401") || text.contains("403") => {
            " (no such model, or it is gated: accept its terms on the hub and set HF_TOKEN)"
        }
        () if text.contains("404") => " (no such model on the hub, and no such path here)",
        () => "",
    };
    format!("{text}{hint}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids() {
        for id in ["org/name", "meta-llama/Llama-3.2-1B", "Qwen/Qwen2.5-0.5B_x"] {
            assert!(is_id(id), "{id}");
        }
        for path in [
            "name",
            "/org/name",
            "./name",
            "../name",
            "a/b/c",
            "a/",
            "dir/file.gguf",
            "a b/c",
            "~/x",
            "a/.x",
        ] {
            assert!(!is_id(path), "{path}");
        }
    }

    #[test]
    fn a_snapshot_counts_as_cached_when_every_shard_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path().into());
        let snapshot = folder.path().join("models--org--name/snapshots/abc");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(folder.path().join("models--org--name/refs")).unwrap();
        std::fs::write(folder.path().join("models--org--name/refs/main"), "abc").unwrap();
        let index = r#"{"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"}}"#;
        let files = [
            ("config.json", "{}"),
            ("tokenizer.json", "{}"),
            (INDEX, index),
            ("a.safetensors", ""),
        ];
        for (name, text) in files {
            std::fs::write(snapshot.join(name), text).unwrap();
            assert_eq!(cached(&cache, "org/name"), None, "after {name}");
        }
        std::fs::write(snapshot.join("b.safetensors"), "").unwrap();
        assert_eq!(cached(&cache, "org/name"), Some(snapshot));
    }

    #[test]
    fn an_index_cannot_point_elsewhere() {
        assert!(shards(r#"{"weight_map": {"x": "../../a.safetensors"}}"#).is_err());
        assert!(shards("{}").is_err());
        assert!(shards("not json").is_err());
    }
}
