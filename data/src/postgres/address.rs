//! Where a database is and how to get in, of which messages show no password.

use crate::error::{Error, Result};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::env;
use std::fmt;
use std::time::Duration;
use tokio_postgres::Config;
use tokio_postgres::config::Host;

/// How a server is noticed that vanished without a word.
const KEEPALIVE: Duration = Duration::from_secs(30);
const PROBES: (Duration, u32) = (Duration::from_secs(10), 3);

/// A URL of PostgreSQL. It is shown without its password, and written without it where people may
/// read what is written; worker processes get it as it is.
#[derive(Clone)]
pub(super) struct Address {
    url: String,
}

impl Address {
    pub(super) fn new(url: &str) -> Result<Self> {
        let address = Self { url: url.to_owned() };
        address.config()?;
        Ok(address)
    }

    /// What to connect with: what the URL does not say is taken from the environment, as `psql` does.
    pub(super) fn config(&self) -> Result<Config> {
        if !self.url.starts_with("postgres://") && !self.url.starts_with("postgresql://") {
            // What else it is may be a password.
            return Err(invalid("another text".to_owned()));
        }
        let Parts { credentials, place, .. } = Parts::of(&self.url);
        if credentials.contains(['/', '?']) || place.contains('@') {
            // Cut at the wrong place, a password would be taken for a host, and shown.
            let got =
                "one with @, / or ? where they mean something else; write them as %40, %2F and %3F";
            return Err(invalid(got.to_owned()));
        }
        let parsed = self.url.parse::<Config>();
        let mut config = parsed.map_err(|error| invalid(mobula_core::error::chain(&error)))?;
        complete(&mut config, &self.url)?;
        Ok(config)
    }

    fn without_password(&self) -> String {
        let Parts { scheme, credentials, place, parameters } = Parts::of(&self.url);
        let user = credentials.split(':').next().unwrap_or_default();
        let harmless = |parameter: &&str| {
            let key = parameter.split('=').next().unwrap_or_default();
            // A key can be written in more ways than one.
            key != "password" && !key.contains('%')
        };
        let kept: Vec<_> = parameters.split('&').filter(harmless).collect();
        let parameters =
            if kept.concat().is_empty() { String::new() } else { format!("?{}", kept.join("&")) };
        let at = if user.is_empty() { "" } else { "@" };
        format!("{scheme}{user}{at}{place}{parameters}")
    }
}

/// The parts of a URL, cut where tokio-postgres cuts it.
struct Parts<'a> {
    scheme: &'a str,
    /// User and password.
    credentials: &'a str,
    /// Hosts, ports and the database.
    place: &'a str,
    parameters: &'a str,
}

impl<'a> Parts<'a> {
    fn of(url: &'a str) -> Self {
        let (scheme, rest) = url.split_at(url.find("//").map_or(0, |at| at + 2));
        let (credentials, rest) = rest.split_once('@').unwrap_or(("", rest));
        let (place, parameters) = rest.split_once('?').unwrap_or((rest, ""));
        Self { scheme, credentials, place, parameters }
    }
}

fn invalid(got: String) -> Error {
    Error::InvalidOption {
        option: "the address of a PostgreSQL database",
        expected: "a URL such as postgres://USER@HOST:5432/DATABASE".to_owned(),
        got,
    }
}

/// A variable of the environment that says something.
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// Adds what the environment says, and what a wait needs to end.
fn complete(config: &mut Config, url: &str) -> Result<()> {
    if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
        complete_place(config)?;
    }
    if let (None, Some(user)) = (config.get_user(), variable("PGUSER")) {
        config.user(user);
    }
    if let (None, Some(password)) = (config.get_password(), variable("PGPASSWORD")) {
        config.password(password);
    }
    if let (None, Some(database)) = (config.get_dbname(), variable("PGDATABASE")) {
        config.dbname(database);
    }
    if let (false, Some(mode)) = (url.contains("sslmode="), variable("PGSSLMODE")) {
        let wrong = |_| invalid(format!("the sslmode {mode:?} in PGSSLMODE"));
        let parsed: Config = format!("sslmode={mode}").parse().map_err(wrong)?;
        config.ssl_mode(parsed.get_ssl_mode());
    }
    if config.get_application_name().is_none() {
        config.application_name("mobula");
    }
    if !url.contains("keepalives") {
        let (interval, retries) = PROBES;
        config.keepalives_idle(KEEPALIVE).keepalives_interval(interval).keepalives_retries(retries);
    }
    Ok(())
}

/// Adds host and port.
fn complete_place(config: &mut Config) -> Result<()> {
    match variable("PGHOST") {
        Some(path) if path.starts_with('/') => config.host_path(path),
        host => config.host(host.unwrap_or_else(|| "localhost".to_owned())),
    };
    if let (Some(port), true) = (variable("PGPORT"), config.get_ports().is_empty()) {
        let wrong = |_| invalid(format!("the port {port:?} in PGPORT"));
        config.port(port.parse().map_err(wrong)?);
    }
    Ok(())
}

/// The database as messages call it.
pub(super) fn name_of(config: &Config) -> String {
    let port = |at: usize| {
        let ports = config.get_ports();
        ports.get(at).or(ports.first()).copied().unwrap_or(5432)
    };
    let host = |(at, host): (usize, &Host)| match host {
        Host::Tcp(host) => format!("{host}:{}", port(at)),
        Host::Unix(path) => format!("{}:{}", path.display(), port(at)),
    };
    let hosts: Vec<_> = match config.get_hosts() {
        [] => config.get_hostaddrs().iter().map(|of| format!("{of}:{}", port(0))).collect(),
        hosts => hosts.iter().enumerate().map(host).collect(),
    };
    let user = config.get_user().map(|user| format!("{user}@")).unwrap_or_default();
    let database = config.get_dbname().or(config.get_user()).unwrap_or_default();
    format!("postgres://{user}{}/{database}", hosts.join(","))
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.without_password())
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.without_password())
    }
}

impl Serialize for Address {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match serializer.is_human_readable() {
            true => serializer.serialize_str(&self.without_password()),
            false => serializer.serialize_str(&self.url),
        }
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self { url: String::deserialize(deserializer)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(url: &str) -> Address {
        Address { url: url.to_owned() }
    }

    #[test]
    fn passwords_are_not_shown() {
        for (url, shown) in [
            ("postgres://ann:s3cret@db:5433/birds", "postgres://ann@db:5433/birds"),
            ("postgres://ann@db/birds?password=s3cret", "postgres://ann@db/birds"),
            (
                "postgresql://ann:s3cret%40@a,b/birds?password=s3cret&sslmode=disable&%70assword=s3cret",
                "postgresql://ann@a,b/birds?sslmode=disable",
            ),
            ("postgres:///birds?host=/run/pg&user=ann", "postgres:///birds?host=/run/pg&user=ann"),
        ] {
            let address = address(url);
            assert_eq!(address.to_string(), shown);
            assert_eq!(format!("{address:?}"), format!("{shown:?}"));
            assert_eq!(serde_json::to_value(&address).expect("JSON"), shown);
            let packed = rmp_serde::to_vec(&address).expect("MessagePack");
            let again: Address = rmp_serde::from_slice(&packed).expect("MessagePack");
            assert_eq!(again.url, url, "workers get it");
        }
    }

    #[test]
    fn addresses_that_are_none_are_refused_without_showing_them() {
        for url in [
            "host=db password=s3cret",
            "mysql://ann:s3cret@db/birds",
            "postgres://ann:s3@cret@db/birds",
            "postgres://ann:s3/cr?et@db",
            "postgres://db:5432/birds?password=s3@cret",
            "postgres://db/birds?password=s3@cret",
            "postgres://ann:s3cret@db/birds?sslmode=s3cret",
            "postgres://ann:s3cret@db:s3cret/birds",
        ] {
            let error = address(url).config().expect_err(url).to_string();
            assert!(error.contains("postgres://USER@HOST:5432/DATABASE"), "{error}");
            assert!(!error.contains("cret"), "{error}");
        }
    }
}
