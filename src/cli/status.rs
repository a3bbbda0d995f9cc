//! `mobula status`: what running programs are doing.

use super::output::{bytes, print, print_json, table};
use anyhow::bail;
use mobula_core::Resources;
use mobula_core::run::unix_time;
use mobula_core::status::{self, NodeStatus, Status};
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// The program that works on the run in this folder
    #[arg(long, value_name = "DIR", conflicts_with = "pid")]
    run: Option<PathBuf>,
    /// The program with this process id
    #[arg(long)]
    pid: Option<u32>,
    /// Print JSON: an object for one program, an array where none was named
    #[arg(long)]
    json: bool,
    /// Print the metrics of one program as Prometheus reads them
    #[arg(long, conflicts_with = "json")]
    prometheus: bool,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    match (&options.run, options.pid) {
        (Some(run), _) => show(&status::of_run(run)?, options)?,
        (None, Some(pid)) => show(&status::of_pid(pid)?, options)?,
        (None, None) => show_all(options)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn show(status: &Status, options: &Options) -> anyhow::Result<()> {
    if options.json {
        return print_json(status);
    }
    if options.prometheus {
        return print(status::prometheus(status).trim_end());
    }
    print(text(status))
}

fn show_all(options: &Options) -> anyhow::Result<()> {
    let mut programs = Vec::new();
    for (pid, answer) in status::running() {
        match answer {
            Ok(status) => programs.push(status),
            Err(error) => eprintln!("warning: process {pid} does not tell its status: {error}"),
        }
    }
    if options.json {
        return print_json(&programs);
    }
    if options.prometheus {
        return match &programs[..] {
            [program] => show(program, options),
            others => bail!("{} programs run; name one: --pid PID, or --run DIR", others.len()),
        };
    }
    if programs.is_empty() {
        return print("no program of yours that uses Mobula is running on this machine");
    }
    print(programs.iter().map(text).collect::<Vec<_>>().join("\n\n\n"))
}

fn text(status: &Status) -> String {
    let mut text = program(status);
    section(&mut text, "resources", &resources(status));
    section(&mut text, "tasks", &tasks(status));
    if !status.actors.is_empty() {
        section(&mut text, "actors", &actors(status));
    }
    if !status.workers.is_empty() {
        section(&mut text, "worker processes", &workers(status));
    }
    section(&mut text, "objects", &objects(status));
    text
}

fn program(status: &Status) -> String {
    let program = &status.program;
    let seconds = (unix_time() - program.started).max(0.0);
    let mut text = format!(
        "process {}, for {}, {} resident: {}",
        program.pid,
        duration(seconds),
        bytes(program.resident_bytes),
        program.command.join(" ")
    );
    for run in &program.runs {
        // Writing to a string does not fail.
        let _ = write!(text, "\nrun {}", run.display());
    }
    text
}

fn section(text: &mut String, title: &str, body: &str) {
    let lines: Vec<String> = body.lines().map(|line| format!("  {line}")).collect();
    let _ = write!(text, "\n\n{title}\n{}", lines.join("\n"));
}

fn resources(status: &Status) -> String {
    let rows = status.nodes.iter().flat_map(|node| {
        let free: Vec<(String, String)> = amounts(&node.free);
        let is_there = |amount: &str| amount != "0" && amount != "0 B";
        let row = move |(name, total): (String, String)| {
            let free = free.iter().find(|(other, _)| *other == name);
            let free = free.map_or("0".to_owned(), |(_, amount)| amount.clone());
            is_there(&total).then(|| [node_name(node), name, total, free])
        };
        amounts(&node.total).into_iter().filter_map(row)
    });
    table(["node", "resource", "total", "free"], rows)
}

/// One that did not answer is shown as such.
fn node_name(node: &NodeStatus) -> String {
    if node.silent { format!("{}: silent", node.name) } else { node.name.clone() }
}

/// Resources by name, as they are read.
fn amounts(resources: &Resources) -> Vec<(String, String)> {
    let mut amounts = vec![
        ("CPU".to_owned(), resources.cpus.to_string()),
        ("GPU".to_owned(), resources.gpus.to_string()),
        ("memory".to_owned(), bytes(resources.memory)),
    ];
    amounts.extend(resources.custom.iter().map(|(name, n)| (name.clone(), n.to_string())));
    amounts
}

fn tasks(status: &Status) -> String {
    let tasks = &status.tasks;
    let counts = [tasks.waiting, tasks.running, tasks.finished, tasks.failed, tasks.cancelled];
    let header = ["waiting", "running", "finished", "failed", "cancelled"];
    table(header, [counts.map(|count| count.to_string())])
}

fn actors(status: &Status) -> String {
    let rows = status.actors.iter().map(|actor| {
        [
            actor.name.clone(),
            actor.state.name().to_owned(),
            actor.restarts.to_string(),
            actor.pending.to_string(),
            actor.pid.map_or("-".to_owned(), |pid| pid.to_string()),
            actor.node.clone().unwrap_or_else(|| "-".to_owned()),
        ]
    });
    table(["name", "state", "restarts", "pending calls", "process", "node"], rows)
}

fn workers(status: &Status) -> String {
    let rows = status.workers.iter().map(|worker| {
        let state = if worker.busy { "busy" } else { "idle" };
        let mib = match worker.resident_bytes {
            0 => "-".to_owned(),
            bytes => format!("{:.1}", bytes as f64 / f64::from(1 << 20)),
        };
        [worker.node.clone(), worker.pid.to_string(), worker.name.clone(), state.to_owned(), mib]
    });
    table(["node", "process", "for", "state", "resident MiB"], rows)
}

fn objects(status: &Status) -> String {
    let nodes = status.nodes.iter().filter(|node| !node.silent);
    let lines = nodes.map(|node| {
        let objects = &node.objects;
        format!(
            "{}: {}, {} of up to {} in memory, {} on disk",
            node.name,
            objects.count,
            bytes(objects.memory_bytes),
            bytes(objects.budget_bytes),
            bytes(objects.spilled_bytes)
        )
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// `2 h 5 min`, `40 s`.
fn duration(seconds: f64) -> String {
    let seconds = seconds as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::duration;

    #[test]
    fn times_are_read_at_a_glance() {
        let check = |seconds, expected: &str| assert_eq!(duration(seconds), expected);
        check(40.9, "40 s");
        check(125.0, "2 min 5 s");
        check(7500.0, "2 h 5 min");
    }
}
