"""llama.cpp's converter for a model with the demo's tokenizer; run by its environment's Python.

    convert_to_gguf.py LLAMA_CPP MODEL OUTPUT

The converter knows published tokenizers by a checksum and refuses others. The demo's splits text as GPT-2's does
(`ByteLevel` with its regular expression), so it is named that.
"""

import runpy
import sys

sources, model, output = sys.argv[1:]
sys.path[:0] = [sources, f"{sources}/gguf-py"]

from conversion.base import TextModel  # noqa: E402

TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", output, "--outtype", "f32"]
runpy.run_path(f"{sources}/convert_hf_to_gguf.py", run_name="__main__")
