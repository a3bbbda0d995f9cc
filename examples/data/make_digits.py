"""Writes digits-0.parquet ... digits-3.parquet: the 1,797 8x8 digits that scikit-learn ships.

Needs: pip install scikit-learn==1.9.1 pyarrow==26.0.1
Run:   python make_digits.py        (same bytes every time with these versions)
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_digits

FILES = 4
ROW_GROUP_ROWS = 120

digits = load_digits()
pixels = pa.array(digits.data.astype("uint8").ravel())  # 0..16
table = pa.table(
    {
        "image": pa.FixedSizeListArray.from_arrays(pixels, 64),
        "label": pa.array(digits.target.astype("uint8")),
    },
    # No nulls anywhere: say so, and readers need no validity bitmaps.
    schema=pa.schema(
        [
            pa.field("image", pa.list_(pa.field("item", pa.uint8(), nullable=False), 64), nullable=False),
            pa.field("label", pa.uint8(), nullable=False),
        ]
    ),
)

here = Path(__file__).parent
rows = -(-len(table) // FILES)
for i in range(FILES):
    part = table.slice(i * rows, rows)
    pq.write_table(
        part,
        here / f"digits-{i}.parquet",
        row_group_size=ROW_GROUP_ROWS,
        compression="zstd",
    )
    print(f"digits-{i}.parquet: {len(part)} rows")
