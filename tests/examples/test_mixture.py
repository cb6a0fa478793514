"""The demo's mixture base: all its models can be exported, and its report has every stage of every variant."""

import itertools
import sys
from pathlib import Path

import pytest

from megatron_moe_lpr.conversion.added_experts import added_counts

sys.path.append(str(Path(__file__).parents[2] / "examples" / "demo"))
import mixture
from settings import Settings
from workflow import Workflow

LAYERS = 4


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(Workflow, "run", lambda flow, *words, **_: commands.append(list(map(str, words))))
    monkeypatch.setattr(mixture, "read_settings", lambda **fields: Settings(**fields | {"runs": tmp_path}))
    mixture.mixture()
    flags = [dict(itertools.pairwise(command)) for command in commands]
    added = [found["--add-experts"] for found in flags if "--add-experts" in found]
    base = [mixture.BASE_EXPERTS] * LAYERS
    # A stock mixture has one number of experts, so every layer gets as many.
    totals = [{old + new for old, new in zip(base, added_counts(text, base), strict=True)} for text in added]
    assert len(totals) == 2 and all(len(one) == 1 and min(one) > mixture.BASE_EXPERTS for one in totals)
    trained = [Path(found["--save"]).name for found in flags if "--train-iters" in found]
    stages = [f"stage{stage}{name}" for name in ("", "-random", "-rows") for stage in (1, 2)]
    assert trained == ["base", *stages]
    exported = [
        (Path(found["--load"]).name, Path(found["--hf"]).name)
        for found in flags
        if "--load" in found and "--hf" in found
    ]
    assert exported == [("base", "base_hf"), ("stage2", "hf"), ("stage2", "hf")]
    report = commands[-1]
    assert [Path(word.split("=")[1]).stem for word in report if word.endswith(".json")] == ["start", *stages]
