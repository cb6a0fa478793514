"""The comparison of graft and fine-tuning: its conversations, its measures, and the commands of all models."""

import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.conversion.tiny_models import COMMON
from tests.data.builders import make_hf_tokenizer

sys.path.append(str(Path(__file__).parents[2] / "examples" / "demo"))
import answers
import conversations
import instruct
from settings import Settings
from workflow import Workflow

TEMPLATE = Path(__file__).parents[2] / instruct.TEMPLATE
ANSWER = "Opens the dialog where you can choose."


def test_a_conversation_is_a_heading_and_the_text_after_it() -> None:
    documents = [
        f"Heading\n{ANSWER}\nMore of it.",
        "A heading without a text",
        "Heading\nToo short.",
        f"Heading\n{'x' * 241}",
        f"{'A heading like a sentence. ' * 4}\n{ANSWER}",
    ]
    (found,) = conversations.conversations(iter(documents))
    assert found == [{"role": "user", "content": "Heading"}, {"role": "assistant", "content": ANSWER}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> PreTrainedTokenizerFast:
    found = PreTrainedTokenizerFast.from_pretrained(make_hf_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    found.chat_template = TEMPLATE.read_text()
    return found


@pytest.fixture(scope="module")
def some(tokenizer, tmp_path_factory) -> list[answers.Conversation]:
    file = tmp_path_factory.mktemp("conversations") / "en.jsonl"
    texts = [ANSWER, "Ends.", "Saves the file under another name, in the same folder."]
    pairs = [[("user", "Open" + " file" * number), ("assistant", text)] for number, text in enumerate(texts)]
    rows = [{"messages": [{"role": role, "content": content} for role, content in pair]} for pair in pairs]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return answers.read_conversations(file, tokenizer)


def test_the_template_marks_the_answer_and_its_end(tokenizer, some) -> None:
    assert (
        tokenizer.decode(some[0].prompt) == "### Open\n"
        and tokenizer.decode(some[0].answer) == f"{ANSWER}<|endoftext|>"
    )
    messages = [{"role": "user", "content": "Open"}, {"role": "assistant", "content": ANSWER}]
    marked = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert marked["assistant_masks"] == [0] * len(some[0].prompt) + [1] * len(some[0].answer)


def test_bits_per_byte_of_padded_answers_are_those_of_each_alone(some) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **{**COMMON, "vocab_size": 800})).eval()
    bits = 0.0
    for one in some:
        logits = model(torch.tensor([one.prompt + one.answer])).logits[0, len(one.prompt) - 1 : -1].double()
        bits -= torch.log_softmax(logits, -1)[range(len(one.answer)), one.answer].sum().item() / math.log(2)
    text_bytes = sum(one.text_bytes for one in some)
    with torch.no_grad():
        found = answers.bits_per_byte(model, some, batch=2)
    assert found == pytest.approx(bits / text_bytes, rel=1e-5)


def test_an_answer_that_goes_on_has_not_ended(some) -> None:
    """A model that ends the first, shortest prompt's answer alone, as its last token."""

    def generate(input_ids: torch.Tensor, max_new_tokens: int, **_: object) -> torch.Tensor:
        new = torch.full((len(input_ids), max_new_tokens), 5)
        new[0, -1] = 0
        return torch.cat([input_ids, new], dim=1)

    model = SimpleNamespace(generate=generate, generation_config=SimpleNamespace(eos_token_id=0))
    flags = SimpleNamespace(new_tokens=4, batch=3)
    assert answers.share_ended(model, some, flags) == pytest.approx(1 / 3)


class Recorder:
    """In place of the commands: notes their words and writes what the steps after them read."""

    def __init__(self) -> None:
        self.trained: dict[str, dict[str, str]] = {}
        self.grafted: dict[str, str] = {}

    def __call__(self, flow: Workflow, *words: object, **_: str) -> None:
        command = [str(word) for word in words]
        value = dict(itertools.pairwise(command))
        if "megatron_moe_lpr.pretrain" in command:
            save = Path(value["--save"])
            save.mkdir(parents=True)
            self.trained[save.name] = value | {"data": " ".join(command[command.index("--data-path") + 1 :])}
        elif "graft" in command:
            self.grafted = value
        elif "examples/demo/answers.py" in command:
            one = {"conversations": 2, "ended": 0.5, "bits_per_byte": 1.25}
            Path(value["--output"]).write_text(json.dumps(dict.fromkeys(("en", "es", "zh", "el", "hu", "tr"), one)))
        elif "tools/evaluate.py" in command:
            averages = {name: {"bits_per_byte": 2.0} for name in ("original", "expanded")}
            Path(value["--output"]).write_text(json.dumps({"averages": averages}))


def test_every_way_starts_from_the_right_model(tmp_path, monkeypatch, capsys) -> None:
    recorder, demo = Recorder(), Workflow(Settings(runs=tmp_path / "demo", ranks=2))
    monkeypatch.setattr(Workflow, "run", lambda *words, **environment: recorder(*words, **environment))
    monkeypatch.setattr(instruct, "finished_demo", lambda: demo)
    instruct.instruct()
    runs, trained = tmp_path / "demo-instruct", recorder.trained
    stages = {name: (one["--stage"], Path(one["--load"])) for name, one in trained.items()}
    assert stages == {
        "dense": ("full", runs / "base"),
        "dense_new": ("full", runs / "dense"),
        "sft": ("sft", tmp_path / "demo" / "stage2"),
        "graft_sft": ("sft", runs / "graft"),
    }
    graft = (recorder.grafted["--load"], recorder.grafted["--instruct"])
    assert graft == (str(tmp_path / "demo" / "stage2"), str(runs / "hf" / "dense"))
    assert [name in trained["dense"]["data"] for name in ("chat-en", "chat-el")] == [True, False]
    assert [name in trained["sft"]["data"] for name in ("1 ", "chat-en", "chat-el")] == [True, True, True]
    assert [name in trained["dense_new"]["data"] for name in ("chat-en", "chat-el")] == [False, True]
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| ") and "50%" in line]
    assert len(rows) == len(instruct.models(demo, demo)) == 7
    assert rows[4] == "| MoE-LPR, grafted | 50% | 50% | 1.250 | 1.250 | 2.000 | 2.000 |"
    assert json.loads((runs / "instruct.json").read_text())["MoE-LPR"]["text expanded"] == 2.0
    instruct.instruct()  # the second time prints the table alone
    assert recorder.trained == trained and capsys.readouterr().out.splitlines()[-7:] == rows
