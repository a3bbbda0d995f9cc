//! The batch script for Slurm, and its submission.

use super::{Options, shell};
use crate::cli::output::print;
use anyhow::{Context, ensure};
use mobula::World;
use mobula::run::RUN_DIR_VARIABLE;
use mobula::world::SECRET_VARIABLE;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// How long before the time limit a program is asked to end. Slurm may send it a minute earlier.
const NOTICE_SECONDS: u32 = 90;

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let job = Job::new(options)?;
    let script = job.script()?;
    if options.print {
        return print(script.trim_end());
    }
    let logs = job.folder.join("logs");
    fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;
    let file = job.file();
    fs::write(&file, script).with_context(|| format!("cannot write {}", file.display()))?;
    let id = submit(&file)?;
    print(format!(
        "submitted job {id}, {name}: {file}\noutput: {logs}/slurm-{id}.log\nstate: squeue --job {id}\
         \nend it: scancel {id}",
        name = job.name,
        file = file.display(),
        logs = logs.display()
    ))
}

/// The job's number.
fn submit(script: &Path) -> anyhow::Result<String> {
    let mut sbatch = Command::new("sbatch");
    sbatch.arg("--parsable").arg(script).stdin(Stdio::null());
    // Inside another job, its variables would be taken for options of this one.
    let slurm = std::env::vars_os().map(|(name, _)| name);
    let slurm = slurm.filter(|name| name.to_string_lossy().starts_with("SLURM_"));
    slurm.filter(|name| name != "SLURM_CONF").for_each(|name| {
        sbatch.env_remove(name);
    });
    World::remove_from(&mut sbatch);
    let output = sbatch.output().context(
        "cannot start sbatch; is this a machine that jobs are submitted from? --print shows the \
         script",
    )?;
    let errors = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    ensure!(output.status.success(), "sbatch refused {}: {errors}", script.display());
    if !errors.is_empty() {
        eprintln!("{errors}");
    }
    // With several clusters: `number;cluster`.
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.trim().split(';').next().unwrap_or_default().to_owned())
}

struct Job<'a> {
    options: &'a Options,
    name: String,
    /// The run directory, absolute.
    folder: PathBuf,
    /// Where the command was typed, and where the job is to run.
    cwd: PathBuf,
}

impl<'a> Job<'a> {
    fn new(options: &'a Options) -> anyhow::Result<Self> {
        let name = options.job.name()?;
        let cwd = std::env::current_dir().context("the current folder")?;
        let folder = cwd.join(&options.job.slurm.root).join(&name);
        Ok(Self { options, name, folder, cwd })
    }

    fn file(&self) -> PathBuf {
        self.folder.join("job.sh")
    }

    fn script(&self) -> anyhow::Result<String> {
        let mut text = format!(
            "#!/bin/bash\n# Written by `mobula launch --slurm`. To submit it again:\n#   sbatch {}\n",
            shell::quote(self.file().as_os_str())?.replace('\n', " ")
        );
        for directive in self.directives()? {
            writeln!(text, "#SBATCH {directive}")?;
        }
        let mut command = vec!["srun".to_owned()];
        command.extend(self.srun_options());
        command.push(shell::join(&self.options.command)?);
        // What the user gives comes last: it may look like a placeholder.
        let body = BODY
            .replace("{{run_dir_variable}}", RUN_DIR_VARIABLE)
            .replace("{{secret}}", SECRET_VARIABLE)
            .replace("{{max_restarts}}", &self.options.max_restarts.to_string())
            .replace("{{run_dir}}", &shell::quote(self.folder.as_os_str())?)
            .replace("{{command}}", &command.join(" "));
        text.push_str(&body);
        Ok(text)
    }

    /// What follows `#SBATCH`.
    fn directives(&self) -> anyhow::Result<Vec<String>> {
        let (job, slurm) = (&self.options.job, &self.options.job.slurm);
        let log = self.folder.join("logs").join("slurm-%j.log");
        let mut directives = vec![
            format!("--job-name={}", self.name),
            format!("--chdir={}", quoted(&self.cwd)?),
            // A percent sign begins a pattern; only %j is meant as one.
            format!("--output={}", quoted(&log)?.replace('%', "%%").replace("-%%j.", "-%j.")),
            "--open-mode=append".to_owned(),
            format!("--nodes={}", job.nodes),
            format!("--ntasks-per-node={}", slurm.ntasks_per_node),
        ];
        let number = |n: Option<std::num::NonZeroU32>| n.map(|n| n.to_string());
        let given = [
            ("cpus-per-task", number(job.cpus_per_task)),
            ("gpus-per-node", number(job.gpus_per_node)),
            ("mem", job.mem.clone()),
            ("time", slurm.time.clone()),
            ("partition", slurm.partition.clone()),
            ("account", slurm.account.clone()),
        ];
        for (option, value) in given {
            let Some(value) = value else { continue };
            ensure!(
                !value.is_empty()
                    && !value.contains(|c: char| c.is_whitespace() || "\"'\\#".contains(c)),
                "--{option} is {value:?}, expected a value of sbatch's --{option}"
            );
            directives.push(format!("--{option}={value}"));
        }
        directives.push("--requeue".to_owned());
        directives.push("--no-kill".to_owned());
        directives.push(format!("--signal=B:USR1@{NOTICE_SECONDS}"));
        for option in &slurm.sbatch {
            ensure!(
                option.starts_with('-') && !option.contains('\n'),
                "--sbatch={option:?} is no option of sbatch: expected one such as --exclusive"
            );
            directives.push(option.clone());
        }
        Ok(directives)
    }

    fn srun_options(&self) -> Vec<String> {
        // One copy that ends, well or badly, is no reason to end the others: the driver knows what
        // it can do without, and when it is over. The cluster's defaults may say otherwise.
        let mut options = vec!["--kill-on-bad-exit=0", "--wait=0", "--no-kill"];
        // srun does not read sbatch's option, since 22.05.
        let cpus = self.options.job.cpus_per_task.map(|n| format!("--cpus-per-task={n}"));
        options.extend(cpus.as_deref());
        options.into_iter().map(str::to_owned).collect()
    }
}

/// A path as `#SBATCH` lines take it.
fn quoted(path: &Path) -> anyhow::Result<String> {
    let text = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    ensure!(
        !text.contains(['"', '\\', '\n']),
        "{text:?} cannot be written into a batch script: a path without quotes, backslashes and \
         line breaks is needed"
    );
    Ok(format!("\"{text}\""))
}

/// What the script does.
const BODY: &str = include_str!("slurm.sh");
