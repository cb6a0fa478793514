"""Command lines as modules, to call them in this process."""

import importlib
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).parents[2] / "tools"
MODULES = {
    "convert_hf": "convert",
    "preprocess_data": "preprocess",
    "allocate_experts": "allocate",
    "download_data": "download",
}
"""Scripts whose module has another name."""


def load_tool(name: str) -> ModuleType:
    """The module behind tools/NAME.py, or of a subcommand of `moe-lpr`."""
    return importlib.import_module(f"megatron_moe_lpr.commands.{MODULES.get(name, name)}")
