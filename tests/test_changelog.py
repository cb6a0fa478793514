"""CHANGELOG.md keeps its form and knows the current version and checkpoint format."""

import re
from pathlib import Path

from megatron_moe_lpr import __version__
from megatron_moe_lpr.checkpoint.format.card import FORMAT_VERSION

PAGE = (Path(__file__).parents[1] / "CHANGELOG.md").read_text(encoding="utf-8")
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_form():
    first, *released = re.findall(r"^## (.*)", PAGE, re.MULTILINE)
    assert first == "[Unreleased]"
    dates = [re.fullmatch(r"\[\d+\.\d+\.\d+\] - (\d{4}-\d\d-\d\d)", heading).group(1) for heading in released]
    assert dates == sorted(dates, reverse=True)
    assert set(re.findall(r"^### (.*)", PAGE, re.MULTILINE)) <= KINDS


def test_the_current_version_has_its_part():
    assert f"\n## [{__version__}] - " in PAGE


def test_the_format_of_cards_is_told():
    assert max(map(int, re.findall(r"[Ff]ormat (\d+)", PAGE))) == FORMAT_VERSION
