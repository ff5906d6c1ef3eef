"""What may have made a run another is named with both sides of it."""

from __future__ import annotations

from lowrank_compress.stages.changes import environment_changes


def test_environments_are_compared_key_by_key():
    changes = environment_changes(
        {"torch": "2.13", "threads": 1, "settings": {}},
        {"torch": "2.14", "threads": 1, "settings": {"A": "b"}, "new": 2},
    )
    assert [(each.what, each.expected, each.found) for each in changes] == [
        ("torch", "2.13", "2.14"),
        ("settings", "none", "A=b"),
        ("new", "none", "2"),
    ]


def test_what_is_not_there_and_what_says_nothing_are_the_same():
    assert environment_changes({"blas": None, "settings": {}}, {}) == []
