//! Every feature of the facade alone, and none: each must compile without a warning.

use crate::command;
use anyhow::{Result, ensure};

/// The facade's features: one a layer, and `tls`. `cuda` needs its toolkit and is left to machines
/// with one.
const FEATURES: &[&str] = &["", "data", "serve", "train", "tune", "tls"];

/// Crates that belong to one feature only, by the start of their names.
const HEAVY: &[(&str, &str)] =
    &[("datafusion", "data"), ("parquet", "data"), ("axum", "serve"), ("rustls", "tls")];

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

/// The heavy crates in `tree` that `feature` has no business to compile.
fn uninvited<'a>(tree: &'a str, feature: &str) -> Vec<&'a str> {
    let foreign: Vec<_> = HEAVY.iter().filter(|(_, owner)| *owner != feature).collect();
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
        assert_eq!(uninvited(tree, "data"), Vec::<&str>::new());
    }
}
