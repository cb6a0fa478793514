"""A converted checkpoint: its manifest, and a tokenizer that is not the card's."""

from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_moe_lpr.checkpoint.loading.verification import check_same_on_all_ranks, open_checkpoint
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.checksums import MANIFEST, checksum_of_file, read_manifest, write_manifest
from tests.conversion.helpers import run
from tests.conversion.tiny_models import save_model
from tests.distributed import rank_pool


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    save_model("qwen2-tied", tmp_path / "hf")
    run("import", "--hf", tmp_path / "hf", "--save", tmp_path / "checkpoint", "--num-experts", 3)
    return tmp_path / "checkpoint" / "release"


def test_conversion_writes_checksums_of_what_is_there(converted: Path) -> None:
    entries = read_manifest(converted)
    files = {path.relative_to(converted).as_posix() for path in converted.rglob("*") if path.is_file()}
    assert entries.keys() == files - {MANIFEST.as_posix()}
    assert all(checksum_of_file(converted / name) == entry for name, entry in entries.items())
    assert "moe_lpr/tokenizer.json" in entries and "common.pt" in entries


def test_cut_tokenizer_is_not_exported(converted: Path, capsys: pytest.CaptureFixture) -> None:
    tokenizer = converted / "moe_lpr" / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes()[:-5])
    for _ in ("with its manifest", "without"):
        with pytest.raises(SystemExit):
            run("export", "--load", converted, "--hf", converted.parent / "out")
        assert "tokenizer.json: " in capsys.readouterr().err and not (converted.parent / "out").exists()
        (converted / MANIFEST).unlink(missing_ok=True)
    # Also where somebody summed the cut one.
    write_manifest(converted, {})
    with pytest.raises(UserError, match=r"tokenizer\.json: not the file that the card was written with"):
        open_checkpoint(converted)
    tokenizer.unlink()
    write_manifest(converted, {})
    with pytest.raises(UserError, match=r"tokenizer\.json: missing"):
        open_checkpoint(converted)


def sameness(paths: list[Path]) -> str | None:
    """On every rank of a pool: the error where rank N reads `paths[N]`."""
    try:
        check_same_on_all_ranks(paths[dist.get_rank()])
    except UserError as error:
        return str(error)
    return None


def test_ranks_that_read_different_checkpoints_are_named(tmp_path: Path) -> None:
    """The latest of a run that goes on, looked up twice; a copy that one node has; a node without the manifest."""
    iterations = [
        tmp_path / name for name in ("iter_0000001", "iter_0000002", "node/iter_0000001", "bare/iter_0000001")
    ]
    for path in iterations:
        path.mkdir(parents=True)
        (path / "a").write_text("another" if path.name == "iter_0000002" else "same")
        write_manifest(path, {})
    (iterations[3] / MANIFEST).unlink()
    first, later, copy, bare = iterations
    assert rank_pool(2).run(sameness, [first, copy]) == [None, None]
    for other, words in ((later, "name one iteration directory"), (bare, "has no checksums.json")):
        errors = rank_pool(2).run(sameness, [first, other])
        assert errors[0] == errors[1] and "rank 1 on" in errors[0] and words in errors[0]
