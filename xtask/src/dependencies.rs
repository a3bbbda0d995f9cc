//! What may come in from outside: licences, banned crates, duplicates.

use crate::{command, licence};
use anyhow::{Result, bail};
use cargo_metadata::{CargoOpt, MetadataCommand, Package};
use std::collections::{BTreeMap, BTreeSet};

/// Licences whose terms a program built on Mobula can meet by shipping their texts.
const LICENCES: &[&str] = &[
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Zlib",
];

/// Crates that must not come in, not even through others.
const BANNED: &[(&str, &str)] = &[
    ("bindgen", "needs libclang; the build needs Rust and a C compiler, nothing else"),
    (
        "candle-nn",
        "its norm and softmax drop gradients and its AdamW hides its state: use mobula-nn",
    ),
    ("cmake", "needs CMake; the build needs Rust and a C compiler, nothing else"),
    ("native-tls", "needs the system's OpenSSL"),
    ("openssl-sys", "needs the system's OpenSSL"),
    ("prost-build", "needs protoc: check generated code in"),
    ("serde_yaml", "archived: use serde_norway"),
];

/// A crate that we accept in several versions.
type Duplicate = (&'static str, &'static [&'static str], &'static str);

/// The crates, their release series, and who holds the odd ones out.
const DUPLICATES: &[Duplicate] = &[
    ("base64", &["0.13", "0.22", "0.23"], "tokenizers (candle), tonic, arrow"),
    ("block-buffer", &["0.10", "0.12"], "follows digest"),
    ("comfy-table", &["7", "8"], "7 is arrow's pretty printer"),
    ("crypto-common", &["0.1", "0.2"], "follows digest"),
    ("digest", &["0.10", "0.11"], "object_store is on 0.10, postgres-protocol on 0.11"),
    ("fallible-iterator", &["0.2", "0.3"], "postgres-protocol is on 0.2, rusqlite on 0.3"),
    ("foldhash", &["0.1", "0.2"], "follows hashbrown"),
    ("getrandom", &["0.2", "0.3", "0.4"], "ring is on 0.2, ahash and rand 0.9 on 0.3"),
    ("hashbrown", &["0.14", "0.15", "0.16", "0.17"], "dashmap, petgraph, safetensors, arrow"),
    ("itertools", &["0.14", "0.15"], "tokenizers (candle) and object_store are on 0.14"),
    ("md-5", &["0.10", "0.11"], "follows digest"),
    ("miniz_oxide", &["0.8", "0.9"], "png is on 0.8"),
    ("num-bigint", &["0.4", "0.5"], "bigdecimal (DataFusion) is on 0.4"),
    ("phf", &["0.12", "0.13"], "chrono-tz is on 0.12, tokio-postgres on 0.13"),
    ("phf_shared", &["0.12", "0.13"], "follows phf"),
    ("rand", &["0.9", "0.10"], "candle and DataFusion are on 0.9"),
    ("rand_core", &["0.9", "0.10"], "follows rand"),
    ("syn", &["2", "3"], "the derive macros are half way from 2 to 3"),
];

pub(crate) fn check() -> Result<String> {
    // Licences and bans: whatever any feature on any platform can bring in.
    let mut all = MetadataCommand::new();
    let all = all.current_dir(command::root()).features(CargoOpt::AllFeatures).exec()?;
    let mut complaints = licences(&all.packages);
    complaints.extend(banned(&all.packages));
    // Duplicates: what a plain build on Linux compiles.
    let tree = compiled()?;
    let versions = versions(&tree);
    complaints.extend(duplicates(&versions, DUPLICATES));
    // What `cargo run` compiles, and what `cargo test` does.
    for edges in ["normal", "normal,dev"] {
        let [all, one] = ["--workspace", "--package mobula"].map(|what| with_features(what, edges));
        complaints.extend(compiled_anew(&all?, &one?));
    }
    if !complaints.is_empty() {
        bail!(
            "the dependencies break the rules of xtask/src/dependencies.rs:\n{}",
            complaints.join("\n")
        );
    }
    Ok(format!("{} crates compiled", versions.len()))
}

fn licences(packages: &[Package]) -> Vec<String> {
    let complaint = |package: &Package| {
        let name = format!("  {} {}", package.name, package.version);
        let Some(expression) = &package.license else {
            return Some(format!("{name} states no licence: look at its files, then replace it"));
        };
        match licence::is_met(expression, LICENCES) {
            Ok(true) => None,
            Ok(false) => {
                Some(format!("{name} is under {expression}; allowed are {}", LICENCES.join(", ")))
            }
            Err(error) => Some(format!("{name}: {error:#}")),
        }
    };
    packages.iter().filter_map(complaint).collect()
}

fn banned(packages: &[Package]) -> Vec<String> {
    let mut complaints = Vec::new();
    for (name, reason) in BANNED {
        if packages.iter().any(|package| package.name.as_str() == *name) {
            complaints.push(format!(
                "  {name} is banned ({reason}); see who brings it in: cargo tree --workspace --all-features -i {name}"
            ));
        }
    }
    complaints
}

/// One line `name vVERSION …` for every crate of a plain Linux build, as cargo prints it.
fn compiled() -> Result<String> {
    let tree =
        "tree --workspace --edges normal,build,dev --prefix none --target x86_64-unknown-linux-gnu";
    command::output(command::cargo_command(tree))
}

/// One line `name vVERSION;features` for every crate that is built for the target, not for the build itself.
fn with_features(packages: &str, edges: &str) -> Result<String> {
    let tree = format!("tree {packages} --edges {edges} --prefix none --format {{p}};{{f}}");
    command::output(command::cargo_command(&tree))
}

/// Crates that the facade by itself has with other features than the workspace: they, and what is built on
/// them, would be compiled once more for each `cargo run`.
fn compiled_anew(all: &str, one: &str) -> BTreeSet<String> {
    let lines = |tree| -> BTreeSet<String> {
        str::lines(tree).map(|line| line.trim_end_matches(" (*)").to_owned()).collect()
    };
    let all = lines(all);
    let other = lines(one).into_iter().filter(|line| !all.contains(line));
    let complaint = |line: String| {
        let name = line.replace(';', " with the features: ");
        format!(
            "  mobula by itself has {name}; the workspace has others, so it is compiled twice: have \
             [workspace.dependencies] name those of the workspace, for it or for a crate that brings it in"
        )
    };
    other.filter(|line| !line.starts_with("mobula")).map(complaint).collect()
}

/// The versions of each crate.
fn versions(tree: &str) -> BTreeMap<&str, BTreeSet<&str>> {
    let mut versions = BTreeMap::<_, BTreeSet<_>>::new();
    for line in tree.lines() {
        let mut words = line.split_whitespace();
        if let (Some(name), Some(version)) = (words.next(), words.next()) {
            versions.entry(name).or_default().insert(version.trim_start_matches('v'));
        }
    }
    versions
}

/// New duplicates, and accepted ones that are no more.
fn duplicates(versions: &BTreeMap<&str, BTreeSet<&str>>, accepted: &[Duplicate]) -> Vec<String> {
    let mut complaints = Vec::new();
    for (name, versions) in versions {
        let found: BTreeSet<_> = versions.iter().map(|version| series(version)).collect();
        let accepted = accepted.iter().find(|(accepted, ..)| accepted == name);
        let known: BTreeSet<_> = accepted
            .iter()
            .flat_map(|(_, known, _)| known.iter())
            .map(|known| series(known))
            .collect();
        let new = versions.len() > 1 && (!found.is_subset(&known) || versions.len() > known.len());
        let list = versions.iter().copied().collect::<Vec<_>>().join(", ");
        if new {
            complaints.push(format!(
                "  {name} comes in {} versions ({list}): align them (see `cargo tree -d`), or accept them with a reason",
                versions.len()
            ));
        } else if let Some(gone) = known.difference(&found).next() {
            complaints.push(format!(
                "  {name} {gone} is accepted as a duplicate, but gone (now {list}): remove it from the list"
            ));
        }
    }
    let missing = accepted.iter().filter(|(name, ..)| !versions.contains_key(name));
    complaints.extend(missing.map(|(name, ..)| {
        format!("  {name} is accepted as a duplicate, but gone: remove it from the list")
    }));
    complaints
}

/// What semver treats as one series: `1.2.3` is `1`, `0.2.3` is `0.2`.
fn series(version: &str) -> String {
    let mut parts = version.split('.');
    match (parts.next().unwrap_or_default(), parts.next()) {
        ("0", Some(minor)) => format!("0.{minor}"),
        (major, _) => major.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TREE: &str =
        "mobula v0.1.0 (/somewhere)\n\nrand v0.9.5\nrand v0.10.4\nrand v0.9.5 (*)\nserde v1.0.1\n";

    #[test]
    fn features_that_a_package_lacks_by_itself_are_told() {
        let all = "serde v1.0.1;derive,std\nserde_json v1.0.2;std (*)\nmobula v0.1.0;a";
        let one = "mobula v0.1.0;\nserde_json v1.0.2;std\nserde v1.0.1;std";
        let complaints = Vec::from_iter(compiled_anew(all, one));
        assert_eq!(complaints.len(), 1, "{complaints:?}");
        let expected = "  mobula by itself has serde v1.0.1 with the features: std; the workspace";
        assert!(complaints[0].starts_with(expected), "{complaints:?}");
    }

    #[test]
    fn accepted_duplicates_pass() {
        let accepted: &[Duplicate] = &[("rand", &["0.9", "0.10"], "a reason")];
        assert_eq!(duplicates(&versions(TREE), accepted), Vec::<String>::new());
    }

    #[test]
    fn a_new_duplicate_is_named_with_the_way_out() {
        for accepted in [&[][..], &[("rand", &["0.9", "0.8"][..], "a reason")][..]] {
            let complaints = duplicates(&versions(TREE), accepted);
            assert_eq!(complaints.len(), 1);
            assert!(
                complaints[0].contains("rand comes in 2 versions (0.10.4, 0.9.5)"),
                "{complaints:?}"
            );
            assert!(complaints[0].contains("cargo tree -d"));
        }
    }

    #[test]
    fn two_releases_of_one_series_are_duplicates_too() {
        let tree = "a v1.0.0\na v1.2.0\n";
        assert_eq!(duplicates(&versions(tree), &[("a", &["1"], "a reason")]).len(), 1);
    }

    #[test]
    fn acceptance_that_is_no_longer_needed_must_go() {
        let accepted: &[Duplicate] = &[
            ("rand", &["0.9", "0.10"], ""),
            ("serde", &["1", "2"], ""),
            ("gone", &["1", "2"], ""),
        ];
        let complaints = duplicates(&versions(TREE), accepted);
        assert_eq!(complaints.len(), 2, "{complaints:?}");
        assert!(
            complaints[0].contains("serde 2 is accepted")
                && complaints[1].contains("gone is accepted")
        );
    }

    #[test]
    fn series_follow_semver() {
        let series = ["1.2.3", "0.10.4", "7", "0.9"].map(series);
        assert_eq!(series, ["1", "0.10", "7", "0.9"]);
    }
}
