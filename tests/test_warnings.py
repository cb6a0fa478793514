"""A warning attributed to a module of this repository is an error, in tests and on ranks."""

import warnings

import pytest

from tests.distributed import RankFailure, rank_pool


def warn(kind: type[Warning]) -> None:
    warnings.warn("ours", kind)


@pytest.mark.parametrize("kind", [UserWarning, DeprecationWarning, FutureWarning])
def test_warnings_are_errors(kind):
    with pytest.raises(kind, match="ours"):
        warn(kind)


def test_on_ranks_too():
    with pytest.raises(RankFailure, match="DeprecationWarning: ours"):
        rank_pool(1).run(warn, DeprecationWarning)
