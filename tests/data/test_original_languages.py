"""--original-languages, whatever the data happens to have."""

import pytest

from megatron_moe_lpr.data.original_languages import parse_languages, read_original_languages
from megatron_moe_lpr.errors import UserError

STAGE_1 = ["el", "hu", "tr"]


@pytest.mark.parametrize("given", [["en", "es", "zh"], ["en,es,zh"], ["EN", " es", "zho"], ["English, Spanish,cn,en"]])
def test_all_originals_are_known_without_their_data(given):
    found = read_original_languages(given, STAGE_1)
    assert found.names == ("en", "es", "zh")
    assert found == read_original_languages(given, STAGE_1)
    assert any("the data has nothing of en (English), es (Spanish), zh (Chinese)" in note for note in found.notes)
    assert read_original_languages(given, [*STAGE_1, "en", "es", "zh"]).names == found.names


def test_spellings_are_said():
    assert "EN is read as en (English)" in read_original_languages(["EN"], ["en"]).notes[0]
    assert read_original_languages(["en"], ["en"]).notes == ()


def test_the_history_adds_its_own():
    found = read_original_languages(["en"], ["en", "el"], {"English", "zh"})
    assert found.names == ("en", "zh") and "history also has zh (Chinese)" in found.notes[0]
    assert read_original_languages([], ["en", "el"], {"en"}).notes == ()
    assert "none given and none in the checkpoint's history" in read_original_languages([], ["en"]).notes[0]


def test_tags_of_the_users_own():
    assert read_original_languages(["el-tech", "code"], ["el-tech", "el"]).names == ("code", "el-tech")
    notes = read_original_languages(["code", "en"], ["el", "en-tech"]).notes
    assert any("code: neither the code nor the name of a language" in note for note in notes)
    assert any("en-tech of the data is not among them and counts as expanded" in note for note in notes)


def test_a_misspelled_tag_of_the_data_is_named():
    (note,) = read_original_languages(["en", "Englsh"], ["en", "Englsh"]).notes or ("",)
    assert note == ""
    notes = read_original_languages(["en"], ["en", "Englsh"]).notes
    assert any(note.startswith("Englsh of the data is no known language") for note in notes)


@pytest.mark.parametrize(
    ("given", "data", "words"),
    [
        ("Englsh", ["en", "el"], "the data has el, en; write en if you mean en (English)"),
        ("Englsh", ["el"], "write en if you mean en (English)"),
        ("el-teck", ["el-tech"], "write el-tech if you mean el-tech"),
        ("kr", ["ko"], "if you mean ko (Korean), write ko, else write its three-letter code"),
    ],
)
def test_near_misses_are_refused_with_a_suggestion(given, data, words):
    with pytest.raises(UserError) as error:
        read_original_languages(["zh", given], data)
    assert words in str(error.value) and str(error.value).startswith(f"--original-languages {given}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", ["en|es", "'en'", "[en]", "(en)", "en/es", "en+es", "en=1", "*", "0.2", "en:es"])
def test_what_cannot_be_a_name_is_refused(given):
    """As a tag of the user's own it would leave English to be trained on as an expanded language."""
    with pytest.raises(UserError, match="separate several by white space or commas") as error:
        read_original_languages([given], ["el", "en"])
    assert str(error.value).startswith(f"--original-languages {given}: ")
    with pytest.raises(UserError, match="white space or commas"):
        parse_languages([given], "--languages")


@pytest.mark.parametrize("given", ["हिन्दी", "el_GR.UTF-8", "ca@valencia", "my_own-tag2"])
def test_letters_of_any_script_and_locales_are_names(given):
    assert len(read_original_languages([given], ["el", "en"]).names) == 1


def test_lists_of_other_flags():
    assert parse_languages(["EN, es", "en"], "--languages")[0] == ["en", "es"]
    assert parse_languages(["en", "Yunanca"], "--languages")[1] == [
        "--languages: Yunanca: neither the code nor the name of a language; taken as a tag of your own"
    ]
    with pytest.raises(UserError, match=r"^--languages Frensh: "):
        parse_languages(["Frensh"], "--languages")
