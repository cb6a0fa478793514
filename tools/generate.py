#!/usr/bin/env python3
"""The command `moe-lpr generate` as a script of a clone."""

from megatron_moe_lpr.commands.generate import main
from megatron_moe_lpr.errors import run_command

if __name__ == "__main__":
    run_command(main)
