//! `klio drill`.

use super::args::{Cli, DrillArgs};
use crate::{
    config::Config,
    error::{Error, Failure},
};

pub(super) async fn run(_: &Config, _: &Cli, _: &DrillArgs) -> Result<u8, Error> {
    Err(Error::new(Failure::Config, "klio drill is not there yet"))
}
