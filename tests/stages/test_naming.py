"""Names of matrices for people: the place in the model, and as few parts as tell them apart."""

from __future__ import annotations

import pytest

from lowrank_compress.model.tasks import AUTO, unit_of_loss
from lowrank_compress.stages.naming import collective, loss_unit, place_of, shortened


def test_names_are_as_short_as_tells_them_apart() -> None:
    names = ["attention.output.dense", "intermediate.dense", "output.dense", "attention.self.query"]
    assert shortened(names) == {
        "attention.output.dense": "attention.output.dense",
        "intermediate.dense": "intermediate.dense",
        "output.dense": "output.dense",
        "attention.self.query": "query",
    }
    assert shortened(["mlp", "mlp"]) == {"mlp": "mlp"}


@pytest.mark.parametrize(
    ("name", "place", "together"),
    [
        ("model.layers.11.self_attn.q_proj", (11, "self_attn.q_proj"), "self_attn.q_proj"),
        ("model.layers.2.mlp.experts.7.lr_up", (2, "mlp.experts.7.lr_up"), "mlp.experts.lr_up"),
        ("model.layers.2.mlp.experts.7", (2, "mlp.experts.7"), "mlp.experts"),
        ("model.layers.0:experts", (0, "experts"), "experts"),
        ("lm_head", (None, "lm_head"), "lm_head"),
    ],
)
def test_places_of_names(name: str, place: tuple[int | None, str], together: str) -> None:
    assert place_of(name) == place
    assert collective(place[1]) == together


def test_units_follow_from_the_class_but_where_several_heads_are_of_one() -> None:
    for task, auto in AUTO.items():
        told = loss_unit({"about": {"auto_class": auto.__name__}})
        assert told == unit_of_loss("classification" if task in ("scores", "labels") else task)
    assert loss_unit({"about": {"auto_class": "AutoModelForSequenceClassification", "loss": "nats a pair"}}) == (
        unit_of_loss("scores", paired=True)
    )
    assert loss_unit({}) == "nats a token"
