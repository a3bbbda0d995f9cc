//! What the copies of a program show each other to be let in: `MOBULA_SECRET`, or a file that only
//! its owner can read, in a folder that all machines see.

use crate::Error;
use crate::error::AtPath;
use crate::world::{SECRET_VARIABLE, World};
use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::hint::black_box;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Of a secret that is made here, before they are written in hexadecimal.
const BYTES: u64 = 32;
/// With TLS, who connects can try secrets at leisure, and a short one is soon found.
const MIN_BYTES: usize = if cfg!(feature = "tls") { 16 } else { 1 };
pub(super) const MAX_BYTES: usize = 1024;

/// What all copies know, and nobody else.
#[derive(Clone)]
pub(super) struct Secret {
    text: String,
    /// Where it is from, unless it was given.
    file: Option<PathBuf>,
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Secret").field("file", &self.file).finish_non_exhaustive()
    }
}

/// A secret's file, until the driver ends.
#[derive(Debug)]
pub(super) struct SecretFile(Secret);

impl Drop for SecretFile {
    fn drop(&mut self) {
        // It may be gone with its folder, or be another driver's by now.
        if let Some(path) = self.0.file()
            && let Ok(Some(text)) = read(path)
            && text == self.0.text
        {
            let _ = fs::remove_file(path);
        }
    }
}

impl Secret {
    /// The driver's: from the environment, else a new one in a file for the others.
    pub(super) fn of_driver(world: &World) -> Result<(Self, Option<SecretFile>), Error> {
        if let Some(secret) = Self::from_environment()? {
            return Ok((secret, None));
        }
        let file = Self::written(path(world))?;
        Ok((file.0.clone(), Some(file)))
    }

    fn written(path: PathBuf) -> Result<SecretFile, Error> {
        let text = random()?;
        write(&path, &text)?;
        Ok(SecretFile(Self { text, file: Some(path) }))
    }

    /// The others': from the environment, else from the file, once it is there.
    pub(super) fn of_agent(world: Option<&World>) -> Result<Option<Self>, Error> {
        if let Some(secret) = Self::from_environment()? {
            return Ok(Some(secret));
        }
        let Some(world) = world else { return Ok(None) };
        Self::from_file(path(world))
    }

    /// Where the file of this world is, for those who look for it in vain.
    pub(super) fn file_of(world: &World) -> PathBuf {
        path(world)
    }

    /// Where it was read, or written. `None`: it was given in the environment.
    pub(super) fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    fn from_environment() -> Result<Option<Self>, Error> {
        let given = std::env::var_os(SECRET_VARIABLE).filter(|text| !text.is_empty());
        given.map(Self::given).transpose()
    }

    pub(super) fn given(text: impl Into<OsString>) -> Result<Self, Error> {
        match text.into().into_string() {
            Ok(text) if has_right_length(&text) => Ok(Self { text, file: None }),
            Ok(text) => Err(wrong(text.len())),
            Err(text) => Err(wrong(text.len())),
        }
    }

    fn from_file(path: PathBuf) -> Result<Option<Self>, Error> {
        let Some(text) = read(&path)? else { return Ok(None) };
        if has_right_length(&text) {
            return Ok(Some(Self { text, file: Some(path) }));
        }
        let reason = format!(
            "it has {} bytes, not {MIN_BYTES} to {MAX_BYTES}; remove it, and start again",
            text.len()
        );
        Err(Error::Join { action: format!("take the secret of {}", path.display()), reason })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.text.as_bytes()
    }
}

/// A secret of so many bytes that is none.
fn wrong(bytes: usize) -> Error {
    Error::LaunchVariable {
        variable: SECRET_VARIABLE.to_owned(),
        got: Some(format!("({bytes} bytes, not shown)")),
        expected: format!(
            "UTF-8, {MIN_BYTES} to {MAX_BYTES} bytes; best are 32 random ones in hexadecimal"
        ),
    }
}

fn has_right_length(text: &str) -> bool {
    (MIN_BYTES..=MAX_BYTES).contains(&text.len())
}

/// Takes the same time for all that have the right length, so that nobody finds a secret byte by
/// byte.
pub(super) fn is_same(one: &[u8], other: &[u8]) -> bool {
    let differences = one.iter().zip(other).map(|(a, b)| a ^ b);
    // Without the black box, a compiler might stop at the first difference.
    let difference = differences.fold(0, |sum, one| black_box(sum | one));
    one.len() == other.len() && difference == 0
}

/// One file for each start of a job, in the folder of the run, else in that of all runs.
fn path(world: &World) -> PathBuf {
    let folder = std::env::var_os("MOBULA_RUN_DIR").map_or_else(|| "runs".into(), PathBuf::from);
    let host: String =
        world.master_addr.chars().map(|c| if c.is_alphanumeric() { c } else { '-' }).collect();
    folder.join(format!(".join-{host}-{}-{}", world.master_port, world.restart_count))
}

fn random() -> Result<String, Error> {
    let source = Path::new("/dev/urandom");
    let mut bytes = Vec::new();
    let file = fs::File::open(source).at("open", source)?;
    file.take(BYTES).read_to_end(&mut bytes).at("read", source)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Written beside and renamed: who sees it sees all of it.
fn write(path: &Path, secret: &str) -> Result<(), Error> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).at("create", folder)?;
    }
    let draft = path.with_extension(format!("{}.tmp", std::process::id()));
    // One that a killed program has left would keep its rights.
    let _ = fs::remove_file(&draft);
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft);
    file.and_then(|mut file| file.write_all(secret.as_bytes())).at("write", &draft)?;
    fs::rename(&draft, path).at("create", path)
}

/// `None` where there is none yet. One that others can read, or that is somebody else's, is refused.
fn read(path: &Path) -> Result<Option<String>, Error> {
    let mut file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).at("open", path),
    };
    let is = file.metadata().at("read", path)?;
    if is.mode() & 0o077 != 0 || is.uid() != rustix::process::geteuid().as_raw() {
        let reason = "others may have written or read it; remove it, and start again".to_owned();
        return Err(Error::Join { action: format!("trust {}", path.display()), reason });
    }
    let mut text = String::new();
    file.read_to_string(&mut text).at("read", path)?;
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn only_the_whole_secret_is_the_same() {
        assert!(is_same(b"correct", b"correct"));
        for wrong in ["correc", "correctt", "corrext", "korrect", "", "tcerroc"] {
            assert!(!is_same(b"correct", wrong.as_bytes()), "{wrong}");
        }
    }

    #[test]
    fn a_secret_of_the_wrong_length_is_refused_and_not_shown() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("secret");
        for wrong in ["x".repeat(MIN_BYTES - 1), "x".repeat(MAX_BYTES + 1)] {
            let error = Secret::given(wrong.clone()).expect_err("wrong").to_string();
            assert!(error.contains(&format!("({} bytes, not shown)", wrong.len())), "{error}");
            assert!(error.contains(&format!("{MIN_BYTES} to 1024 bytes")), "{error}");
            write(&path, &wrong).expect("writes");
            let error = Secret::from_file(path.clone()).expect_err("wrong").to_string();
            assert!(error.contains(&path.display().to_string()), "{error}");
        }
        Secret::given("x".repeat(MIN_BYTES)).expect("long enough");
        write(&path, &"x".repeat(MIN_BYTES)).expect("writes");
        let secret = Secret::from_file(path.clone()).expect("long enough").expect("there");
        assert_eq!(secret.file(), Some(path.as_path()));
    }

    #[test]
    fn the_file_is_its_owners_alone_and_one_that_is_not_is_refused() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("deep/secret");
        assert_eq!(read(&path).expect("not yet"), None);
        write(&path, "text").expect("writes");
        let mode = fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(read(&path).expect("reads").as_deref(), Some("text"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("ours");
        let error = read(&path).expect_err("others can read it").to_string();
        assert!(error.contains("remove it"), "{error}");
    }

    #[test]
    fn a_secret_that_is_not_text_is_refused_and_not_ignored() {
        use std::os::unix::ffi::OsStringExt;
        let error = Secret::given(OsString::from_vec(vec![0xff; 32])).expect_err("not UTF-8");
        let error = error.to_string();
        assert!(error.contains("MOBULA_SECRET") && error.contains("UTF-8"), "{error}");
    }

    #[test]
    fn a_driver_removes_its_own_file_and_not_that_of_another() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("secret");
        let first = Secret::written(path.clone()).expect("writes");
        let second = Secret::written(path.clone()).expect("writes");
        drop(first);
        assert_eq!(read(&path).expect("reads").as_deref(), Some(second.0.text.as_str()));
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn secrets_are_long_and_differ() {
        let [one, other] = [random().expect("random"), random().expect("random")];
        assert!(one.len() == 64 && one != other);
    }
}
