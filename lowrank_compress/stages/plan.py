"""A recipe with every default decided and checked, before any work."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lowrank_compress.allocation.table import ALLOCATORS
from lowrank_compress.calibration.capture import needs_gradient
from lowrank_compress.calibration.statistics import SMALL, specialises
from lowrank_compress.calibration.tokens import load_tokenizer
from lowrank_compress.config import DTYPES, CalibrateConfig, CalibrationSet, FactorizeConfig, RefineConfig, ScoreConfig
from lowrank_compress.errors import InputError, UnsupportedError
from lowrank_compress.methods.declared import options_used
from lowrank_compress.methods.groups import needed, needs_data
from lowrank_compress.methods.mixture import Mixture
from lowrank_compress.methods.module import ModuleMethod
from lowrank_compress.methods.scheme import label, method_of, methods_of, rival_of, scheme_of
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.embedding import embedding_of
from lowrank_compress.model.locate import directory_of, locate
from lowrank_compress.model.remembering import require_cacheable
from lowrank_compress.model.tasks import NEED_EXAMPLES
from lowrank_compress.recipe import Recipe
from lowrank_compress.stages.budgets import byte_budget, require_nats, with_budgets
from lowrank_compress.stages.choose import Chooser
from lowrank_compress.stages.environment import compute_device, micro_batch
from lowrank_compress.stages.identity import source_id
from lowrank_compress.stages.reading import refuse_unlabelled
from lowrank_compress.stages.samples import check_own, check_shares, sources_of, usual_text
from lowrank_compress.stages.score import check_options
from lowrank_compress.stages.subject import Subject, subject_of
from lowrank_compress.texts import SELF

log = logging.getLogger(__name__)

PAPERS_SEQ_LEN = 2048
# From this ratio on a second allocation pays for the time that it takes, unless the recipe says otherwise.
SECOND = 0.25


@dataclass(frozen=True, eq=False)
class Plan:
    """A recipe with every default decided, and what it is for, resolved.

    Attributes
    ----------
    recipe
        What was asked for.
    subject
        The model, and what of it is compressed.
    calibrate, score, factorize
        Configs of the stages.
    notes
        What the user should know about how the methods were chosen.
    refine
        That of the stage that may follow; None where it does not.
    """

    recipe: Recipe
    subject: Subject
    calibrate: CalibrateConfig
    score: ScoreConfig
    factorize: FactorizeConfig
    notes: tuple[str, ...]
    refine: RefineConfig | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        """The dense checkpoint."""
        return self.subject.checkpoint

    @property
    def device(self) -> str:
        """Where all stages compute."""
        return self.score.device

    @cached_property
    def chooser(self) -> Chooser:
        """What may be chosen, and what chooses.

        Raises
        ------
        InputError
            The ratio is out of reach.
        """
        return Chooser(self.score, self.subject)

    @property
    def _has_modules(self) -> bool:
        return any(
            isinstance(method, ModuleMethod) for ways in methods_of(self.score.scheme).values() for method in ways
        )

    def resolved(self) -> Recipe:
        """The recipe with all defaults written out; it repeats the run on its own."""
        model = (
            self.recipe.model
            if (directory := directory_of(self.recipe.model)) is None
            else str(directory.resolve())  # of an adapter, not of what it was merged to
        )
        source = self.recipe.calibration
        if isinstance(source, str):
            source = _resolved(source)
        elif source is not None:
            source = tuple(part.model_copy(update={"text": _resolved(part.text)}) for part in source)
        return self.recipe.model_copy(
            update={
                "model": model,
                "calibration": source,
                "allocate": self.score.allocate,
                "storage": self.score.storage,
                "metric": self.score.scheme.metric if self._has_modules else None,
                "options": {
                    name: value
                    for name, value in self.score.options.items()
                    if name not in Recipe.model_fields and value is not None
                },
                "round_to": self.score.round_to,
                "seq_len": self.calibrate.seq_len,
                "micro_batch": self.calibrate.micro_batch,
                "device": self.device,
                "dtype": self.factorize.dtype,
                "second": self.recipe.second,
                "second_by": self.score.second_by if self.score.second else self.recipe.second_by,
                "refine": self.recipe.refine if self.refine is None else True,
            }
        )


def _resolved(text: str) -> str:
    """Name a text so that it is found from anywhere."""
    return text if text == SELF or text.startswith("hf:") else str(Path(text).resolve())


def make_plan(recipe: Recipe, *, reads_text: bool = True) -> Plan:
    """Decide every default of a recipe and check it before any work.

    Parameters
    ----------
    reads_text
        Whether the calibration text will be read, if the method needs one.

    Raises
    ------
    LrcError
        An unknown name, a ratio outside (0, 1), an unsupported or damaged checkpoint, a sequence that is too long.
    """
    recipe = with_budgets(recipe)
    method = method_of(recipe)
    device = str(compute_device(recipe.device))
    checkpoint = Checkpoint(locate(recipe.model, recipe.revision, recipe.trust_remote_code), recipe.trust_remote_code)
    if checkpoint.quantization is not None:
        raise UnsupportedError(
            f"{recipe.model} is already compressed by this program; start from the dense checkpoint it was made from."
        )
    design = blueprint(checkpoint)
    design.check_ties()
    if recipe.kv_ratio is not None:
        require_cacheable(design)
    scheme, notes = scheme_of(recipe, design.resolved)
    rival = rival_of(recipe, design.resolved) if design.task == "lm" and recipe.bytes is None else None
    subject = subject_of(design, scheme, rival)
    groups = subject.groups
    if not groups:
        raise InputError("No part of the blocks has a method: all are left dense. Choose one with --method.")
    if not subject.candidates:
        recipe = recipe.model_copy(update={"ratio": 0.0})
    if recipe.bytes is not None:
        require_nats(recipe.allocate or method.allocate, groups)
    check_options(recipe.allocate or method.allocate, recipe.storage or method.storage, subject.candidates)
    # Losses on other text than fits are made on, where the calibration set is small.
    held_out = isinstance(method, Mixture) and method.held_out
    refines = held_out if recipe.refine is None else recipe.refine
    if design.task == "embedding" and (refines or needs_gradient(needed(groups))):
        embedding_of(checkpoint)  # whose change is the loss
    gradients = design.task in NEED_EXAMPLES and (refines or needs_gradient(needed(groups)))
    if gradients and recipe.calibration is None:
        refuse_unlabelled(recipe.method, design, ())
    reads = needs_data(groups) or refines
    longest = design.longest_input()
    seq_len = recipe.seq_len or min(PAPERS_SEQ_LEN, longest)
    if seq_len > longest:
        raise InputError(
            f"--seq-len {seq_len} is more than the {longest} positions of the model. Use at most {longest}."
        )
    if reads and recipe.calibration is None:
        usual, said = usual_text(design, seq_len, recipe.samples, device)
        recipe, notes = recipe.model_copy(update={"calibration": usual}), (*notes, *said)
    if reads and reads_text:
        load_tokenizer(checkpoint.path, recipe.trust_remote_code)
    dtype = recipe.dtype or str(checkpoint.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise InputError(f"The checkpoint's weights are {dtype}; name an output --dtype: {', '.join(DTYPES)}.")
    # The kernels of GPUs are fast at multiples of 8.
    round_to = recipe.round_to or (1 if device == "cpu" else 8)
    storage = recipe.storage or method.storage
    little = specialises(subject.largest, recipe.samples * seq_len)
    drawn = method.drawn if isinstance(method, Mixture) and little else 0
    calibrate = CalibrateConfig(
        scheme=scheme,
        source=recipe.calibration,
        text_column=recipe.text_column,
        label_column=recipe.label_column,
        samples=recipe.samples,
        seq_len=seq_len,
        seed=recipe.seed,
        micro_batch=recipe.micro_batch or micro_batch(device, seq_len),
        clip=recipe.clip,
        device=device,
        held_out=held_out,
        drawn=drawn,
        rival=rival,
    )
    if reads:
        check_own(calibrate, design.task)
        if gradients:
            refuse_unlabelled(recipe.method, design, sources_of(calibrate))
    if reads and reads_text:
        check_shares(calibrate)
        for source in sources_of(calibrate):
            if not source.is_hub:
                source_id(source)  # refuses a file that is not there
    allocate = recipe.allocate or method.allocate
    second = held_out and ALLOCATORS[allocate].needs_loss and all(group.nats for group in groups)
    if recipe.second and not second:
        raise InputError(
            "--second compares plans by predicted losses in nats a token, and on text that is held out: it goes with "
            "--method auto, its metrics and --allocate loss. Leave one of them out."
        )
    score = ScoreConfig(
        scheme=scheme,
        allocate=allocate,
        storage=storage,
        ratio=recipe.ratio,
        ratio_of=recipe.ratio_of,
        damping_fisher=recipe.damping_fisher,
        damping_gram=recipe.damping_gram,
        options=options_used(recipe, allocate, scheme, rival),
        round_to=round_to,
        device=device,
        held_out=held_out,
        rival=rival,
        second=second and (recipe.ratio >= SECOND if recipe.second is None else recipe.second),
        second_by=recipe.second_by or ("full" if subject.largest <= SMALL else "scales"),
        kv_ratio=recipe.kv_ratio,
        bytes=byte_budget(recipe, dtype),
    )
    factorize = FactorizeConfig(
        method=label(recipe), scheme=scheme, storage=storage, round_to=round_to, dtype=dtype, device=device
    )
    refine = RefineConfig(
        **dict(CalibrationSet.of(calibrate)),
        device=device,
        clip=recipe.clip,
        damping_fisher=recipe.damping_fisher,
        drawn=drawn,
    )
    notes = (*design.warnings, *notes)
    log.info(
        "Plan: %s of %d blocks with %d matrices; calibrate %s; score %s; factorize %s",
        type(design.model).__name__,
        len(design.resolved.blocks),
        len(design.resolved.targets),
        calibrate if reads else "without text, as no method needs any",
        score,
        factorize,
    )
    return Plan(recipe, subject, calibrate, score, factorize, notes, refine if refines else None)
