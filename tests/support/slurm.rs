//! A real Slurm on one machine: a controller and three nodes as child processes, each node on its
//! own loopback address, with 4 CPUs and 2 pretended GPUs. Needs nothing but the packages: no
//! root, no systemd, no cgroups. Several may run at once.
//!
//! Whatever happens to the program that started it, the cluster ends with it: a shell outside of
//! the program's process group waits for the end of a pipe, and then cleans up.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The names of the nodes. Node `n` listens on `127.0.0.(10 + n)`.
pub(crate) const NODES: [&str; 3] = ["node1", "node2", "node3"];

/// Starting takes a second or two, on a busy machine several.
const UP: Duration = Duration::from_secs(30);
/// How often a start is tried again on other ports: another program may take one meanwhile.
const TRIES: usize = 3;
const DOWN: Duration = Duration::from_secs(15);
const POLL: Duration = Duration::from_millis(20);

/// The programs, with the Debian packages that have them.
const PROGRAMS: [(&str, &str); 4] = [
    ("munged", "munge"),
    ("slurmctld", "slurmctld"),
    ("slurmd", "slurmd"),
    ("srun", "slurm-client"),
];

/// A cluster that runs; it ends when this is dropped.
pub(crate) struct Slurm {
    folder: PathBuf,
    daemons: Vec<(String, Child)>,
    guard: Child,
    /// Tells the guard the process ids of the daemons, and, by its end, that it is time.
    pids: Option<ChildStdin>,
}

impl Slurm {
    /// What is not installed, if anything.
    pub(crate) fn missing() -> Option<String> {
        let lacks = PROGRAMS.iter().filter(|(program, _)| find(program).is_none());
        let packages: Vec<_> = lacks.map(|(_, package)| *package).collect();
        (!packages.is_empty()).then(|| format!("not installed: {}", packages.join(" ")))
    }

    /// Starts a cluster, and returns once all nodes are idle.
    pub(crate) fn start() -> Result<Self, String> {
        let mut reasons = String::new();
        for _ in 0..TRIES {
            let mut slurm = Self::prepare().map_err(|error| format!("preparing Slurm: {error}"))?;
            match slurm.bring_up() {
                Ok(()) => return Ok(slurm),
                Err(reason) => reasons += &format!("{reason}\n{}", slurm.logs()),
            }
        }
        Err(reasons)
    }

    /// A command whose Slurm is this one.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("SLURM_CONF", self.configuration()).stdin(Stdio::null());
        command
    }

    pub(crate) fn configuration(&self) -> PathBuf {
        self.folder.join("slurm.conf")
    }

    /// What a command of Slurm prints.
    pub(crate) fn ask(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.command(program).args(arguments).output();
        output.map_or_else(
            |error| format!("{program}: {error}"),
            |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        )
    }

    /// Kills a node, as a power failure does: its daemon, its steps and all that runs in them.
    pub(crate) fn kill_node(&mut self, node: &str) {
        // The daemon first, which would report what happens to the rest.
        if let Some((_, daemon)) = self.daemons.iter_mut().find(|(name, _)| name == node) {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        let pids = self.processes_of(node);
        let parents = pids.iter().filter_map(|pid| parent(*pid));
        let steps = parents.filter(|pid| comm(*pid).starts_with("slurmstepd"));
        let all: Vec<String> = steps.chain(pids.iter().copied()).map(|p| p.to_string()).collect();
        let _ = Command::new("kill").arg("-KILL").args(all).stderr(Stdio::null()).status();
    }

    /// Starts the daemon of a node that was killed.
    pub(crate) fn start_node(&mut self, node: &str) -> std::io::Result<()> {
        self.daemons.retain(|(name, _)| name != node);
        self.daemon(node, "slurmd", &["-D", "-N", node])
    }

    /// The processes that steps of this cluster run on a node.
    pub(crate) fn processes_of(&self, node: &str) -> Vec<u32> {
        let conf = format!("SLURM_CONF={}", self.configuration().display());
        let node = format!("SLURMD_NODENAME={node}");
        let is_there = |pid: &u32| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            let has =
                |variable: &str| environment.split(|b| *b == 0).any(|v| v == variable.as_bytes());
            has(&conf) && has(&node)
        };
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(is_there).collect()
    }

    fn prepare() -> std::io::Result<Self> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        // Not $TMPDIR: the path of a socket has 107 bytes at most.
        let folder = PathBuf::from(format!("/tmp/mobula-slurm-{}-{count}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        for part in ["state", "log", "munge"] {
            fs::create_dir_all(folder.join(part))?;
        }
        fs::write(folder.join("slurm.conf"), configuration(&folder)?)?;
        fs::write(folder.join("gres.conf"), GPUS)?;
        let mut guard = Command::new("sh");
        guard.args(["-c", GUARD, "guard"]).arg(&folder).process_group(0).stdin(Stdio::piped());
        let mut guard = guard.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let pids = guard.stdin.take();
        Ok(Self { folder, daemons: Vec::new(), guard, pids })
    }

    fn bring_up(&mut self) -> Result<(), String> {
        let path = |name: &str| self.folder.join("munge").join(name);
        let (key, socket) = (path("key"), path("socket"));
        let random = fs::File::open("/dev/urandom").and_then(|mut random| {
            let mut bytes = [0; 128];
            std::io::Read::read_exact(&mut random, &mut bytes)?;
            fs::write(&key, bytes)?;
            fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o400))
        });
        random.map_err(|error| format!("writing munge's key: {error}"))?;
        let option = |name: &str, path: &Path| format!("--{name}={}", path.display());
        let munge = [
            option("key-file", &key),
            option("socket", &socket),
            option("pid-file", &path("pid")),
            option("log-file", &path("log")),
            option("seed-file", &path("seed")),
        ];
        let mut arguments = vec!["--foreground", "--force"];
        arguments.extend(munge.iter().map(String::as_str));
        let failed = |error: std::io::Error| format!("starting a daemon: {error}");
        self.daemon("munged", "munged", &arguments).map_err(failed)?;
        poll(UP, || socket.exists().then_some(())).ok_or("munged opened no socket")?;
        self.daemon("slurmctld", "slurmctld", &["-D"]).map_err(failed)?;
        for node in NODES {
            self.daemon(node, "slurmd", &["-D", "-N", node]).map_err(failed)?;
        }
        let up = poll(UP, || {
            let lost = self.daemons.iter_mut().any(|(_, d)| !matches!(d.try_wait(), Ok(None)));
            if lost { Some(Err("a daemon ended")) } else { self.is_idle().then_some(Ok(())) }
        });
        Ok(up.unwrap_or(Err("not all nodes became idle"))?)
    }

    /// Waits until all nodes are idle.
    pub(crate) fn wait_idle(&self, deadline: Duration) -> Option<()> {
        poll(deadline, || self.is_idle().then_some(()))
    }

    fn is_idle(&self) -> bool {
        self.ask("sinfo", &["-h", "-t", "idle", "-o", "%D"]) == "3"
    }

    fn daemon(&mut self, name: &str, program: &str, arguments: &[&str]) -> std::io::Result<()> {
        let log = self.folder.join("log").join(format!("{name}.out"));
        let log = fs::File::options().create(true).append(true).open(log)?;
        let path = find(program).unwrap_or_else(|| program.into());
        let mut command = self.command(&path.to_string_lossy());
        // Ctrl-C must reach the guard's cleaning before it reaches them.
        command.args(arguments).process_group(0).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn()?;
        if let Some(pids) = &mut self.pids {
            writeln!(pids, "{}", child.id())?;
        }
        self.daemons.push((name.to_owned(), child));
        Ok(())
    }

    /// The last lines that its daemons have written.
    pub(crate) fn logs(&self) -> String {
        let files = fs::read_dir(self.folder.join("log")).into_iter().flatten().flatten();
        let tail = |path: PathBuf| {
            let text = fs::read_to_string(&path).unwrap_or_default();
            let lines: Vec<_> = text.lines().rev().take(8).collect();
            let lines: Vec<_> = lines.into_iter().rev().collect();
            format!("{}:\n{}\n", path.display(), lines.join("\n"))
        };
        files.map(|file| tail(file.path())).collect()
    }
}

impl Drop for Slurm {
    fn drop(&mut self) {
        drop(self.pids.take());
        let ended = poll(DOWN, || {
            // Reaped here, or the guard would see them as alive.
            self.daemons.retain_mut(|(_, daemon)| matches!(daemon.try_wait(), Ok(None)));
            self.guard.try_wait().ok().flatten()
        });
        if ended.is_none() {
            eprintln!("Slurm in {} did not end in {DOWN:?}", self.folder.display());
        }
    }
}

/// Asks again until there is an answer; `None` after the deadline.
pub(crate) fn poll<T>(deadline: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + deadline;
    loop {
        match ask() {
            None if Instant::now() >= end => return None,
            None => std::thread::park_timeout(POLL),
            answer => return answer,
        }
    }
}

/// Where a program is; daemons are often not on the path of a user.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders =
        std::env::split_paths(&path).chain(["/usr/sbin".into(), "/usr/local/sbin".into()]);
    folders.map(|folder| folder.join(program)).find(|file| file.is_file())
}

fn comm(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default()
}

fn parent(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

fn output_of(program: &str, arguments: &[&str]) -> std::io::Result<String> {
    let output = Command::new(program).args(arguments).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Ports that are free now, all different.
fn free_ports<const N: usize>() -> std::io::Result<[u16; N]> {
    let mut listeners = Vec::new();
    let mut ports = [0; N];
    for port in &mut ports {
        let listener = TcpListener::bind(("0.0.0.0", 0))?;
        *port = listener.local_addr()?.port();
        listeners.push(listener);
    }
    Ok(ports)
}

/// Device files stand for the GPUs: plain files would be counted, but not shown to jobs.
const GPUS: &str =
    "AutoDetect=off\nNodeName=node[1-3] Name=gpu Flags=nvidia_gpu_env File=/dev/null,/dev/zero\n";

fn configuration(folder: &Path) -> std::io::Result<String> {
    let (host, user) = (output_of("hostname", &["-s"])?, output_of("id", &["-un"])?);
    let [controller, first, second, third] = free_ports()?;
    let folder = folder.display();
    Ok(format!(
        "ClusterName=mobula
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
MailProg=/bin/true
SwitchType=switch/none
SlurmdTimeout=5
SlurmctldTimeout=5
InactiveLimit=0
KillWait=2
JobRequeue=1
GresTypes=gpu
DefMemPerCPU=100
NodeName=DEFAULT CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 \
         RealMemory=4000 Gres=gpu:2 State=UNKNOWN
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.11 Port={first}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.12 Port={second}
NodeName=node3 NodeHostname={host} NodeAddr=127.0.0.13 Port={third}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"
    ))
}

/// Reads process ids until the pipe ends, and then cleans up: the jobs while there is a controller
/// to end them, the daemons, the folder.
const GUARD: &str = r#"
folder=$1
export SLURM_CONF=$folder/slurm.conf
pids=
while read -r pid; do pids="$pids $pid"; done
gone() { for pid in $pids; do kill -0 "$pid" 2>/dev/null && return 1; done; }
again() { n=$((n - 1)); [ "$n" -gt 0 ] && sleep 0.05; }
if [ -n "$(timeout 5 squeue --noheader)" ]; then
    timeout 5 scancel --user="$(id -un)"
    n=100
    while [ -n "$(timeout 5 squeue --noheader)" ] && again; do :; done
fi
kill $pids
n=60
while ! gone && again; do :; done
kill -9 $pids
rm -rf "$folder"
"#;
