"""What a run of lm_eval may replace."""

import json
from pathlib import Path

import pytest

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.evaluation.lm_eval.harness import run_harness

SETTINGS = {"tasks": "arc"}
COMMAND = ["true"]


def test_an_earlier_run_of_another_kind_is_replaced_and_a_killed_one_too(tmp_path: Path) -> None:
    output = tmp_path / "base" / "arc"
    run_harness(COMMAND, SETTINGS, output)
    (output / "results_1.json").write_text("{}")
    run_harness(COMMAND, SETTINGS, output)
    assert (output / "results_1.json").exists()
    run_harness(COMMAND, {"tasks": "mmlu"}, output)
    assert not (output / "results_1.json").exists()
    assert json.loads((output / "settings.json").read_text()) == {"tasks": "mmlu"}
    (output / "settings.json").unlink()
    (output / "results_2.json").write_text("{}")
    run_harness(COMMAND, SETTINGS, output)
    assert not (output / "results_2.json").exists()


@pytest.mark.parametrize("kind", ["file", "link", "content"])
def test_nothing_else_is(kind: str, tmp_path: Path) -> None:
    output = tmp_path / "arc"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("text")
    if kind == "file":
        output.write_text("text")
    elif kind == "link":
        output.symlink_to("mine")
    else:
        (tmp_path / "mine").rename(output)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"arc: (is not a directory|holds something else)"):
        run_harness(COMMAND, SETTINGS, output)
    assert sorted(tmp_path.rglob("*")) == before
