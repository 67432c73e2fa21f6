//! The HTTP client, and whose certificates it believes.

use reqwest::{Client, Error};

/// Lets HTTP clients of this process compute with `ring`. The first call decides for the whole process; what a program
/// has chosen before stays.
pub fn prepare() {
    // An error means that a choice was made already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// A client for servers at this URL. It believes the certificates that the system believes (`SSL_CERT_FILE` names
/// others), or any; it keeps connections for later requests, or none.
pub(crate) fn client(url: &str, any_certificate: bool, keeps_connections: bool) -> Result<Client, Error> {
    prepare();
    let mut builder = Client::builder().no_proxy();
    if !keeps_connections {
        builder = builder.pool_max_idle_per_host(0);
    }
    if url.starts_with("https:") {
        builder.tls_danger_accept_invalid_certs(any_certificate).build()
    } else {
        // Plain HTTP must work where the system has no certificates at all.
        builder.tls_certs_only([]).build()
    }
}
