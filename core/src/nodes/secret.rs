//! What the copies of a program show each other to be let in: `MOBULA_SECRET`, or a file that only
//! its owner can read, in a folder that all machines see.

use crate::Error;
use crate::error::AtPath;
use crate::world::{SECRET_VARIABLE, World};
use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};

const HEADER: &str = "authorization";
const BYTES: u64 = 32;

/// Shown by who joins, checked by who lets in.
#[derive(Clone)]
pub(super) struct Secret(String);

/// A secret's file, until the driver ends.
#[derive(Debug)]
pub(super) struct SecretFile(PathBuf);

impl Drop for SecretFile {
    fn drop(&mut self) {
        // It may be gone with its folder.
        let _ = fs::remove_file(&self.0);
    }
}

impl Secret {
    /// The driver's: from the environment, else a new one in a file for the others.
    pub(super) fn of_driver(world: &World) -> Result<(Self, Option<SecretFile>), Error> {
        if let Some(secret) = Self::from_environment() {
            return Ok((secret, None));
        }
        let (secret, path) = (random()?, path(world));
        write(&path, &secret)?;
        Ok((Self(secret), Some(SecretFile(path))))
    }

    /// The others': from the environment, else from the file, once it is there.
    pub(super) fn of_agent(world: Option<&World>) -> Result<Option<Self>, Error> {
        if let Some(secret) = Self::from_environment() {
            return Ok(Some(secret));
        }
        let Some(world) = world else { return Ok(None) };
        read(&path(world)).map(|text| text.map(Self))
    }

    /// Where the file of this world is, for those who look for it in vain.
    pub(super) fn file_of(world: &World) -> PathBuf {
        path(world)
    }

    fn from_environment() -> Option<Self> {
        std::env::var(SECRET_VARIABLE).ok().filter(|text| !text.is_empty()).map(Self)
    }

    pub(super) fn show(&self, metadata: &mut MetadataMap) -> Result<(), Error> {
        let value: Result<MetadataValue<Ascii>, _> = format!("Bearer {}", self.0).parse();
        let wrong = |_| Error::LaunchVariable {
            variable: SECRET_VARIABLE.to_owned(),
            got: Some("(not shown)".to_owned()),
            expected: "visible ASCII characters".to_owned(),
        };
        metadata.insert(HEADER, value.map_err(wrong)?);
        Ok(())
    }

    /// Whether who sent this knows the secret; takes the same time for every wrong one.
    pub(super) fn is_shown(&self, metadata: &MetadataMap) -> bool {
        let shown = metadata.get(HEADER).and_then(|value| value.to_str().ok());
        let Some(shown) = shown.and_then(|value| value.strip_prefix("Bearer ")) else {
            return false;
        };
        let differences = shown.bytes().zip(self.0.bytes()).map(|(a, b)| a ^ b);
        shown.len() == self.0.len() && differences.fold(0, |sum, one| sum | one) == 0
    }
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
    fn only_the_whole_secret_is_let_in() {
        let secret = Secret("correct".to_owned());
        let shows = |text: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert(HEADER, text.parse().expect("ASCII"));
            secret.is_shown(&metadata)
        };
        assert!(shows("Bearer correct"));
        for wrong in ["Bearer correc", "Bearer correctt", "Bearer corrext", "correct", "Bearer "] {
            assert!(!shows(wrong), "{wrong}");
        }
        assert!(!secret.is_shown(&MetadataMap::new()));
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
    fn secrets_are_long_and_differ() {
        let [one, other] = [random().expect("random"), random().expect("random")];
        assert!(one.len() == 64 && one != other);
    }
}
