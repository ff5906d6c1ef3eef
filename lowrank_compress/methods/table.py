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

METHODS: Registry[LinearMethod] = Registry(
    "method",
    "lowrank_compress.methods",
    {
        method.name: method
        for method in (
            LinearMethod("svd", PLAIN, PLAIN, "Eckart & Young, 1936", "plain truncated SVD of the weight; needs no data"),
            LinearMethod(
                "fwsvd", ROW_FISHER, PLAIN, "FWSVD, ICLR 2022", "rows weighted by the Fisher information of their weights"
            ),
            LinearMethod("asvd", PLAIN, ABSOLUTE, "ASVD, 2023", "columns weighted by the mean absolute activation"),
            LinearMethod(
                "afm", PLAIN, CENTRED_GRAM, "Atomic Feature Mimicking, CVPR 2022",
                "principal components of the layer's outputs, mean restored through the bias",
            ),
            LinearMethod("svd-llm", PLAIN, GRAM, "SVD-LLM, ICLR 2025", "least output error on the calibration set"),
            LinearMethod(
                "kfac", FISHER, GRAM, "K-FAC (Martens & Grosse, ICML 2015); GFWSVD, 2025",
                "least loss increase to second order (Kronecker-factored Fisher)", unit="nats",
            ),
            LinearMethod(
                "auto", FISHER, GRAM, "this toolkit: kfac metric, loss-aware ranks, the cheaper storage",
                "the recommendation: kfac with ranks by predicted loss and pivot storage",
                allocate="loss", storage="auto", unit="nats",
            ),
        )
    },
    LinearMethod,
)  # fmt: skip
