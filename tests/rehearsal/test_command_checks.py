"""What `moe-lpr rehearse` prints of the checks, and that a fault ends it with an error."""

from types import SimpleNamespace

import pytest

from megatron_moe_lpr.commands.rehearse import _check
from megatron_moe_lpr.errors import UserError
from tests.rehearsal.test_checks import BATCH, WORLD, recorded

CONFIG = SimpleNamespace(batch=BATCH, layout=WORLD.layout)


def test_faults_are_printed_and_end_the_command(capsys):
    ranks = [recorded(rank) for rank in range(4)]
    _check(ranks[:3], CONFIG, 4)
    assert capsys.readouterr().out.startswith("simulated: all 4 ranks agree, 3 of them rehearsed: ")
    ranks[1].files = ranks[0].files
    with pytest.raises(UserError, match=r"1 fault.* listed above"):
        _check(ranks, CONFIG, 4)
    assert capsys.readouterr().out == "save: file __0_0.distcp is written more than once: by ranks 0, 1\n"
