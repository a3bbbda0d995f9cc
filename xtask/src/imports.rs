//! Who may import whom. Layers meet in `mobula-core`, and the facade wires them together.

use anyhow::{Result, bail};
use cargo_metadata::{DependencyKind, MetadataCommand};

/// A package of this workspace and the others that it may depend on, in any way.
const RULES: &[(&str, &[&str])] = &[
    ("mobula-macros", &[]),
    ("mobula-core", &["mobula-macros"]),
    ("mobula-data", &["mobula-core"]),
    ("mobula-nn", &["mobula-core"]),
    ("mobula-tune", &["mobula-core"]),
    ("mobula-serve", &["mobula-core"]),
    ("mobula-train", &["mobula-core", "mobula-nn"]),
    ("mobula", LAYERS),
    ("mobula-bench", LAYERS),
    ("mobula-bench-data", &["mobula-core", "mobula-data"]),
    ("xtask", &[]),
];

const LAYERS: &[&str] =
    &["mobula-core", "mobula-data", "mobula-nn", "mobula-serve", "mobula-train", "mobula-tune"];

/// One dependency between two packages of the workspace.
#[derive(Debug, PartialEq)]
struct Edge {
    from: String,
    to: String,
    kind: &'static str,
}

pub(crate) fn check() -> Result<String> {
    let metadata = MetadataCommand::new().current_dir(crate::command::root()).no_deps().exec()?;
    let packages: Vec<&str> =
        metadata.packages.iter().map(|package| package.name.as_str()).collect();
    let edges = edges(&metadata.packages, &packages);
    let mut complaints = strangers(&packages);
    complaints.extend(edges.iter().filter_map(complaint));
    if !complaints.is_empty() {
        bail!("the import rules are broken:\n{}", complaints.join("\n"));
    }
    Ok(format!("{} packages, {} imports", packages.len(), edges.len()))
}

fn edges(packages: &[cargo_metadata::Package], members: &[&str]) -> Vec<Edge> {
    let mut edges = Vec::new();
    for package in packages {
        for dependency in &package.dependencies {
            if members.contains(&dependency.name.as_str()) {
                edges.push(Edge {
                    from: package.name.to_string(),
                    to: dependency.name.clone(),
                    kind: table(dependency.kind),
                });
            }
        }
    }
    edges
}

fn table(kind: DependencyKind) -> &'static str {
    match kind {
        DependencyKind::Development => "dev-dependencies",
        DependencyKind::Build => "build-dependencies",
        _ => "dependencies",
    }
}

fn may_import(package: &str) -> Option<&'static [&'static str]> {
    RULES.iter().find(|(name, _)| *name == package).map(|(_, allowed)| *allowed)
}

/// Packages that no rule covers.
fn strangers(packages: &[&str]) -> Vec<String> {
    let unknown = packages.iter().filter(|package| may_import(package).is_none());
    unknown
        .map(|package| format!("  {package} has no import rule: add one to xtask/src/imports.rs"))
        .collect()
}

/// What is wrong with an edge, if something is.
fn complaint(edge: &Edge) -> Option<String> {
    let allowed = may_import(&edge.from)?;
    if allowed.contains(&edge.to.as_str()) {
        return None;
    }
    let rule = match allowed {
        [] => "no package of the workspace".to_string(),
        some => format!("only {}", some.join(", ")),
    };
    Some(format!(
        "  {} → {} ([{}]): {} may import {rule}; what two layers share belongs in mobula-core, what wires them in mobula",
        edge.from, edge.to, edge.kind, edge.from,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edge(from: &str, to: &str) -> Edge {
        Edge { from: from.into(), to: to.into(), kind: "dev-dependencies" }
    }

    #[test]
    fn the_rules_hold_for_every_pair() {
        let allowed = [
            ("mobula-core", "mobula-macros"),
            ("mobula-data", "mobula-core"),
            ("mobula-nn", "mobula-core"),
            ("mobula-tune", "mobula-core"),
            ("mobula-serve", "mobula-core"),
            ("mobula-train", "mobula-core"),
            ("mobula-train", "mobula-nn"),
        ];
        let layers = RULES.iter().map(|(name, _)| *name).filter(|name| name.starts_with("mobula-"));
        let layers: Vec<_> = layers.filter(|name| !name.starts_with("mobula-bench")).collect();
        for from in &layers {
            for to in &layers {
                let good = allowed.contains(&(*from, *to));
                assert_eq!(complaint(&edge(from, to)).is_none(), good, "{from} → {to}");
            }
        }
    }

    #[test]
    fn the_facade_imports_every_layer_and_nobody_imports_the_facade() {
        for layer in LAYERS {
            assert_eq!(complaint(&edge("mobula", layer)), None);
            assert!(complaint(&edge(layer, "mobula")).is_some());
        }
        assert!(complaint(&edge("mobula", "mobula-macros")).is_some());
        assert!(complaint(&edge("xtask", "mobula-core")).is_some());
    }

    #[test]
    fn a_complaint_names_the_edge_the_rule_and_the_way_out() {
        let text = complaint(&edge("mobula-tune", "mobula-train")).expect("forbidden");
        for part in
            ["mobula-tune → mobula-train", "[dev-dependencies]", "only mobula-core", "belongs in"]
        {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_package_without_a_rule_is_named() {
        assert_eq!(strangers(&["mobula", "xtask"]), Vec::<String>::new());
        assert!(strangers(&["mobula-rl"])[0].contains("mobula-rl has no import rule"));
    }
}
