"""What Python programs call, and what the command line is a shell over: `compress`, `evaluate`, `load`.

Nothing here prints: progress goes to a reporter, and warnings, where there is none, to Python's `warnings`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lowrank_compress.artifacts.documents import read_json
from lowrank_compress.artifacts.manifest import Manifest, read_manifest
from lowrank_compress.config import EvaluateConfig, evaluate_config
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.locate import locate
from lowrank_compress.model.tasks import AUTO, task_of
from lowrank_compress.recipe import METHOD, RATIO, Recipe, make_recipe
from lowrank_compress.resources.cost import Meter
from lowrank_compress.resources.memory import bytes_of, keep_freed
from lowrank_compress.stages import pipeline
from lowrank_compress.stages.contamination import refuse_calibration_text
from lowrank_compress.stages.cost import keep_cost
from lowrank_compress.stages.environment import compute_device
from lowrank_compress.stages.index import read_index
from lowrank_compress.stages.plan import make_plan
from lowrank_compress.stages.publishing import publish
from lowrank_compress.stages.reach import check_ratio
from lowrank_compress.stages.report import REPORT
from lowrank_compress.stages.reporting import Reporter, Silent
from lowrank_compress.stages.run import Run, working
from lowrank_compress.stages.sizing import roomy
from lowrank_compress.texts import Place, names_of


@dataclass(frozen=True)
class Result:
    """A compressed checkpoint.

    Attributes
    ----------
    path
        Its directory; `transformers` loads it from there.
    run
        The run directory that it is in.
    id
        SHA-256 of all that it depends on.
    report
        ``asked_ratio`` and ``reached_ratio`` (shares of elements, of what ``ratio_of`` says), ``reached_ratio_bytes``;
        ``claimed_elements`` and ``claimed_bytes`` of the weights inside the blocks, and ``stored_elements`` and
        ``stored_bytes`` of what stands in their place; ``predicted_loss``, the sum over all matrices, where ``unit`` is
        "nats" (the losses of some methods do not add up: None); ``shards``.
    cost
        What making it took: ``seconds`` by step, and the peak of memory.
    """

    path: Path
    run: Path
    id: str
    report: Mapping[str, Any]
    cost: Mapping[str, Any] = field(repr=False, default_factory=dict)

    def load(self, **options: Any) -> PreTrainedModel:
        """Load the model, as :func:`load` does."""
        return load(self.run, **options)

    def push_to_hub(
        self, repo: str, *, token: str | None = None, private: bool = False, overwrite: bool = False
    ) -> str:
        """Put the checkpoint, and nothing else of the run, on the Hugging Face hub; return its address.

        Parameters
        ----------
        repo
            OWNER/NAME, or a name for a repository of the token's own account; it is made if there is none.
        token
            None for that of the environment, or of a log-in.
        private
            Whether a new repository is to be.
        overwrite
            Replace a model that is not from this program.

        Raises
        ------
        LrcError
            It was changed, the hub cannot be reached or refuses, or another model is there.
        """
        return publish(self.run, repo, token=token, private=private, overwrite=overwrite)


def compress(
    model: Place,
    ratio: float = RATIO,
    *,
    method: str = METHOD,
    calibration: Place | Sequence[Place | Mapping[str, Any]] | None = None,
    out: Place | None = None,
    memory_budget: int | str | None = None,
    keep_statistics: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    **fields: Any,
) -> Result:
    """Compress a checkpoint, as ``lrc compress`` does: with the same arguments the result has the same bytes.

    A run that was interrupted goes on where it stopped; a finished one is returned at once.

    Parameters
    ----------
    model
        A directory, or a name on the Hugging Face hub.
    ratio
        Share of the parameters to remove.
    method
        See ``lrc list methods``.
    calibration
        Text to calibrate on; None for WikiText-2 from the hub and as much that the model writes itself, where it does
        and fits in half of the memory. Or several, whose windows are drawn in proportion to weights:
        ``["wiki.txt:2", {"text": "code.jsonl", "weight": 1, "text_column": "content"}]``.
    out
        Run directory; None for ``runs/<model>-<method>-<ratio>``.
    memory_budget
        Bytes to get by with, or a size such as "8GB"; None for what is free. It changes no result.
    keep_statistics
        Keep the statistics, from which other ratios can be made.
    overwrite
        Replace the results of another recipe in `out`.
    reporter
        Told about progress and warnings; None for silence, and Python warnings.
    fields
        Any other field of :class:`Recipe`.

    Raises
    ------
    LrcError
        The input is not what it must be; the message says what to do.
    """
    given = {"model": str(model), "ratio": ratio, "method": method, **fields}
    given |= {} if calibration is None else {"calibration": _texts(calibration)}
    return run_recipe(
        make_recipe(given, "The call of compress"),
        None if out is None else Path(out),
        memory_budget=memory_budget,
        keep_statistics=keep_statistics,
        overwrite=overwrite,
        reporter=reporter,
    )


def _texts(given: Place | Sequence[Place | Mapping[str, Any]]) -> Any:
    if isinstance(given, str | PathLike):
        return str(given)
    return [str(text) if isinstance(text, PathLike) else text for text in given]


def run_recipe(
    recipe: Recipe,
    out: Path | None = None,
    *,
    memory_budget: int | str | None = None,
    keep_statistics: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    tune_heap: bool = False,
) -> Result:
    """Compress as a recipe says; see :func:`compress`.

    Parameters
    ----------
    tune_heap
        Let this process keep freed memory from now on, where there is plenty: for programs, not for libraries.
    """
    memory = bytes_of(memory_budget)
    reporter = reporter or Silent()
    plan = make_plan(recipe)
    check_ratio(plan.score, plan.subject)
    run = Run(out or pipeline.default_run(recipe))
    pipeline.refuse_foreign(run)
    for note in plan.notes:
        reporter.warn(note)
    meter = Meter(reporter)
    with working(run, memory) as resources:
        if tune_heap and roomy(plan, resources):
            keep_freed()
        resources.workers.once(lambda: pipeline.claim(run, plan, overwrite=overwrite))
        manifest = pipeline.compress(
            plan, run, meter, resources=resources, keep_statistics=keep_statistics, overwrite=overwrite
        )
        resources.workers.once(lambda: keep_cost(run, "compress", meter.cost()))
    return result_of(run, manifest, meter.cost())


def result_of(run: Run, manifest: Manifest, cost: Mapping[str, Any] | None = None) -> Result:
    """Describe the final checkpoint of a run: what `manifest` is of, or what later stages have made of that."""
    path, last = run.model, read_index(run.index).chain[-1]
    later = read_manifest(run.path / last.directory)
    if later is not None and later.id == last.id:  # a later stage's may have been deleted
        path, manifest = run.path / last.directory, later
    whole = read_json(path / REPORT)
    nats = whole["unit"] == "nats"
    loss = sum(matrix["predicted_loss"] for matrix in whole["matrices"].values()) if nats else None
    report = {**manifest.report, "predicted_loss": loss, "unit": whole["unit"]}
    return Result(path, run.path, manifest.id, report, cost or {})


def evaluate(
    target: Place,
    *,
    perplexity: Place | Sequence[Place] = (),
    classification: Place | None = None,
    tasks: str | Sequence[str] = (),
    sts: Place | Sequence[Place] = (),
    device: str = "auto",
    force: bool = False,
    reporter: Reporter | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Measure a checkpoint, as ``lrc eval`` does; for a run, the dense original beside it.

    Evaluations of a run are kept in it, and not repeated.

    Parameters
    ----------
    target
        A run directory, a checkpoint directory or a name on the Hugging Face hub.
    perplexity
        One or more texts to measure perplexity on.
    classification
        A table of labelled examples to measure accuracy, F1, correlations or exact match on, as the head asks for.
    tasks
        Names of lm-eval tasks.
    sts
        One or more tables of pairs of texts and how similar they are, for an embedding model.
    device
        "auto", "cpu", "cuda" or "cuda:N".
    force
        Measure on the text that the run was calibrated on, too; the result will flatter.
    reporter
        Told about progress and warnings; None for silence, and Python warnings.
    fields
        Any other field of `config.EvaluateConfig`, such as ``seq_len``, ``limit`` or ``by_position``.

    Returns
    -------
    dict
        ``perplexity`` and ``classification``, by text, and ``tasks``, by name and metric: the values of "dense" and
        "compressed" (of examples with several measures, all in ``metrics``, the first of them beside; by position,
        those of each part of the windows in ``positions``); ``size``.

    Raises
    ------
    LrcError
        The input is not what it must be; the message says what to do.
    """
    config = evaluate_config(
        "The call of evaluate",
        perplexity=names_of(perplexity),
        classification=None if classification is None else str(classification),
        tasks=names_of(tasks),
        sts=names_of(sts),
        device=str(compute_device(device)),
        **fields,
    )
    return run_evaluation(str(target), config, force=force, reporter=reporter)


def run_evaluation(
    target: str, config: EvaluateConfig, *, force: bool = False, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Measure as a config says; see :func:`evaluate`."""
    run = Run(Path(target))
    if not force:
        refuse_calibration_text(Path(target), config)
    with working(run if run.exists() else None) as resources:
        return dict(pipeline.evaluate_target(target, config, reporter, resources=resources).report)


def load(path: Place, **options: Any) -> PreTrainedModel:
    """Load a model with the head that its configuration names: a language model's, or a classifier's.

    Parameters
    ----------
    path
        A run directory, whose checkpoint must be as it was written; any other checkpoint; or a name on the hub.
    options
        Passed on to ``from_pretrained``, such as ``dtype`` or ``device_map``.

    Raises
    ------
    LrcError
        It is none, is damaged, or is of a kind that this package does not know.
    """
    run = Run(Path(path))
    trusted = bool(options.get("trust_remote_code"))
    checkpoint = Checkpoint(run.finished().path if run.exists() else locate(str(path), None, trusted), trusted)
    return AUTO[task_of(checkpoint.config)].from_pretrained(checkpoint.path, **options)
