"""`--moe-layer-freq` against Python's evaluation of the text, which is how Megatron reads it (`moe_freq_type`)."""

import pytest

from megatron_moe_lpr.conversion.layer_frequency import layers_with_experts
from megatron_moe_lpr.errors import UserError


@pytest.mark.parametrize("text", ["[0]+[1]*3", "([0]*1+[1]*3)", "[1,1,0,0]", "2*[0, 1]", "([1]*2 + [0])*1+[1]"])
def test_patterns(text):
    assert layers_with_experts(text, 4) == [bool(flag) for flag in eval(text)]


@pytest.mark.parametrize(
    ("interval", "expected"), [("1", [True] * 4), ("2", [True, False] * 2), ("4", [True] + [False] * 3)]
)
def test_intervals(interval, expected):
    assert layers_with_experts(interval, 4) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0", "between 1 and the number of layers, 4"),
        ("5", "between 1 and the number of layers, 4"),
        ("[1]*5", "names 5 layers, and the model has 4"),
        ("[0]*4", "must hold a 1"),
        ("[2]*4", "must hold a 1"),
        ("[1]*1000000000000", "neither a number nor a pattern"),
        ("[1]*[1]", "neither a number nor a pattern"),
        ("[1]+1", "neither a number nor a pattern"),
        ("__import__('os')", "neither a number nor a pattern"),
        ("[True]*4", "neither a number nor a pattern"),
        ("[1", "neither a number nor a pattern"),
    ],
)
def test_what_is_neither(text, words):
    with pytest.raises(UserError, match=words) as error:
        layers_with_experts(text, 4)
    assert "--moe-layer-freq" in str(error.value)
