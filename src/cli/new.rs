//! `mobula new`: a crate to start from.

use super::output::print;
use anyhow::{Context, ensure};
use mobula::random::Stream;
use std::f64::consts::TAU;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// The name of the crate, and of its folder
    name: String,
    /// The folder to make it in
    #[arg(long, default_value = ".")]
    dir: PathBuf,
}

/// Mobula's own manifest: it has the profile.
const MANIFEST: &str = include_str!("../../Cargo.toml");

/// Files with a text of their own; `{{name}}` stands for the crate's name.
const FILES: [(&str, &str); 4] = [
    ("src/main.rs", include_str!("../templates/new/main.rs")),
    ("sweep.yaml", include_str!("../templates/new/sweep.yaml")),
    ("README.md", include_str!("../templates/new/README.md")),
    (".gitignore", include_str!("../templates/new/gitignore")),
];

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    check_name(&options.name)?;
    let folder = options.dir.join(&options.name);
    ensure!(
        fs::symlink_metadata(&folder).is_err(),
        "{} exists; choose another name, or another folder with --dir",
        folder.display()
    );
    // Under another name until it is whole: a failure leaves no half of a crate.
    let draft = options.dir.join(format!(".{}.tmp-{}", options.name, std::process::id()));
    let written = write_crate(&draft, &options.name)
        .and_then(|()| fs::rename(&draft, &folder).with_context(|| at("create", &folder)));
    if written.is_err() {
        // The first error is the one to tell.
        let _ = fs::remove_dir_all(&draft);
    }
    written?;
    print(format!(
        "wrote {0}\n\nnext:\n  cd {0}\n  cargo run\n\nthe first build takes some minutes; \
         README.md tells the rest",
        folder.display()
    ))
}

fn write_crate(folder: &Path, name: &str) -> anyhow::Result<()> {
    let manifest = [include_str!("../templates/new/manifest.toml"), &dev_profile()].concat();
    let manifest = manifest.replace("{{mobula}}", &dependency());
    let texts = FILES.map(|(path, text)| (path, text.to_owned()));
    let made = [("Cargo.toml", manifest), ("data/spirals.csv", spirals())];
    for (path, text) in texts.into_iter().chain(made) {
        let path = folder.join(path);
        let parent = path.parent().unwrap_or(folder);
        fs::create_dir_all(parent).with_context(|| at("create", parent))?;
        fs::write(&path, text.replace("{{name}}", name)).with_context(|| at("write", &path))?;
    }
    Ok(())
}

fn at(action: &str, path: &Path) -> String {
    format!("cannot {action} {}", path.display())
}

/// Cargo's rules for names, and the names that are taken in the crate itself.
fn check_name(name: &str) -> anyhow::Result<()> {
    let letters = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    ensure!(
        name.starts_with(|c: char| c.is_ascii_alphabetic()) && name.chars().all(letters),
        "{name:?} is no name for a crate: expected a letter, then letters, digits, - and _"
    );
    let word = name.replace('-', "_");
    ensure!(
        !TAKEN.contains(&word.as_str()),
        "{name:?} is taken, by Rust or by a crate that the new one needs; choose another name"
    );
    Ok(())
}

const TAKEN: &[&str] = &[
    // Crates of every Rust program, and its own dependencies.
    "alloc",
    "core",
    "proc_macro",
    "std",
    "test",
    "anyhow",
    "candle_core",
    "clap",
    "mimalloc",
    "mobula",
    "serde", // Folders that cargo makes.
    "build",
    "deps",
    "examples",
    "incremental", // Keywords.
    "abstract",
    "as",
    "async",
    "await",
    "become",
    "box",
    "break",
    "const",
    "continue",
    "crate",
    "do",
    "dyn",
    "else",
    "enum",
    "extern",
    "false",
    "final",
    "fn",
    "for",
    "gen",
    "if",
    "impl",
    "in",
    "let",
    "loop",
    "macro",
    "match",
    "mod",
    "move",
    "mut",
    "override",
    "priv",
    "pub",
    "ref",
    "return",
    "self",
    "static",
    "struct",
    "super",
    "trait",
    "true",
    "try",
    "type",
    "typeof",
    "unsafe",
    "unsized",
    "use",
    "virtual",
    "where",
    "while",
    "yield",
];

/// Mobula itself: by version, and from the checkout that this command was built from, while that
/// is there.
fn dependency() -> String {
    let version = env!("CARGO_PKG_VERSION");
    let source = env!("CARGO_MANIFEST_DIR");
    if !Path::new(source).join("src/lib.rs").exists() {
        return format!("{version:?}");
    }
    let path = toml::Value::String(source.to_owned());
    format!("{{ version = {version:?}, path = {path} }}")
}

/// The profile that Mobula itself is developed with. What is a member of its workspace, and
/// therefore built as ours is, is a dependency in the new crate and needs a line.
fn dev_profile() -> String {
    let mut profile = String::new();
    let mut inside = false;
    for line in MANIFEST.lines() {
        if line.starts_with('[') {
            inside = line.starts_with("[profile.dev");
        }
        if inside && !line.starts_with('#') && !line.is_empty() {
            let gap =
                if line.starts_with("[profile.dev]") || line.contains("\"*\"") { "\n" } else { "" };
            let _ = writeln!(profile, "{gap}{line}");
        }
    }
    for member in ["mobula", "mobula-data", "mobula-serve", "mobula-tune"] {
        let _ = writeln!(profile, "[profile.dev.package.{member}]\nopt-level = 1");
    }
    profile
}

/// Points of each spiral.
const POINTS: u32 = 400;

/// `x,y,spiral`: two spirals of one and a half turns, one the other's mirror image, with noise.
fn spirals() -> String {
    let noise = Stream::new(7, "spirals");
    let mut csv = "x,y,spiral\n".to_owned();
    for i in 0..POINTS {
        let along = f64::from(i + 1) / f64::from(POINTS);
        for (spiral, side) in [(0u32, 1.0), (1, -1.0)] {
            let mut noise = noise.at(u64::from(spiral), i);
            let (sin, cos) = (1.5 * TAU * along).sin_cos();
            let mut coordinate = |direction| side * along * direction + 0.02 * noise.normal();
            let (x, y) = (coordinate(cos), coordinate(sin));
            let _ = writeln!(csv, "{x:.4},{y:.4},{spiral}");
        }
    }
    csv
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_cargo_takes() {
        for good in ["hello", "my-model", "a_2", "X"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", "2fast", "a b", "../up", "-x", "crate", "std", "candle-core", "über", "a/b"]
        {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    /// The new crate is to use the versions that Mobula was built and tested with, and its profile.
    #[test]
    fn versions_and_profile_are_the_workspaces() {
        let ours: toml::Table = MANIFEST.parse().expect("our manifest");
        let text = [include_str!("../templates/new/manifest.toml"), &dev_profile()].concat();
        let text = text.replace("{{mobula}}", &dependency());
        let new: toml::Table = text.parse().expect("the new manifest");
        let version = |of: &toml::Value| of.get("version").unwrap_or(of).clone();
        for (name, dependency) in new["dependencies"].as_table().expect("a table") {
            let ours = &ours["workspace"]["dependencies"][name];
            assert_eq!(version(dependency), version(ours), "{name}");
        }
        let packages = |of: &toml::Table| of["profile"]["dev"]["package"].clone();
        for (name, profile) in packages(&ours).as_table().expect("a table") {
            assert_eq!(packages(&new).get(name), Some(profile), "{name}");
        }
        assert_eq!(new["profile"]["dev"]["opt-level"], ours["profile"]["dev"]["opt-level"]);
    }
}
