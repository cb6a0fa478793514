"""shellcheck accepts every shell script."""

import shutil
import subprocess

import pytest

from tests.launching.builders import ROOT


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    scripts = [*ROOT.glob("examples/*.sh"), *ROOT.glob("examples/*/*.sh"), *ROOT.glob("examples/slurm/*.sbatch")]
    scripts += [*ROOT.glob("tests/docker/*.sh"), ROOT / ".ci/run"]
    result = subprocess.run(["shellcheck", "-x", *map(str, scripts)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
