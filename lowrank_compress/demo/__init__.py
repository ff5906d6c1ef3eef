"""The demo: a small Llama trained by this project, and the text that trains, calibrates and evaluates it.

``scripts/train_demo_model.py`` made the checkpoint in `MODEL_DIRECTORY`;
`lowrank_compress.demo.text` extracts the text.
"""

from pathlib import Path

MODEL_DIRECTORY = Path(__file__).resolve().parent / "model"
