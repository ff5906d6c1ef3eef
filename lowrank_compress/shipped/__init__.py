"""The model code that compressed checkpoints carry: it computes with them, and makes ``from_pretrained`` load them.

The files import torch and transformers, each other relatively, and nothing else; `join` makes the one file of them that
is put into a checkpoint. `join` itself stays here.
"""
