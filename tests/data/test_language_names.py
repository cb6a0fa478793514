"""Names of languages against what ISO 639 and BCP 47 say, and misspellings."""

import pytest

from megatron_moe_lpr.data.language_names import (
    canonical_language,
    covers,
    is_known,
    language_title,
    likely_meaning,
    split_names,
)

SPELLINGS = {
    "el": "el EL ell ELL gre Greek greek GREEK ell_Grek el-Grek gr Ελληνικά",
    "en": "en EN eng English eng_Latn us",
    "zh": "zh zho chi Chinese cmn cn Mandarin 中文",
    "zh-CN": "zh_CN zh-cn zh_CN.UTF-8",
    "zh-Hans": "zh-Hans zho_Hans ZH_HANS",
    "en-US": "en-US en_us eng-US en_US.UTF-8",
    "he": "he iw heb Hebrew",
    "ja": "ja jp jpn Japanese",
    "cs": "cs cz ces cze Czech",
    "uk": "uk ua ukr Ukrainian",
    "yue": "yue zh-yue Cantonese",
    "gsw": "gsw Swiss_German",
    "nb": "nb nob Norwegian-Bokmål",
    "es-419": "es-419",
    "ceb": "ceb Cebuano",
}


@pytest.mark.parametrize("code", SPELLINGS)
def test_one_spelling_for_each_language(code):
    for word in SPELLINGS[code].split():
        assert canonical_language(f" {word} ") == code, word
    assert is_known(code)


@pytest.mark.parametrize("tag", ["code", "el-tech", "EL-tech", "german-web", "math", "xq", "en-legal", "el-tech-2"])
def test_own_tags_stay_as_they_are(tag):
    assert canonical_language(tag) == tag and not is_known(tag) and language_title(tag) == tag


@pytest.mark.parametrize(
    ("name", "language", "same"),
    [
        ("en", "en-US", True),
        ("en-US", "en", True),
        ("en-US", "en-GB", False),
        ("zh", "zh-Hant", True),
        ("zh-Hans", "zh-CN", True),
        ("zh-Hans", "zh-TW", False),
        ("pt-BR", "pt-PT", False),
        ("sr", "sr-Latn", True),
        ("no", "nb", True),
        ("el", "el-tech", False),
        ("el-tech", "el-tech", True),
        ("el", "en", False),
        ("ar", "arz", False),
    ],
)
def test_regions_and_scripts(name, language, same):
    assert covers(name, language) is same and covers(language, name) is same


@pytest.mark.parametrize(
    ("given", "data", "meaning"),
    [
        ("Englsh", ["en", "el"], "en"),
        ("Englsh", ["el"], "en"),
        ("Englisch", ["en"], "en"),
        ("enn", ["en", "el"], "en"),
        ("ek", ["el", "hu"], "el"),
        ("el-teck", ["el-tech", "hu"], "el-tech"),
        ("Code", ["code"], "code"),
        ("kr", ["ko"], "ko"),
        ("se", ["sv"], "sv"),
        ("kau", ["ko"], None),
        ("es", ["el", "hu", "tr"], None),
        ("km", ["ar"], None),
        ("en-legal", ["el-legal"], None),
        ("code", ["el", "hu", "tr"], None),
        ("xx", ["el", "en"], None),
    ],
)
def test_what_a_misspelled_name_may_mean(given, data, meaning):
    assert likely_meaning(given, data) == meaning


def test_lists_are_split():
    assert split_names(["en,es , zh", "Swiss German;Haitian Creole", "en es"]) == [
        "en",
        "es",
        "zh",
        "Swiss German",
        "Haitian Creole",
        "en",
        "es",
    ]
