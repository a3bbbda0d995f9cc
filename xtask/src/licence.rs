//! SPDX licence expressions: `(MIT OR Apache-2.0) AND Unicode-3.0`.

use anyhow::{Result, bail, ensure};

/// Whether the terms of `expression` can be met with the licences of `allowed` alone.
///
/// `AND` binds tighter than `OR`; `A WITH B` is one licence, allowed only under that full name;
/// `A/B` is how old crates write `A OR B`.
pub(crate) fn is_met(expression: &str, allowed: &[&str]) -> Result<bool> {
    let tokens = tokens(expression);
    let mut parser = Parser { tokens: &tokens, allowed };
    let met = parser.alternatives();
    match (met, parser.tokens) {
        (Ok(met), []) => Ok(met),
        (Ok(_), [extra, ..]) => bail!("licence expression {expression:?}: unexpected {extra:?}"),
        (Err(error), _) => Err(error.context(format!("licence expression {expression:?}"))),
    }
}

fn tokens(expression: &str) -> Vec<String> {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    spaced.split_whitespace().map(String::from).collect()
}

struct Parser<'a> {
    tokens: &'a [String],
    allowed: &'a [&'a str],
}

impl Parser<'_> {
    fn alternatives(&mut self) -> Result<bool> {
        let mut met = self.conjunction()?;
        while self.take("OR") {
            met |= self.conjunction()?;
        }
        Ok(met)
    }

    fn conjunction(&mut self) -> Result<bool> {
        let mut met = self.term()?;
        while self.take("AND") {
            met &= self.term()?;
        }
        Ok(met)
    }

    fn term(&mut self) -> Result<bool> {
        if self.take("(") {
            let met = self.alternatives()?;
            ensure!(self.take(")"), "a parenthesis is not closed");
            return Ok(met);
        }
        let mut licence = self.word()?;
        if self.take("WITH") {
            licence = format!("{licence} WITH {}", self.word()?);
        }
        Ok(self.allowed.contains(&licence.as_str()))
    }

    fn word(&mut self) -> Result<String> {
        match self.tokens {
            [word, rest @ ..] if !["AND", "OR", "WITH", "(", ")"].contains(&word.as_str()) => {
                self.tokens = rest;
                Ok(word.clone())
            }
            [word, ..] => bail!("expected a licence, got {word:?}"),
            [] => bail!("expected a licence at the end"),
        }
    }

    /// Steps over `token` if it is next.
    fn take(&mut self, token: &str) -> bool {
        match self.tokens {
            [next, rest @ ..] if next == token => {
                self.tokens = rest;
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_evaluated_as_spdx_says() {
        let allowed = &["MIT", "Apache-2.0", "Unicode-3.0", "Apache-2.0 WITH LLVM-exception"];
        for (expression, met) in [
            ("MIT", true),
            ("GPL-3.0-only", false),
            ("MIT OR GPL-3.0-only", true),
            ("GPL-3.0-only OR MIT", true),
            ("MIT/Apache-2.0", true),
            ("GPL-2.0 / MIT", true),
            ("MIT AND GPL-3.0-only", false),
            ("(MIT OR GPL-3.0-only) AND Unicode-3.0", true),
            ("MIT OR GPL-3.0-only AND LGPL-3.0-only", true),
            ("(MIT OR GPL-3.0-only) AND LGPL-3.0-only", false),
            ("Apache-2.0 WITH LLVM-exception", true),
            ("Apache-2.0 WITH Other-exception", false),
            ("GPL-2.0-only WITH LLVM-exception OR MIT", true),
        ] {
            assert_eq!(is_met(expression, allowed).expect(expression), met, "{expression}");
        }
    }

    #[test]
    fn broken_expressions_are_errors() {
        for expression in ["", "MIT OR", "(MIT", "MIT)", "AND MIT", "MIT Apache-2.0", "MIT WITH"] {
            assert!(is_met(expression, &["MIT"]).is_err(), "{expression}");
        }
    }
}
