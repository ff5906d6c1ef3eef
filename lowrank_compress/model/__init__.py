"""Models as they are read, changed and written: the only code that knows checkpoints and modules."""
