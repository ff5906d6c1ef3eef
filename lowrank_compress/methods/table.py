"""All methods by name."""

from __future__ import annotations

from lowrank_compress.methods.linear import (
    ABSOLUTE,
    CENTRED_GRAM,
    FISHER,
    GRAM,
    PLAIN,
    ROW_FISHER,
    LinearMethod,
)
from lowrank_compress.registry import Registry

_OWN = (
    LinearMethod(
        name="svd",
        left=PLAIN,
        right=PLAIN,
        paper="Eckart & Young, 1936",
        help="plain truncated SVD of the weight; needs no data",
    ),
    LinearMethod(
        name="fwsvd",
        left=ROW_FISHER,
        right=PLAIN,
        paper="FWSVD, ICLR 2022",
        help="rows weighted by the Fisher information of their weights",
    ),
    LinearMethod(
        name="asvd",
        left=PLAIN,
        right=ABSOLUTE,
        paper="ASVD, 2023",
        help="columns weighted by the mean absolute activation",
    ),
    LinearMethod(
        name="afm",
        left=PLAIN,
        right=CENTRED_GRAM,
        paper="Atomic Feature Mimicking (Yu & Wu), AAAI 2023",
        help="principal components of the layer's outputs, mean restored through the bias",
    ),
    LinearMethod(
        name="svd-llm",
        left=PLAIN,
        right=GRAM,
        paper="SVD-LLM, ICLR 2025",
        help="least output error on the calibration set",
    ),
    LinearMethod(
        name="kfac",
        left=FISHER,
        right=GRAM,
        paper="K-FAC (Martens & Grosse, ICML 2015); GFWSVD, 2025",
        help="least loss increase to second order (Kronecker-factored Fisher)",
        unit="nats",
    ),
    LinearMethod(
        name="auto",
        left=FISHER,
        right=GRAM,
        paper="this toolkit",
        help="the recommendation: the kfac metric, ranks by predicted loss, pivot or pair storage",
        allocate="loss",
        storage="auto",
        unit="nats",
    ),
)

METHODS: Registry[LinearMethod] = Registry(
    "method", "lowrank_compress.methods", {method.name: method for method in _OWN}, LinearMethod
)
