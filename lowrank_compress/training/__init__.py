"""Training of a compressed model: what is trained, towards what, and how."""
