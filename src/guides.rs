//! The README and the guides of `docs/guides/`, so that their snippets are compiled and run by `cargo test`.

#[doc = include_str!("../docs/guides/cluster.md")]
mod cluster {}
#[doc = include_str!("../docs/guides/core.md")]
mod core {}
#[doc = include_str!("../docs/guides/data.md")]
mod data {}
#[doc = include_str!("../docs/guides/serve.md")]
mod serve {}
#[doc = include_str!("../docs/guides/status.md")]
mod status {}
#[doc = include_str!("../docs/guides/train.md")]
mod train {}
#[doc = include_str!("../docs/guides/tune.md")]
mod tune {}
#[doc = include_str!("../README.md")]
mod readme {}
