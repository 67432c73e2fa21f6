//! What each command of the command line does.

pub mod bench;
pub mod device;
pub mod doctor;
pub mod key;
pub mod loadtest;
pub mod model_files;
pub mod pull;
pub mod serve;
mod signals;
pub mod tune;
