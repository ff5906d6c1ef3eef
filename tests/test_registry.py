from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from lowrank_compress import registry
from lowrank_compress.errors import InputError
from lowrank_compress.methods.linear import GRAM, PLAIN, LinearMethod
from lowrank_compress.registry import Registry

OWN = LinearMethod("own", PLAIN, PLAIN, "", "")
THIRD_PARTY = LinearMethod("theirs", PLAIN, GRAM, "", "")
NOT_A_METHOD = "a string"


def made_on_demand() -> LinearMethod:
    return THIRD_PARTY


def table(monkeypatch: pytest.MonkeyPatch, **plugins: str) -> Registry[LinearMethod]:
    points = [EntryPoint(name, f"{__name__}:{value}", "group") for name, value in plugins.items()]

    def entry_points(**selection: Any) -> list[EntryPoint]:
        assert selection == {"group": "group"}
        return points

    monkeypatch.setattr(registry, "entry_points", entry_points)
    return Registry("method", "group", {"own": OWN}, LinearMethod)


def test_third_parties_add_values_and_factories(monkeypatch: pytest.MonkeyPatch) -> None:
    found = table(monkeypatch, theirs="THIRD_PARTY", lazy="made_on_demand")
    assert found["theirs"] is THIRD_PARTY
    assert found["lazy"] is THIRD_PARTY
    assert set(found) == {"own", "theirs", "lazy"}


def test_own_entries_win(monkeypatch: pytest.MonkeyPatch) -> None:
    assert table(monkeypatch, own="THIRD_PARTY")["own"] is OWN


def test_a_plug_in_of_another_type_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"NOT_A_METHOD.*'bad' as a str; expected a LinearMethod"):
        table(monkeypatch, bad="NOT_A_METHOD")["own"]


def test_an_unknown_name_suggests_and_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"Unknown method 'owm'\. Did you mean 'own'\? Known: own\."):
        table(monkeypatch)["owm"]
