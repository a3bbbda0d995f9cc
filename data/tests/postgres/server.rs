//! A real PostgreSQL in a folder of its own, on a port of its own. Needs the package and nothing else: it
//! runs as another user where this one is root, which it refuses to be.
//!
//! Whatever happens to the program that started it, the server ends with it: a shell outside of the
//! program's process group waits for the end of a pipe, and then cleans up.

use std::fs;
use std::io::Write;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// With characters that a URL must have otherwise.
pub(crate) const PASSWORD: &str = "s3cr:t@/?";
const PASSWORD_IN_URL: &str = "s3cr%3At%40%2F%3F";

/// Starting takes a second or two, on a busy machine several.
const UP: Duration = Duration::from_secs(60);
const DOWN: Duration = Duration::from_secs(15);
const POLL: Duration = Duration::from_millis(20);
/// How often a start is tried again on another port: a program may take one meanwhile.
const TRIES: usize = 3;

const PROGRAMS: [&str; 3] = ["initdb", "postgres", "psql"];

/// A server that runs; it ends when this is dropped.
pub(crate) struct Server {
    folder: PathBuf,
    pub(crate) port: u16,
    postgres: Child,
    guard: Child,
    /// Tells the guard the process id of the server, and, by its end, that it is time.
    pid: Option<ChildStdin>,
}

impl Server {
    /// What is not installed, if anything.
    pub(crate) fn missing() -> Option<String> {
        let lacks: Vec<_> =
            PROGRAMS.into_iter().filter(|program| find(program).is_none()).collect();
        (!lacks.is_empty()).then(|| format!("not installed: {} (postgresql)", lacks.join(" ")))
    }

    /// Starts a server, and returns once it answers.
    pub(crate) fn start() -> Result<Self, String> {
        let mut reasons = String::new();
        for _ in 0..TRIES {
            let mut server =
                Self::begin().map_err(|error| format!("preparing PostgreSQL: {error}"))?;
            let answer = poll(UP, || match server.postgres.try_wait() {
                Ok(None) => server.ask("SELECT 1").ok().map(|_| true),
                _ => Some(false),
            });
            match answer {
                Some(true) => return Ok(server),
                _ => reasons += &server.log(),
            }
        }
        Err(format!("PostgreSQL did not start:\n{reasons}"))
    }

    fn begin() -> std::io::Result<Self> {
        let folder = new_folder()?;
        let mut guard = Command::new("sh");
        guard.args(["-c", GUARD, "guard"]).arg(&folder).process_group(0).stdin(Stdio::piped());
        let mut guard = guard.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let mut pid = guard.stdin.take();
        make_database(&folder)?;
        let port = mobula_core::world::free_port()?;
        let postgres = start(&folder, port)?;
        if let Some(pid) = &mut pid {
            writeln!(pid, "{}", postgres.id())?;
        }
        Ok(Self { folder, port, postgres, guard, pid })
    }

    /// The database of the tests, with its password.
    pub(crate) fn url(&self) -> String {
        format!("postgres://tester:{PASSWORD_IN_URL}@127.0.0.1:{}/postgres", self.port)
    }

    /// The folder of its socket.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// What `psql` prints of a query's result.
    pub(crate) fn ask(&self, sql: &str) -> Result<String, String> {
        let mut psql = self.psql();
        let output = psql.args(["-c", sql]).output().map_err(|error| error.to_string())?;
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
            false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        }
    }

    /// The same, which must not fail.
    pub(crate) fn sql(&self, sql: &str) -> String {
        self.ask(sql).unwrap_or_else(|error| panic!("{sql}: {error}"))
    }

    /// `psql` of this server's database, in a quiet way, which stops at an error.
    pub(crate) fn psql(&self) -> Command {
        let mut psql = Command::new(find("psql").unwrap_or_else(|| "psql".into()));
        psql.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"]).stdin(Stdio::null());
        psql.arg(format!("postgres://tester@127.0.0.1:{}/postgres", self.port));
        psql.env("PGPASSWORD", PASSWORD).env("PGCONNECT_TIMEOUT", "10");
        psql
    }

    /// Asks until there is an answer other than nothing.
    pub(crate) fn wait_for(&self, sql: &str) -> String {
        poll(UP, || self.ask(sql).ok().filter(|answer| !answer.is_empty()))
            .unwrap_or_else(|| panic!("nothing became of {sql}"))
    }

    fn log(&self) -> String {
        log(&self.folder)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.pid.take());
        let ended = poll(DOWN, || {
            // Reaped here, or the guard would see it as alive.
            let _ = self.postgres.try_wait();
            self.guard.try_wait().ok().flatten()
        });
        if ended.is_none() {
            eprintln!("PostgreSQL in {} did not end in {DOWN:?}", self.folder.display());
        }
    }
}

/// An empty folder, which belongs to who runs the server.
fn new_folder() -> std::io::Result<PathBuf> {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    // Not $TMPDIR: the path of a socket has 107 bytes at most, and another user must get there.
    let folder = PathBuf::from(format!("/tmp/mobula-postgres-{}-{count}", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir(&folder)?;
    if let Some((user, group)) = other_user() {
        chown(&folder, Some(user), Some(group))?;
    }
    Ok(folder)
}

fn make_database(folder: &Path) -> std::io::Result<()> {
    let password = folder.join("password");
    fs::write(&password, PASSWORD)?;
    let mut init = daemon("initdb", folder)?;
    init.args(["--username=tester", "--auth=scram-sha-256", "--no-sync", "--encoding=UTF8"]);
    init.args(["--locale=C", "--pwfile"]).arg(&password).arg("-D").arg(folder.join("data"));
    let status = init.status()?;
    match status.success() {
        true => Ok(()),
        false => Err(std::io::Error::other(format!("initdb: {status}, {}", log(folder)))),
    }
}

fn start(folder: &Path, port: u16) -> std::io::Result<Child> {
    let mut postgres = daemon("postgres", folder)?;
    postgres.arg("-D").arg(folder.join("data")).arg("-p").arg(port.to_string());
    for setting in ["listen_addresses=127.0.0.1", "fsync=off", "shared_buffers=32MB"] {
        postgres.args(["-c", setting]);
    }
    postgres.args(["-c", &format!("unix_socket_directories={}", folder.display())]);
    postgres.process_group(0).spawn()
}

/// Sends a signal to a process.
pub(crate) fn signal(name: &str, pid: &str) {
    let status = Command::new("kill").args([&format!("-{name}"), pid]).status().expect("kill runs");
    assert!(status.success(), "kill -{name} {pid}");
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

/// A program of the server, as a user that may run it, with a log.
fn daemon(program: &str, folder: &Path) -> std::io::Result<Command> {
    let log = fs::File::options().create(true).append(true).open(folder.join("log"))?;
    let mut command = Command::new(find(program).unwrap_or_else(|| program.into()));
    command.current_dir(folder).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    if let Some((user, group)) = other_user() {
        command.uid(user).gid(group);
    }
    Ok(command)
}

fn log(folder: &Path) -> String {
    fs::read_to_string(folder.join("log")).unwrap_or_default()
}

/// User and group of who runs the server where root must not: the package's own user, or nobody.
fn other_user() -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let ids = |name: &str| {
        let line = users.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    };
    ids("postgres").or_else(|| ids("nobody"))
}

/// Where a program is. Debian keeps those of the server off the path.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut versions: Vec<_> = versions.map(|version| version.path().join("bin")).collect();
    versions.sort();
    let folders = versions.into_iter().rev().chain(std::env::split_paths(&path));
    folders.map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// Reads a process id until the pipe ends, and then ends that server and removes its folder.
const GUARD: &str = r#"
folder=$1
pid=
while read -r line; do pid=$line; done
if [ -n "$pid" ]; then
    kill -INT "$pid"
    n=100
    while kill -0 "$pid" && [ "$n" -gt 0 ]; do n=$((n - 1)); sleep 0.05; done
    kill -KILL "$pid"
fi
rm -rf "$folder"
"#;
