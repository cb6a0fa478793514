"""From the hub's files to datasets: the real client against a stand-in for the hub, files in the corpora's formats."""

import importlib.util
import io
import json
from pathlib import Path

import pytest
import zstandard

from tests.data.builders import corpus_texts
from tests.data.preparation.hub_server import COMMIT, Hub, serve
from tests.launching.builders import run_script, save_dense_model

SKYPILE = "Skywork/SkyPile-150B"
SLIMPAJAMA = "cerebras/SlimPajama-627B"
CULTURAX = "uonlp/CulturaX"
needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow: make test-eval")


def texts(language: str, part: int) -> list[str]:
    return corpus_texts("valid", language)[2 * part : 2 * part + 2]


def jsonl(language: str, part: int, **more: object) -> bytes:
    return "".join(json.dumps({"text": text, **more}) + "\n" for text in texts(language, part)).encode()


def parquet(language: str, part: int) -> bytes:
    """CulturaX's columns."""
    import pyarrow
    import pyarrow.parquet

    found = texts(language, part)
    others = {name: ["x"] * len(found) for name in ("timestamp", "url", "source")}
    output = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": found, **others}), output)
    return output.getvalue()


def make_hub() -> Hub:
    """Three files of each corpus, and what is no text beside them."""
    slim = {
        f"train/chunk{chunk}/example_train_{part}.jsonl.zst": zstandard.compress(
            jsonl("en", part + 2 * (chunk - 1), meta={"redpajama_set_name": "RedPajamaC4"})
        )
        for chunk in (1, 2)
        for part in (0, 1)
    }
    sky = {f"data/2020-40_zh_head_000{part}.jsonl": jsonl("zh", part) for part in range(3)}
    return Hub({SLIMPAJAMA: slim, SKYPILE: {**sky, "data/README.md": b"text"}})


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    work = tmp_path_factory.mktemp("tokenizer")
    save_dense_model(work / "dense")
    return work / "dense"


def fetch(work: Path, endpoint: str, *arguments: str, **settings: object):
    """examples/download_data.sh against the stand-in."""
    hub = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": 0, "HF_HUB_DISABLE_XET": 1, "HF_HOME": work / "home"}
    hub |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1", "HF_TOKEN": ""}
    return run_script("download_data.sh", work, *arguments, **{**hub, "LANGUAGES": "en=2 zh", **settings})


def datasets(work: Path, dense: Path, **settings: object):
    """What examples/preprocess.sh makes of the files."""
    places = {"INPUT": "corpus/train/LANGUAGE/*", "VALID_INPUT": "corpus/valid/LANGUAGE/*"}
    return run_script("preprocess.sh", work, **{"HF": dense, **places, **settings})


def documents(work: Path, name: str) -> int:
    return json.loads((work / "data" / f"{name}.json").read_text())["documents"]


def test_from_the_hub_to_datasets(tmp_path, dense):
    """SlimPajama's over two folders, SkyPile's; a broken connection; a second start fetches only what is missing."""
    hub = make_hub()
    first = "data/2020-40_zh_head_0000.jsonl"
    # The client keeps what it has got in blocks of 10 MB.
    hub.files[SKYPILE][first] = jsonl("zh", 0, more="x" * 12_000_000)
    hub.cut.add(first)
    with serve(hub) as endpoint:
        done = fetch(tmp_path, endpoint)
        assert done.returncode == 0, done.stderr
        starts = [start for path, start in hub.sent if path == first]
        assert len(starts) == 2 and starts[0] == 0 and starts[1] >= 10_000_000
        found = sorted(path for path in (tmp_path / "corpus").rglob("*") if path.is_file())
        assert [str(path.relative_to(tmp_path / "corpus")) for path in found] == [
            "corpus.json",
            "train/en/train-chunk1-example_train_0.jsonl.zst",
            "train/en/train-chunk1-example_train_1.jsonl.zst",
            "train/zh/data-2020-40_zh_head_0000.jsonl",
            "valid/en/train-chunk2-example_train_0.jsonl.zst",
            "valid/zh/data-2020-40_zh_head_0001.jsonl",
        ]
        assert found[3].read_bytes() == hub.files[SKYPILE][first]
        record = json.loads(found[0].read_text())
        assert record["en"]["revision"] == COMMIT and record["zh"]["data_set"] == SKYPILE

        hub.sent.clear()
        found[3].unlink()
        assert fetch(tmp_path, endpoint).returncode == 0
        assert [path for path, _ in hub.sent] == [first]
    made = datasets(tmp_path, dense, EXPANDED="zh", ORIGINAL="en", VALID_DOCUMENTS=1)
    assert made.returncode == 0, made.stderr
    assert [documents(tmp_path, name) for name in ("train-zh", "review-en", "valid-en", "valid-zh")] == [2, 4, 1, 1]


@needs_pyarrow
def test_parquet_of_culturax(tmp_path, dense):
    hub = Hub({CULTURAX: {f"el/el_part_0000{part}.parquet": parquet("el", part) for part in range(3)}})
    hub.files[SLIMPAJAMA] = make_hub().files[SLIMPAJAMA]
    with serve(hub) as endpoint:
        done = fetch(tmp_path, endpoint, LANGUAGES="el=2 en=1")
    assert done.returncode == 0, done.stderr
    made = datasets(tmp_path, dense, EXPANDED="el", ORIGINAL="en")
    assert made.returncode == 0, made.stderr
    assert [documents(tmp_path, name) for name in ("train-el", "valid-el", "review-en")] == [4, 2, 2]


def test_dry_run_tells_files_sizes_and_terms_and_fetches_nothing(tmp_path):
    hub = make_hub()
    with serve(hub) as endpoint:
        done = fetch(tmp_path, endpoint, DRY_RUN=1)
    assert done.returncode == 0, done.stderr
    assert hub.sent == [] and not (tmp_path / "corpus").exists()
    for path, content in list(hub.files[SLIMPAJAMA].items())[:3]:
        assert f"{path} -> corpus/" in done.stdout and f"({len(content):,} bytes)" in done.stdout
    assert "Skywork Community License" in done.stdout and "GB free below corpus" in done.stdout


@pytest.mark.parametrize(
    ("settings", "prepare", "message"),
    [
        (
            {},
            lambda hub: hub.gated.add(SKYPILE),
            f"{SKYPILE}: accept its conditions at https://huggingface.co/datasets/",
        ),
        ({}, lambda hub: hub.files.pop(SKYPILE), f"{SKYPILE}: not on the hub, or it asks for a login"),
        ({}, lambda hub: hub.damaged.add("data/2020-40_zh_head_0000.jsonl"), "damaged on the way; start again"),
        ({"LANGUAGES": "zh=5"}, lambda hub: None, "has 3 files for zh, --shards 5 and --valid-shards 1"),
        ({"LANGUAGES": "zh=x"}, lambda hub: None, "--languages zh=x: write LANGUAGE or LANGUAGE=N"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, lambda hub: None, "the hub does not answer"),
    ],
)
def test_failures_are_one_line(tmp_path, settings, prepare, message):
    hub = make_hub()
    prepare(hub)
    with serve(hub) as endpoint:
        done = fetch(tmp_path, settings.get("HF_ENDPOINT", endpoint), LANGUAGES=settings.get("LANGUAGES", "zh"))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1 and message in errors[0], done.stderr
    assert not (tmp_path / "corpus" / "train").exists() and not (tmp_path / "corpus" / "corpus.json").exists()
