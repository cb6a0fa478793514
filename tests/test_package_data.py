"""An installed package has all files that the code reads: templates, style sheet, tables."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "megatron_moe_lpr"


def test_every_file_of_the_package_is_installed(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    built, source = (
        {
            str(path.relative_to(root))
            for path in (root / PACKAGE).rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        }
        for root in (tmp_path, ROOT)
    )
    assert built == source and f"{PACKAGE}/evaluation/report/page.html" in built
