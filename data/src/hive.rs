//! Folders named `column=value`, as Hive, Spark and Arrow have them.

/// What stands for a missing value.
const MISSING: &str = "__HIVE_DEFAULT_PARTITION__";

/// The name of the folder with the rows that have this value.
pub(crate) fn folder(column: &str, value: Option<&str>) -> String {
    let column = encode(column);
    // A folder with a dot in front would be hidden.
    let column = column.strip_prefix('.').map_or(column.clone(), |rest| format!("%2E{rest}"));
    let value = match value {
        None => MISSING.to_owned(),
        Some(MISSING) => MISSING.replacen('_', "%5F", 1),
        Some(value) => encode(value),
    };
    format!("{column}={value}")
}

/// Column and value of a folder of such a name; `None` if it is called otherwise.
pub(crate) fn parse(folder: &str) -> Option<(String, Option<String>)> {
    let (column, value) = folder.split_once('=').filter(|(column, _)| !column.is_empty())?;
    Some((decode(column), (value != MISSING).then(|| decode(value))))
}

/// With `%20` for what may mean something to a file system or a URL. Other letters than those of
/// ASCII stay: Spark takes `%C3` for a letter.
fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '-' | '_' | '.' | '~' => encoded.push(letter),
            _ if letter.is_ascii_alphanumeric() || !letter.is_ascii() => encoded.push(letter),
            _ => encoded.push_str(&format!("%{:02X}", u32::from(letter))),
        }
    }
    encoded
}

/// What was encoded; as it is, where that is no text.
fn decode(text: &str) -> String {
    let (mut decoded, mut rest) = (Vec::with_capacity(text.len()), text.as_bytes());
    while let Some((first, behind)) = rest.split_first() {
        let hex = behind.get(..2).filter(|_| *first == b'%').and_then(byte);
        decoded.push(hex.unwrap_or(*first));
        rest = if hex.is_some() { &behind[2..] } else { behind };
    }
    String::from_utf8(decoded).unwrap_or_else(|_| text.to_owned())
}

fn byte(hex: &[u8]) -> Option<u8> {
    let digits =
        str::from_utf8(hex).ok().filter(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()))?;
    u8::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn folders_of_others_are_understood() {
        let text = |text: &str| Some(("a".to_owned(), Some(text.to_owned())));
        assert_eq!(parse("a=b=c"), text("b=c"));
        assert_eq!(parse("a="), text(""));
        assert_eq!(parse("a=New%20York+x"), text("New York+x"));
        assert_eq!(parse("a=100%"), text("100%"));
        assert_eq!(parse("a=%+1"), text("%+1"));
        assert_eq!(parse("a=%FF"), text("%FF"));
        assert_eq!(parse("a=M%C3%BCnchen"), text("München"));
        assert_eq!(parse("a=__HIVE_DEFAULT_PARTITION__"), Some(("a".to_owned(), None)));
        assert_eq!((parse("a"), parse("=b")), (None, None));
    }

    proptest! {
        #[test]
        fn names_are_one_folder_and_come_back(column in ".+", value in proptest::option::of(".*")) {
            let name = folder(&column, value.as_deref());
            prop_assert!(!name.contains(['/', '\0', '*', '?', '[', '\\']) && !name.starts_with('.'));
            prop_assert_eq!(parse(&name), Some((column, value)));
        }
    }

    #[test]
    fn the_word_for_missing_is_a_value_too() {
        let name = folder("a", Some(MISSING));
        assert_eq!(parse(&name), Some(("a".to_owned(), Some(MISSING.to_owned()))));
    }
}
