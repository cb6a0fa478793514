"""Every command of docs/tutorial.md: run as it stands in small, or parsed by its own program where it needs GPUs."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from megatron_moe_lpr.conversion.layer_frequency import layers_with_experts
from tests.data.builders import corpus_texts
from tests.serving.servers import vllm_command

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
ON_GPUS = "## On GPUs\n"
SMALLER = {
    "--new-tokens": "60",
    "--num-experts": "3",
    "--moe-layer-freq": "[0]+[1]*3",  # the base model below has four layers
    "--train-iters": "2",
    "--lr-warmup-iters": "1",
    "--seq-length": "64",
    "--num-tokens-to-generate": "4",
}
"""Values in place of the page's own; `--num-experts 1` stays."""
RECORDER = """#!/bin/sh
for word in "$@"; do printf '%s\\0' "$word"; done >>"$RECORD"
printf '\\n' >>"$RECORD"
"""
PROGRAM = """
import json, sys
from megatron_moe_lpr import cli
for words in json.load(open(sys.argv[1])):
    print("$", *words, flush=True)
    cli.main(words)
"""


def blocks(text: str) -> list[str]:
    """Return the code blocks, in order."""
    return re.findall(r"```bash\n(.*?)```", text, re.DOTALL)


def recorded(script: str, directory: Path, *programs: str) -> list[list[str]]:
    """Run a script by bash with recorders in the programs' places. Returns the words of their calls."""
    record = directory / "record"
    record.write_bytes(b"")
    for name in programs:
        (directory / name).write_text(RECORDER)
        (directory / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{directory}{os.pathsep}{os.environ['PATH']}", "RECORD": str(record)}
    subprocess.run(["bash", "-eu", "-c", script], env=environment, cwd=directory, check=True, timeout=60)
    calls = record.read_bytes().split(b"\n")[:-1]
    return [[word.decode() for word in call.split(b"\0")[:-1]] for call in calls]


def smaller(words: list[str]) -> list[str]:
    """Return a command with the values of `SMALLER`."""
    found = list(words)
    for flag, value in SMALLER.items():
        if flag in found and found[found.index(flag) + 1] != "1":
            found[found.index(flag) + 1] = value
    if "preprocess" in found and "--max-documents" not in found:
        found += ["--max-documents", "4"]
    if "--max-documents" in found:
        place = found.index("--max-documents") + 1
        found[place] = str(min(4, int(found[place])))
    return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Path, list[list[str]], str]:
    """The page's commands up to serving, run on the demo's base model: directory, commands, output."""
    root = tmp_path_factory.mktemp("tutorial")
    before, _ = PAGE.split("## 9. Serve\n")
    script = "\n".join(blocks(before))
    assert re.findall(r"\bexport (\w+)=", script) == ["BASE", "TEXT"]
    script = re.sub(r"BASE=\S+", f"BASE={ROOT}/data/base_model", script)
    script = script.replace("TEXT=data/help_corpus", f"TEXT={root}/text").replace(
        "OUT=runs/tutorial", f"OUT={root}/out"
    )
    for split in ("train", "valid"):
        (root / "text" / split).mkdir(parents=True)
        for language in ("en", "el", "hu", "tr"):
            lines = "".join(json.dumps({"text": text}) + "\n" for text in corpus_texts("valid", language)[:20])
            (root / "text" / split / f"{language}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    calls = [smaller(words) for words in recorded(script, root, "moe-lpr")]
    (root / "calls.json").write_text(json.dumps(calls))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, root / "calls.json"],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root / "out", calls, done.stdout


def test_the_steps_lead_from_a_base_model_to_a_stock_model(ran):
    out, calls, printed = ran
    # Every command of the method, in its order; loops count as often as they turn.
    names = [words[0] for words in calls]
    assert list(dict.fromkeys(names)) == [
        *("extend-tokenizer", "import", "verify", "inspect", "preprocess", "inspect-data", "train"),
        *("evaluate", "report", "export", "generate"),
    ]
    assert names.count("preprocess") == 3 + 1 + 2 * 4 and names.count("train") == 2
    assert printed.count("$ ") == len(calls)
    tokens = json.loads((out / "tokenizer" / "extension.json").read_text())
    config = json.loads((out / "hf" / "config.json").read_text())
    assert config["vocab_size"] == tokens["base_vocab_size"] + tokens["new_tokens"]
    evaluations = [json.loads((out / f"{name}.json").read_text()) for name in ("base", "stage1", "stage2")]
    for record in evaluations:
        assert [one["language"] for one in record["datasets"]] == ["en", "el", "hu", "tr"]
        assert all(0 < one["bits_per_byte"] < 8 for one in record["datasets"])
    assert "stage 2" in (out / "report.html").read_text()


def test_files_that_the_page_names_are_there():
    for file in re.findall(r"\$OUT/(\S+\.jsonl)`", PAGE):
        assert file == "stage1/metrics.jsonl"
    for target in re.findall(r"\]\((?!http)([^)#]+)", PAGE):
        assert (ROOT / "docs" / target).exists() or target == "real-model.md", target
    for name in re.findall(r"`((?:examples|docs|data)/\S+?)`", PAGE):
        assert (ROOT / name).exists() or name == "examples/real/settings.yaml", name
    for recipe in re.findall(r"--config (\S+)", PAGE):
        assert (ROOT / recipe).is_file()


def test_every_third_of_the_layers_gets_experts():
    (pattern,) = re.findall(r'--moe-layer-freq "(.+?)"', PAGE)
    assert layers_with_experts(pattern, 30) == [False, False, True] * 10


def test_serving_is_what_make_test_serving_starts(tmp_path):
    """Flags of the server, and its address and model in the request."""
    _, rest = PAGE.split("## 9. Serve\n")
    serve, ask = blocks(rest.split(ON_GPUS)[0])
    serve = serve.replace(".venv-vllm/bin/python", "python").replace("$OUT", "out")
    (server,) = recorded(serve, tmp_path, "python")
    known = vllm_command(Path("environment"), Path("out/hf"))
    assert server[:2] == known[1:3]
    flags = {word for word in server if word.startswith("--")}
    assert flags <= set(known) and server[server.index("--served-model-name") + 1] == "model"
    (request,) = recorded(ask, tmp_path, "curl")
    assert request[0] == f"http://127.0.0.1:{server[server.index('--port') + 1]}/v1/completions"
    assert json.loads(request[-1])["model"] == "model"


def test_commands_for_gpus_are_shown_in_a_form_that_is_parsed():
    """`tests/test_readme.py` parses every command of the page; each line here is one."""
    (block,) = blocks(PAGE.split(ON_GPUS)[1])
    lines = block.replace("\\\n", " ").splitlines()
    assert all(shlex.split(line)[0] == "moe-lpr" for line in lines) and len(lines) == 7
