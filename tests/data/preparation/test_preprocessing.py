import dataclasses
import json
import os

import numpy as np
import pytest
import sentencepiece
import tokenizers
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_moe_lpr.data.indexed import read_lengths
from megatron_moe_lpr.data.manifest import read_manifest
from megatron_moe_lpr.data.preparation import encoding, sources
from megatron_moe_lpr.data.preparation.merging import merge
from megatron_moe_lpr.data.preparation.preprocessing import preprocess
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files import renaming
from tests.data.builders import CORPUS, EOD_TOKEN, LANGUAGES, corpus_texts, make_plan, run_plan, write_jsonl

SUFFIXES = (".bin", ".idx", ".json")
ODD_TEXTS = ["emoji 😀👩‍👩‍👧", "nul \0 in it", " leading and trailing \n", "\u200bzero width", "ǅ ﷽ \U0001f9ff", "a"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Many blocks from small inputs, in this process and in those forked off it."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", 20_000)


def reference_ids(path, texts):
    """Ids and EOD by the libraries themselves."""
    if path.is_dir():
        library = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        return [library.encode(text, add_special_tokens=False).ids for text in texts], 0, library.decode
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [library.encode(text) for text in texts], library.eos_id(), library.decode


def contents(prefix):
    return [prefix.with_name(prefix.name + suffix).read_bytes() for suffix in SUFFIXES]


@pytest.mark.parametrize("language", ["el", "zh"])
def test_corpus_reads_back_as_the_text(any_tokenizer, tmp_path, language):
    texts = corpus_texts("valid", language)
    manifest = run_plan(
        CORPUS / "valid" / f"{language}.jsonl.zst", tmp_path / "x", any_tokenizer, language=language, workers=2
    )
    dataset = IndexedDataset(str(tmp_path / "x"))
    documents = [dataset[index].tolist() for index in range(len(dataset))]
    ids, eod, decode = reference_ids(any_tokenizer, texts)
    assert documents == [[*expected, eod] for expected in ids]
    assert [decode(document[:-1]) for document in documents] == texts
    assert (manifest.language, manifest.eod, manifest.documents) == (language, eod, len(texts))
    assert manifest.tokens == sum(map(len, documents)) == int(dataset.sequence_lengths.sum())
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
    assert manifest == read_manifest(str(tmp_path / "x")) and manifest.skipped == {}


@pytest.mark.parametrize("split", [True, False])
def test_mentions_of_the_end_of_document_are_counted(hf_tokenizer, tmp_path, capsys, split):
    texts = [f"a page about {EOD_TOKEN}", "plain", f"{EOD_TOKEN} twice {EOD_TOKEN}"]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = run_plan(source, tmp_path / "x", hf_tokenizer, split_special_tokens=split, workers=2)
    dataset = IndexedDataset(str(tmp_path / "x"))
    documents = [dataset[index].tolist() for index in range(3)]
    assert [document.count(manifest.eod) for document in documents] == ([1, 1, 1] if split else [2, 1, 3])
    assert all(document[-1] == manifest.eod for document in documents)
    error = capsys.readouterr().err
    if split:
        decode = reference_ids(hf_tokenizer, [])[2]
        assert [decode(document[:-1]) for document in documents] == texts
        assert manifest.skipped == {"kept_with_special_tokens_as_text": 2}
    else:
        inside = {"kept_with_end_of_document_inside": 2, "kept_with_special_tokens_as_tokens": 2}
        assert manifest.skipped == inside and "kept: 2 kept_with_end_of_document_inside" in error
    assert f"a.jsonl: {EOD_TOKEN})" in error


def test_no_eod(hf_tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    manifest = run_plan(source, tmp_path / "x", hf_tokenizer, append_eod=False)
    ids, _, _ = reference_ids(hf_tokenizer, ["one", "two"])
    dataset = IndexedDataset(str(tmp_path / "x"))
    assert dataset[0].tolist() == ids[0]
    assert (manifest.append_eod, manifest.tokens) == (False, sum(map(len, ids)))


def test_odd_documents_are_kept_or_counted(any_tokenizer, tmp_path):
    source = tmp_path / "a.jsonl"
    rows = [json.dumps({"text": text}) for text in ["", " \n\t", *ODD_TEXTS, "lone \ud800 surrogate"]]
    source.write_text("\n".join(rows) + "\n", encoding="utf-8")
    manifest = run_plan(source, tmp_path / "x", any_tokenizer)
    texts = [*ODD_TEXTS, "lone \ufffd surrogate"]
    dataset = IndexedDataset(str(tmp_path / "x"))
    decode = reference_ids(any_tokenizer, [])[2]
    assert [decode(dataset[index][:-1].tolist()) for index in range(len(dataset))] == texts
    assert manifest.skipped == {"empty": 2, "kept_with_replaced_surrogates": 1}


def test_very_long_document(hf_tokenizer, tmp_path):
    text = "\n".join(corpus_texts("train", "en"))
    text = (text * (10_000_000 // len(text) + 1))[:10_000_000]
    source = write_jsonl(tmp_path / "a.jsonl", ["before", text, "after"])
    manifest = run_plan(source, tmp_path / "x", hf_tokenizer, workers=2)
    dataset = IndexedDataset(str(tmp_path / "x"))
    library = tokenizers.Tokenizer.from_file(str(hf_tokenizer / "tokenizer.json"))
    assert library.decode(dataset[1][:-1].tolist()) == text
    assert manifest.documents == 3 and manifest.text_bytes == len(text.encode()) + 11


def test_same_output_for_any_number_of_workers(hf_tokenizer, tmp_path):
    inputs = [CORPUS / "valid" / "en.jsonl.zst", CORPUS / "valid" / "es.jsonl.zst"]
    for workers in (1, 4):
        run_plan(inputs, tmp_path / str(workers), hf_tokenizer, workers=workers, shuffle_seed=3)
    assert contents(tmp_path / "1") == contents(tmp_path / "4")
    run_plan(inputs, tmp_path / "plain", hf_tokenizer)
    plain, shuffled = (read_lengths(str(tmp_path / name)) for name in ("plain", "1"))
    assert plain.tolist() != shuffled.tolist() and sorted(plain) == sorted(shuffled)


@pytest.mark.parametrize("shuffle_seed", [None, 7])
def test_three_partitions_merged_are_one_run(hf_tokenizer, tmp_path, shuffle_seed):
    (tmp_path / "in").mkdir()
    for language in ("hu", "tr"):
        write_jsonl(tmp_path / "in" / f"{language}.jsonl", [*corpus_texts("valid", language), " "])
    inputs = str(tmp_path / "in" / "*.jsonl")
    run_plan(inputs, tmp_path / "one", hf_tokenizer, shuffle_seed=shuffle_seed)
    parts = [run_plan(inputs, tmp_path / "part", hf_tokenizer, partition=(index, 3)) for index in (3, 1, 2)]
    assert all(part.documents > 20 for part in parts)
    merge([str(tmp_path / "part-*-of-00003")], str(tmp_path / "merged"), shuffle_seed)
    assert contents(tmp_path / "one") == contents(tmp_path / "merged")


def test_one_prefix_for_each_language(hf_tokenizer, tmp_path):
    rows = [{"body": text, "lang": name} for name in LANGUAGES for text in corpus_texts("valid", name)[:5]]
    source = write_jsonl(tmp_path / "a.jsonl", rows[::2] + rows[1::2])
    manifests = preprocess(
        make_plan(source, tmp_path / "x", hf_tokenizer, language=None, language_key="lang", json_key="body")
    )
    assert {prefix: manifest.language for prefix, manifest in manifests.items()} == {
        str(tmp_path / f"x_{name}"): name for name in LANGUAGES
    }
    decode = reference_ids(hf_tokenizer, [])[2]
    for name in LANGUAGES:
        dataset = IndexedDataset(str(tmp_path / f"x_{name}"))
        found = {decode(dataset[index][:-1].tolist()) for index in range(len(dataset))}
        assert found == set(corpus_texts("valid", name)[:5])
    assert not (tmp_path / "x.json").exists()


def test_max_documents(hf_tokenizer, tmp_path):
    source = CORPUS / "valid" / "en.jsonl.zst"
    manifest = run_plan(source, tmp_path / "x", hf_tokenizer, max_documents=30)
    texts = corpus_texts("valid", "en")[:30]
    assert manifest.documents == 30 and manifest.text_bytes == sum(len(text.encode()) for text in texts)
    assert manifest.tokens == sum(map(len, reference_ids(hf_tokenizer, texts)[0])) + 30


def test_bad_line_stops_and_leaves_nothing(hf_tokenizer, tmp_path):
    rows = [*[json.dumps({"text": "word " * 100})] * 150, "{broken", *[json.dumps({"text": "x"})] * 50]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    for partition in ((1, 1), (2, 2)):
        with pytest.raises(UserError, match=r"a\.jsonl:151: malformed JSON .*--on-error skip"):
            run_plan(tmp_path / "a.jsonl", tmp_path / "out" / "x", hf_tokenizer, workers=2, partition=partition)
    assert os.listdir(tmp_path / "out") == []
    manifest = run_plan(tmp_path / "a.jsonl", tmp_path / "out" / "x", hf_tokenizer, stop_on_error=False)
    assert (manifest.documents, manifest.skipped) == (200, {"malformed": 1})


def test_existing_output(hf_tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["one"])
    run_plan(source, tmp_path / "x", hf_tokenizer)
    before = contents(tmp_path / "x")
    write_jsonl(source, ["two words"])
    with pytest.raises(UserError, match=r"x\.json: exists; .*--overwrite"):
        run_plan(source, tmp_path / "x", hf_tokenizer)
    assert contents(tmp_path / "x") == before
    run_plan(source, tmp_path / "x", hf_tokenizer, overwrite=True)
    assert contents(tmp_path / "x") != before
    source = write_jsonl(tmp_path / "y.json", ["one"])
    with pytest.raises(UserError, match="would replace the input"):
        run_plan(source, tmp_path / "y", hf_tokenizer, overwrite=True)


def test_killed_worker_is_one_clear_error(hf_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding.BlockEncoder, "encode", lambda *_: os._exit(9))
    with pytest.raises(UserError, match="worker process was killed"):
        run_plan(write_jsonl(tmp_path / "a.jsonl", ["one"]), tmp_path / "out" / "x", hf_tokenizer)
    assert os.listdir(tmp_path / "out") == []


def dataset_bytes(directory):
    """Content of each file of the dataset x; nothing else but a.jsonl may be there."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in ("a.jsonl", "b.jsonl")}


@pytest.mark.parametrize("step", range(8))
def test_a_failure_while_publishing_leaves_the_dataset_that_was_there(hf_tokenizer, tmp_path, monkeypatch, step):
    run_plan(write_jsonl(tmp_path / "a.jsonl", ["one"]), tmp_path / "x", hf_tokenizer)
    before, rename, count = dataset_bytes(tmp_path), os.rename, [0]

    def failing(source, target):
        count[0] += 1
        if count[0] == step + 1:
            raise OSError("disk")
        rename(source, target)

    monkeypatch.setattr(renaming, "_system_call", lambda: None)
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="disk"):
        run_plan(write_jsonl(tmp_path / "b.jsonl", ["two three"]), tmp_path / "x", hf_tokenizer, overwrite=True)
    assert dataset_bytes(tmp_path) == before
    read_manifest(str(tmp_path / "x"))


def test_the_next_run_puts_back_what_a_killed_one_was_exchanging(hf_tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["one"])
    run_plan(source, tmp_path / "x", hf_tokenizer)
    before, work = dataset_bytes(tmp_path), tmp_path / ".x.partial-0123"
    for name in ("old", "content"):
        (work / name).mkdir(parents=True)
    for name in ("x.json", "x.bin"):
        (tmp_path / name).rename(work / "old" / name)
    (tmp_path / "x.bin").write_bytes(b"new")
    (work / "content" / "x.json").write_bytes(b"new")
    (work / "moves.json").write_text(json.dumps({"old": ["x.json", "x.bin", "x.idx"], "new": ["x.bin", "x.json"]}))
    with pytest.raises(UserError, match="exists; choose another"):
        run_plan(source, tmp_path / "x", hf_tokenizer)
    assert dataset_bytes(tmp_path) == before


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "directory"])
def test_what_no_dataset_may_replace(hf_tokenizer, tmp_path, suffix, kind):
    source, place = write_jsonl(tmp_path / "a.jsonl", ["one"]), tmp_path / f"x{suffix}"
    if kind == "directory":
        place.mkdir()
    else:
        (tmp_path / "real").write_text("mine")
        place.symlink_to("real" if kind == "link" else "nowhere")
    with pytest.raises(UserError, match=rf"x\{suffix}: "):
        run_plan(source, tmp_path / "x", hf_tokenizer, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} - {"real"} == {"a.jsonl", place.name}
    assert kind == "directory" or (place.is_symlink() and (tmp_path / "real").read_text() == "mine")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_truncated_files_are_refused(hf_tokenizer, tmp_path, suffix):
    run_plan(write_jsonl(tmp_path / "a.jsonl", ["one"]), tmp_path / "x", hf_tokenizer)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"x\{suffix}: truncated"):
        read_manifest(str(tmp_path / "x"))
    path.unlink()
    with pytest.raises(UserError, match=rf"x\{suffix}: missing"):
        read_manifest(str(tmp_path / "x"))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "other"}', "\0"])
def test_damaged_manifest(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=r"x\.json: not a manifest"):
        read_manifest(str(tmp_path / "x"))


class TestMerging:
    @pytest.fixture
    def datasets(self, hf_tokenizer, sp_model, tmp_path):
        source = write_jsonl(tmp_path / "a.jsonl", ["one two", "three"])
        for name, tokenizer, language in (
            ("en", hf_tokenizer, "en"),
            ("el", hf_tokenizer, "el"),
            ("sp", sp_model, "en"),
        ):
            run_plan(source, tmp_path / name, tokenizer, language=language)
        for index in (1, 2, 3):
            run_plan(source, tmp_path / "part", hf_tokenizer, partition=(index, 3))
        run_plan(write_jsonl(tmp_path / "b.jsonl", ["four"]), tmp_path / "more", hf_tokenizer)
        return tmp_path

    def test_order_and_counts(self, datasets):
        manifest = merge([str(datasets / "more"), str(datasets / "en.bin")], str(datasets / "out"))
        merged, en, more = (IndexedDataset(str(datasets / name)) for name in ("out", "en", "more"))
        expected = [more[0].tolist(), en[0].tolist(), en[1].tolist()]
        assert [merged[index].tolist() for index in range(3)] == expected
        assert manifest.documents == 3 and manifest.text_bytes == 4 + 7 + 5
        assert [os.path.basename(source.name) for source in manifest.sources] == ["b.jsonl", "a.jsonl"]
        assert manifest.tokens == sum(map(len, expected)) and np.sum(merged.sequence_lengths) == manifest.tokens

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["en", "el"], "language is el, but en"),
            (["en", "sp"], "tokenizer is"),
            (["en", "nothing"], r"nothing\.json: no such file"),
            (["none*"], "no dataset of that name"),
            (["en", "en"], "given twice"),
            (["part-00001-of-00003", "part-00003-of-00003"], r"partition 2/3 is missing"),
            (["part-00001-of-00003", "en"], "not a partition, but other inputs are"),
        ],
    )
    def test_refusals(self, datasets, names, message):
        with pytest.raises(UserError, match=message):
            merge([str(datasets / name) for name in names], str(datasets / "out"))
        assert not list(datasets.glob("*out*"))

    def test_missing_partition_allowed_on_demand(self, datasets):
        names = [str(datasets / f"part-0000{index}-of-00003") for index in (3, 1)]
        assert merge(names, str(datasets / "out"), allow_missing_partitions=True).partition is None

    def test_manifest_is_of_the_output(self, datasets):
        manifest = merge([str(datasets / "en")], str(datasets / "out"), shuffle_seed=1)
        assert dataclasses.replace(manifest, shuffle_seed=None).documents == 2 and manifest.shuffle_seed == 1
        with pytest.raises(UserError, match="exists"):
            merge([str(datasets / "en")], str(datasets / "out"))
        with pytest.raises(UserError, match="is an input too"):
            merge([str(datasets / "en")], str(datasets / "en"), overwrite=True)
