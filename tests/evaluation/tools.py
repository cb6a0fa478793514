"""Modules of command lines, to be called in the test's process."""

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
"""Modules with another name than the script."""


def load_tool(name: str) -> ModuleType:
    """Return the module of tools/NAME.py, or of a subcommand of `moe-lpr`."""
    return importlib.import_module(f"megatron_moe_lpr.commands.{MODULES.get(name, name)}")
