"""The directory of an extended tokenizer, which transformers loads as it loads that of the base."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_moe_lpr.conversion.hugging_face.exported_tokenizer import TOKENIZER, settle_tokenizer
from megatron_moe_lpr.conversion.hugging_face.hf_directory import carried_files, carry_files
from megatron_moe_lpr.data.tokenizer import ORIGIN, SentencePieceTokenizer, load_tokenizer
from megatron_moe_lpr.data.tokenizer_settings import CONFIG
from megatron_moe_lpr.files.json_files import read_json, write_json
from megatron_moe_lpr.vocabulary.figures import ExtensionFigures

REPORT_FILE, PLOT_FILE = "extension_report.json", "extension_report.svg"
NOT_CARRIED = (TOKENIZER, "vocab.json", "merges.txt", "README.md", REPORT_FILE, PLOT_FILE)
"""Other forms of the base's tokenizer, its model card, and the report of an earlier extension."""


def write_directory(base: Path, content: dict[str, Any], figures: ExtensionFigures, target: Path) -> str:
    """Write all files but the record of the extension; return the fingerprint of the tokenizer.

    Args:
        base: directory of the base tokenizer.
        content: fields of the extended tokenizer.json.
        figures: what the extension brings.
        target: an empty directory.
    """
    files = carried_files(base)
    carry_files(
        {name: file for name, file in files.items() if name not in NOT_CARRIED and file.suffix != ".model"}, target
    )
    if isinstance(load_tokenizer(base), SentencePieceTokenizer):
        content = _with_settings(base, content, target)
    settings = read_json(target / CONFIG) if (target / CONFIG).is_file() else {}
    if settings.pop(ORIGIN, None) is not None:
        write_json(settings, target / CONFIG)
    (target / TOKENIZER).write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
    for warning in settle_tokenizer(target):
        print(f"warning: {warning}", file=sys.stderr)
    write_json(figures.record(), target / REPORT_FILE)
    (target / PLOT_FILE).write_text(figures.plot(), encoding="utf-8")
    return load_tokenizer(target).fingerprint


def _with_settings(base: Path, content: dict[str, Any], target: Path) -> dict[str, Any]:
    """Add what transformers' class for SentencePiece models knows by itself: special tokens' names, BOS before a text.

    Writes tokenizer_config.json to `target` and returns tokenizer.json with the post-processor.
    """
    with tempfile.TemporaryDirectory() as name:
        trial = Path(name)
        carry_files(carried_files(base), trial)
        settle_tokenizer(trial)
        write_json(read_json(trial / CONFIG), target / CONFIG)
        return {**content, "post_processor": read_json(trial / TOKENIZER)["post_processor"]}
