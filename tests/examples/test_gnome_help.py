"""Pages of GNOME's help to JSON lines: paragraphs without mark-up, untranslated ones left out."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "demo" / "gnome_help.py"
PAGE = '<page xmlns="http://projectmallard.org/1.0/" id="a"><title>{}</title><section><p>{}</p></section></page>'


def write_page(directory: Path, language: str, title: str, text: str) -> None:
    place = directory / language / "gnome-help"
    place.mkdir(parents=True)
    (place / "a.page").write_text(PAGE.format(title, text), encoding="utf-8")


def convert(pages: Path, output: Path, *languages: str) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, "--pages", pages, "--output", output, "--languages", *languages]
    return subprocess.run(command, capture_output=True, text=True)


def test_text_without_markup_and_without_what_is_not_translated(tmp_path):
    write_page(tmp_path, "C", "Sound", "Press <key>Enter</key>\n  now.")
    write_page(tmp_path, "hu", "Hang", "Press <key>Enter</key> now.")
    done = convert(tmp_path, tmp_path / "out", "en", "hu")
    assert done.returncode == 0, done.stderr
    read = {name: json.loads((tmp_path / "out" / f"{name}.jsonl").read_text("utf-8")) for name in ("en", "hu")}
    assert read == {"en": {"id": "a.page", "text": "Sound\nPress Enter now."}, "hu": {"id": "a.page", "text": "Hang"}}


def test_no_pages_and_broken_ones_are_named(tmp_path):
    done = convert(tmp_path, tmp_path / "out", "hu")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "no *.page" in done.stderr
    write_page(tmp_path, "C", "Sound", "<p>")
    done = convert(tmp_path, tmp_path / "out", "en")
    assert done.returncode == 1 and "a.page: not a Mallard page" in done.stderr
