//! Namespaces as the cache file writes them: the strings themselves, in JSON.

use std::sync::Arc;

use crate::batching::Namespace;

/// `null` for what everyone shares, else the tenant and the salt, each a string or `null`.
type Written<'a> = Option<(Option<&'a str>, Option<&'a str>)>;

pub fn to_text(namespace: &Namespace) -> serde_json::Result<String> {
    let written: Written = match namespace {
        Namespace::Shared => None,
        Namespace::Private { tenant, salt } => Some((tenant.as_deref(), salt.as_deref())),
    };
    serde_json::to_string(&written)
}

pub fn from_text(text: &str) -> serde_json::Result<Namespace> {
    let read: Option<(Option<String>, Option<String>)> = serde_json::from_str(text)?;
    Ok(match read {
        None => Namespace::Shared,
        Some((tenant, salt)) => Namespace::Private {
            tenant: tenant.map(Arc::from),
            salt: salt.map(Arc::from),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_namespace_is_read_as_it_was() {
        let strings = [None, Some(""), Some("null"), Some("a \"quoted\" one, and\nmore")];
        let private = strings.iter().flat_map(|tenant| {
            strings.iter().map(|salt| Namespace::Private {
                tenant: tenant.map(Arc::from),
                salt: salt.map(Arc::from),
            })
        });
        let all: Vec<Namespace> = private.chain([Namespace::Shared]).collect();
        let texts: Vec<String> = all.iter().map(|namespace| to_text(namespace).unwrap()).collect();
        for (index, namespace) in all.iter().enumerate() {
            assert_eq!(from_text(&texts[index]).unwrap(), *namespace);
            assert!(!texts[..index].contains(&texts[index]));
        }
        assert!(from_text("{}").is_err());
    }
}
