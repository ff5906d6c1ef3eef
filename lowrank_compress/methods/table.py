"""All methods by name."""

from __future__ import annotations

from lowrank_compress.arch.spec import MLP, QUERY_KEY, VALUE_OUTPUT
from lowrank_compress.calibration.statistics import LIKENESS, ROUTED
from lowrank_compress.methods import cr, experts, nystrom, value_output
from lowrank_compress.methods.experts import ExpertMethod
from lowrank_compress.methods.linear import (
    ABSOLUTE,
    CENTRED_GRAM,
    FISHER,
    GRAM,
    PLAIN,
    ROW_FISHER,
    LinearMethod,
)
from lowrank_compress.methods.mixture import Mixture
from lowrank_compress.methods.module import ModuleMethod
from lowrank_compress.options import ALIGN, ALPHA, PEAK, SUBSPACE
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
        options=(ALPHA,),
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
)

_MODULES = (
    ModuleMethod(
        name="nystrom",
        group=MLP,
        paper="MoDeGPT, ICLR 2025 (Nyström, ridge leverage scores)",
        help="fewer hidden units in the MLP; those that stay make up for the others",
        statistics=nystrom.statistics,
        decompose=nystrom.decompose,
        reduce=nystrom.reduce,
    ),
    ModuleMethod(
        name="cr",
        group=QUERY_KEY,
        paper="MoDeGPT, ICLR 2025 (CR decomposition)",
        help="fewer dimensions of queries and keys, rotary pairs kept whole; shrinks the key cache",
        statistics=cr.statistics,
        decompose=cr.decompose,
        reduce=cr.reduce,
    ),
    ModuleMethod(
        name="vo-svd",
        group=VALUE_OUTPUT,
        paper="MoDeGPT, ICLR 2025 (joint SVD)",
        help="fewer dimensions of values, the best product of value and output; shrinks the value cache",
        statistics=value_output.statistics,
        decompose=value_output.decompose,
        reduce=value_output.reduce,
    ),
)

_EXPERTS = (
    ExpertMethod(
        name="frequency",
        paper="the usual baseline of expert pruning",
        help="fewer experts: those stay that most tokens go to; the router forgets the others",
        statistics=frozenset({ROUTED}),
        saliency=experts.frequency,
        whole=True,
    ),
    ExpertMethod(
        name="reap",
        paper="REAP (Lasby et al.), ICLR 2026",
        help="fewer experts: those stay whose routed outputs are largest in the mean over their tokens",
        statistics=frozenset({ROUTED, "routed_norm"}),
        saliency=experts.mean_routed_output,
        whole=True,
    ),
    ExpertMethod(
        name="reap-sum",
        paper="REAP (Lasby et al.), ICLR 2026, summed over tokens",
        help="fewer experts: those stay whose routed outputs are largest in sum",
        statistics=frozenset({"routed_norm"}),
        saliency=experts.routed_output,
        whole=True,
    ),
    ExpertMethod(
        name="camera",
        paper="CAMERA (Xu et al.), AAAI 2026",
        help="fewer hidden units in all experts of a block, ranked together by the energy that they put out",
        statistics=frozenset({"hidden_energy", "hidden_peak"}),
        saliency=experts.routed_energy,
        whole=False,
        options=(PEAK,),
    ),
    ExpertMethod(
        name="merge",
        paper="Sub-MoE (Li et al.), AAAI 2026",
        help="fewer experts: those with like outputs are merged to one, to which the router's rows of all of them lead",
        statistics=frozenset({ROUTED, LIKENESS}),
        saliency=None,
        whole=False,
        merges=True,
        options=(SUBSPACE, ALIGN),
    ),
)

_MIXTURES = (
    Mixture(
        name="auto",
        methods={"qk": "kfac", "vo": "kfac", "mlp": "kfac|nystrom"},
        paper="this toolkit",
        help="the recommendation: kfac, or nystrom in MLPs where that loses less; ranks by predicted loss",
        allocate="loss",
        storage="auto",
        metric="kfac",
        held_out=True,
        drawn=3,
        rival="modegpt",
    ),
    Mixture(
        name="modegpt",
        methods={"qk": "cr", "vo": "vo-svd", "mlp": "nystrom"},
        paper="MoDeGPT, ICLR 2025",
        help="narrower modules: nystrom, cr and vo-svd together; also shrinks the key-value cache",
        allocate="block-influence",
    ),
)

METHODS: Registry[LinearMethod | ModuleMethod | ExpertMethod | Mixture] = Registry(
    "method",
    "lowrank_compress.methods",
    {method.name: method for method in (*_OWN, *_MODULES, *_EXPERTS, *_MIXTURES)},
    LinearMethod | ModuleMethod | ExpertMethod | Mixture,
)
