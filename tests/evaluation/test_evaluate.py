"""Evaluation: numbers equal to those of transformers on the exported model, and the same at every layout."""

import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from examples.real import likelihood
from megatron_moe_lpr.checkpoint.format.card import read_card
from megatron_moe_lpr.checkpoint.format.directory import CARD_FILE, resolve_checkpoint
from megatron_moe_lpr.data.reading.document_options import DocumentOptions
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.evaluation.checkpoint import EvaluationOptions, evaluate_checkpoint, unknown_languages
from megatron_moe_lpr.evaluation.report.record import Dataset
from megatron_moe_lpr.evaluation.results import evaluation_record
from megatron_moe_lpr.files.checksum_file import write_checksums
from megatron_moe_lpr.parallel.layout import ParallelLayout
from tests.conversion.helpers import rewrite_checkpoint, run
from tests.conversion.tiny_models import load_model
from tests.data.builders import write_dataset
from tests.distributed import rank_pool
from tests.evaluation.tools import TOOLS, load_tool
from tests.model.configuration.test_kernels import gpu
from tests.training.outcomes import evaluation_outcome
from tests.training.runs import make_checkpoint

SEQUENCE = 32
TOP_K = 2
DOCUMENTS = {"en": (70, 33), "el": (47,)}
"""Lengths of the documents of each dataset, which have no end-of-document token."""
LAYOUTS = {
    "EP2": {"expert_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "TP2": {"tensor_model_parallel_size": 2},
    "CP2": {"context_parallel_size": 2},
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Directory with the export, an MoE checkpoint with different experts, datasets and token ids by language."""
    root = tmp_path_factory.mktemp("evaluation")
    checkpoint = make_checkpoint(root)
    run("export", "--load", checkpoint, "--hf", root / "exported")
    generator = np.random.default_rng(5)
    # Neither a multiple of the sequence length nor of a pass: the padding must count nowhere.
    documents = {
        language: [generator.integers(1, 99, length).tolist() for length in lengths]
        for language, lengths in DOCUMENTS.items()
    }
    data = {language: write_dataset(root / language, language, each) for language, each in documents.items()}
    tokens = {language: [token for document in each for token in document] for language, each in documents.items()}
    return root, checkpoint, data, tokens


def evaluate(
    load: Path, data: dict[str, str], layout: dict, original: tuple[str, ...] = ("en",), apart: bool = False
) -> dict:
    """Evaluate on this rank of a pool."""
    options = EvaluationOptions(
        load=load,
        valid_data_path=list(data.values()),
        original_languages=list(original),
        seq_length=SEQUENCE,
        micro_batch_size=2,
        fp32=True,
        layout=ParallelLayout(**layout),
        documents=DocumentOptions(reset_attention_mask=apart, reset_position_ids=apart),
        platform="cpu",
    )
    return evaluation_record(evaluate_checkpoint(options))


@pytest.fixture(scope="module")
def alone(setting):
    """The evaluation of one process."""
    _, checkpoint, data, _ = setting
    return rank_pool(1).run(evaluate, checkpoint, data, {})[0]


@functools.cache
def exported(directory: Path):
    return load_model(directory)


def keeper(states: list[torch.Tensor]):
    """A hook that appends the input of a layer to `states`."""
    return lambda module, inputs: states.append(inputs[0][0])


@torch.no_grad()
def by_transformers(directory: Path, tokens: list[int], ends: Sequence[int] = ()) -> dict:
    """Compute by transformers: summed loss; for each layer how often experts are chosen, and expert 0's probability.

    Args:
        ends: tokens before each document but the first, whose context begins anew there.
    """
    model = exported(directory)
    loss, routed = 0.0, []
    starts = sorted({*range(0, len(tokens) - 1, SEQUENCE), *ends, len(tokens) - 1})
    for start, end in itertools.pairwise(starts):
        window = torch.tensor(tokens[start : end + 1])
        states: list[torch.Tensor] = []
        hooks = [layer.mlp.register_forward_pre_hook(keeper(states)) for layer in model.model.layers]
        logits = model(window[None, :-1]).logits[0]
        for hook in hooks:
            hook.remove()
        loss += functional.cross_entropy(logits, window[1:], reduction="sum").item()
        gates = [layer.mlp.gate.weight for layer in model.model.layers]
        routed.append(torch.stack([(state @ gate.T).softmax(-1) for state, gate in zip(states, gates, strict=True)]))
    probabilities = torch.cat(routed, dim=1)
    chosen = functional.one_hot(probabilities.topk(TOP_K).indices, probabilities.shape[-1]).sum(-2).float()
    return {"loss": loss, "probability": probabilities[..., 0].mean(1), "expert_share": chosen.mean(1)}


@pytest.mark.parametrize("language", ["en", "el"])
def test_equals_transformers(setting, alone, language):
    root, _, _, tokens = setting
    found = next(one for one in alone["datasets"] if one["language"] == language)
    expected = by_transformers(root / "exported", tokens[language])
    predicted = len(tokens[language]) - 1
    assert found["tokens"] == predicted
    assert found["loss"] == pytest.approx(expected["loss"] / predicted, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected["loss"] / predicted), rel=1e-4)
    text_bytes = 3 * len(tokens[language])  # as write_dataset says
    assert found["bits_per_byte"] == pytest.approx(expected["loss"] / math.log(2) / text_bytes, rel=1e-5)
    routing = found["routing"]
    assert routing["expert0_probability"] == pytest.approx(expected["probability"].tolist(), abs=1e-5)
    share = torch.tensor(routing["expert_share"])
    assert torch.allclose(share, expected["expert_share"], atol=1e-6)
    assert routing["expert0_top_k_share"] == pytest.approx(share[:, 0].tolist())
    assert 0.02 < share[:, 0].mean() < 0.98, "the choice does not show"


def test_the_measuring_of_make_real_sums_the_same(setting, alone):
    """A dataset as one text: the windows of examples/real are those of an evaluation, and so are the bits."""
    root, _, _, tokens = setting
    for found in alone["datasets"]:
        ids = tokens[found["language"]]
        windows = likelihood.cut(0, ids[:1], ids[1:], SEQUENCE)
        nats = sum(sum(likelihood.nats(exported(root / "exported"), one)) for one in likelihood.batches(list(windows)))
        assert nats == pytest.approx(found["loss"] * found["tokens"], rel=1e-5)
        assert nats / math.log(2) / (3 * len(ids)) == pytest.approx(found["bits_per_byte"], rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_documents_apart_equal_transformers_on_each(setting, alone, ranks):
    """No document is context of another; the record says so. On two pipeline ranks too."""
    root, checkpoint, data, tokens = setting
    record = rank_pool(ranks).run(evaluate, checkpoint, data, LAYOUTS["PP2"] if ranks == 2 else {}, ("en",), True)[0]
    assert record["reset_attention_mask"] and not alone["reset_attention_mask"]
    found = {one["language"]: one for one in record["datasets"]}
    expected = by_transformers(root / "exported", tokens["en"], [DOCUMENTS["en"][0]])
    assert found["en"]["loss"] == pytest.approx(expected["loss"] / (len(tokens["en"]) - 1), rel=1e-5)
    assert found["en"]["routing"]["expert0_probability"] == pytest.approx(expected["probability"].tolist(), abs=1e-5)
    across = {one["language"]: one for one in alone["datasets"]}
    assert found["en"]["documents_apart"] and not (found["en"]["is_packed"] or across["en"]["documents_apart"])
    assert abs(found["en"]["loss"] - across["en"]["loss"]) > 1e-4
    assert found["el"]["loss"] == pytest.approx(across["el"]["loss"], rel=1e-5)  # of one document


def test_conversations_equal_transformers_with_labels_of_answers(setting, tmp_path):
    """Loss and bits per byte are of what counts alone, each conversation by itself; even tokens count."""
    root, checkpoint, _, _ = setting
    generator = np.random.default_rng(6)
    documents = [generator.integers(1, 99, length).tolist() for length in (12, 30, 7, 20, 3)]
    data = {"el": write_dataset(tmp_path / "chat", "el", documents, chat=True)}
    loss = count = 0.0
    for document in documents:
        ids = torch.tensor([document])
        labels = ids.masked_fill(ids % 2 == 1, -100)
        number = int((labels[:, 1:] >= 0).sum())
        with torch.no_grad():
            loss += exported(root / "exported")(ids, labels=labels).loss.item() * number if number else 0.0
        count += number
    counted_bytes = 3 * sum(token % 2 == 0 for document in documents for token in document)  # as write_dataset says
    for ranks in (1, 2):
        (found,) = rank_pool(ranks).run(evaluate, checkpoint, data, LAYOUTS["PP2"] if ranks == 2 else {})[0]["datasets"]
        assert found["tokens"] == count and found["loss"] == pytest.approx(loss / count, rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(loss / math.log(2) / counted_bytes, rel=1e-5)
        assert found["is_packed"] and found["documents_apart"]
        # The report compares models by it.
        assert Dataset.model_validate(found).text_bytes == pytest.approx(counted_bytes, rel=1e-9)


def test_conversations_without_an_answer_are_refused_before_the_model_is_loaded(setting, tmp_path, monkeypatch):
    _, checkpoint, data, _ = setting
    silent = write_dataset(tmp_path / "silent", "el", [[1] * (SEQUENCE + 5) + [2]], chat=True)
    monkeypatch.setattr("megatron_moe_lpr.evaluation.checkpoint.initialize_parallel", None)
    with pytest.raises(UserError, match="silent: none of the conversations has a token that counts in the loss"):
        evaluate(checkpoint, data | {"el": silent}, {})


def test_documents_apart_on_cp_ranks_of_transformer_engine_are_refused(setting, monkeypatch):
    _, checkpoint, data, _ = setting
    monkeypatch.setattr("megatron_moe_lpr.evaluation.checkpoint.select_platform", lambda *_: gpu())
    monkeypatch.setattr("megatron_moe_lpr.evaluation.checkpoint.initialize_parallel", None)
    with pytest.raises(UserError, match="--context-parallel-size 2: Transformer Engine splits documents"):
        evaluate(checkpoint, data, {"context_parallel_size": 2}, apart=True)


def test_averages(alone):
    by_language = {one["language"]: one for one in alone["datasets"]}
    assert alone["averages"]["original"]["bits_per_byte"] == by_language["en"]["bits_per_byte"]
    assert alone["averages"]["expanded"]["loss"] == by_language["el"]["loss"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(setting, alone, layout):
    _, checkpoint, data, _ = setting
    for record in rank_pool(2).run(evaluate, checkpoint, data, LAYOUTS[layout]):
        for one, reference in zip(record["datasets"], alone["datasets"], strict=True):
            assert one["tokens"] == reference["tokens"]
            assert one["loss"] == pytest.approx(reference["loss"], rel=1e-5)
            for name in ("expert0_probability", "expert0_top_k_share"):
                assert one["routing"][name] == pytest.approx(reference["routing"][name], abs=1e-4)


def test_languages_that_nothing_is_known_of_are_named():
    history = [{"stage": "1", "languages": ["el", "Hungarian"], "original_languages": ["en"]}]
    assert unknown_languages(["el", "hu", "en-US"], ["en"], history) == []
    (note,) = unknown_languages(["el", "en", "es", "zh"], ["en"], history)
    assert "es (Spanish), zh (Chinese) of the data was neither called original nor trained on" in note
    assert unknown_languages(["el", "en"], ["en"], []) == []


def test_original_languages_are_those_of_the_history(setting, alone, tmp_path):
    """Also languages of which the run that recorded them had no data."""
    _, checkpoint, data, _ = setting
    shutil.copytree(checkpoint, tmp_path / "trained")
    entry = {"stage": "1", "languages": ["el"], "original_languages": ["English", "es"]}
    directory = resolve_checkpoint(tmp_path / "trained")
    path = directory.side_directory / CARD_FILE
    dataclasses.replace(read_card(path), history=[entry]).write(path)
    write_checksums(directory.path, {})
    record = rank_pool(1).run(evaluate, tmp_path / "trained", data, {}, ())[0]
    assert record["original_languages"] == ["en", "es"] and record["averages"] == alone["averages"]
    unknown = rank_pool(1).run(evaluate, checkpoint, data, {}, ())[0]
    assert unknown["averages"]["original"]["loss"] is None


def test_command_line_writes_json(setting, alone, tmp_path):
    _, checkpoint, data, _ = setting
    options = ["--original-languages", "en", "--seq-length", str(SEQUENCE), "--micro-batch-size", "2"]
    arguments = ["--load", str(checkpoint), "--valid-data-path", *data.values(), *options]
    command = [sys.executable, TOOLS / "evaluate.py", *arguments, "--output", str(tmp_path / "result.json")]
    # A process of its own: the command leaves the process groups that other tests here still use.
    environment = os.environ | {"PYTHONPATH": str(TOOLS.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["averages"]["original"]["loss"] == pytest.approx(alone["averages"]["original"]["loss"])
    assert "bits per byte" in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seq-length", "100000"], "--seq-length 100000"),
        (["--original-languages", "enn", "--seq-length", "32"], "write en if you mean en .English."),
        (["--bf16", "--fp32"], "give one of them"),
        (["--output", "no/such/place.json"], "there is no directory"),
    ],
)
def test_bad_input_is_one_line(setting, change, message):
    _, checkpoint, data, _ = setting
    tool = load_tool("evaluate")
    with pytest.raises(UserError, match=message):
        tool.main(["--load", str(checkpoint), "--valid-data-path", *data.values(), *change])


def test_weight_that_is_not_a_number(setting, tmp_path):
    _, _, data, _ = setting
    make_checkpoint(tmp_path)
    rewrite_checkpoint(tmp_path / "checkpoint", spoil)
    assert "NaN" in rank_pool(1).run(evaluation_outcome, tmp_path / "checkpoint", data)[0]


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    tensors["decoder.layers.1.mlp.router.weight"].view(-1)[:1].fill_(torch.nan)
