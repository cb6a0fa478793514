"""Work on every rank: own results, one error for all, and messages that do not grow with the world."""

import ast
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import megatron_moe_lpr
from megatron_moe_lpr.errors import DamagedFile, UserError
from megatron_moe_lpr.parallel import every_rank
from megatron_moe_lpr.parallel.every_rank import (
    decide_on_rank_0,
    first_on_any_rank,
    gather_on_rank_0,
    on_every_rank,
    on_rank_0,
    union_of_ranks,
)
from tests.distributed import rank_pool


def attempt(errors: dict, function=on_every_rank) -> object:
    """Let some ranks raise; return this rank's result, or its error as text."""
    rank = dist.get_rank()

    def action() -> int:
        if rank in errors:
            raise errors[rank]
        return 10 + rank

    try:
        return function(action)
    except Exception as error:
        host = r"rank (\d) on [^:]+: "
        return type(error).__name__, re.sub(host, r"rank \1: ", str(error))


def exchange() -> list:
    rank = dist.get_rank()
    return [
        gather_on_rank_0(rank * 2),
        decide_on_rank_0(rank, sum),
        first_on_any_rank(f"value {rank}" if rank else None),
        first_on_any_rank(None),
        on_rank_0(lambda: f"from {rank}"),
        union_of_ranks(["0", "1", "5"], {str(rank), "7"}),
    ]


USER, DAMAGED, DEFECT = UserError("no room"), DamagedFile("cut", Path("f")), ZeroDivisionError("ours")
CASES = [
    ({}, [10, 11, 12]),
    ({1: USER}, [("UserError", "rank 1: no room")] * 3),
    ({0: USER, 1: USER, 2: USER}, [("UserError", "no room")] * 3),
    ({1: USER, 2: DAMAGED, 0: DAMAGED}, [("UserError", "rank 1: no room")] * 3),
    ({2: DAMAGED}, [("DamagedFile", "cut")] * 3),
    ({1: DEFECT}, [*[("UserError", "rank 1: ZeroDivisionError: ours")] * 2]),
    ({2: OSError(5, "I/O error", "/x")}, [("UserError", "rank 2: /x: I/O error")] * 3),
]


def test_each_rank_has_its_own_result_and_all_have_one_error():
    pool = rank_pool(3)
    for errors, expected in CASES:
        found = pool.run(attempt, errors)
        if DEFECT in errors.values():
            assert found.pop(1) == ("ZeroDivisionError", "ours")
        assert found == expected
    assert pool.run(attempt, {1: USER}, on_rank_0) == [10] * 3
    assert pool.run(attempt, {0: USER}, on_rank_0) == [("UserError", "rank 0: no room")] * 3
    assert pool.run(attempt, {0: DAMAGED}, on_rank_0) == [("DamagedFile", "cut")] * 3
    first, second, third = pool.run(exchange)
    assert first == [[0, 2, 4], 3, (1, "value 1"), None, "from 0", {"0", "1"}]
    assert second == third == [None, *first[1:]]


def test_a_process_without_process_groups_is_a_world_of_one():
    assert on_every_rank(lambda: 3) == on_rank_0(lambda: 3) == decide_on_rank_0(3, sum) == 3
    assert union_of_ranks(["a", "b"], {"b", "c"}) == {"b"}
    assert gather_on_rank_0(3) == [3] and first_on_any_rank(3) == (0, 3) and first_on_any_rank(None) is None
    with pytest.raises(UserError, match=r"^no room$"):
        on_every_rank(lambda: attempt_alone(USER))


def attempt_alone(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("size", [8, 512])
def test_what_a_rank_receives_does_not_grow_with_the_world(size, monkeypatch):
    """One number where nothing fails; only rank 0 has a list of all ranks."""
    received = []
    monkeypatch.setattr(every_rank.dist, "all_reduce", lambda tensor, **options: received.append(tensor.nbytes))
    monkeypatch.setattr(
        every_rank.dist, "broadcast_object_list", lambda values, src: received.append(len(pickle.dumps(values)))
    )
    lists = []
    monkeypatch.setattr(every_rank.dist, "gather_object", lambda value, values: lists.append(values))
    # No group is made: the process may have one of its own already.
    monkeypatch.setattr(every_rank, "collective_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(every_rank.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(every_rank.dist, "get_world_size", lambda: size)
    monkeypatch.setattr(every_rank.dist, "get_rank", lambda: 3)
    assert on_every_rank(lambda: "own") == "own"
    gather_on_rank_0("own")
    assert received == [8] and lists == [None]


def test_nothing_is_gathered_on_all_ranks():
    """The one exchange of Python objects is above: torch's all-to-all of them appears nowhere in the package."""
    for path in Path(megatron_moe_lpr.__file__).parent.rglob("*.py"):
        # Called or imported: a rehearsal has a stand-in of that name, which sends nothing.
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (getattr(node, "attr", ""), node.name if isinstance(node, ast.alias) else "")
            assert "all_gather_object" not in names, path
