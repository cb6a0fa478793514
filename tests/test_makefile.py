"""A commit is checked by what CI runs."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def make(*arguments: str) -> str:
    """What make prints, which builds nothing of these targets."""
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.parametrize(
    ("version", "directory"),
    [("2.11", ".venv-te"), ("2.11.0", ".venv-te"), ("2.20", ".venv-te-2.20.2"), ("2.17.1", ".venv-te-2.17.1")],
)
def test_a_version_of_transformer_engine_has_an_environment_of_its_own(version, directory):
    commands = make("--dry-run", "test-te", f"TE_VERSION={version}")
    assert f"{ROOT}/{directory}/bin/python -m pytest" in commands


@pytest.mark.parametrize("version", ["2.1", "9.9", "2.20.9"])
def test_a_version_that_the_emulation_does_not_know_ends_before_anything_is_made(version, tmp_path):
    """2.1 is not the beginning of 2.11."""
    script = ROOT / "tests/transformer_engine/environment.sh"
    environment = os.environ | {"TE_VERSION": version}
    result = subprocess.run(["bash", script, tmp_path / "env"], env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and not (tmp_path / "env").exists()
    assert re.fullmatch(rf"error: TE_VERSION={version}: the emulation knows .* 2\.11\.0 .*2\.20\.2\n", result.stderr)


def test_a_commit_is_checked_by_make_lint_as_ci_is():
    """The hook runs the command itself, since a second list of checks could come to differ from it."""
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (hook,) = repository["hooks"]
    assert repository["repo"] == "local" and (hook["entry"], hook["language"]) == ("make lint", "system")
    # For every commit, whatever files it holds, and for all files.
    assert hook["always_run"] and not hook["pass_filenames"] and not {"args", "files", "exclude"} & hook.keys()
    assert hook["entry"] in (ROOT / ".ci/run").read_text().splitlines()
