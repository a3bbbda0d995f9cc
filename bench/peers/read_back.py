"""What we write, read back by others: `read_back.py MOBULA FOLDER`, a program and an empty folder.

A table with columns of many types is written by pyarrow, converted to each format by `mobula data convert`,
and read by pyarrow, polars and DuckDB. Each must have its columns, types and values, in the order of its
rows. Prints a line for each format and reader; an error names both, the column and the row.
"""

import decimal
import math
import random
import struct
import subprocess
import sys
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset
import pyarrow.json
import pyarrow.parquet

MOBULA, FOLDER = sys.argv[1], Path(sys.argv[2])
ROWS = 4000
# Several files, not all equally long, and several row groups in each.
CUT = ["--rows-per-file", "1500"]
GROUPS = ["--row-group-rows", "400"]
WORDS = ["", " ", "a", "Ångström", "日本語", "🦀 e\u0301", "a,b\tc", 'say "hi"', "'", "two\nlines", "\r\n", "\\n"]
WORDS += ["NULL", "0", "x" * 300]
TOWNS = ["Oslo", "Åre", "日本", "", "a/b", "k=v", "100%", "%41", "two words", " ", "..", "a:b", "*", "?", 'q"q', "\\", "+", "1", "null"]


def integers(bits, signed):
    least, most = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    return [least, most, 0, 1, most - 1], lambda pick: pick.randint(least, most)


def floats(exact):
    """Numbers that the type holds, and what is no usual one."""
    edges = [0.0, -0.0, 1.0, float("nan"), float("inf"), float("-inf"), exact(1e-3), 1e4]
    return edges, lambda pick: exact(pick.uniform(-1e4, 1e4))


def single(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def half(value):
    return struct.unpack("e", struct.pack("e", value))[0]


def instants(unit, least=-(10**9), most=4 * 10**9):
    """Seconds from least to most, in a smaller unit: before 1970 too, and not only whole ones."""
    first, last = least * unit, most * unit + unit - 1
    return [0, max(-1, least), 1, first, last], lambda pick: pick.randint(first, last)


def decimals(digits, scale):
    most = 10**digits - 1
    number = lambda value: decimal.Decimal(value).scaleb(-scale, decimal.Context(prec=50))
    edges = [number(value) for value in (0, 1, -1, most, -most)]
    return edges, lambda pick: number(pick.randint(-most, most))


def some(make, most=3):
    """Lists, empty ones too, with values that are missing."""
    return lambda pick: [None if pick.random() < 0.2 else make(pick) for _ in range(pick.randint(0, most))]


def word(pick):
    return pick.choice(WORDS)


def pair(pick):
    return {"n": pick.choice([None, pick.randint(-9, 9)]), "s": pick.choice([None, word(pick)])}


def three(pick):
    return [single(pick.random()) for _ in range(3)]


# Of each column: a type, values that must be in it, and how to make others.
COLUMNS = {
    "i8": (pa.int8(), *integers(8, True)),
    "i16": (pa.int16(), *integers(16, True)),
    "i32": (pa.int32(), *integers(32, True)),
    "i64": (pa.int64(), *integers(64, True)),
    "u8": (pa.uint8(), *integers(8, False)),
    "u16": (pa.uint16(), *integers(16, False)),
    "u32": (pa.uint32(), *integers(32, False)),
    "u64": (pa.uint64(), *integers(64, False)),
    "f16": (pa.float16(), *floats(half)),
    "f32": (pa.float32(), *floats(single)),
    "f64": (pa.float64(), *floats(float)),
    "flag": (pa.bool_(), [True, False], lambda pick: pick.random() < 0.5),
    "text": (pa.string(), WORDS, word),
    "large_text": (pa.large_string(), WORDS, word),
    "text_view": (pa.string_view(), WORDS, word),
    "bytes": (pa.binary(), [b"", b"\0", b"\xff\xfe"], lambda pick: pick.randbytes(pick.randint(0, 20))),
    "four_bytes": (pa.binary(4), [b"\0" * 4, b"\xff" * 4], lambda pick: pick.randbytes(4)),
    "day": (pa.date32(), [0, -1, -100_000, 100_000], lambda pick: pick.randint(-20_000, 40_000)),
    "at_ms": (pa.timestamp("ms"), *instants(10**3)),
    "at_us": (pa.timestamp("us"), *instants(10**6)),
    "at_ns": (pa.timestamp("ns"), *instants(10**9)),
    "at_utc": (pa.timestamp("us", "UTC"), *instants(10**6)),
    "at_oslo": (pa.timestamp("ms", "Europe/Oslo"), *instants(10**3)),
    "clock_ms": (pa.time32("ms"), *instants(10**3, 0, 86_399)),
    "clock_us": (pa.time64("us"), *instants(10**6, 0, 86_399)),
    "clock_ns": (pa.time64("ns"), *instants(10**9, 0, 86_399)),
    "price": (pa.decimal128(9, 2), *decimals(9, 2)),
    "wide": (pa.decimal128(38, 10), *decimals(38, 10)),
    "numbers": (pa.list_(pa.int64()), [[], [None], [1, 2]], some(lambda pick: pick.randint(-9, 9))),
    "words": (pa.large_list(pa.string()), [[], [""]], some(word)),
    "three": (pa.list_(pa.float32(), 3), [[0.0, -0.0, float("nan")]], three),
    "pair": (pa.struct({"n": pa.int32(), "s": pa.string()}), [{"n": None, "s": None}], pair),
    "pairs": (pa.list_(pa.struct({"n": pa.int32(), "s": pa.string()})), [[]], some(pair)),
    "map": (pa.map_(pa.string(), pa.int64()), [[], [("a", None)]], lambda pick: [(word(pick), 1)]),
    "category": (pa.dictionary(pa.int32(), pa.string()), WORDS[:6], lambda pick: pick.choice(WORDS[:6])),
    "town": (pa.string(), TOWNS, lambda pick: pick.choice(TOWNS)),
    "tiny": (pa.int8(), [-1, 0, 7], lambda pick: pick.choice([-1, 0, 7])),
    "missing": (pa.float64(), [None], lambda pick: None),
}


def table():
    pick = random.Random(7)
    columns = {"id": pa.array(range(ROWS), pa.int64())}
    for name, (kind, edges, make) in COLUMNS.items():
        values = [*edges, None] * 2
        while len(values) < ROWS:
            values.append(None if pick.random() < 0.15 else make(pick))
        pick.shuffle(values)
        columns[name] = pa.array(values, kind)
    return pa.table(columns)


def convert(source, folder, *options):
    command = [MOBULA, "data", "convert", str(source), str(folder), *options, *CUT]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"`{' '.join(command)}` failed:\n{done.stderr}")


def plain(kind):
    """What a type says of its values: how they lie in memory is each library's own business."""
    types = pa.types
    if types.is_dictionary(kind):
        return plain(kind.value_type)
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_large_binary(kind) or types.is_binary_view(kind) or types.is_fixed_size_binary(kind):
        return pa.binary()
    if types.is_map(kind):
        return pa.list_(pa.struct({"key": plain(kind.key_type), "value": plain(kind.item_type)}))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return pa.list_(plain(kind.value_type))
    if types.is_struct(kind):
        return pa.struct({field.name: plain(field.type) for field in kind})
    return kind


def read_as(form, reader, kind):
    """The type that a reader has for the values of another; None if it cannot read them."""
    types = pa.types
    is_half = kind == pa.float16()
    if reader == "duckdb":
        if is_half:
            # Its scan of Arrow's tables knows no such type.
            return None if form == "arrow" else pa.float32()
        if types.is_timestamp(kind) and kind.tz:
            return pa.timestamp("us", "UTC")
        if kind == pa.timestamp("ms") and form != "arrow":
            return pa.timestamp("us")
        if types.is_time32(kind):
            return pa.time64("us")
    if reader == "polars":
        if form == "jsonl" and types.is_time(kind):
            return pa.string()
        if types.is_time(kind):
            return pa.time64("ns")
        if form == "jsonl" and types.is_integer(kind) and kind.bit_width < 32:
            return pa.int64()
        if form == "jsonl" and (types.is_decimal(kind) or types.is_map(kind)):
            return None  # It makes floats of the former first.
    if reader == "pyarrow":
        if form in ("csv", "jsonl") and is_half:
            return pa.float32()
        if form == "jsonl" and (types.is_date(kind) or types.is_time(kind)):
            return pa.string()
        if form == "jsonl" and types.is_map(kind):
            return None
    return plain(kind)


def in_text(value, form):
    """What is left of a value in CSV or JSON."""
    if isinstance(value, bytes):
        value = value.hex()
    if form == "csv":
        return None if value == "" else value  # No difference is made.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [in_text(item, form) for item in value] if isinstance(value, list) else value


def as_held(table, form):
    """The columns and values that a format can hold."""
    if form not in ("csv", "jsonl"):
        return table
    columns = {}
    for name in table.column_names:
        column = table[name]
        kind = pa.string() if plain(column.type) == pa.binary() else column.type
        if form == "csv" and pa.types.is_nested(kind):
            continue
        is_number_list = pa.types.is_fixed_size_list(kind)
        if plain(kind) == pa.string() or pa.types.is_floating(kind) or is_number_list:
            column = pa.array([in_text(value, form) for value in column.to_pylist()], kind)
        columns[name] = column
    return pa.table(columns)


def by_pyarrow(form, folder, kinds):
    files = sorted(folder.glob(f"*.{form}"))
    if form == "folders":
        names = pa.schema({"town": pa.string(), "tiny": pa.int8()})
        names = pyarrow.dataset.HivePartitioning(names, segment_encoding="uri")
        return pyarrow.dataset.dataset(folder, format="parquet", partitioning=names).to_table()
    if form == "parquet":
        return pa.concat_tables(pa.parquet.read_table(file) for file in files)
    if form == "arrow":
        return pa.concat_tables(pa.ipc.open_file(file).read_all() for file in files)
    if form == "csv":
        cells = pa.csv.ConvertOptions(column_types=kinds, null_values=[""], strings_can_be_null=True)
        lines = pa.csv.ParseOptions(newlines_in_values=True)
        return pa.concat_tables(pa.csv.read_csv(file, parse_options=lines, convert_options=cells) for file in files)
    told = pa.json.ParseOptions(explicit_schema=pa.schema(kinds), unexpected_field_behavior="ignore")
    return pa.concat_tables(pa.json.read_json(file, parse_options=told) for file in files)


def by_polars(form, folder, kinds):
    files = sorted(folder.glob(f"*.{form}"))
    kinds = dict(pl.from_arrow(pa.schema(kinds).empty_table()).schema)
    if form == "folders":
        names = {"town": pl.String, "tiny": pl.Int8}
        rows = pl.scan_parquet(folder, hidden_file_prefix="_", hive_partitioning=True, hive_schema=names)
        return rows.collect().to_arrow()
    if form == "parquet":
        return pl.read_parquet(files).to_arrow()
    if form == "arrow":
        return pl.read_ipc(files).to_arrow()
    if form == "csv":
        return pl.concat(pl.read_csv(file, schema=kinds) for file in files).to_arrow()
    return pl.concat(pl.read_ndjson(file, schema=kinds) for file in files).to_arrow()


def sql(kind):
    """DuckDB's name of a type."""
    types = pa.types
    if types.is_timestamp(kind):
        return "TIMESTAMPTZ" if kind.tz else {"us": "TIMESTAMP", "ns": "TIMESTAMP_NS"}[kind.unit]
    if types.is_decimal(kind):
        return f"DECIMAL({kind.precision}, {kind.scale})"
    if types.is_struct(kind):
        return "STRUCT(" + ", ".join(f"{field.name} {sql(field.type)}" for field in kind) + ")"
    if types.is_list(kind):
        if kind == plain(COLUMNS["map"][0]):
            return "MAP(VARCHAR, BIGINT)"
        return sql(kind.value_type) + "[]"
    if types.is_unsigned_integer(kind):
        return f"UINT{kind.bit_width}"
    if types.is_integer(kind):
        return f"INT{kind.bit_width // 8}"
    usual = {pa.float32(): "FLOAT", pa.float64(): "DOUBLE", pa.bool_(): "BOOLEAN", pa.string(): "VARCHAR"}
    return (usual | {pa.date32(): "DATE", pa.time64("us"): "TIME", pa.time64("ns"): "TIME_NS"})[kind]


def by_duckdb(form, folder, kinds):
    database = duckdb.connect(config={"autoinstall_known_extensions": False})
    if form == "arrow":
        # Arrow's files it reads by way of pyarrow.
        rows = pyarrow.dataset.dataset(sorted(folder.glob("*.arrow")), format="ipc")
        rows = rows.scanner(columns=list(kinds))
    elif form == "folders":
        rows = f"read_parquet('{folder}/**/*.parquet', hive_types = {{'tiny': TINYINT}})"
    elif form == "parquet":
        rows = f"read_parquet('{folder}/*.parquet')"
    else:
        names = ", ".join(f"'{name}': '{sql(kind)}'" for name, kind in kinds.items())
        how = "header = true" if form == "csv" else "format = 'newline_delimited'"
        rows = f"read_{form.removesuffix('l')}('{folder}/*.{form}', columns = {{{names}}}, {how})"
    found = database.from_arrow(rows) if form == "arrow" else database.sql(f"SELECT * FROM {rows}")
    found = found.to_arrow_table()
    # An instant has no zone here, and is shown in that of the machine.
    zoned = lambda kind: pa.types.is_timestamp(kind) and kind.tz
    kinds = [field.with_type(pa.timestamp("us", "UTC") if zoned(field.type) else field.type) for field in found.schema]
    return found.cast(pa.schema(kinds))


READERS = {"pyarrow": by_pyarrow, "polars": by_polars, "duckdb": by_duckdb}


class Different(Exception):
    pass


def listed(column):
    """Values as Python has them, times as whole numbers of their unit."""
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_time(kind) or pa.types.is_date(kind):
        column = column.cast(pa.int32() if kind.bit_width == 32 else pa.int64())
    values = column.to_pylist()
    if pa.types.is_map(kind):
        return [value and [{"key": key, "value": item} for key, item in value] for value in values]
    return values


def without_zeros(text):
    """10:30:00 of 10:30:00.000."""
    return text.rstrip("0").rstrip(".") if text and "." in text else text


def same(a, b):
    if isinstance(a, float) and isinstance(b, float):
        return (a != a and b != b) or struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def compare(what, want, got, kinds, order):
    """Raises what is different first. `kinds` has the type of each column that the reader can read."""
    if sorted(got.column_names) != sorted(kinds):
        raise Different(f"{what}: columns {got.column_names}, expected {list(kinds)}")
    if got.num_rows != want.num_rows:
        raise Different(f"{what}: {got.num_rows} rows, expected {want.num_rows}")
    for name, kind in kinds.items():
        expected, column = want[name], got[name]
        if plain(column.type) != kind:
            raise Different(f"{what}: column {name} is {column.type}, expected {kind}")
        if pa.types.is_dictionary(expected.type):
            expected = expected.cast(plain(expected.type))
        if not pa.types.is_nested(kind) and plain(expected.type) != kind:
            expected = expected.cast(kind)  # To the wider type, or a date's text: nothing is rounded.
        values, right = listed(column), listed(expected)
        if pa.types.is_time(want[name].type) and pa.types.is_string(kind):
            values, right = (list(map(without_zeros, texts)) for texts in (values, right))
        for row, value in enumerate(right):
            if not same(value, values[order[row]]):
                raise Different(f"{what}: column {name}, row {row}: {values[order[row]]!r}, expected {value!r}")


def must_be_noticed(what, want, got, kinds, order):
    """A comparison that finds nothing wrong must find a value that is."""
    at = want.column_names.index("i32")
    numbers = want["i32"].to_pylist()
    for row, wrong in [(17, 5), (ROWS - 1, None if numbers[-1] is not None else 0)]:
        changed = pa.array([*numbers[:row], wrong, *numbers[row + 1 :]], pa.int32())
        try:
            compare(what, want.set_column(at, "i32", changed), got, kinds, order)
        except Different as error:
            if f"{what}: column i32, row {row}:" in str(error):
                continue
        sys.exit(f"{what}: a wrong value in column i32, row {row} was not noticed")


def check(form, reader, folder, want):
    """The number of values that are the same."""
    kinds = {name: read_as(form, reader, want.schema.field(name).type) for name in want.column_names}
    kinds = {name: kind for name, kind in kinds.items() if kind is not None}
    got = READERS[reader](form, folder, kinds)
    got = got.select([name for name in got.column_names if name in kinds or name not in want.column_names])
    order = range(got.num_rows)
    if form == "folders":
        # They come folder by folder.
        order = sorted(order, key=got["id"].to_pylist().__getitem__)
    what = f"{folder.name}, {reader}"
    compare(what, want, got, kinds, order)
    must_be_noticed(what, want, got, kinds, order)
    return len(kinds) * got.num_rows


# The name of a folder, the format, and what `convert` is told.
CONVERSIONS = [
    *((f"parquet-{name}", "parquet", [*GROUPS, "--compression", name]) for name in ("none", "snappy", "lz4", "zstd")),
    ("parquet-folders", "folders", ["--partition-by", "town,tiny"]),
    ("csv", "csv", ["--format", "csv"]),
    ("jsonl", "jsonl", ["--format", "jsonl"]),
    ("arrow", "arrow", ["--format", "arrow"]),
]


def main():
    rows, failed = table(), 0
    for name, form, options in CONVERSIONS:
        source = FOLDER / f"{name}.parquet"
        want = as_held(rows, form)
        pa.parquet.write_table(rows.select(want.column_names), source, row_group_size=1000)
        convert(source, FOLDER / name, *options)
        for reader in READERS:
            try:
                values = check(form, reader, FOLDER / name, want)
                print(f"{name:<16} {reader:<8} {want.num_rows} rows, {values} values")
            except (Exception, pl.exceptions.PanicException) as error:
                failed += 1
                kind = "" if isinstance(error, Different) else f"{name}, {reader}: {type(error).__name__}: "
                print(f"error: {kind}{error}", file=sys.stderr)
    if failed:
        sys.exit(f"{failed} of {len(CONVERSIONS) * len(READERS)} differ")


if __name__ == "__main__":
    main()
