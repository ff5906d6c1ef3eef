"""The compressed linear layer and what makes ``from_pretrained`` load it: a quantizer, and remote code.

This file imports nothing but torch and transformers, because a byte-for-byte copy of it (``REMOTE_FILE``) travels in
every compressed checkpoint. Importing it, here or as the copy, registers the quantizer; the package's stays in place.
"""

from __future__ import annotations

import copy
import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

QUANT_METHOD = "lowrank"
VERSION = 1
FORMATS = ("pair", "pivot", "dense")
REMOTE_FILE = "modeling_lowrank.py"
PACKAGE = "lowrank_compress.model.layers"


class Stock(NamedTuple):
    """The module of the uncompressed model in whose place a smaller one stands: what a dense export restores."""

    out_features: int
    in_features: int
    bias: bool
    conv1d: bool


class Part(NamedTuple):
    """One part of a compressed layer: its rows, format and rows in ``lr_in``, and the end of its children's names."""

    rows: int
    format: str
    width: int
    suffix: str


class CompressedLinear(nn.Module):
    """A linear layer whose parts (one, or the fused ones) are each stored as low-rank factors.

    All parts share one product ``h = lr_in(x)``, cut into their widths. A part of m rows then emits
    ``pair``: ``lr_out(h)``, weight A·B; ``pivot``: rows ``lr_index`` are h itself and the others, ascending,
    ``lr_out(h)``; ``dense``: h. The layer equals, up to rounding, a linear layer with ``dense_weight()``.

    Parameters
    ----------
    in_features, out_features : int
        n and m of the weight (m, n) it stands for.
    bias : bool
        Whether it adds a ``bias`` (m,).
    parts : sequence of mapping
        ``{"rows": m_i, "format": "pair" | "pivot" | "dense", "rank": r_i}``; the rank of a dense part is its rows.
        With one part the children are named ``lr_out`` and ``lr_index``, else ``lr_out_0``, ``lr_index_0``, ...
    heads : int
        1: the parts' rows follow one another. More: every head emits its rows of each part in turn (GPT-NeoX).
    stock : Stock, optional
        The module it replaces, if that is not a ``nn.Linear`` of the same shape and bias.

    Notes
    -----
    Weights start uninitialised: they are always loaded. The empty buffer ``weight`` (0,) makes a load by code that
    does not know this layer fail with a size mismatch instead of starting from random weights.
    """

    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        parts: Sequence[Mapping[str, Any]],
        heads: int = 1,
        stock: Stock | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        device = torch.get_default_device() if device is None else torch.device(device)
        self.in_features, self.out_features, self.heads = in_features, out_features, heads
        self.parts = [
            Part(int(part["rows"]), str(part["format"]), _width(part), "" if len(parts) == 1 else f"_{i}")
            for i, part in enumerate(parts)
        ]
        self.stock = stock or Stock(out_features, in_features, bias, False)
        self._ordered = any(part.format == "pivot" for part in self.parts) or (heads > 1 and len(parts) > 1)
        self._order: Tensor | None = None

        def linear(n: int, m: int) -> nn.Module:
            return nn.utils.skip_init(nn.Linear, n, m, bias=False, device=device, dtype=dtype)

        self.lr_in = linear(in_features, sum(part.width for part in self.parts))
        for rows, form, width, suffix in self.parts:
            if form != "dense":
                self.add_module(f"lr_out{suffix}", linear(width, rows - width if form == "pivot" else rows))
            if form == "pivot":
                self.register_buffer(f"lr_index{suffix}", torch.arange(width, device=device))
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    def row_order(self, device: torch.device) -> Tensor:
        """Return where each output row stands in the concatenation of what the parts emit: int64 (out_features,).

        It is derived from the index buffers when first needed and kept as a plain attribute, because a buffer that is
        not in the checkpoint comes back uninitialised from the meta device.
        """
        order = self._order
        if order is not None and order.device == device:
            return order
        # A tensor made in inference mode could not be used by a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            emitted, offset = [], 0
            for rows, form, _, suffix in self.parts:
                row = torch.arange(rows, device=device)
                if form == "pivot":
                    index = self.get_buffer(f"lr_index{suffix}").to(device)
                    row = torch.argsort(torch.ones_like(row).scatter(0, index, 0), stable=True)
                size = rows // self.heads
                emitted.append(row // size * (self.out_features // self.heads) + offset + row % size)
                offset += size
            order = torch.argsort(torch.cat(emitted))
        if not torch.compiler.is_compiling() and type(order) is Tensor:
            self._order = order
        return order

    def remember_order(self) -> None:
        """Derive the row order now, if one is needed and the indices are in memory.

        A graph compiled before the first call would derive it anew at every call.
        """
        if self._ordered and self.weight.device.type != "meta":
            self.row_order(self.weight.device)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> CompressedLinear:
        order, self._order = self._order, None
        super()._apply(fn, *args, **kwargs)
        moved = None if order is None else fn(order)
        # What to_empty or a move to the meta device leaves is no order.
        if (
            order is not None
            and type(moved) is Tensor
            and moved.device.type != "meta"
            and order.cpu().equal(moved.cpu())
        ):
            self._order = moved
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._order = None
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        h = self.lr_in(x)
        emitted: list[Tensor] = []
        inner = h.split([part.width for part in self.parts], -1) if len(self.parts) > 1 else (h,)
        for (_, form, _, suffix), h_part in zip(self.parts, inner, strict=True):
            if form != "pair":
                emitted.append(h_part)
            if form != "dense":
                emitted.append(getattr(self, f"lr_out{suffix}")(h_part))
        y = emitted[0] if len(emitted) == 1 else torch.cat(emitted, -1)
        if self._ordered:
            # On a CPU, gather with an expanded index is ten times faster than index_select along the last dimension.
            y = y.gather(-1, self.row_order(y.device).expand(y.shape))
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight (out_features, in_features) this layer stands for, multiplied in at least float32.

        Half-precision factors are multiplied in float32, others in float64 (float32 on devices without it); the product
        is cast once to `dtype`, by default that of the factors.
        """
        factor = self.lr_in.get_parameter("weight")
        half = factor.dtype.itemsize < 4 or factor.device.type == "mps"
        accurate = torch.float32 if half else torch.float64
        emitted: list[Tensor] = []
        inner = factor.to(accurate).split([part.width for part in self.parts])
        for (_, form, _, suffix), b in zip(self.parts, inner, strict=True):
            if form != "pair":
                emitted.append(b)
            if form != "dense":
                emitted.append(self.get_parameter(f"lr_out{suffix}.weight").to(accurate) @ b)
        weight = torch.cat(emitted)
        if self._ordered:
            weight = weight[self.row_order(weight.device)]
        return weight.to(dtype or factor.dtype)

    def extra_repr(self) -> str:
        """Shape and parts, as ``print(model)`` shows them."""
        parts = ", ".join(f"{part.rows}:{part.format}:{part.width}" for part in self.parts)
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, parts={parts}"


def _width(part: Mapping[str, Any]) -> int:
    """Count the rows that a part takes in ``lr_in``."""
    return int(part["rows"] if part["format"] == "dense" else part["rank"])


class LowRankConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a compressed checkpoint: alone it says how to build the modules.

    Parameters
    ----------
    modules : mapping, optional
        Module path to ``{"in_features", "out_features", "bias", "heads", "parts"}`` (see `CompressedLinear`).
    dense_shapes : mapping, optional
        Module path to ``[out, in]`` of linear layers that stay dense but are smaller than the model's config says.
    version : int
        The version of this layout.
    factor_quantization : None
        Reserved for a quantization of the factors themselves.

    Raises
    ------
    ValueError
        If the version, a format or any other value is not one this code knows how to load.
    """

    def __init__(
        self,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        dense_shapes: Mapping[str, Sequence[int]] | None = None,
        version: int = VERSION,
        factor_quantization: None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise ValueError(f"expected quant_method {QUANT_METHOD!r}, got {quant_method!r}")
        if version != VERSION:
            raise ValueError(
                f"this checkpoint is of low-rank format version {version!r}, but this code reads version {VERSION}: "
                "install the lowrank_compress that wrote it"
            )
        if factor_quantization is not None or unknown:
            what = ", ".join(sorted(unknown)) or "factor_quantization"
            raise ValueError(
                f"the low-rank quantization_config uses {what}, unknown to this code: update lowrank_compress"
            )
        self.quant_method: Any = QUANT_METHOD
        self.version = version
        self.factor_quantization = factor_quantization
        self.modules = {path: _checked(path, entry) for path, entry in (modules or {}).items()}
        self.dense_shapes = {path: [int(n) for n in shape] for path, shape in (dense_shapes or {}).items()}


def _checked(path: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Copy one module's entry, if it is one that `CompressedLinear` can be built from."""

    def refuse(problem: str) -> ValueError:
        return ValueError(f"quantization_config.modules[{path!r}]: {problem}")

    entry = {"heads": 1, **copy.deepcopy(dict(entry))}
    expected = {"in_features", "out_features", "bias", "heads", "parts"}
    if set(entry) != expected:
        raise refuse(f"expected the keys {sorted(expected)}, got {sorted(entry)}")
    for part in entry["parts"]:
        if set(part) != {"rows", "format", "rank"}:
            raise refuse(f"expected a part to have the keys rows, format and rank, got {part}")
        if part["format"] not in FORMATS:
            raise refuse(f"unknown format {part['format']!r}, expected one of {', '.join(FORMATS)}")
        limit = part["rows"] - 1 if part["format"] == "pivot" else part["rows"]
        if not 1 <= _width(part) <= limit:
            raise refuse(f"the rank of a {part['format']} part of {part['rows']} rows is from 1 to {limit}, got {part}")
        if part["rows"] % entry["heads"]:
            raise refuse(f"{part['rows']} rows cannot be shared by {entry['heads']} heads")
    rows = sum(part["rows"] for part in entry["parts"])
    if rows != entry["out_features"]:
        raise refuse(f"its parts have {rows} rows in all, out_features is {entry['out_features']}")
    return entry


def swap_modules(model: nn.Module, config: LowRankConfig) -> None:
    """Replace the modules that `config` names by uninitialised ones of its shapes, on their device and in their dtype.

    Paths are those of the saved model. A model with a head and its base model differ by ``base_model_prefix``, so each
    path is looked up as it is, without and with that prefix.

    Raises
    ------
    ValueError
        If a path leads nowhere, or to a module that is not a linear layer of the shape that the entry replaces.
    """
    for path, (rows, columns) in config.dense_shapes.items():
        name, old, stock = _find(model, path)
        new = _dense_module(Stock(rows, columns, stock.bias, stock.conv1d), old.weight)
        new.lr_stock = stock
        _put(model, name, new)
    for path, entry in config.modules.items():
        name, old, stock = _find(model, path)
        shape = (entry["out_features"], entry["in_features"])
        present = (old.weight.shape[1], old.weight.shape[0]) if stock.conv1d else tuple(old.weight.shape)
        if shape != present:
            raise ValueError(
                f"{path} is {present} (out, in) in the model, but {shape} in the checkpoint's low-rank config"
            )
        new = CompressedLinear(**entry, stock=stock, device=old.weight.device, dtype=old.weight.dtype)
        _put(model, name, new.train(old.training))


def _find(model: nn.Module, path: str) -> tuple[str, Any, Stock]:
    """Look up the linear layer that a saved path means: its path here, itself, and what it is in the stock model."""
    prefix = getattr(model, "base_model_prefix", "")
    for name in (path, path.removeprefix(f"{prefix}."), f"{prefix}.{path}"):
        try:
            module: Any = model.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(module, nn.Linear):
            own = Stock(module.out_features, module.in_features, module.bias is not None, False)
        elif isinstance(module, Conv1D):
            own = Stock(module.weight.shape[1], module.weight.shape[0], True, True)
        else:
            raise ValueError(
                f"{path} of the low-rank config is a {type(module).__name__}, expected nn.Linear or Conv1D"
            )
        return name, module, getattr(module, "lr_stock", own)
    raise ValueError(
        f"the low-rank config names the module {path}, which {type(model).__name__} does not have"
        + (f", with or without the prefix {prefix!r}" if prefix else "")
    )


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _dense_module(stock: Stock, like: Tensor) -> Any:
    """Make an uninitialised ``nn.Linear`` or ``Conv1D`` of that shape, with the device and dtype of `like`."""
    if stock.conv1d:
        with torch.device("meta"):
            conv = Conv1D(stock.out_features, stock.in_features).to(like.dtype)
        return conv if like.device.type == "meta" else conv.to_empty(device=like.device)
    return nn.utils.skip_init(
        nn.Linear, stock.in_features, stock.out_features, bias=stock.bias, device=like.device, dtype=like.dtype
    )


@torch.no_grad()
def restore_modules(model: nn.Module) -> None:
    """Put stock dense modules in the place of all that `swap_modules` replaced.

    A module that is smaller than the stock one is padded with zeros at its end, which leaves the function of an
    attention or MLP unchanged when its neighbours are padded alike.

    Raises
    ------
    ValueError
        If a module has a bias that the stock one has no place for, or is not in memory.
    """
    found: list[tuple[str, Any, Stock]] = []
    for name, old in model.named_modules():
        stock = old.stock if isinstance(old, CompressedLinear) else getattr(old, "lr_stock", None)
        if not isinstance(stock, Stock):
            continue
        if old.bias is not None and not stock.bias:
            raise ValueError(f"{name} has a bias of its own, which a stock {type(model).__name__} has no place for")
        if any(tensor.device.type == "meta" for tensor in old.parameters()):
            raise ValueError(f"the weights of {name} are not in memory: load the model without offloading")
        found.append((name, old, stock))
    for name, old, stock in found:
        if isinstance(old, CompressedLinear):
            weight = old.dense_weight()
        else:
            weight = old.weight.T if stock.conv1d else old.weight
        new = _dense_module(stock, weight).train(old.training)
        stored = new.weight.T if stock.conv1d else new.weight
        stored.zero_()[: weight.shape[0], : weight.shape[1]] = weight
        if stock.bias:
            new.bias.zero_()
            if old.bias is not None:
                new.bias[: len(old.bias)] = old.bias
        _put(model, name, new)


class LowRankQuantizer(HfQuantizer):
    """Lets ``from_pretrained`` build a compressed model; afterwards the model is an ordinary floating-point one."""

    requires_calibration = True
    quantization_config: LowRankConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        swap_modules(model, self.quantization_config)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for module in model.modules():
            if isinstance(module, transformers.PreTrainedModel):
                # Else .half() and .float() raise; no weight is quantized.
                module.__dict__["is_quantized"] = False
                module.config.__dict__["_is_quantized"] = False
            if isinstance(module, CompressedLinear):
                module.remember_order()
        model.save_pretrained = _Saver(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> Any:
        """Say that ``save_pretrained`` may write the factors."""
        return True

    @property
    def is_trainable(self) -> Any:
        """True: the factors are ordinary parameters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: the layer is two matrix products."""
        return True

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Turn `model` in place into the stock dense model, in the dtype of its factors or in `dtype`; return it."""
        model = self._dequantize(model)
        for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model, "save_pretrained")):
            owner.__dict__.pop(name, None)
        for name in ("quantization_config", "auto_map", "_pre_quantization_dtype"):  # the last: transformers 4
            model.config.__dict__.pop(name, None)
        model.is_quantized = False
        return model if dtype is None else model.to(dtype)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        restore_modules(model)
        return model


class _Saver:
    """A loaded model's ``save_pretrained`` that also writes the remote code: the copy loads as the original did.

    It stands in the model's ``__dict__``. Its reference is weak, so that a deleted model frees its memory at once.
    """

    def __init__(self, model: Any) -> None:
        self.model = weakref.ref(model)

    def __call__(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> Any:
        model = self.model()
        if model is None:
            raise ReferenceError("the model of this save_pretrained is gone")
        model.config.auto_map = remote_code_entries(model.config)
        if is_main_process:
            write_remote_code(save_directory)
        return type(model).save_pretrained(model, save_directory, is_main_process, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Saver:
        return _Saver(memo.get(id(self.model()), self.model()))

    def __reduce__(self) -> Any:
        return _Saver, (self.model(),)


class _Remote:
    """What the auto classes call in a checkpoint's copy of this file; hands over to the native class."""

    auto_class: ClassVar[str]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: the native class stays what it is."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Register this copy's quantizer, unless the package's is, and load with the native class."""
        register()
        # An auto class that has found an adapter hands over the base model's path; the native one finds both again.
        adapter_kwargs = dict(kwargs.pop("adapter_kwargs", None) or {})
        path = adapter_kwargs.pop("_adapter_model_path", path)
        kwargs |= {"adapter_kwargs": adapter_kwargs, "trust_remote_code": False}
        return getattr(transformers, cls.auto_class).from_pretrained(path, *args, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return getattr(transformers, cls.auto_class).from_config(config, **{**kwargs, "trust_remote_code": False})


class LowRankModel(_Remote):
    """Remote code for ``AutoModel``."""

    auto_class = "AutoModel"


class LowRankForCausalLM(_Remote):
    """Remote code for ``AutoModelForCausalLM``."""

    auto_class = "AutoModelForCausalLM"


class LowRankForMaskedLM(_Remote):
    """Remote code for ``AutoModelForMaskedLM``."""

    auto_class = "AutoModelForMaskedLM"


class LowRankForSequenceClassification(_Remote):
    """Remote code for ``AutoModelForSequenceClassification``."""

    auto_class = "AutoModelForSequenceClassification"


class LowRankForTokenClassification(_Remote):
    """Remote code for ``AutoModelForTokenClassification``."""

    auto_class = "AutoModelForTokenClassification"


class LowRankForQuestionAnswering(_Remote):
    """Remote code for ``AutoModelForQuestionAnswering``."""

    auto_class = "AutoModelForQuestionAnswering"


def remote_code_entries(config: Any) -> dict[str, str]:
    """Build the ``auto_map`` of a compressed checkpoint: the auto classes that know `config`'s type."""
    return {
        remote.auto_class: f"{Path(REMOTE_FILE).stem}.{remote.__name__}"
        for remote in _Remote.__subclasses__()
        if type(config) in getattr(transformers, remote.auto_class)._model_mapping
    }


def write_remote_code(directory: Any) -> Path:
    """Copy this file, byte for byte, into a checkpoint's directory."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    target = Path(directory) / REMOTE_FILE
    if target.resolve() != Path(__file__).resolve():
        shutil.copyfile(__file__, target)
    return target


def register() -> None:
    """Make transformers load checkpoints with this file's quantizer, unless that of the package is already in place.

    Calling it again does nothing; of several checkpoints' copies the one that loads now is in place.
    """
    present = AUTO_QUANTIZER_MAPPING.get(QUANT_METHOD)
    if present is not None and present.__name__ != LowRankQuantizer.__name__:
        raise RuntimeError(f"another quantizer, {present}, is already registered as {QUANT_METHOD!r}")
    if present is None or present.__module__ != PACKAGE:
        AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = LowRankConfig
        AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = LowRankQuantizer


register()
