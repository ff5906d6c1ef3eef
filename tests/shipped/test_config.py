from __future__ import annotations

from typing import Any

import pytest

from lowrank_compress.shipped.config import LowRankConfig
from tests.shipped.test_linear import entry


def test_config_survives_its_dict() -> None:
    config = LowRankConfig({"a.b": entry("fused mix")}, {"c": [3, 4]})
    assert config.to_dict() == {
        "quant_method": "lowrank",
        "version": 2,
        "factor_quantization": None,
        "modules": {"a.b": entry("fused mix")},
        "dense_shapes": {"c": [3, 4]},
        "attention": {},
    }
    assert LowRankConfig(**config.to_dict()).to_dict() == config.to_dict()
    # What is saved again is of the present version.
    assert LowRankConfig(**{**config.to_dict(), "version": 1}).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"version": 11},
            "of low-rank format version 11, but this code reads versions 1 to 10: update lowrank_compress",
        ),
        ({"version": 0}, "format version 0, but"),
        ({"version": True}, "format version True, but"),
        ({"version": "2"}, "format version '2', but"),
        ({"version": None}, "format version None, but"),
        ({"quant_method": "gptq"}, "expected quant_method 'lowrank', got 'gptq'"),
        ({"factor_quantization": {"bits": 8}}, "factor_quantization: expected the keys layout and linears"),
        ({"rotation": 1}, "uses rotation, unknown to this code"),
    ],
)
def test_config_of_another_make(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRankConfig.from_dict({**LowRankConfig().to_dict(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"parts": [{"rows": 12, "format": "tucker", "rank": 2}]},
            r"modules\['x'\]: unknown format 'tucker', expected",
        ),
        ({"parts": [{"rows": 12, "format": "pivot", "rank": 12}]}, "rank of a pivot part of 12 rows is from 1 to 11"),
        ({"parts": [{"rows": 12, "format": "pair", "rank": 0}]}, "rank of a pair part of 12 rows is from 1 to 12"),
        ({"parts": [{"rows": 11, "format": "pair", "rank": 1}]}, "parts have 11 rows in all, out_features is 12"),
        ({"parts": [{"rows": 12, "format": "pair"}]}, "expected a part to have the keys rows, format and rank"),
        ({"heads": 5}, "12 rows cannot be shared by 5 heads"),
        ({"sparse": True}, "expected the keys"),
    ],
)
def test_config_with_a_bad_module(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRankConfig({"x": {**entry("pair"), **change}})
