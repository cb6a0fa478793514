"""The real model's driver: its settings, its text, the commands of all stages in order, and the record of steps."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
import zstandard

from examples.real import flow as flows
from examples.real import measure, memory, real, report, settings, text
from examples.real.base import source
from examples.real.flow import Flow
from examples.real.settings import Layout, read_settings
from examples.real.tokenizer import NEW, OLD
from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import UserError
from tests import test_readme
from tests.data.builders import make_hf_tokenizer

pytest.importorskip("peft", reason="needs peft")
sys.path.append(str(Path(__file__).parents[2] / "examples" / "demo"))
import lora

ROOT = Path(__file__).parents[2]
WORDS = {"el": "αρχείο ανοίγει", "hu": "fájlt megnyit", "tr": "dosyayı açar", "en": "opens the file"}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A corpus of 40 documents of each language and split."""
    for split, language in itertools.product(("train", "valid"), WORDS):
        file = tmp_path / "corpus" / split / f"{language}.jsonl.zst"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [{"text": f"{split} {number} " + f"{WORDS[language]} " * 6} for number in range(40)]
        file.write_bytes(zstandard.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    return tmp_path / "corpus"


@pytest.fixture
def environment(tmp_path: Path, corpus: Path) -> dict[str, str]:
    """Settings in a file of their own: the repository's with the small corpus."""
    values = yaml.safe_load(settings.FILE.read_text())
    values |= {"corpus": str(corpus), "characters": 1000, "replay_share": 0.1, "passage_characters": 40}
    values["training"] |= {"seq_length": 8, "global_batch_size": 2}
    values["stage1"]["lr_warmup_iters"] = 10
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values))
    base = make_hf_tokenizer(tmp_path / "dense")
    (base / "config.json").write_text('{"num_hidden_layers": 6}')
    return {"SETTINGS": str(tmp_path / "settings.yaml"), "RUNS": str(tmp_path / "runs"), "BASE": str(base)}


class Recorder:
    """In place of the commands: notes their words and writes what the steps after them read."""

    def __init__(self, dense: Path) -> None:
        self.dense, self.commands, self.trained, self.measured = dense, [], {}, []

    def __call__(self, flow: Flow, *words: object, **_: str) -> None:
        command = [str(word) for word in words][1:]
        command = command[2:] if command[:2] == ["-m", "megatron_moe_lpr.cli"] else command
        self.commands.append(command)
        value = dict(itertools.pairwise(command))
        if command[0] == "export":
            shutil.copytree(self.dense, value["--hf"])
        elif command[0] == "extend-tokenizer":
            shutil.copytree(self.dense, value["--output"])
        elif command[0] == "preprocess":
            tokens = 100 if Path(value["--output-prefix"]).name.startswith(NEW) else 300
            Path(value["--output-prefix"]).parent.mkdir(exist_ok=True)
            Path(f"{value['--output-prefix']}.json").write_text(json.dumps({"tokens": tokens}))
        elif command[0] == "train":
            self.train(yaml.safe_load(Path(value["--config"]).read_text()))

    def train(self, config: dict) -> None:
        save = Path(config["save"])
        save.mkdir(parents=True)
        self.trained[str(save.parent.name) + "/" + save.name] = config
        tokens = [{"kind": "train", "consumed_tokens": 16 * step, "tokens_per_second": 8.0 * step} for step in (1, 2)]
        (save / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in tokens))


def run_all(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> tuple[Flow, Recorder]:
    flow = Flow(read_settings(environment))
    recorder = Recorder(Path(environment["BASE"]))
    monkeypatch.setattr(Flow, "run", lambda *words, **rest: recorder(*words, **rest))
    for module in (measure, report):
        monkeypatch.setattr(module, "run", lambda *words: recorder.measured.append(words))
    for name in real.plan("all"):
        real.STAGES[name].action(flow)
    return flow, recorder


def test_all_stages(environment, monkeypatch, capsys) -> None:
    monkeypatch.setattr(memory, "tree_bytes", lambda: 2_000_000)
    flow, recorder = run_all(environment, monkeypatch)
    runs, trained = flow.runs, recorder.trained
    stages = {name: (one["stage"], Path(one["load"])) for name, one in trained.items()}
    assert stages == {
        "trial/run": ("1", runs / "trial" / "start"),
        "moe-lpr/stage1": ("1", runs / "moe-lpr" / "start"),
        "moe-lpr/stage2": ("2", runs / "moe-lpr" / "stage1"),
        "runs/full": ("full", runs / "base"),
        "moe-lpr-old-tokens/stage1": ("1", runs / "moe-lpr-old-tokens" / "start"),
        "moe-lpr-old-tokens/stage2": ("2", runs / "moe-lpr-old-tokens" / "stage1"),
    }
    # Three languages; (tokens - 1) // 8 windows of each, two in a step. The new tokens are a third of the old ones.
    iters = {name: one["train_iters"] for name, one in trained.items() if name.endswith(("stage1", "full"))}
    assert iters == {"moe-lpr/stage1": 18, "runs/full": 55, "moe-lpr-old-tokens/stage1": 55}
    data = trained["moe-lpr/stage2"]["data_path"]
    names = [[Path(word).name for word in data[1::2]], data[::2]]
    assert names == [["new-en", "new-el", "new-hu", "new-tr"], ["3", "2", "2", "2"]]
    assert [Path(word).name for word in trained["runs/full"]["data_path"]] == ["old-el", "old-hu", "old-tr"]
    rows = {command[command.index("--save") + 1]: "--tokenizer" in command for command in imports(recorder)}
    assert rows[str(runs / "moe-lpr" / "start")] and not rows[str(runs / "moe-lpr-old-tokens" / "start")]
    (lora,) = (command for command in recorder.commands if command[0].endswith("lora.py"))
    assert lora[lora.index("--train-iters") + 1] == "55" and "--fp32" in lora
    assert [one["name"] for one in json.loads((runs / "models.json").read_text())] == [
        "base", "full fine-tuning", "LoRA", "MoE-LPR, base's tokens", "MoE-LPR"
    ]  # fmt: skip
    trial = json.loads((runs / "trial.json").read_text())
    # 16 tokens at 16 tokens/s; the first step does not count.
    assert trial == {name: {OLD: 16.0, NEW: 16.0} for name in flow.settings.layouts} and not (runs / "trial").exists()
    steps = {step["name"]: step for step in json.loads((runs / "steps.json").read_text())}
    assert steps["MoE-LPR: stage 1"]["tokens_per_second"] == pytest.approx(32 / 3)
    assert all(step["done"] and step["peak_memory_bytes"] == 2_000_000 for step in steps.values())
    assert not [name for name in steps if name.startswith("trial")]
    assert set(json.loads((runs / "bytes_per_token.json").read_text())[NEW]) == {"en", "el", "hu", "tr"}
    assert recorder.measured == [(runs, flow.settings)] * 2
    before = len(recorder.commands)
    capsys.readouterr()
    for name in real.plan("all"):
        real.STAGES[name].action(flow)
    assert len(recorder.commands) == before and "done before" in capsys.readouterr().out


def test_the_commands_accept_their_flags(environment, monkeypatch) -> None:
    monkeypatch.setattr(memory, "tree_bytes", lambda: 2_000_000)
    flow, recorder = run_all(environment, monkeypatch)
    known = {command[0]: command for command in recorder.commands if not command[0].endswith("lora.py")}
    assert set(known) == {"import", "export", "verify", "extend-tokenizer", "preprocess", "allocate", "train"}
    # Each with all flags that any of its calls has, and every training's file.
    shown = {
        (name, frozenset(word for word in words if word[:2] == "--")): (name, words)
        for name, *words in recorder.commands
    }
    trainings = [("train", ["--config", str(file)]) for file in (flow.runs / "flags").iterdir()]
    for name, words in [*shown.values(), *trainings]:
        if name.endswith("lora.py"):
            assert parse_flags(lora.Flags, words).lr
            continue
        with monkeypatch.context() as patch:
            test_readme.test_flags_of_a_shown_command(name, words, patch)


def imports(recorder: Recorder) -> list[list[str]]:
    return [command for command in recorder.commands if command[0] == "import"]


def test_a_stage_runs_after_what_it_needs() -> None:
    assert real.plan("others") == ["base", "tokenizer", "others"]
    assert real.plan("base") == ["base"] and real.plan("all") == list(real.STAGES)
    for number, (_, stage) in enumerate(real.STAGES.items()):
        assert set(stage.needs) <= set(list(real.STAGES)[:number])
    assert "examples.real.real $(STAGE)" in (ROOT / "examples" / "real" / "real.mk").read_text()


def test_a_failed_step_is_recorded_and_its_next_start_adds_up(environment, monkeypatch) -> None:
    flow, clock = Flow(read_settings(environment)), iter((0.0, 5.0, 20.0, 22.0))
    monkeypatch.setattr(flows.time, "monotonic", lambda: next(clock))
    done = flow.runs / "deep" / ".done"
    with pytest.raises(UserError):
        flow.step(done, "title", fail)
    (step,) = json.loads((flow.runs / "steps.json").read_text())
    assert not step["done"] and step["seconds"] == 5
    flow.step(done, "title", lambda: None)
    flow.step(done, "title", fail)
    (step,) = json.loads((flow.runs / "steps.json").read_text())
    assert step["done"] and step["seconds"] == 7


def fail() -> None:
    raise UserError("no")


def test_the_text_is_whole_documents_and_a_small_replay_of_many(environment) -> None:
    flow = Flow(read_settings(environment))
    text.choose_text(flow)
    originals = {language: set(read_texts(text.source(flow, "train", language))) for language in WORDS}
    for language in flow.settings.expanded:
        chosen = read_texts(text.document_file(flow, language))
        assert set(chosen) <= originals[language] and len(set(chosen)) == len(chosen)
        assert 1000 <= sum(map(len, chosen)) < 1000 + len(chosen[-1]) + 1
    learned = sum(text.text_bytes(text.document_file(flow, language)) for language in flow.settings.expanded)
    replayed = read_texts(text.document_file(flow, "en"))
    assert len(replayed) > 3 and sum(len(one.encode()) for one in replayed) <= 0.1 * learned
    assert all(any(whole.startswith(f"{one} ") for whole in originals["en"]) for one in replayed)


def read_texts(file: Path) -> list[str]:
    return list(text.texts([str(file)]))


def test_layers_with_experts_of_a_model_of_any_depth() -> None:
    assert Layout(0.0, 3, 4).frequency(7) == "[0,0,1,0,0,1,0]"
    assert Layout(0.5, 1, 3).frequency(5) == "[0,0,1,1,1]"
    # SmolLM2: as many new experts in both.
    counts = {
        name: one.frequency(30).count("1") * (one.num_experts - 1) for name, one in read_settings({}).layouts.items()
    }
    assert set(counts.values()) == {30}


def test_settings(tmp_path, environment) -> None:
    found = read_settings(environment | {"RANKS": "2", "TEXT": "texts", "THREADS": "3"})
    assert Flow(found).threads == {"OMP_NUM_THREADS": "3"}
    assert (found.ranks, found.text, found.pairs) == (2, Path("texts"), None)
    assert Flow(found).common_flags()["micro_batch_size"] == 1
    quick = read_settings({"QUICK": "1"})
    assert quick.runs == Path("runs/real-quick") and quick.stage2["train_iters"] == settings.QUICK_ITERS
    file = tmp_path / "wrong.yaml"
    (shown,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "real-model.md").read_text(), re.DOTALL)
    file.write_text(shown)
    assert Flow(read_settings({"SETTINGS": str(file)})).common_flags()["bf16"]
    file.write_text("stage1: {lr: 2.0}\nranks: 8")
    some, default = read_settings({"SETTINGS": str(file)}), read_settings({})
    assert some.stage1 == {**default.stage1, "lr": 2.0} and (some.ranks, some.stage2) == (8, default.stage2)
    for content, message in (
        ("runs: x\nrunz: y", "runz"),
        ("- 1", "settings expected"),
        ("a: [", "wrong.yaml"),
        ("layout: some third layer", "some third layer"),
        ("layouts: {upper half: {distanz: 3}}", "distanz"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            read_settings({"SETTINGS": str(file)})
    with pytest.raises(UserError, match="RANKS=two"):
        read_settings({"RANKS": "two"})


def test_the_base_model_of_a_package(environment, monkeypatch) -> None:
    flow = Flow(read_settings(environment | {"BASE": "some-package==1.0"}))
    package = flow.runs / "package" / "some"

    def install(_: Flow, *words: object, **__: str) -> None:
        assert "some-package==1.0" in words and "--no-deps" in words
        package.mkdir(parents=True, exist_ok=True)
        (package / f"{len(list(package.iterdir()))}.gguf").touch()

    monkeypatch.setattr(Flow, "python", install)
    assert source(flow) == source(flow) == str(package / "0.gguf")
    install(flow, "some-package==1.0", "--no-deps")
    with pytest.raises(UserError, match="2 found"):
        source(flow)


def test_memory_of_descendants_counts() -> None:
    alone = memory.tree_bytes()
    code = "x = bytearray(80 << 20); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        with memory.peak_memory() as peak:
            pass
        child.communicate(b"\n")
    assert peak.num_bytes > alone + (70 << 20)
