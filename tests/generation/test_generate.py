"""The command: what goes to standard output and error, closed pipes, conversations, and transformers beside it."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe_lpr.commands.generate import main
from megatron_moe_lpr.errors import BROKEN_PIPE_CODE, UserError
from megatron_moe_lpr.generation import answering
from megatron_moe_lpr.generation.tokens import PromptTokenizer
from tests.generation.builders import by_transformers, make_models

ROOT = Path(__file__).parents[2]
COUNT = ["--num-tokens-to-generate", "6", "--fp32", "--platform", "cpu"]
PROMPT = "Γειά σου"


@pytest.fixture(scope="module")
def models(tmp_path_factory, cpu_platform) -> tuple[Path, Path]:
    return make_models(tmp_path_factory.mktemp("generate"), "qwen3")


@pytest.fixture(scope="module")
def expected(models) -> str:
    """The greedy text by transformers' own classes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models[1])
    ids = tokenizer(PROMPT).input_ids
    (found,) = by_transformers(models[1], [ids], 6)
    return tokenizer.decode([*ids, *found])[len(PROMPT) :]


def sources(models: tuple[Path, Path]) -> list[list[str]]:
    return [["--load", str(models[0])], ["--hf", str(models[1])]]


def test_text_alone_goes_to_standard_output(models, expected, capsys):
    for source in sources(models):
        main([*source, "--prompt", PROMPT, *COUNT])
        found = capsys.readouterr()
        assert found.out == f"{expected}\n"
        assert "6 tokens in " in found.err and "tokens/s" in found.err


def test_files_of_prompts_give_json_lines(models, expected, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text(f"a\n{PROMPT}\n", encoding="utf-8")
    for source in sources(models):
        main([*source, "--prompts", str(tmp_path / "prompts.txt"), *COUNT])
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert lines[1] == {"text": expected, "tokens": 6, "finish_reason": "length"} and len(lines) == 2


def test_seeded_draws_of_transformers_repeat(models, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        main(["--hf", str(models[1]), "--prompt", PROMPT, *COUNT, "--temperature", "2", "--seed", seed])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_conversation_in_a_terminal(models, monkeypatch, capsys):
    """Each answer is given to the model with all that was said before."""
    said: list[str] = []
    encode = PromptTokenizer.encode

    def listening(tokenizer, request):
        ids = encode(tokenizer, request)
        said.append(tokenizer.decode(ids))
        return ids

    typed = io.StringIO(f"{PROMPT}\n\nΤι;\n")
    typed.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", typed)
    monkeypatch.setattr(PromptTokenizer, "encode", listening)
    monkeypatch.setattr(answering, "POLL_SECONDS", 0.01)
    main(["--load", str(models[0]), "--chat", *COUNT])
    answers = capsys.readouterr().out
    assert len(said) == 2 and said[0] == f"<|user|>{PROMPT}\n<|assistant|>"
    first = said[1].removeprefix(said[0]).removesuffix("\n<|user|>Τι;\n<|assistant|>")
    assert answers.startswith(first) and answers.count("\n") >= 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "α " * 600], "--prompt: the prompt has .* tokens, and the model 256 positions"),
        (["--prompt", ""], "--prompt: the prompt has no token"),
        (["--prompt", "a", "--tensor-model-parallel-size", "3"], "--tensor-model-parallel-size 3 does not divide"),
        (["--prompt", "a", "--tokenizer", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_one_line_before_the_weights_are_read(models, flags, message, monkeypatch):
    def loaded(*arguments, **options):
        raise AssertionError("the weights were read")

    monkeypatch.setattr("megatron_moe_lpr.generation.checkpoint.load_model", loaded)
    with pytest.raises(UserError, match=message) as caught:
        main(["--load", str(models[0]), *flags, *COUNT])
    assert "\n" not in str(caught.value)


def test_a_reader_that_leaves_has_read_utf8_and_ends_the_command_quietly(models, expected):
    """Whatever the locale says of the encoding."""
    flags = ["--num-tokens-to-generate", "200", *COUNT[2:]]
    command = [sys.executable, "-m", "megatron_moe_lpr.commands.generate", "--load", str(models[0]), *flags]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=ROOT
    ) as process:
        process.stdin.write(PROMPT.encode())
        process.stdin.close()
        whole = expected.rstrip("\ufffd").encode()
        assert process.stdout.read(len(whole)) == whole
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=200) == BROKEN_PIPE_CODE
    assert b"Traceback" not in errors and b"error" not in errors
