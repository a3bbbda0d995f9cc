//! `mobula doctor`: what this machine has, and whether the parts that a run needs work.

use super::output::{bytes, print, print_json};
use mobula::{Placement, Runtime};
use serde::Serialize;
use std::path::Path;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A worker process that has not answered by then will not.
const WORKER_DEADLINE: Duration = Duration::from_secs(10);

/// Below this even small models meet the out-of-memory killer.
const LOW_MEMORY: u64 = 1 << 30;

/// One thing that was looked at.
#[derive(Serialize)]
struct Check {
    name: &'static str,
    status: Status,
    value: String,
    /// The way out of a warning.
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    Warn,
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    checks: Vec<Check>,
}

pub(crate) fn run(options: &Options, runtime: &Runtime) -> anyhow::Result<()> {
    let checks = vec![
        Check::ok("system", system()),
        cpus(),
        threads(),
        cpu_features(),
        memory(),
        shared_memory(),
        Check::ok("allocator", "mimalloc".to_owned()),
        cuda(),
        #[cfg(all(feature = "cuda", feature = "train"))]
        nccl(),
        worker(runtime),
    ];
    let report = Report { version: env!("CARGO_PKG_VERSION"), checks };
    if options.json { print_json(&report) } else { print(report.text()) }
}

impl Check {
    fn ok(name: &'static str, value: String) -> Self {
        Self { name, status: Status::Ok, value, hint: None }
    }

    fn warn(name: &'static str, value: String, hint: impl Into<String>) -> Self {
        Self { name, status: Status::Warn, value, hint: Some(hint.into()) }
    }
}

impl Report {
    fn text(&self) -> String {
        let mut lines = vec![format!("mobula {}", self.version)];
        for check in &self.checks {
            let status = match check.status {
                Status::Ok => "ok",
                Status::Warn => "warn",
            };
            lines.push(format!("{status:<5} {:<14} {}", check.name, check.value));
            lines.extend(check.hint.iter().map(|hint| format!("{:20} → {hint}", "")));
        }
        lines.join("\n")
    }
}

fn system() -> String {
    let uname = rustix::system::uname();
    let kernel = [uname.sysname(), uname.release(), uname.machine()];
    let kernel = kernel.map(|part| part.to_string_lossy().into_owned()).join(" ");
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    name.map_or(kernel.clone(), |name| format!("{}, {kernel}", name.trim_matches('"')))
}

fn usable_cpus() -> usize {
    available_parallelism().map_or(1, usize::from)
}

fn cpus() -> Check {
    let usable = usable_cpus();
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let installed = info.lines().filter(|line| line.starts_with("processor")).count();
    let model = info.lines().find_map(|line| line.strip_prefix("model name"));
    let model = model.map_or("", |rest| rest.trim_start_matches([' ', '\t', ':']));
    let of = if installed > usable { format!(" of {installed}") } else { String::new() };
    Check::ok("CPUs", format!("{usable}{of} usable  {model}").trim_end().to_owned())
}

fn threads() -> Check {
    const VARIABLE: &str = "RAYON_NUM_THREADS";
    let (threads, usable) = (candle_core::utils::get_num_threads(), usable_cpus());
    let because = match std::env::var(VARIABLE) {
        Ok(value) => format!("{VARIABLE}={value}"),
        Err(_) => format!("{VARIABLE} is not set"),
    };
    let value = format!("candle computes on {threads} ({because})");
    if threads > usable {
        let hint = format!("more threads than CPUs only wait for each other: {VARIABLE}={usable}");
        return Check::warn("threads", value, hint);
    }
    Check::ok("threads", value)
}

#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Check {
    let features = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
    ];
    let yes_no =
        |(name, there): (&str, bool)| format!("{name} {}", if there { "yes" } else { "no" });
    let value = features.map(yes_no).join(", ");
    match features.iter().take(2).all(|(_, there)| *there) {
        true => Check::ok("CPU features", value),
        false => Check::warn(
            "CPU features",
            value,
            "matrix products are several times slower without AVX2 and FMA; virtual machines often \
             have them under a CPU type such as \"host\"",
        ),
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_features() -> Check {
    Check::ok("CPU features", std::env::consts::ARCH.to_owned())
}

fn memory() -> Check {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| -> Option<u64> {
        let rest = info.lines().find_map(|line| line.strip_prefix(name))?;
        Some(rest.trim_end_matches("kB").trim().parse::<u64>().ok()? << 10)
    };
    match (field("MemAvailable:"), field("MemTotal:")) {
        (Some(free), Some(total)) => {
            let value = format!("{} of {} available", bytes(free), bytes(total));
            match free < LOW_MEMORY {
                true => {
                    Check::warn("memory", value, "end other programs, or train with fewer workers")
                }
                false => Check::ok("memory", value),
            }
        }
        _ => Check::ok("memory", "this system does not tell".to_owned()),
    }
}

/// Only told: what workers share is anonymous memory, which a small /dev/shm does not limit.
fn shared_memory() -> Check {
    let value = match rustix::fs::statvfs("/dev/shm") {
        Ok(fs) => format!("{} free in /dev/shm (not needed)", bytes(fs.f_bavail * fs.f_frsize)),
        Err(_) => "no /dev/shm (not needed)".to_owned(),
    };
    Check::ok("shared memory", value)
}

fn cuda() -> Check {
    let devices = nvidia_devices();
    let visible = std::env::var("CUDA_VISIBLE_DEVICES");
    let visible = visible.map_or(String::new(), |v| format!(", CUDA_VISIBLE_DEVICES={v:?}"));
    let built = if cfg!(feature = "cuda") { "" } else { "; built without the cuda feature" };
    if devices.is_empty() {
        return Check::ok("CUDA", format!("no device{visible}{built}"));
    }
    let value = format!("{}{visible}{built}", devices.join(", "));
    match cfg!(feature = "cuda") {
        true => Check::ok("CUDA", value),
        false => Check::warn("CUDA", value, "to compute on them, build with --features cuda"),
    }
}

/// What `Transport::Nccl` sums gradients by.
#[cfg(all(feature = "cuda", feature = "train"))]
fn nccl() -> Check {
    match mobula::train::nccl_version() {
        Ok(version) => Check::ok("NCCL", version),
        Err(error) => Check {
            hint: Some(error.to_string()),
            ..Check::ok("NCCL", "not found (only `Transport::Nccl` needs it)".to_owned())
        },
    }
}

/// `/dev/nvidia0` and so on; other nodes of the driver have no number.
fn nvidia_devices() -> Vec<String> {
    let paths = (0..64).map(|i| format!("/dev/nvidia{i}"));
    paths.filter(|path| Path::new(path).exists()).collect()
}

/// What a worker process is asked.
#[mobula::remote]
fn process_id() -> u32 {
    std::process::id()
}

/// Starts a real one.
fn worker(runtime: &Runtime) -> Check {
    let begun = Instant::now();
    let answer = runtime.submit(process_id::remote().on(Placement::Process));
    match answer.get_timeout(WORKER_DEADLINE) {
        Ok(pid) if *pid != std::process::id() => {
            let ms = begun.elapsed().as_millis();
            Check::ok("worker process", format!("started, asked and answered in {ms} ms"))
        }
        Ok(_) => {
            Check::warn("worker process", "ran in this process".to_owned(), "please report it")
        }
        Err(error) => Check::warn(
            "worker process",
            error.to_string(),
            "training starts processes: raise `ulimit -u`, and allow this program to start itself",
        ),
    }
}
