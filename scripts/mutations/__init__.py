"""Named mutations of what `lrc` reads; a table a file. `scripts/mutate.py` tries them."""
