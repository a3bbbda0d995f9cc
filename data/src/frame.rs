//! Whole datasets: queries, joins, groups, order. What these need of other rows makes them no row by
//! row operation, so their result is computed where it is opened, and kept as blocks.

use crate::Dataset;
use crate::error::{Error, Result};
use crate::order::OrderBy;
use crate::query::{TABLE, bare, query_schema};
use crate::source::query::Query;
use crate::source::slice::{self, Part, Slice, Zip};
use crate::source::sorted::{Groups, Shuffled, Sorted};
use crate::source::union::{self, Union};
use mobula_core::random::Stream;
use serde::{Deserialize, Serialize};

/// The name of the second dataset of a join.
const OTHER: &str = "other";

/// Which rows a [`Dataset::join`] has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum JoinType {
    /// Each pair of rows whose keys are the same.
    Inner,
    /// The same, and the rows of the left that have no partner.
    Left,
    /// The same as inner, and the rows of the right that have no partner.
    Right,
    /// The same as inner, and the rows of either that have no partner.
    Full,
    /// The rows of the left that have a partner, once, with the left's columns.
    LeftSemi,
    /// The rows of the left that have none, with the left's columns.
    LeftAnti,
    /// Each row of the left with each of the right; without keys.
    Cross,
}

impl JoinType {
    fn sql(self) -> &'static str {
        match self {
            Self::Inner => "INNER",
            Self::Left => "LEFT",
            Self::Right => "RIGHT",
            Self::Full => "FULL",
            Self::LeftSemi => "LEFT SEMI",
            Self::LeftAnti => "LEFT ANTI",
            Self::Cross => "CROSS",
        }
    }

    fn has_left_columns_only(self) -> bool {
        matches!(self, Self::LeftSemi | Self::LeftAnti)
    }
}

/// What works on all rows together. The result is computed once in every process that reads it. It is
/// kept in memory while the budget (see the guide) has room, and on disk beyond; so do sorts and groups
/// while they run. [`persist`](Self::persist) computes it once for all processes.
impl Dataset {
    /// The result of a query over this dataset, which it calls `dataset`:
    /// `"SELECT species, count(*) AS n FROM dataset GROUP BY species ORDER BY species"`.
    pub fn sql(&self, query: impl Into<String>) -> Result<Self> {
        self.sql_with(query, [] as [(&str, &Self); 0])
    }

    /// The same over this dataset and `others`, by the names that the query calls them.
    pub fn sql_with<'a, S: Into<String>>(
        &self,
        query: impl Into<String>,
        others: impl IntoIterator<Item = (S, &'a Self)>,
    ) -> Result<Self> {
        let mut inputs = vec![(TABLE.to_owned(), self.clone())];
        inputs.extend(others.into_iter().map(|(name, other)| (name.into(), other.clone())));
        let query = query.into();
        let schema = query_schema(&bare(&inputs), &query)?;
        Ok(Self::unopened(Query { inputs, query }).with_schema(schema))
    }

    /// Pairs rows whose columns `on` are the same, in both under one name. A missing value
    /// has no partner. All other columns must differ in name: see [`rename`](Self::rename).
    pub fn join<S: AsRef<str>>(
        &self,
        other: &Self,
        on: impl IntoIterator<Item = S>,
        how: JoinType,
    ) -> Result<Self> {
        let on: Vec<_> = on.into_iter().map(|column| column.as_ref().to_owned()).collect();
        let (left, right) = (self.schema()?, other.schema()?);
        for schema in [&left, &right] {
            let known = |column: &String| schema.field_with_name(column).is_ok();
            if let Some(unknown) = on.iter().find(|column| !known(column)) {
                return Err(Error::no_such_column(unknown, schema));
            }
        }
        if on.is_empty() != (how == JoinType::Cross) {
            return Err(Error::InvalidOption {
                option: "the columns of a join",
                expected: "at least one, or none for JoinType::Cross".to_owned(),
                got: on.len().to_string(),
            });
        }
        let rest = right.fields().iter().map(|field| field.name());
        let rest: Vec<_> = rest.filter(|name| !on.contains(name)).collect();
        if let Some(twice) = rest.iter().find(|name| left.field_with_name(name).is_ok())
            && !how.has_left_columns_only()
        {
            return Err(Error::ColumnTwice { column: (*twice).clone() });
        }
        let query = join_query(&on, &names(&left), &rest, how);
        self.sql_with(query, [(OTHER, other)])
    }

    /// The rows in the order of SQL expressions such as `"species"` or `"body_mass_g DESC NULLS
    /// LAST"`, the first first. Rows that are the same by these stay in the order they had. Data that
    /// have no room in memory are written and read once for it. What is done to the rows before is done
    /// again for a sample of the keys: [`persist`](Self::persist) what takes long.
    pub fn sort<S: AsRef<str>>(&self, by: impl IntoIterator<Item = S>) -> Result<Self> {
        let (by, schema) = (list("the expressions of a sort", by)?, self.schema()?);
        OrderBy::new(&schema, &by)?;
        Ok(Self::unopened(Sorted { input: self.clone(), by }).with_schema(schema))
    }

    /// One row for each combination of the columns `keys`, which it has, with the values of SQL
    /// aggregates such as `"avg(body_mass_g) AS mass"`, in the order of the keys.
    pub fn aggregate<K: AsRef<str>, S: AsRef<str>>(
        &self,
        keys: impl IntoIterator<Item = K>,
        aggregates: impl IntoIterator<Item = S>,
    ) -> Result<Self> {
        let keys = keys.into_iter().map(|key| quoted(key.as_ref()));
        let keys = keys.collect::<Vec<_>>().join(", ");
        let aggregates = list("the aggregates of an aggregate", aggregates)?;
        if keys.is_empty() {
            return self.sql(format!("SELECT {aggregates} FROM {TABLE}"));
        }
        self.sql(format!(
            "SELECT {keys}, {aggregates} FROM {TABLE} GROUP BY {keys} ORDER BY {keys}"
        ))
    }

    /// The combinations of values that `columns` have, each once, in order.
    pub fn unique<S: AsRef<str>>(&self, columns: impl IntoIterator<Item = S>) -> Result<Self> {
        let columns = columns.into_iter().map(|column| quoted(column.as_ref()));
        let columns = list("the columns of unique", columns)?;
        self.sql(format!("SELECT DISTINCT {columns} FROM {TABLE} ORDER BY {columns}"))
    }

    /// The values of a column and how often each is there (`count`), the most frequent first.
    pub fn frequencies(&self, column: impl AsRef<str>) -> Result<Self> {
        if column.as_ref() == "count" {
            return Err(Error::ColumnTwice { column: "count".to_owned() });
        }
        let column = quoted(column.as_ref());
        self.sql(format!(
            "SELECT {column}, count(*) AS count FROM {TABLE} GROUP BY {column} ORDER BY count DESC, {column}"
        ))
    }

    /// The `rows` rows with the largest values of a column, the largest first; none with a missing one.
    pub fn top_k(&self, column: impl AsRef<str>, rows: usize) -> Result<Self> {
        let column = quoted(column.as_ref());
        self.sql(format!(
            "SELECT * FROM {TABLE} WHERE {column} IS NOT NULL ORDER BY {column} DESC LIMIT {rows}"
        ))
    }
}

/// What changes where rows are, but not the rows.
impl Dataset {
    /// The rows of this dataset and, behind them, those of `other`, which has the same columns.
    pub fn union(&self, other: &Self) -> Result<Self> {
        let inputs = vec![self.clone(), other.clone()];
        let schema = union::schema_of(&inputs)?;
        Ok(Self::unopened(Union { inputs }).with_schema(schema))
    }

    /// The columns of this dataset and those of `other`, which has as many rows: row by row, in the
    /// order of both.
    pub fn zip(&self, other: &Self) -> Result<Self> {
        let schema = slice::zipped(&self.schema()?, &other.schema()?)?;
        let zip = Zip { left: self.clone(), right: other.clone() };
        let zipped = Self::unopened(zip).with_schema(schema);
        zipped.open()?;
        Ok(zipped)
    }

    /// The first `rows` rows.
    pub fn limit(&self, rows: u64) -> Result<Self> {
        self.part(Part::Rows { start: 0, rows }, None)
    }

    /// All rows but the first `rows`.
    pub fn skip(&self, rows: u64) -> Result<Self> {
        self.part(Part::Rows { start: rows, rows: u64::MAX }, None)
    }

    /// `pieces` datasets, whose lengths differ by one row at most: the first has the first rows.
    pub fn split(&self, pieces: usize) -> Result<Vec<Self>> {
        let of = pieces as u64;
        (0..of).map(|piece| self.part(Part::Piece { piece, of }, None)).collect()
    }

    /// The same rows in blocks of `block_rows`, the last of which may have fewer. Blocks are what is
    /// read at once, shuffled and kept: some thousand rows are a good length. Reading one reads the
    /// blocks of this dataset that it has rows of; [`persist`](Self::persist) if these are much
    /// longer.
    pub fn repartition(&self, block_rows: u64) -> Result<Self> {
        if block_rows == 0 {
            return Err(Error::InvalidOption {
                option: "block_rows",
                expected: "at least 1".to_owned(),
                got: "0".to_owned(),
            });
        }
        self.part(Part::Rows { start: 0, rows: u64::MAX }, Some(block_rows))
    }

    fn part(&self, part: Part, block_rows: Option<u64>) -> Result<Self> {
        let (input, schema) = (self.clone(), self.schema()?);
        Ok(Self::unopened(Slice { input, part, block_rows }).with_schema(schema))
    }

    /// About `fraction` of the rows, each by a draw from `seed` and its position in the source.
    pub fn sample(&self, fraction: f64, seed: u64) -> Result<Self> {
        // Other draws than those of a split from the same seed.
        let [high, low] = Stream::new(seed, "sample").key().map(u64::from);
        Ok(self.split_at("fraction", fraction, high << 32 | low)?.1)
    }

    /// All rows in an order drawn from `seed`: any order is as likely as any other. Data that have no
    /// room in memory are written and read once for it. To train, [`StreamOptions::with_shuffle`](crate::StreamOptions::with_shuffle)
    /// is cheaper, and has another order in every epoch.
    pub fn random_shuffle(&self, seed: u64) -> Result<Self> {
        let (input, schema) = (self.clone(), self.schema()?);
        Ok(Self::unopened(Shuffled { input, seed }).with_schema(schema))
    }

    /// What the [`BatchFn`](crate::BatchFn) of this name makes of each group of rows whose columns
    /// `keys` are the same, in the order of the keys. A group is in memory as a whole.
    pub fn map_groups<S: Into<String>>(
        &self,
        keys: impl IntoIterator<Item = S>,
        function: impl Into<String>,
    ) -> Result<Self> {
        let keys = keys.into_iter().map(Into::into).collect();
        let groups = Groups { input: self.clone(), keys, function: function.into() };
        let schema = groups.schema()?;
        Ok(Self::unopened(groups).with_schema(schema))
    }
}

/// The keys come once, from whichever side has the row.
fn join_query(on: &[String], left: &[&String], rest: &[&String], how: JoinType) -> String {
    let of = |table: &str, column: &str| format!("{table}.{}", quoted(column));
    let key = |column: &String| match how {
        JoinType::Right => of(OTHER, column),
        JoinType::Full => {
            let (own, other) = (of(TABLE, column), of(OTHER, column));
            format!("coalesce({own}, {other}) AS {}", quoted(column))
        }
        _ => of(TABLE, column),
    };
    let columns = left.iter().map(|column| match on.contains(column) {
        true => key(column),
        false => of(TABLE, column),
    });
    let rest = rest.iter().map(|column| of(OTHER, column));
    let columns: Vec<_> = match how.has_left_columns_only() {
        true => columns.collect(),
        false => columns.chain(rest).collect(),
    };
    let equal = on.iter().map(|column| format!("{} = {}", of(TABLE, column), of(OTHER, column)));
    let equal = equal.collect::<Vec<_>>().join(" AND ");
    let condition = if on.is_empty() { String::new() } else { format!(" ON {equal}") };
    let (columns, join) = (columns.join(", "), how.sql());
    format!("SELECT {columns} FROM {TABLE} {join} JOIN {OTHER}{condition}")
}

fn names(schema: &arrow::datatypes::SchemaRef) -> Vec<&String> {
    schema.fields().iter().map(|field| field.name()).collect()
}

/// A column's name as SQL has it, whatever is in it.
pub(crate) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn list<S: AsRef<str>>(
    option: &'static str,
    expressions: impl IntoIterator<Item = S>,
) -> Result<String> {
    let all: Vec<_> = expressions.into_iter().map(|text| text.as_ref().to_owned()).collect();
    match all.is_empty() {
        false => Ok(all.join(", ")),
        true => Err(Error::InvalidOption {
            option,
            expected: "at least one".to_owned(),
            got: "none".to_owned(),
        }),
    }
}
