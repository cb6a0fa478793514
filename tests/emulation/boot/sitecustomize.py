"""Read by every Python that starts with this folder on PYTHONPATH: the emulation goes in before Megatron is imported.

Not at once: most of torchrun's own processes never need it.
"""

import sys

NEEDS_DEVICE = ("megatron_moe_lpr", "megatron", "transformer_engine")


class Finder:
    """Stands first in line for imports until one of these packages is asked for."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in NEEDS_DEVICE:
            sys.meta_path.remove(self)
            from tests.emulation.start import emulate

            emulate()


sys.meta_path.insert(0, Finder())
