//! Slurm's notation for many hosts: `node[1-3,07],rack[1-2]gpu[01-16],login`.

use super::variables::invalid;
use crate::Error;

/// No cluster has more; a list that does is a slip such as `[1-10000000]`.
pub(super) const MOST_HOSTS: usize = 100_000;

/// The hosts of a list, in its order; at least one. `name` is the variable, for the error.
pub(super) fn expand(name: &str, list: &str) -> Result<Vec<String>, Error> {
    hosts(list).map_err(|reason| invalid(name, list, format!("host names ({reason})")))
}

type Reason = &'static str;

fn hosts(list: &str) -> Result<Vec<String>, Reason> {
    let mut hosts = Vec::new();
    for part in split_outside_brackets(list)? {
        hosts.extend(expand_one(part)?);
        if hosts.len() > MOST_HOSTS {
            return Err("more than 100000 of them");
        }
    }
    Ok(hosts)
}

/// Splits at the commas that are not within brackets.
fn split_outside_brackets(list: &str) -> Result<Vec<&str>, Reason> {
    let (mut parts, mut start, mut inside) = (Vec::new(), 0, false);
    for (at, byte) in list.bytes().enumerate() {
        match byte {
            b'[' if inside => return Err("a [ within brackets"),
            b']' if !inside => return Err("a ] without its ["),
            b'[' => inside = true,
            b']' => inside = false,
            b',' if !inside => {
                parts.push(&list[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if inside {
        return Err("a [ without its ]");
    }
    parts.push(&list[start..]);
    Ok(parts)
}

/// One name, with any number of bracketed ranges in it; the last one varies fastest.
fn expand_one(name: &str) -> Result<Vec<String>, Reason> {
    let mut hosts = vec![String::new()];
    let mut rest = name;
    while let Some((plain, after)) = rest.split_once('[') {
        let (ranges, after) = after.split_once(']').ok_or("a [ without its ]")?;
        let numbers = numbers(ranges)?;
        if hosts.len() * numbers.len() > MOST_HOSTS {
            return Err("more than 100000 of them");
        }
        let with =
            |host: &String| numbers.iter().map(|n| format!("{host}{plain}{n}")).collect::<Vec<_>>();
        hosts = hosts.iter().flat_map(with).collect();
        rest = after;
    }
    hosts.iter_mut().for_each(|host| host.push_str(rest));
    if hosts.iter().any(|host| host.is_empty() || host.contains(char::is_whitespace)) {
        return Err("an empty name");
    }
    Ok(hosts)
}

/// `1-3,07` is 1, 2, 3, 07: numbers keep the width of the first of their range.
fn numbers(ranges: &str) -> Result<Vec<String>, Reason> {
    let mut numbers = Vec::new();
    for range in ranges.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (from, to) = (number(first)?, number(last)?);
        if from > to {
            return Err("a range that runs backwards");
        }
        if to - from >= MOST_HOSTS as u64 || numbers.len() > MOST_HOSTS {
            return Err("more than 100000 of them");
        }
        numbers.extend((from..=to).map(|n| format!("{n:0width$}", width = first.len())));
    }
    Ok(numbers)
}

fn number(digits: &str) -> Result<u64, Reason> {
    let is_number = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    let parsed = is_number.then(|| digits.parse().ok()).flatten();
    parsed.ok_or("between brackets, ranges such as 1-3,7")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lists_as_slurm_writes_them() {
        let check = |list, expected: &[&str]| {
            assert_eq!(hosts(list).expect(list), expected, "{list}");
        };
        check("node1", &["node1"]);
        check("node[1-3,7],gpu01", &["node1", "node2", "node3", "node7", "gpu01"]);
        check("n[08-11]", &["n08", "n09", "n10", "n11"]);
        check("n[8-11]", &["n8", "n9", "n10", "n11"]);
        check("r[1-2]n[1-2]-ib", &["r1n1-ib", "r1n2-ib", "r2n1-ib", "r2n2-ib"]);
        check("a.example.org,b", &["a.example.org", "b"]);
        check("[1-2]", &["1", "2"]);
    }

    #[test]
    fn lists_that_are_none() {
        for list in [
            "",
            ",",
            "a,",
            "a[",
            "a]",
            "a[]",
            "a[1",
            "a[1-]",
            "a[-1]",
            "a[3-1]",
            "a[x]",
            "a[1,]",
            "a[1-2]]",
            "a[[1]]",
            "a b",
            "a[1-10000000]",
            "a[1-1000]b[1-1000]",
            "a[+1]",
            "a[99999999999999999999]",
        ] {
            assert!(hosts(list).is_err(), "{list:?}");
        }
    }

    /// A bracketed group: its text, and the endings it stands for.
    fn group() -> impl Strategy<Value = (String, Vec<String>)> {
        prop::collection::vec((0u64..200, 0u64..12, 0usize..5), 1..4).prop_map(|ranges| {
            let (mut text, mut ends) = (Vec::new(), Vec::new());
            for (from, more, width) in ranges {
                let pad = |n: u64| format!("{n:0width$}");
                let width = pad(from).len();
                text.push(match more {
                    0 => pad(from),
                    _ => format!("{}-{:0width$}", pad(from), from + more),
                });
                ends.extend((from..=from + more).map(|n| format!("{n:0width$}")));
            }
            (text.join(","), ends)
        })
    }

    proptest! {
        #[test]
        fn what_was_folded_unfolds(
            parts in prop::collection::vec(("[a-z][a-z0-9.-]{0,6}", prop::option::of(group())), 1..5)
        ) {
            let (mut list, mut expected) = (Vec::new(), Vec::new());
            for (prefix, group) in &parts {
                match group {
                    None => {
                        list.push(prefix.clone());
                        expected.push(prefix.clone());
                    }
                    Some((text, ends)) => {
                        list.push(format!("{prefix}[{text}]"));
                        expected.extend(ends.iter().map(|end| format!("{prefix}{end}")));
                    }
                }
            }
            prop_assert_eq!(hosts(&list.join(",")).expect("a list"), expected);
        }

        #[test]
        fn no_text_breaks_it(list in "[a-c0-9\\[\\],x-]{0,24}") {
            if let Ok(hosts) = hosts(&list) {
                prop_assert!(!hosts.is_empty() && hosts.len() <= MOST_HOSTS);
                prop_assert!(hosts.iter().all(|host| !host.is_empty() && !host.contains(['[', ','])));
            }
        }
    }
}
