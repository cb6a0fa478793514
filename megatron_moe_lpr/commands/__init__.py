"""Command lines: flags, one call into the package, what is printed. `moe-lpr` and the scripts of tools/ run them."""
