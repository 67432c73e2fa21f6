//! `sconce key`: a new API key. The secret is shown once and kept nowhere; the server's file has its hash.

use rand::TryRng as _;
use rand::rngs::{SysError, SysRng};

use super::{OutputError, say};
use crate::{api, config::Key};

/// 256 bits, so that nobody guesses one, whatever is known of its hash.
const SECRET_BYTES: usize = 32;

/// Why no key was made.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("the operating system gives no random numbers: {0}")]
    Random(#[from] SysError),
    #[error(transparent)]
    Name(#[from] api::KeysError),
    #[error(transparent)]
    Output(#[from] OutputError),
}

/// Prints the secret, and what the keys' file needs of it.
pub fn run(settings: &Key) -> Result<(), KeyError> {
    let mut bytes = [0; SECRET_BYTES];
    SysRng.try_fill_bytes(&mut bytes)?;
    let secret = format!("sk-{}", hex(&bytes));
    let lines = lines(&settings.name, &secret);
    api::check_keys(&lines)?;
    say(format_args!(
        "# The key, shown this once. Its owner sends it as `Authorization: Bearer KEY`:\n# {secret}\n\n\
         # For the file of --api-keys:\n{lines}"
    ))?;
    Ok(())
}

fn lines(name: &str, secret: &str) -> String {
    format!(
        "[[key]]\nname = \"{}\"\nsha256 = \"{}\"\nweight = 1\nrequests-per-minute = 60\ntokens-per-minute = 100000\nmax-in-flight = 8\n",
        name.escape_default(),
        hex(&api::hash_key(secret)),
    )
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
