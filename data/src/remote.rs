//! Files in object stores, by their URLs: `s3://`, `gs://`, `az://` and so on, and `http(s)://`.
//!
//! Where to find a store, and who asks, is said by the environment, by the names that its own tools
//! have: nothing secret is in the description of a dataset.

mod folder;
mod reader;

use folder::without_unfinished;
pub(crate) use folder::{PART, WRITING, sign};
pub(crate) use reader::RemoteReader;

use crate::error::{Error, Result};
use crate::runtime::block_on;
use bytes::Bytes;
use futures::TryStreamExt;
use glob::{MatchOptions, Pattern};
use object_store::path::Path as Key;
use object_store::{
    Error as StoreError, GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt,
    ObjectStoreScheme, coalesce_ranges,
};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use url::{Position, Url};

/// Bytes between two ranges that are cheaper to read than another request.
const GAP: u64 = 1 << 20;

/// Whether a path is a URL.
pub(crate) fn is_url(path: &Path) -> bool {
    path.to_str().is_some_and(|text| {
        let scheme = text.split_once("://").map(|(scheme, _)| scheme);
        scheme.is_some_and(|s| s.len() > 1 && s.bytes().all(|b| b.is_ascii_alphanumeric()))
    })
}

/// An error for a URL that names nothing that can be read. Paths are not looked at.
pub(crate) fn check(path: &Path) -> Result<()> {
    if is_url(path) { Place::new(path).map(drop) } else { Ok(()) }
}

/// A store, and what of it a URL names.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    store: Arc<dyn ObjectStore>,
    /// What comes before the key, such as `s3://bucket`.
    root: String,
    key: Key,
    /// Whether it has no folders.
    is_http: bool,
}

impl Place {
    pub(crate) fn new(url: &Path) -> Result<Self> {
        let invalid = |got: String| Error::InvalidOption {
            option: "the URL",
            expected:
                "such as s3://bucket/key, gs://bucket/key, az://container/key (the account in \
                       AZURE_STORAGE_ACCOUNT_NAME) or https://host/path, without a query"
                    .to_owned(),
            got: format!("{}: {got}", without_secrets(url)),
        };
        let text = url.to_str().ok_or_else(|| invalid("not UTF-8".to_owned()))?;
        let parsed = Url::parse(text).map_err(|error| invalid(error.to_string()))?;
        if parsed.query().is_some() || parsed.fragment().is_some() {
            return Err(invalid("it has a query or a fragment".to_owned()));
        }
        if parsed.password().is_some() {
            return Err(invalid("it has a password, which would be seen".to_owned()));
        }
        let (scheme, key) =
            ObjectStoreScheme::parse(&parsed).map_err(|error| invalid(error.to_string()))?;
        // Of some stores the name is the first part of the path.
        let parts = || parsed.path().split('/').filter(|part| !part.is_empty());
        let of_store = parts().count().saturating_sub(key.parts().count());
        let host = &parsed[..Position::BeforePath];
        let root = std::iter::once(host).chain(parts().take(of_store));
        let root = root.collect::<Vec<_>>().join("/");
        let is_http = matches!(scheme, ObjectStoreScheme::Http);
        Ok(Self { store: store(&scheme, &root, &parsed)?, root, key, is_http })
    }

    /// Its URL, with another key.
    fn url_of(&self, key: &Key) -> PathBuf {
        // What would mean something else in a URL.
        let key = key.as_ref().replace('%', "%25").replace('#', "%23").replace('?', "%3F");
        format!("{}/{key}", self.root).into()
    }

    /// The objects that are below a key.
    fn list(&self, prefix: &Key) -> Result<Vec<ObjectMeta>> {
        let (store, prefix) = (self.store.clone(), prefix.clone());
        let url = self.url_of(&prefix);
        block_on(async move {
            let mut found: Vec<_> =
                store.list(Some(&prefix)).try_collect().await.map_err(failed("list", &url))?;
            found.sort_by(|one: &ObjectMeta, other| {
                one.location.parts().cmp(other.location.parts())
            });
            Ok(without_folders(found, &prefix))
        })
    }

    /// What is known of an object; `None` where there is none.
    fn head(&self) -> Result<Option<ObjectMeta>> {
        let (store, key, url) = (self.store.clone(), self.key.clone(), self.url());
        block_on(async move {
            match store.head(&key).await {
                Ok(meta) => Ok(Some(meta)),
                Err(StoreError::NotFound { .. }) => Ok(None),
                Err(error) => Err(failed("open", &url)(error)),
            }
        })
    }
}

/// Without objects of no bytes that stand for a folder, as some programs make them.
fn without_folders(found: Vec<ObjectMeta>, folder: &Key) -> Vec<ObjectMeta> {
    let is_folder = |at: usize, object: &ObjectMeta| {
        // What is below it comes next.
        let next = found.get(at + 1);
        let has_more = next.is_some_and(|next| next.location.prefix_matches(&object.location));
        object.size == 0 && (object.location == *folder || has_more)
    };
    let files = found.iter().enumerate().filter(|(at, object)| !is_folder(*at, object));
    files.map(|(_, object)| object.clone()).collect()
}

/// A URL as far as it may be seen.
fn without_secrets(url: &Path) -> String {
    let text = url.to_string_lossy();
    let text = text.split(['?', '#']).next().unwrap_or_default();
    match text.split_once("://").and_then(|(scheme, rest)| Some((scheme, rest.rsplit_once('@')?))) {
        Some((scheme, (_, rest))) => format!("{scheme}://…@{rest}"),
        None => text.to_owned(),
    }
}

type Stores = BTreeMap<String, Arc<dyn ObjectStore>>;

/// One for each root, with its connections and credentials.
static STORES: Mutex<Stores> = Mutex::new(BTreeMap::new());

fn store(scheme: &ObjectStoreScheme, root: &str, url: &Url) -> Result<Arc<dyn ObjectStore>> {
    let mut stores = STORES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(store) = stores.get(root) {
        return Ok(store.clone());
    }
    let store = new_store(scheme, url)?;
    stores.insert(root.to_owned(), store.clone());
    Ok(store)
}

#[cfg(feature = "cloud")]
fn new_store(scheme: &ObjectStoreScheme, url: &Url) -> Result<Arc<dyn ObjectStore>> {
    use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
    use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
    use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
    use object_store::http::HttpBuilder;
    use object_store::{ClientConfigKey, ClientOptions, RetryConfig};
    use std::time::Duration;

    // Time enough for a large row group on a slow line; who is silent for longer is an error.
    const PATIENCE: &str = "120s";
    let retry = RetryConfig {
        max_retries: 6,
        retry_timeout: Duration::from_secs(60),
        ..RetryConfig::default()
    };
    let store: Result<Arc<dyn ObjectStore>, StoreError> = match scheme {
        ObjectStoreScheme::AmazonS3 => {
            let builder = AmazonS3Builder::from_env().with_url(url.as_str());
            let builder =
                builder.with_config(AmazonS3ConfigKey::Client(ClientConfigKey::Timeout), PATIENCE);
            builder.with_retry(retry).build().map(|store| Arc::new(store) as _)
        }
        ObjectStoreScheme::GoogleCloudStorage => {
            let builder = GoogleCloudStorageBuilder::from_env().with_url(url.as_str());
            let builder =
                builder.with_config(GoogleConfigKey::Client(ClientConfigKey::Timeout), PATIENCE);
            builder.with_retry(retry).build().map(|store| Arc::new(store) as _)
        }
        ObjectStoreScheme::MicrosoftAzure => {
            let builder = MicrosoftAzureBuilder::from_env().with_url(url.as_str());
            let builder =
                builder.with_config(AzureConfigKey::Client(ClientConfigKey::Timeout), PATIENCE);
            builder.with_retry(retry).build().map(|store| Arc::new(store) as _)
        }
        ObjectStoreScheme::Http => {
            let host = &url[..Position::BeforePath];
            let plain = ClientOptions::new().with_allow_http(true);
            let builder = HttpBuilder::new().with_url(host).with_client_options(plain);
            let builder = builder.with_config(ClientConfigKey::Timeout, PATIENCE);
            builder.with_retry(retry).build().map(|store| Arc::new(store) as _)
        }
        _ => return Err(unknown(url)),
    };
    store.map_err(failed("open", Path::new(url.as_str())))
}

#[cfg(not(feature = "cloud"))]
fn new_store(_scheme: &ObjectStoreScheme, url: &Url) -> Result<Arc<dyn ObjectStore>> {
    let source = "Mobula was built without its feature `cloud`".into();
    Err(Error::ObjectStore { action: "open", url: url.to_string(), source, hint: "" })
}

#[cfg(feature = "cloud")]
fn unknown(url: &Url) -> Error {
    Error::InvalidOption {
        option: "the URL",
        expected: "one of s3, gs, az, abfs, http and https before ://, or a path".to_owned(),
        got: url.to_string(),
    }
}

/// What to do about what a store says.
fn failed(action: &'static str, url: &Path) -> impl Fn(StoreError) -> Error + use<> {
    let url = url.to_path_buf();
    move |error| match error {
        StoreError::NotFound { .. } if action == "read" => Error::FileChanged { path: url.clone() },
        StoreError::Precondition { .. } | StoreError::NotModified { .. } => {
            Error::FileChanged { path: url.clone() }
        }
        error => Error::ObjectStore {
            action,
            hint: hint(&url),
            url: url.display().to_string(),
            source: Box::new(error),
        },
    }
}

/// Where a store's address and credentials come from.
fn hint(url: &Path) -> &'static str {
    let scheme = url.to_str().and_then(|text| text.split_once("://")).map(|(scheme, _)| scheme);
    match scheme {
        Some("s3" | "s3a") => {
            "; AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION say who asks \
             (AWS_SKIP_SIGNATURE=true: nobody, for public data), AWS_ENDPOINT_URL where another \
             store is (AWS_ALLOW_HTTP=true if it is http)"
        }
        Some("gs") => {
            "; GOOGLE_SERVICE_ACCOUNT says in which file the credentials are \
             (GOOGLE_SKIP_SIGNATURE=true: none, for public data)"
        }
        Some("az" | "adl" | "azure" | "abfs" | "abfss") => {
            "; AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY say who asks \
             (AZURE_SKIP_SIGNATURE=true: nobody, for public data)"
        }
        _ => "",
    }
}

/// The objects of a pattern: one, those of a folder whose names fit `in_folder`, or those that fit a
/// pattern with wildcards. In the order of their names, at least one.
pub(crate) fn expand(pattern: &Path, in_folder: &str) -> Result<Vec<PathBuf>> {
    let place = Place::new(pattern)?;
    let files = match wildcards(place.key.as_ref()) {
        None => one_or_folder(&place, in_folder)?,
        Some(folder) => matching(&place, folder, place.key.as_ref(), true)?,
    };
    if files.is_empty() {
        return Err(Error::NoFiles { pattern: pattern.to_owned() });
    }
    Ok(files)
}

/// Whether a URL has no wildcard and is none of the files that it stands for.
pub(crate) fn is_folder(url: &Path, files: &[PathBuf]) -> Result<bool> {
    if !is_url(url) {
        return Ok(false);
    }
    let place = Place::new(url)?;
    Ok(wildcards(place.key.as_ref()).is_none() && files != [place.url()])
}

/// The folders in which a file lies below a folder, or below the part of a pattern in front of its first
/// wildcard; without the escapes that their names have in a URL.
pub(crate) fn folders_of(file: &Path, pattern: &Path) -> Result<Vec<String>> {
    let (file, pattern) = (Place::new(file)?, Place::new(pattern)?);
    let root = wildcards(pattern.key.as_ref()).unwrap_or(pattern.key.as_ref());
    let below = file.key.as_ref().strip_prefix(root).unwrap_or_default();
    let folder = below.rsplit_once('/').map_or("", |(folder, _)| folder);
    Ok(folder.split('/').filter(|name| !name.is_empty()).map(str::to_owned).collect())
}

/// The folder above the first wildcard, if there is one.
fn wildcards(key: &str) -> Option<&str> {
    let first = key.find(['*', '?', '['])?;
    Some(key[..first].rsplit_once('/').map_or("", |(folder, _)| folder))
}

/// A name with a dot is looked for as that of a file first, others as that of a folder: most often one
/// question is enough.
fn one_or_folder(place: &Place, in_folder: &str) -> Result<Vec<PathBuf>> {
    let is_file = || Ok::<_, Error>(!place.key.as_ref().is_empty() && place.head()?.is_some());
    let itself = || vec![place.url()];
    let dotted = place.is_http || place.key.filename().is_some_and(|name| name.contains('.'));
    if dotted && is_file()? {
        return Ok(itself());
    }
    let folder = Pattern::escape(place.key.as_ref());
    let pattern = format!("{folder}/{in_folder}");
    let pattern = pattern.trim_start_matches('/');
    let found = matching(place, place.key.as_ref(), pattern, false)?;
    Ok(if found.is_empty() && !dotted && is_file()? { itself() } else { found })
}

fn matching(
    place: &Place,
    folder: &str,
    pattern: &str,
    case_sensitive: bool,
) -> Result<Vec<PathBuf>> {
    let pattern = Pattern::new(pattern).map_err(|error| Error::InvalidOption {
        option: "the file pattern",
        expected: "a URL with the wildcards *, ? and [...]".to_owned(),
        got: format!("{pattern:?}: {}", error.msg),
    })?;
    // As the file system has it: a wildcard fits neither a `/` nor the dot of a hidden name.
    let options = MatchOptions {
        require_literal_separator: true,
        require_literal_leading_dot: true,
        case_sensitive,
    };
    // What is written is listed above the folders that are named by values.
    let folder = folder.split('/').take_while(|name| !name.contains('=')).collect::<Vec<_>>();
    let folder = folder.join("/");
    let folder = Key::parse(folder).map_err(|error| failed("list", &place.url())(error.into()))?;
    let look = || {
        let found = place.list(&folder)?.into_iter().map(|object| object.location);
        without_unfinished(place, found.collect())
    };
    // A write may end between the look at the files and that at their list.
    let found = match look() {
        Err(Error::FileChanged { .. }) => look()?,
        found => found?,
    };
    let fits = found.into_iter().filter(|key| pattern.matches_with(key.as_ref(), options));
    Ok(fits.map(|key| place.url_of(&key)).collect())
}

/// An object as it was when it was opened: what is read of it later is the same, or an error.
#[derive(Debug)]
pub(crate) struct RemoteFile {
    place: Place,
    meta: ObjectMeta,
    /// Why it could not be read, for who learns of it only through a decoder.
    failure: Mutex<Option<Error>>,
}

impl RemoteFile {
    pub(crate) fn open(url: &Path) -> Result<Self> {
        let place = Place::new(url)?;
        let meta = place.head()?.ok_or_else(|| Error::NoFiles { pattern: url.to_owned() })?;
        Ok(Self { place, meta, failure: Mutex::new(None) })
    }

    pub(crate) fn length(&self) -> u64 {
        self.meta.size
    }

    /// Other than that of another object, or of the same one when it has changed.
    pub(crate) fn version(&self) -> String {
        let time = || self.meta.last_modified.timestamp_millis().to_string();
        self.meta.e_tag.clone().unwrap_or_else(time)
    }

    /// Some ranges, those near each other in one request.
    pub(crate) fn read(self: &Arc<Self>, ranges: Vec<Range<u64>>) -> Result<Vec<Bytes>> {
        let file = self.clone();
        // No store answers to an empty one.
        let asked: Vec<_> = ranges.iter().filter(|range| !range.is_empty()).cloned().collect();
        let read =
            block_on(
                async move { coalesce_ranges(&asked, |range| file.clone().get(range), GAP).await },
            );
        let mut read = read?.into_iter();
        let next = |range: Range<u64>| {
            if range.is_empty() { Bytes::new() } else { read.next().unwrap_or_default() }
        };
        Ok(ranges.into_iter().map(next).collect())
    }

    async fn get(self: Arc<Self>, range: Range<u64>) -> Result<Bytes> {
        let url = self.place.url();
        let options = GetOptions {
            range: Some(GetRange::Bounded(range)),
            // A weak one fits nothing.
            if_match: self.meta.e_tag.clone().filter(|tag| !tag.starts_with("W/")),
            ..GetOptions::default()
        };
        let got = self.place.store.get_opts(&self.place.key, options).await;
        let got = got.map_err(failed("read", &url))?;
        // Not every server heeds the condition, or has tags.
        let version = |meta: &ObjectMeta| (meta.size, meta.e_tag.clone(), meta.last_modified);
        if version(&got.meta) != version(&self.meta) {
            return Err(Error::FileChanged { path: url });
        }
        got.bytes().await.map_err(failed("read", &url))
    }

    /// Remembers why it could not be read.
    fn remember(&self, error: Error) -> std::io::Error {
        let text = error.to_string();
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        std::io::Error::other(text)
    }

    /// Why it could not be read, if that is so: not what a decoder makes of it.
    pub(crate) fn failure(&self) -> Option<Error> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
