"""Symbolic links of directories that come from elsewhere."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.links import copy_private, file_inside, tree_inside


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with a file, beside one that it must not reach."""
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    for path in (directory / "file", directory / "sub" / "file", tmp_path / "secret"):
        path.write_text(path.name)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("other")
    return directory


def link(place: Path, text: object) -> Path:
    place.symlink_to(str(text))
    return place


GOOD = {
    "relative": lambda model: link(model / "x", "file"),
    "into a directory": lambda model: link(model / "x", "sub/file"),
    "absolute": lambda model: link(model / "x", model / "file"),
    "chain": lambda model: link(model / "x", link(model / "y", "sub/file").name),
    "from below": lambda model: link(model / "sub" / "x", "../file"),
    "text that leaves and comes back": lambda model: link(model / "x", "../model/file"),
    "through a linked directory": lambda model: link(model / "d", "sub") / "file",
}
BAD = {
    "absolute": lambda model: link(model / "x", model.parent / "secret"),
    "relative": lambda model: link(model / "x", "../secret"),
    "chain": lambda model: link(model / "x", link(model / "y", "../secret").name),
    "chain that comes back": lambda model: link(model / "x", link(model.parent / "elsewhere" / "y", model / "file")),
    "through a linked directory": lambda model: link(model / "d", "../elsewhere") / "file",
    "a neighbour of a longer name": lambda model: link(
        model / "x", link(model.with_name("model-2"), model.parent / "secret")
    ),
    "the parent": lambda model: link(model / "x", ".."),
    "a system file": lambda model: link(model / "x", "/etc/passwd"),
}


@pytest.mark.parametrize("make", GOOD.values(), ids=GOOD)
@pytest.mark.parametrize("through", ["itself", "a link"])
def test_inside(make: Callable[[Path], Path], through: str, model: Path, tmp_path: Path) -> None:
    path = make(model)
    directory = model if through == "itself" else link(tmp_path / "alias", model)
    real = file_inside(directory / path.relative_to(model), directory)
    assert real == path.resolve() and not real.is_symlink() and real.read_text() == "file"


@pytest.mark.parametrize("make", BAD.values(), ids=BAD)
def test_outside(make: Callable[[Path], Path], model: Path) -> None:
    path = make(model)
    with pytest.raises(UserError, match=rf"{path}: a symbolic link that leads out of {model}, to "):
        file_inside(path, model)
    with pytest.raises(UserError, match="leads out of"):
        tree_inside(model, model)


def test_to_nothing_and_in_a_circle(model: Path) -> None:
    link(model / "x", "nowhere")
    link(model / "a", "b")
    link(model / "b", "a")
    for name in "xa":
        with pytest.raises(UserError, match=rf"{model / name}: a symbolic link that leads to nothing"):
            file_inside(model / name, model)
    assert file_inside(model / "missing", model) == model / "missing"


def test_a_pipe_is_not_waited_for(model: Path) -> None:
    os.mkfifo(model / "config.json")
    with pytest.raises(UserError, match=r"config\.json: neither a file nor a directory"):
        file_inside(model / "config.json", model)


def test_tree(model: Path) -> None:
    link(model / "d", "sub")
    assert tree_inside(model, model) == {
        "file": model / "file",
        "sub/file": model / "sub" / "file",
        "d/file": model / "sub" / "file",
    }
    for place, text in ((model / "sub" / "up", ".."), (model / "sub" / "self", ".")):
        link(place, text)
        with pytest.raises(UserError, match="a directory that holds it"):
            tree_inside(model, model)
        place.unlink()
    (model / "other").mkdir()
    link(model / "sub" / "o", "../other")
    link(model / "other" / "s", "../sub")
    with pytest.raises(UserError, match="a directory that holds it"):
        tree_inside(model, model)


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """The hub's cache, as its client lays it out."""
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "0123"
    (snapshot / "sub").mkdir(parents=True)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    (blobs / "abc").write_text("blob")
    link(snapshot / "file", "../../blobs/abc")
    link(snapshot / "sub" / "file", "../../../blobs/abc")
    return snapshot


def test_the_hubs_blobs(snapshot: Path, tmp_path: Path) -> None:
    blob = snapshot.parents[1] / "blobs" / "abc"
    assert file_inside(snapshot / "file", snapshot) == blob
    assert file_inside(snapshot / "sub" / "file", snapshot / "sub") == blob
    alias = link(tmp_path / "alias", snapshot)
    assert tree_inside(alias, alias) == {"file": blob, "sub/file": blob}


@pytest.mark.parametrize("kind", ["another model's", "another revision", "a blob that is a link", "a linked blobs"])
def test_not_the_hubs_blobs(snapshot: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "secret").write_text("secret")
    blobs = snapshot.parents[1] / "blobs"
    if kind == "another model's":
        other = tmp_path / "hub" / "models--org--other" / "blobs"
        other.mkdir(parents=True)
        (other / "abc").write_text("other")
        path = link(snapshot / "x", other / "abc")
    elif kind == "another revision":
        (snapshot.parent / "4567").mkdir()
        (snapshot.parent / "4567" / "x").write_text("other")
        path = link(snapshot / "x", "../4567/x")
    elif kind == "a blob that is a link":
        link(blobs / "def", tmp_path / "secret")
        path = link(snapshot / "x", "../../blobs/def")
    else:
        blobs.rename(tmp_path / "moved")
        link(blobs, tmp_path)
        path = link(snapshot / "x", "../../blobs/secret")
    with pytest.raises(UserError, match="leads out of"):
        file_inside(path, snapshot)


def test_a_directory_called_snapshots_is_not_the_hubs(tmp_path: Path) -> None:
    model = tmp_path / "mine" / "snapshots" / "1"
    model.mkdir(parents=True)
    (tmp_path / "mine" / "blobs").mkdir()
    (tmp_path / "mine" / "blobs" / "abc").write_text("other")
    with pytest.raises(UserError, match="leads out of"):
        file_inside(link(model / "x", "../../blobs/abc"), model)


@pytest.mark.parametrize(
    ("mode", "copied"),
    [(0o600, 0o600), (0o640, 0o640), (0o644, 0o644), (0o777, 0o644), (0o4755, 0o644), (0o444, 0o644)],
)
def test_permissions_of_a_copy(tmp_path: Path, mode: int, copied: int) -> None:
    (tmp_path / "source").write_text("text")
    (tmp_path / "source").chmod(mode)
    before = os.umask(0o022)
    try:
        copy_private(tmp_path / "source", tmp_path / "a" / "copy")
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "copy").stat().st_mode & 0o7777 == copied
    assert (tmp_path / "a" / "copy").read_text() == "text"
