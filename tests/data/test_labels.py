"""Names of datasets that share a language."""

import pytest

from megatron_moe_lpr.data.labels import dataset_labels


@pytest.mark.parametrize(
    ("datasets", "labels"),
    [
        ([("/data/el", "el"), ("/data/hu", "hu")], ["el", "hu"]),
        ([("/data/news", "el"), ("/data/books", "el"), ("/data/hu", "hu")], ["el/news", "el/books", "hu"]),
        ([("/a/el", "el"), ("/b/el", "el")], ["el/a/el", "el/b/el"]),
        ([("/a/x/el", "el"), ("/b/x/el", "el"), ("/a/y/el", "el")], ["el/a/x/el", "el/b/x/el", "el/y/el"]),
        ([("el", "el"), ("./el", "el")], ["el/el/1", "el/el/2"]),
        ([("", "el"), ("", "el")], ["el/1", "el/2"]),
        ([("el", "el"), ("a/el", "el")], ["el/el", "el/a/el"]),
        ([], []),
    ],
)
def test_labels_are_short_and_all_different(datasets, labels):
    assert dataset_labels(datasets) == labels
    assert len(set(labels)) == len(labels)
