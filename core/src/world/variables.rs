//! Reading an environment: numbers that are numbers, and errors that name the variable.

use crate::Error;

/// An environment.
#[derive(Clone, Copy)]
pub(super) struct Variables<'a> {
    lookup: &'a dyn Fn(&str) -> Option<String>,
}

impl<'a> Variables<'a> {
    pub(super) fn new(lookup: &'a dyn Fn(&str) -> Option<String>) -> Self {
        Self { lookup }
    }

    /// The value; one that is empty counts as not set, as manifests and scripts produce it.
    pub(super) fn text(&self, name: &str) -> Option<String> {
        let value = (self.lookup)(name)?.trim().to_owned();
        (!value.is_empty()).then_some(value)
    }

    /// The value of the first of these that is set, with its name.
    pub(super) fn first<'n>(&self, names: &[&'n str]) -> Option<(&'n str, String)> {
        names.iter().find_map(|name| Some((*name, self.text(name)?)))
    }

    /// A number from 0.
    pub(super) fn index(&self, name: &str) -> Result<Option<usize>, Error> {
        self.text(name).map(|value| parse(name, &value, "a whole number from 0")).transpose()
    }

    /// A number from 1.
    pub(super) fn size(&self, name: &str) -> Result<Option<usize>, Error> {
        let Some(value) = self.text(name) else { return Ok(None) };
        match parse(name, &value, "a whole number from 1")? {
            0 => Err(invalid(name, value, "a whole number from 1")),
            size => Ok(Some(size)),
        }
    }

    /// A number from 0 that must be there because `because` is.
    pub(super) fn need_index(&self, name: &str, because: &str) -> Result<usize, Error> {
        self.index(name)?.ok_or_else(|| missing(name, "a whole number from 0", because))
    }

    /// A number from 1 that must be there because `because` is.
    pub(super) fn need_size(&self, name: &str, because: &str) -> Result<usize, Error> {
        self.size(name)?.ok_or_else(|| missing(name, "a whole number from 1", because))
    }

    pub(super) fn master_port(&self) -> Result<Option<u16>, Error> {
        const PORT: &str = "a port from 1 to 65535";
        let Some(value) = self.text("MASTER_PORT") else { return Ok(None) };
        match parse("MASTER_PORT", &value, PORT)? {
            0 => Err(invalid("MASTER_PORT", value, PORT)),
            port => Ok(Some(port)),
        }
    }

    /// How often the launch was started again, whoever counts it.
    pub(super) fn restart_count(&self) -> Result<u32, Error> {
        const NAMES: [&str; 3] =
            ["RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"];
        let first = self.first(&NAMES);
        first.map_or(Ok(0), |(name, value)| parse(name, &value, "a whole number from 0"))
    }
}

pub(super) fn parse<T: std::str::FromStr>(
    name: &str,
    value: &str,
    expected: &str,
) -> Result<T, Error> {
    value.parse().map_err(|_| invalid(name, value, expected))
}

/// A value that cannot be.
pub(super) fn invalid(name: &str, got: impl ToString, expected: impl Into<String>) -> Error {
    Error::LaunchVariable {
        variable: name.to_owned(),
        got: Some(got.to_string()),
        expected: expected.into(),
    }
}

/// A variable that is not set though `because` is.
pub(super) fn missing(name: &str, expected: &str, because: &str) -> Error {
    let expected = format!("{expected}, since {because} is set");
    Error::LaunchVariable { variable: name.to_owned(), got: None, expected }
}
