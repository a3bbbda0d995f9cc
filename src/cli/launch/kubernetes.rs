//! The manifest of an Indexed Job, one pod a copy, and of the Service that gives pods their names.

use super::Options;
use anyhow::{Context, ensure};
use mobula::world::SECRET_VARIABLE;
use std::fmt::Write;

/// A pod has its ports for itself.
const PORT: u16 = 29_400;

/// The host name of a pod is a DNS label, made of the job's name, a hyphen and the index.
const LONGEST_NAME: usize = 52;

/// JSON strings are YAML strings, so every value that a user gives is written as one.
pub(super) fn manifest(options: &Options) -> anyhow::Result<String> {
    let (job, name) = (&options.job, options.job.name()?);
    check_name(&name)?;
    let image = job.kubernetes.image.as_deref().context("--image is missing")?;
    let command = options
        .command
        .iter()
        .map(|word| word.to_str().with_context(|| format!("{} is not UTF-8", word.display())));
    let command = serde_json::to_string(&command.collect::<anyhow::Result<Vec<_>>>()?)?;
    let mut text = format!(
        r#"# Written by `mobula launch --kubernetes --print`, for Kubernetes 1.29 or newer.
# The ranks let each other in by a secret, which is to be there first:
#   kubectl create secret generic {name}-mobula --from-literal=secret="$(openssl rand -hex 32)"
apiVersion: v1
kind: Service
metadata:
  name: "{name}"
spec:
  clusterIP: None
  # The ranks look for each other before any of them is ready.
  publishNotReadyAddresses: true
  selector:
    mobula/job: "{name}"
  ports:
    - name: mobula
      port: {PORT}
---
apiVersion: batch/v1
kind: Job
metadata:
  name: "{name}"
spec:
  completionMode: Indexed
  completions: {nodes}
  parallelism: {nodes}
  backoffLimitPerIndex: {restarts}
  template:
    metadata:
      labels:
        mobula/job: "{name}"
    spec:
      subdomain: "{name}"
      restartPolicy: Never
      containers:
        - name: mobula
          image: {image}
          command: {command}
          env:
            # The rank is JOB_COMPLETION_INDEX, which Kubernetes sets.
            - name: WORLD_SIZE
              value: "{nodes}"
            - name: MASTER_ADDR
              value: "{name}-0.{name}"
            - name: MASTER_PORT
              value: "{PORT}"
            - name: RESTART_COUNT
              valueFrom:
                fieldRef:
                  fieldPath: metadata.annotations['batch.kubernetes.io/job-index-failure-count']
            - name: {SECRET_VARIABLE}
              valueFrom:
                secretKeyRef:
                  name: "{name}-mobula"
                  key: secret
"#,
        nodes = job.nodes,
        restarts = options.max_restarts,
        image = serde_json::to_string(image)?,
    );
    let claim = job.kubernetes.volume_claim.as_deref();
    if claim.is_some() {
        writeln!(
            text,
            "            - name: MOBULA_RUN_DIR\n              value: \"/runs/{name}\""
        )?;
    }
    text.push_str(&resources(options)?);
    if let Some(claim) = claim {
        write!(
            text,
            r#"          volumeMounts:
            - name: runs
              mountPath: /runs
      volumes:
        - name: runs
          persistentVolumeClaim:
            claimName: {}
"#,
            serde_json::to_string(claim)?
        )?;
    }
    Ok(text)
}

/// Limits are requests too where those are not given: a pod gets what it asks for, or waits.
fn resources(options: &Options) -> anyhow::Result<String> {
    let job = &options.job;
    let amounts = [
        ("cpu", job.cpus_per_task.map(|n| n.to_string())),
        ("memory", job.mem.clone()),
        ("nvidia.com/gpu", job.gpus_per_node.map(|n| n.to_string())),
    ];
    let mut text = String::new();
    for (name, amount) in amounts {
        let Some(amount) = amount else { continue };
        if text.is_empty() {
            text.push_str("          resources:\n            limits:\n");
        }
        writeln!(text, "              {name}: {}", serde_json::to_string(&amount)?)?;
    }
    Ok(text)
}

fn check_name(name: &str) -> anyhow::Result<()> {
    let label = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    ensure!(
        name.chars().all(label)
            && name.starts_with(|c: char| c.is_ascii_lowercase())
            && !name.ends_with('-')
            && name.len() <= LONGEST_NAME,
        "{name:?} is no name for a job of Kubernetes: expected a lower-case letter, then lower-case \
         letters, digits and -, at most {LONGEST_NAME} in all"
    );
    Ok(())
}
