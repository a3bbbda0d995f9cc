//! Filling a trial's parameters into a command line.

use crate::{Error, ParamValue, Params};

/// `${args}` as a whole argument becomes one `--name=value` for each parameter; inside any
/// argument `${name}` becomes a parameter's value and `${params_json}` all of them as JSON. `$${` is
/// a plain `${`, for shell scripts.
pub(crate) fn expand(command: &[String], params: &Params) -> Result<Vec<String>, Error> {
    let mut expanded = Vec::new();
    for part in command {
        if part == "${args}" {
            expanded.extend(arguments(params));
        } else {
            expanded.push(substitute(part, params)?);
        }
    }
    Ok(expanded)
}

fn arguments(params: &Params) -> impl Iterator<Item = String> {
    params.iter().map(|(name, value)| format!("--{name}={}", exact(value)))
}

/// A value to the last digit, unlike its `Display`.
fn exact(value: &ParamValue) -> String {
    match value {
        ParamValue::Float(x) => format!("{x}"),
        other => other.to_string(),
    }
}

fn substitute(part: &str, params: &Params) -> Result<String, Error> {
    let (mut text, mut rest) = (String::new(), part);
    while let Some((before, after)) = rest.split_once("${") {
        if let Some(before) = before.strip_suffix('$') {
            text.push_str(before);
            text.push_str("${");
            rest = after;
            continue;
        }
        let unclosed = || wrong(format!("{part:?} has a ${{ without its }}"));
        let (name, after) = after.split_once('}').ok_or_else(unclosed)?;
        text.push_str(before);
        text.push_str(&variable(name, params)?);
        rest = after;
    }
    text.push_str(rest);
    Ok(text)
}

fn variable(name: &str, params: &Params) -> Result<String, Error> {
    match name {
        "args" => Ok(arguments(params).collect::<Vec<_>>().join(" ")),
        "params_json" => {
            serde_json::to_string(params).map_err(|e| mobula_core::Error::layer(e).into())
        }
        name => params.get(name).map(exact).map_err(|_| {
            let names: Vec<&str> = params.iter().map(|(name, _)| name).collect();
            let names = names.join(", ");
            wrong(format!(
                "there is no ${{{name}}}; available: args, params_json, {names} ($${{ is a plain ${{)"
            ))
        }),
    }
}

fn wrong(problem: String) -> Error {
    Error::SweepField { field: "command".into(), problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_filled_in_to_the_last_digit() {
        let params: Params =
            [("lr", 0.123_456_789_012_345_68.into()), ("opt", "adam".into())].into_iter().collect();
        let check = |command: &[&str], expected: &[&str]| {
            let command: Vec<String> = command.iter().map(ToString::to_string).collect();
            assert_eq!(expand(&command, &params).expect("expand"), expected);
        };
        check(
            &["./train", "${args}", "-q"],
            &["./train", "--lr=0.12345678901234568", "--opt=adam", "-q"],
        );
        check(
            &["sh", "-c", "run ${args} > ${opt}.log"],
            &["sh", "-c", "run --lr=0.12345678901234568 --opt=adam > adam.log"],
        );
        check(&["t", "${params_json}"], &["t", r#"{"lr":0.12345678901234568,"opt":"adam"}"#]);
        check(&["sh", "-c", "x=$${1#--} ${opt}"], &["sh", "-c", "x=${1#--} adam"]);
        check(&["t", "$HOME {x}"], &["t", "$HOME {x}"]);
        let error = |part: &str| expand(&[part.to_owned()], &params).expect_err("bad").to_string();
        assert!(error("--m=${momentum}").contains("available: args, params_json, lr, opt"));
        assert!(error("${lr").contains("without its }"));
    }
}
