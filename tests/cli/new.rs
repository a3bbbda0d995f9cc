use crate::program::mobula;
use std::path::Path;

fn new(name: &str, dir: &Path) -> crate::program::Finished {
    mobula(&["new", name, "--dir", dir.to_str().expect("UTF-8")])
}

/// Whether it builds and trains is for `cargo xtask smoke`: that takes minutes.
#[test]
fn a_new_crate_is_written_once() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let made = new("hello", folder.path());
    assert_eq!(made.code, Some(0), "{made:?}");
    let hello = folder.path().join("hello");
    assert!(made.stdout.contains(&format!("cd {}\n  cargo run", hello.display())), "{made:?}");
    for file in ["Cargo.toml", "src/main.rs", "data/spirals.csv", "sweep.yaml", "README.md"] {
        let text = std::fs::read_to_string(hello.join(file)).expect(file);
        assert!(!text.is_empty() && !text.contains("{{"), "{file}");
    }
    assert!(hello.join(".gitignore").is_file());
    mobula::tune::Sweep::load(hello.join("sweep.yaml")).expect("a sweep file");

    std::fs::write(hello.join("src/main.rs"), "// mine").expect("write");
    let again = new("hello", folder.path());
    assert!(again.error().contains("hello exists; choose another name"), "{again:?}");
    assert_eq!(std::fs::read(hello.join("src/main.rs")).expect("read"), b"// mine");
}

#[test]
fn a_bad_name_or_folder_leaves_nothing_behind() {
    let folder = tempfile::tempdir().expect("temporary folder");
    for name in ["../up", "2fast", "serde", "match"] {
        assert!(new(name, folder.path()).error().contains(name), "{name}");
    }
    let entries = std::fs::read_dir(folder.path()).expect("list").count();
    assert_eq!(entries, 0);
    let file = folder.path().join("file");
    std::fs::write(&file, "").expect("write");
    assert!(new("hello", &file).error().contains("cannot"), "a file is no folder");
}
