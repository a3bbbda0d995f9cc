//! Where running programs listen: one socket each, in a folder that only their user can enter.
//!
//! The socket is made under another name, and moved to its own when it listens and nobody else may
//! connect: a socket that is there and refuses is that of a program that has ended. A run directory
//! has only a link to it. So it does not matter how long the directory's path is (a socket's may
//! have 107 bytes), nor whether its file system has sockets.

use crate::Error;
use crate::error::AtPath;
use std::fs::{self, DirBuilder, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The link in a run directory.
const LINK: &str = "status.sock";

/// A socket's path may be this long; the address has room for 108 with its end.
const MOST_BYTES: usize = 107;

/// What this process has put into the file system.
#[derive(Default)]
struct Here {
    socket: Option<PathBuf>,
    /// Run directories that have a link to it, or would if it listened.
    runs: Vec<PathBuf>,
}

static HERE: Mutex<Here> = Mutex::new(Here { socket: None, runs: Vec::new() });

/// Takes the socket and its links away when dropped.
pub(crate) struct Guard;

impl Drop for Guard {
    fn drop(&mut self) {
        leave();
        crate::timeline::finish();
    }
}

/// Listens on this program's socket.
pub(super) fn listen() -> Result<(UnixListener, Guard), Error> {
    let path = own_path(std::process::id())?;
    let hidden = path.with_extension("new");
    let _ = fs::remove_file(&hidden);
    let listener =
        within_limit(&hidden, |path| UnixListener::bind(path)).at("listen at", &hidden)?;
    fs::set_permissions(&hidden, Permissions::from_mode(0o600)).at("protect", &hidden)?;
    fs::rename(&hidden, &path).at("make", &path)?;
    listener.set_nonblocking(true).at("listen at", &path)?;
    let mut here = here();
    here.runs.iter().for_each(|run| link(run, &path));
    here.socket = Some(path);
    Ok((listener, Guard))
}

pub(super) fn connect(path: &Path) -> std::io::Result<UnixStream> {
    within_limit(path, |path| UnixStream::connect(path))
}

/// Uses a socket's path, or, where that is too long for a socket, another one that leads there.
fn within_limit<T>(
    path: &Path,
    with: impl FnOnce(&Path) -> std::io::Result<T>,
) -> std::io::Result<T> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else { return with(path) };
    if path.as_os_str().len() <= MOST_BYTES {
        return with(path);
    }
    let folder = fs::File::open(folder)?;
    with(&Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name))
}

/// No more requests are answered: the program is about to end.
pub(crate) fn leave() {
    let mut here = here();
    let Some(socket) = here.socket.take() else { return };
    here.runs.iter().for_each(|run| unlink(run, &socket));
    let _ = fs::remove_file(socket);
}

/// This process begins or ends its work on a run: the run's directory leads to it meanwhile.
pub(crate) fn follow_run(run: &Path, is_running: bool) {
    let Ok(run) = std::path::absolute(run) else { return };
    let mut here = here();
    here.runs.retain(|other| *other != run);
    if let Some(socket) = &here.socket {
        if is_running { link(&run, socket) } else { unlink(&run, socket) }
    }
    if is_running {
        here.runs.push(run);
    }
}

/// The run directories that this process works on.
pub(super) fn runs() -> Vec<PathBuf> {
    here().runs.clone()
}

/// A run can do without being seen.
fn link(run: &Path, socket: &Path) {
    let link = run.join(LINK);
    let _ = fs::remove_file(&link);
    if let Err(error) = symlink(socket, &link) {
        tracing::warn!(run = %run.display(), %error, "no link to the status socket");
    }
}

fn unlink(run: &Path, socket: &Path) {
    let link = run.join(LINK);
    if fs::read_link(&link).is_ok_and(|target| target == socket) {
        let _ = fs::remove_file(link);
    }
}

/// The socket that a run directory leads to.
pub(super) fn of_run(run: &Path) -> Option<PathBuf> {
    fs::read_link(run.join(LINK)).ok()
}

/// Its program has ended.
pub(super) fn forget_run(run: &Path) {
    let _ = fs::remove_file(run.join(LINK));
}

/// Where a program of this process id may listen.
pub(super) fn of_pid(pid: u32) -> Vec<PathBuf> {
    let in_session = session_folder().map(|folder| in_session_folder(&folder, pid));
    in_session.into_iter().chain([temporary_folder().join(format!("{pid}.sock"))]).collect()
}

/// The sockets of this user's programs, with their process ids.
pub(super) fn all() -> Vec<(u32, PathBuf)> {
    let in_session = session_folder().map(|folder| list(&folder, "mobula-")).unwrap_or_default();
    let mut found = [in_session, list(&temporary_folder(), "")].concat();
    found.sort();
    found
}

fn list(folder: &Path, prefix: &str) -> Vec<(u32, PathBuf)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let socket = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        let pid = name.strip_prefix(prefix)?.strip_suffix(".sock")?.parse().ok()?;
        Some((pid, entry.path()))
    };
    entries.filter_map(socket).collect()
}

fn own_path(pid: u32) -> Result<PathBuf, Error> {
    if let Some(folder) = session_folder() {
        return Ok(in_session_folder(&folder, pid));
    }
    let folder = temporary_folder();
    // Somebody else may have made a folder of this name; then it is not private.
    if let Err(error) = DirBuilder::new().mode(0o700).create(&folder)
        && !is_private(&folder)
    {
        return Err(error).at("make, for this user alone,", &folder);
    }
    Ok(folder.join(format!("{pid}.sock")))
}

fn in_session_folder(folder: &Path, pid: u32) -> PathBuf {
    folder.join(format!("mobula-{pid}.sock"))
}

/// The folder of the user's session, where there is one.
fn session_folder() -> Option<PathBuf> {
    let folder = PathBuf::from(std::env::var_os("XDG_RUNTIME_DIR")?);
    is_private(&folder).then_some(folder)
}

fn temporary_folder() -> PathBuf {
    std::env::temp_dir().join(format!("mobula-{}", user()))
}

/// A folder, no link to one, that this user owns and nobody else can enter.
fn is_private(folder: &Path) -> bool {
    let private = |meta: fs::Metadata| {
        meta.is_dir() && meta.uid() == user() && meta.permissions().mode() & 0o077 == 0
    };
    fs::symlink_metadata(folder).is_ok_and(private)
}

fn user() -> u32 {
    rustix::process::geteuid().as_raw()
}

fn here() -> MutexGuard<'static, Here> {
    HERE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_may_lie_deep() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let deep = folder.path().join("x".repeat(120));
        fs::create_dir(&deep).expect("a folder");
        let path = deep.join("1.sock");
        let listener = within_limit(&path, |path| UnixListener::bind(path)).expect("listens");
        let _client = connect(&path).expect("connects");
        listener.accept().expect("a client");
        assert!(path.exists());
    }

    #[test]
    fn a_folder_that_others_can_enter_is_not_private() {
        let folder = tempfile::tempdir().expect("temporary folder");
        fs::set_permissions(folder.path(), Permissions::from_mode(0o700)).expect("changed");
        assert!(is_private(folder.path()));
        let link = folder.path().join("link");
        symlink(folder.path(), &link).expect("a link");
        assert!(!is_private(&link));
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).expect("changed");
        assert!(!is_private(folder.path()));
    }
}
