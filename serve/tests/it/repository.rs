//! Model repositories: written, read, served, and what is wrong with broken ones.

use crate::support::*;
use mobula_serve::{BatchingConfig, Error, ModelConfig, Repository, RepositoryModel, Server};
use std::fs;
use std::path::Path;

fn config() -> ModelConfig {
    let metadata = metadata("double");
    let params: toml::Table = toml::from_str("hidden = [32, 16]\ndropout = 0.1").expect("TOML");
    ModelConfig {
        name: "double".to_owned(),
        architecture: "mlp".to_owned(),
        replicas: 2,
        cpus: None,
        params,
        batching: BatchingConfig { max_batch_size: Some(8), ..BatchingConfig::default() },
        inputs: metadata.inputs,
        outputs: metadata.outputs,
    }
}

fn save(dir: &Path) -> RepositoryModel {
    let write = |folder: &Path| Ok(fs::write(folder.join("model.safetensors"), b"weights")?);
    RepositoryModel::save(dir, &config(), write).expect("saved")
}

#[test]
fn what_was_saved_is_read_and_served_in_its_newest_version() {
    let dir = tempfile::tempdir().expect("a folder");
    assert_eq!(save(dir.path()).versions, [1]);
    let second = save(dir.path());
    assert_eq!(second.versions, [1, 2]);
    assert_eq!(fs::read(second.path.join("model.safetensors")).expect("weights"), b"weights");
    let repository = Repository::open(dir.path()).expect("a repository");
    assert_eq!(repository.models()[0].config, config());

    let gate = Gate::default();
    let deployments = repository.deployments(|model| {
        assert_eq!(model.config.params["hidden"][0].as_integer(), Some(32));
        assert!(model.path.ends_with("double/2"));
        Ok(loader(&gate))
    });
    let mut server = Server::new(&runtime());
    for deployment in deployments.expect("loaders") {
        server = server.deploy(deployment).expect("deployed");
    }
    let server = server.bind("127.0.0.1:0").expect("a free port");
    assert_eq!(post_infer(server.addr(), &body(&[1.0])).status, 200);
    assert_eq!(get(server.addr(), "/v2/models/double").json["versions"][0], "2");
    let nine = post_infer(server.addr(), &body(&[1.0; 9]));
    assert!(nine.error().contains("at most 8"), "the batching table counts: {nine:?}");
}

#[test]
fn a_failed_save_leaves_no_version_behind() {
    let dir = tempfile::tempdir().expect("a folder");
    let failed = RepositoryModel::save(dir.path(), &config(), |_| Err("disk full".into()));
    assert!(failed.expect_err("failed").to_string().contains("disk full"));
    assert!(Repository::open(dir.path()).is_err());
    assert_eq!(save(dir.path()).versions, [1]);
}

fn broken(change: impl FnOnce(&Path)) -> String {
    let dir = tempfile::tempdir().expect("a folder");
    save(dir.path());
    change(dir.path());
    Repository::open(dir.path()).expect_err("broken").to_string()
}

/// Replaces words in the saved config.
fn edited(from: &str, to: &str) -> String {
    broken(|dir| {
        let path = dir.join("double/config.toml");
        let text = fs::read_to_string(&path).expect("config");
        assert!(text.contains(from), "{from} not in {text}");
        fs::write(path, text.replace(from, to)).expect("written");
    })
}

#[test]
fn broken_repositories_say_what_is_missing() {
    let text = broken(|dir| fs::remove_file(dir.join("double/config.toml")).expect("removed"));
    assert!(text.contains("double") && text.contains("no config.toml"), "{text}");
    let text = broken(|dir| fs::remove_dir_all(dir.join("double/1")).expect("removed"));
    assert!(text.contains("no version"), "{text}");
    let text = broken(|dir| fs::remove_dir_all(dir.join("double")).expect("removed"));
    assert!(text.contains("NAME/config.toml"), "{text}");
    let text = edited("architecture = \"mlp\"", "architektur = \"mlp\"");
    assert!(text.contains("architektur") && text.contains("`architecture`"), "{text}");
    let text = edited("datatype = \"FP32\"", "datatype = \"FLOAT\"");
    assert!(text.contains("FLOAT") && text.contains("FP32"), "{text}");
    let text = edited("name = \"double\"", "name = \"other\"");
    assert!(text.contains("other") && text.contains("double"), "{text}");
    let text = edited("max_batch_size = 8", "max_delay_ms = -1.0");
    assert!(text.contains("max_delay_ms"), "{text}");
    let missing = Repository::open("/no/such/folder").expect_err("missing");
    assert!(missing.to_string().contains("/no/such/folder"));
}

#[test]
fn a_hook_that_fails_names_the_model() {
    let dir = tempfile::tempdir().expect("a folder");
    save(dir.path());
    let repository = Repository::open(dir.path()).expect("a repository");
    let error = repository.deployments(|_| Err("no architecture mlp".into()));
    let error = error.expect_err("the hook fails");
    assert!(matches!(error, Error::LoadFailed { .. }));
    assert!(error.to_string().contains("double") && error.to_string().contains("no architecture"));
}
