"""Pickles planted in a checkpoint: they run in no command, and what reads the file ends in an error line."""

import functools
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_moe_lpr.checkpoint.format.reader import read_index
from megatron_moe_lpr.files.checksum_file import write_checksums
from tests.conversion.helpers import run
from tests.distributed import rank_pool
from tests.fuzzing.opcodes import name, text
from tests.training.outcomes import evaluation_outcome, train_outcome
from tests.training.runs import make_checkpoint, make_data


class Payload:
    """Unpickled without restriction it makes a directory."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def plant_in_index(iteration: Path, mark: Path) -> None:
    index = read_index(iteration / ".metadata")
    index.planner_data = Payload(mark)
    (iteration / ".metadata").write_bytes(pickle.dumps(index))


def plant_in_common(iteration: Path, mark: Path) -> None:
    content = torch.load(iteration / "common.pt", weights_only=True)
    torch.save(content | {"more": Payload(mark)}, iteration / "common.pt")


def plant_in_object(iteration: Path, mark: Path) -> None:
    index = read_index(iteration / ".metadata")
    objects = {key for key, entry in index.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)}
    stream = io.BytesIO()
    torch.save(Payload(mark), stream)
    (iteration / "planted.distcp").write_bytes(stream.getvalue())
    for place, info in index.storage_data.items():
        if place.fqn in objects:
            info.relative_path, info.offset, info.length = "planted.distcp", 0, len(stream.getvalue())
    (iteration / ".metadata").write_bytes(pickle.dumps(index))


PLACES = {".metadata": plant_in_index, "common.pt": plant_in_common, "object": plant_in_object}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    root = tmp_path_factory.mktemp("untrusted")
    load, data = make_checkpoint(root), make_data(root)
    run("export", "--load", load, "--hf", root / "exported")
    changes = {"train_iters": 2, "save_interval": 2}
    assert rank_pool(2).run(functools.partial(train_outcome, load, root / "run", data, **changes)) == [None, None]
    return root, load, data, changes


@pytest.mark.parametrize("place", PLACES)
def test_a_planted_pickle_does_not_run(place, setting, tmp_path, capsys):
    root, load, data, changes = setting
    planted, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(root / "run", planted)
    iteration = planted / "iter_0000002"
    PLACES[place](iteration, mark)
    write_checksums(iteration, {})  # whoever plants can sum
    expected = f"{os.mkdir.__module__}.mkdir"
    commands = {
        "load": functools.partial(train_outcome, planted, tmp_path / "new", data),
        "resume": functools.partial(train_outcome, load, planted, data, **changes),
        "evaluate": functools.partial(evaluation_outcome, iteration, data),
    }
    for command, function in commands.items():
        for outcome in rank_pool(2).run(function):
            assert outcome and expected in outcome and "\n" not in outcome, (command, outcome)
    for command in ("export", "verify", "inspect"):
        _converter(command, iteration, root / "exported", tmp_path)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    # inspect reads neither, export of a Megatron checkpoint the index only.
    assert len(errors) == (2 if place == ".metadata" else 1) and all(expected in line for line in errors)
    assert not mark.exists()


def _converter(command: str, iteration: Path, exported: Path, root: Path) -> None:
    arguments = {
        "export": ("--load", iteration, "--hf", root / "hf", "--overwrite"),
        "verify": ("--load", iteration, "--hf", exported),
        "inspect": (iteration,),
    }
    try:
        run(command, *arguments[command])
    except SystemExit as caught:
        assert caught.code == 1


def test_the_payload_would_run(tmp_path):
    """The test above can fail: without restriction the payload does what it is for."""
    # The payload of this file, which makes an empty directory: that it runs here is what is tested.
    pickle.loads(pickle.dumps(Payload(tmp_path / "mark")))
    assert (tmp_path / "mark").is_dir()


def test_counters_set_nothing_but_the_run_s_counters(setting, tmp_path):
    root, load, data, changes = setting
    shutil.copytree(root / "run", tmp_path / "run")
    iteration = tmp_path / "run" / "iter_0000002"
    common = torch.load(iteration / "common.pt", weights_only=True)
    resume = functools.partial(train_outcome, load, tmp_path / "run", data, **changes)
    for counters, expected in (
        ({"chunks": [], "optimizer": 1}, None),
        ({"iteration": "many"}, "counter iteration is no"),
    ):
        torch.save(common | {"counters": common["counters"] | counters}, iteration / "common.pt")
        write_checksums(iteration, {})
        for outcome in rank_pool(2).run(resume):
            assert outcome == expected or expected in outcome


def test_an_index_that_changes_a_class_of_the_process(setting, tmp_path, capsys):
    """BUILD on an allowed class would make every path of the process another file's."""
    root, _, data, _ = setting
    planted, victim = tmp_path / "run", tmp_path / "victim"
    victim.write_text("kept")
    shutil.copytree(root / "run", planted)
    iteration = planted / "iter_0000002"
    raw, state = (iteration / ".metadata").read_bytes(), b"}" + text("_str") + text(str(victim)) + b"s"
    (iteration / ".metadata").write_bytes(raw[:2] + name("pathlib", "PosixPath") + b"(N" + state + b"tb0" + raw[2:])
    write_checksums(iteration, {})
    for command in ("export", "verify"):
        _converter(command, iteration, root / "exported", tmp_path)
    outcomes = rank_pool(2).run(functools.partial(train_outcome, planted, tmp_path / "new", data))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and all("sets the state of pathlib.PosixPath" in line for line in [*errors, *outcomes])
    assert victim.read_text() == "kept" and str(Path("x")) == "x" and not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("config.json", {"hidden_size": 1 << 24}, "word_embeddings.weight is [99, 32]"),
        ("config.json", {"intermediate_size": 1 << 24}, "original_expert.linear_fc1.weight_w is [48, 32]"),
        ("config.json", {"vocab_size": (1 << 31) - 1}, "word_embeddings.weight is [99, 32]"),
        ("card.json", {"experts_per_layer": [1024] * 4}, "router.weight is [5, 32]"),
        ("card.json", {"experts_per_layer": [5] * 3}, "config.json has 4 layers, its card another number"),
    ],
)
def test_sizes_that_no_tensor_has_take_no_memory(file, change, words, setting, tmp_path):
    _, load, data, changes = setting
    planted = tmp_path / "planted"
    shutil.copytree(load, planted)
    (iteration,) = planted.glob("*/")
    path = iteration / "moe_lpr" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    write_checksums(iteration, {})
    outcomes = [
        *rank_pool(2).run(functools.partial(train_outcome, planted, tmp_path / "new", data, **changes)),
        *rank_pool(2).run(evaluation_outcome, planted, data),
    ]
    for outcome in outcomes:
        assert f"{iteration}: " in outcome and words in outcome
    assert not list((tmp_path / "new").glob("iter_*"))
