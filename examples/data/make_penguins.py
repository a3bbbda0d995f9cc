"""Copies penguins.csv, byte for byte, out of the palmerpenguins package.

Needs: pip install --no-deps palmerpenguins==0.1.6      (the package is found, not imported)
Run:   python make_penguins.py
"""

from importlib.util import find_spec
from pathlib import Path
from shutil import copyfile

package = find_spec("palmerpenguins")
if package is None:
    raise SystemExit("palmerpenguins is not installed: pip install --no-deps palmerpenguins==0.1.6")
source = Path(package.submodule_search_locations[0]) / "data" / "penguins.csv"
copyfile(source, Path(__file__).parent / "penguins.csv")
print(f"penguins.csv: {len(source.read_text().splitlines()) - 1} rows")
