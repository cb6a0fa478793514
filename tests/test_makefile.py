"""A commit is checked by what CI runs."""

from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_a_commit_is_checked_by_make_lint_as_ci_is():
    """The hook runs the command itself, since a second list of checks could come to differ from it."""
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (hook,) = repository["hooks"]
    assert repository["repo"] == "local" and (hook["entry"], hook["language"]) == ("make lint", "system")
    # For every commit, whatever files it holds, and for all files.
    assert hook["always_run"] and not hook["pass_filenames"] and not {"args", "files", "exclude"} & hook.keys()
    assert hook["entry"] in (ROOT / ".ci/run").read_text().splitlines()
