"""`python -m lowrank_compress` is `lrc`: what torchrun starts."""

from lowrank_compress.cli.main import app

app(prog_name="lrc")
