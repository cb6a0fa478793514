"""Public sets in their own forms become what the measuring of `make real` reads."""

import json

import pytest

from examples.real import public_sets
from examples.real.inputs import Inputs, other_texts, sentence_pairs
from megatron_moe_lpr.errors import UserError


def test_each_set_is_read(tmp_path):
    paragraphs = [{"context": "\ufeffΜια παράγραφος.", "qas": []}, {"context": "Άλλη.", "qas": []}]
    (tmp_path / "xquad.el.json").write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    causes = [("Elmosolyodott.", "Elvörösödött.", "Látszott.", 1), ("Esett.", "Vizes lett.", "Száraz lett.", 0)]
    keys = ("premise", "choice1", "choice2", "label")
    pairs = {"b": ("Two cats sleep.", "Two cats sleeps."), "a": ("One cat sleeps.", "One cat sleep.")}
    for name, pair in pairs.items():
        line = {"sentence_good": pair[0], "sentence_bad": pair[1], "UID": name}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    for first in (0, 1):  # the number that stands for the first alternative
        rows = [dict(zip(keys, (*one[:3], one[3] + first), strict=True)) for one in causes]
        (tmp_path / "train.json").write_text(json.dumps(rows))
        words = ("--xquad", "xquad.el.json", "--hucopa", "train.json", "--blimp", "b.jsonl", "a.jsonl")
        words = [str(tmp_path / word) if word.endswith(("json", "jsonl")) else word for word in words]
        public_sets.main([*words, "--output", str(tmp_path / "sets")])
        (el, hu) = other_texts(Inputs(text=tmp_path / "sets"))
        assert (el.name, el.language, el.documents) == ("xquad", "el", ("Μια παράγραφος.", "Άλλη."))
        assert (hu.name, hu.documents) == ("hucopa", ("Elmosolyodott. Látszott.", "Esett. Vizes lett."))
        assert sentence_pairs(Inputs(pairs=tmp_path / "sets" / "blimp.en.jsonl")) == [pairs["a"], pairs["b"]]


@pytest.mark.parametrize("content", ["[", "{}", '{"data": [{}]}', '{"data": 3}'])
def test_a_file_of_another_form_is_named(tmp_path, content):
    file = tmp_path / "xquad.el.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"xquad\.el\.json: of another form"):
        public_sets.main(["--xquad", str(file), "--output", str(tmp_path / "sets")])
    assert not list((tmp_path / "sets").iterdir())
