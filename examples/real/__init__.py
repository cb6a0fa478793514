"""A real language model extended to three languages. `make real` runs it; docs/real-model.md describes it.

It shares the demo's modules, which are scripts and import each other by their bare names.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "demo"))
