"""The storage formats of a compressed linear layer, one a file."""
