"""The name of a command in messages, in the form in which the user started this process."""

import sys
from pathlib import Path

NAME = "moe-lpr"
"""The installed command."""
SCRIPTS = {
    "import": "convert_hf.py import",
    "verify": "convert_hf.py verify",
    "inspect": "convert_hf.py inspect",
    "export": "convert_hf.py export",
    "expand": "convert_hf.py expand",
    "graft": "convert_hf.py graft",
    "preprocess": "preprocess_data.py",
    "merge-datasets": "merge_datasets.py",
    "inspect-data": "inspect_data.py",
    "build-index": "build_index.py",
    "evaluate": "evaluate.py",
    "generate": "generate.py",
    "benchmarks": "benchmarks.py",
    "report": "report.py",
    "plan": "plan.py",
    "rehearse": "rehearse.py",
    "allocate": "allocate_experts.py",
    "download": "download_data.py",
    "extend-tokenizer": "extend_tokenizer.py",
}
"""Subcommand of `moe-lpr` to the script in tools/ that does the same in a clone."""


def command(name: str) -> str:
    """Return what to type to run a command, in the form in which this process was started.

    `tools/convert_hf.py import` where a script of tools/ runs, otherwise `moe-lpr import`, which is always installed.

    Args:
        name: a key of SCRIPTS, or `train` or `launch`.
    """
    script = Path(sys.argv[0])
    if name in SCRIPTS and script.suffix == ".py" and script.absolute().parent.name == "tools":
        return f"{script.parent / SCRIPTS[name]}"
    return f"{NAME} {name}"
