"""Pages for people: what runs have come to, in one file that opens from disk."""
