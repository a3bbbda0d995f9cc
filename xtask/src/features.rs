//! Every feature of the facade alone, and none: each must compile without a warning.

use crate::command;
use anyhow::{Result, ensure};

/// The facade's features: one a layer, `tls`, other engines, and where data may lie. `cuda` needs its toolkit and is
/// left to machines with one.
const FEATURES: &[&str] =
    &["", "data", "data,backend", "data,postgres", "data,sqlite", "serve", "train", "tune", "tls"];

/// Crates that belong to some features only, by the start of their names.
const HEAVY: &[(&str, &[&str])] = &[
    ("axum", &["serve"]),
    ("datafusion", &["data"]),
    ("datafusion-proto", &["backend"]),
    ("parquet", &["data"]),
    ("reqwest", &["cloud"]),
    ("rusqlite", &["sqlite"]),
    ("rustls", &["tls", "cloud"]),
    ("tokio-postgres", &["postgres"]),
];

pub(crate) fn check() -> Result<String> {
    for feature in FEATURES {
        let select = format!("--package mobula --no-default-features --features={feature}");
        command::cargo(&format!("clippy {select} -- -D warnings"))?;
        let tree = format!("tree {select} --edges normal,build --prefix none");
        let tree = command::output(command::cargo_command(&tree))?;
        let uninvited = uninvited(&tree, feature);
        ensure!(
            uninvited.is_empty(),
            "feature {feature:?} of mobula compiles {}; see who brings it in: cargo tree {select} -i {}",
            uninvited.join(", "),
            uninvited[0]
        );
    }
    Ok(format!("{} combinations", FEATURES.len()))
}

/// The heavy crates in `tree` that `features` have no business to compile.
fn uninvited<'a>(tree: &'a str, features: &str) -> Vec<&'a str> {
    let invited = |owners: &[&str]| features.split(',').any(|feature| owners.contains(&feature));
    let foreign: Vec<_> = HEAVY.iter().filter(|(_, owners)| !invited(owners)).collect();
    let names = tree.lines().filter_map(|line| line.split_whitespace().next());
    let mut found: Vec<_> =
        names.filter(|name| foreign.iter().any(|(start, _)| name.starts_with(start))).collect();
    found.sort_unstable();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_their_own_feature_may_compile_heavy_crates() {
        let tree = "mobula v0.1.0\ndatafusion-expr v55.2.0\ndatafusion v55.2.0\ndatafusion v55.2.0 (*)\nserde v1.0.0";
        assert_eq!(uninvited(tree, "train"), ["datafusion", "datafusion-expr"]);
        assert_eq!(uninvited(tree, "cloud,data"), Vec::<&str>::new());
        let tree = "mobula v0.1.0\ndatafusion-proto v55.2.0";
        assert_eq!(uninvited(tree, "data"), ["datafusion-proto"]);
        assert_eq!(uninvited(tree, "data,backend"), Vec::<&str>::new());
    }
}
