"""`make help` lists every target, and a commit is checked by what CI runs."""

import re
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def make(*arguments: str) -> str:
    """What make prints, which builds nothing of these targets."""
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout


def targets() -> set[str]:
    """Those that are no files, as make itself has understood all Makefiles."""
    database = make("--print-data-base", "--no-builtin-rules", "--dry-run", "help")
    return set(re.search(r"^\.PHONY: (.*)", database, re.MULTILINE).group(1).split())


def test_help_has_one_line_for_each_target():
    lines = make("help").splitlines()
    described = [line.split()[1] for line in lines if re.fullmatch(r"make \S+ +[A-Z].*[.?]", line)]
    assert len(described) == len(lines) and sorted(described) == sorted(targets())
    assert {"install", "test", "lint", "help", "demo"} <= targets() and max(map(len, lines)) <= 120


def test_make_alone_installs():
    assert ".DEFAULT_GOAL := install" in make("--print-data-base", "--no-builtin-rules", "--dry-run", "help")


def test_a_commit_is_checked_by_make_lint_as_ci_is():
    """The command itself: another list of checks, or other versions of them, could differ from it one day."""
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (hook,) = repository["hooks"]
    assert repository["repo"] == "local" and (hook["entry"], hook["language"]) == ("make lint", "system")
    # For every commit, whatever files it holds, and for all files.
    assert hook["always_run"] and not hook["pass_filenames"] and not {"args", "files", "exclude"} & hook.keys()
    assert hook["entry"] in (ROOT / ".ci/run").read_text().splitlines()
