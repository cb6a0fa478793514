"""Which differences of two descriptions make another run."""

from megatron_moe_lpr.training.configuration.description import differences

DATA = ["el 0.5 documents 0-9 index a text b", "en 0.5 documents 0-9 index c text d"]
NOW = {"languages": ["el", "en"], "original_languages": ["en", "es", "zh"], "data": DATA}


def test_originals_without_training_data_make_no_difference():
    for recorded in (["en"], ["en", "zh"], ["EN"], ["English", "fr"], ["en-US"]):
        assert differences(NOW | {"original_languages": recorded}, NOW) == {}
    stage_1 = {"languages": ["el"], "original_languages": []}
    assert differences(stage_1, stage_1 | {"original_languages": ["en", "es", "zh"]}) == {}


def test_originals_with_training_data_do():
    assert differences(NOW, NOW | {"original_languages": ["es", "zh"]}) == {"original_languages": (["en"], [])}
    found = differences(NOW, NOW | {"original_languages": ["el", "en"]})
    assert found == {"original_languages": (["en"], ["el", "en"])}


def test_old_spellings_are_the_same_data():
    old = {"languages": ["EN", "el"], "original_languages": ["EN"], "data": [DATA[0], DATA[1].replace("en ", "EN ")]}
    assert differences(old, NOW) == {}
    assert "data" in differences(old, NOW | {"data": [DATA[0], DATA[1].replace("en 0.5", "en 0.6")]})
