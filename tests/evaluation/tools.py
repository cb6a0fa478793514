"""Command lines as modules, to call them in this process."""

import importlib
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).parents[2] / "tools"


def load_tool(name: str) -> ModuleType:
    """The module of a subcommand of `moe-lpr`."""
    return importlib.import_module(f"megatron_moe_lpr.commands.{name}")
