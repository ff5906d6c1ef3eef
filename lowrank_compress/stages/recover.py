"""Train a compressed checkpoint for a short time, with the dense model as its teacher or on text of the user's own."""

from __future__ import annotations

from pathlib import Path

from lowrank_compress.artifacts.directories import files_in, replacing
from lowrank_compress.artifacts.manifest import Key, Manifest, commit, listed
from lowrank_compress.errors import CheckpointError
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.resources.resources import Resources
from lowrank_compress.stages.environment import environment
from lowrank_compress.stages.identity import checkpoint_id
from lowrank_compress.stages.recoverconfig import RecoverConfig
from lowrank_compress.stages.recovering import Training, teacher_of
from lowrank_compress.stages.reporting import Reporter, Silent
from lowrank_compress.stages.rewrite import contents_of, refuse_packed, rewrite
from lowrank_compress.stages.run import made_already, work_of
from lowrank_compress.stages.samples import has_own, settings_of, text_id
from lowrank_compress.stages.stage import Given

VERSION = 5


def key(config: RecoverConfig, inputs: Given) -> Key:
    """Everything that the trained checkpoint and its report depend on; a text counts by its content."""
    found = contents_of(inputs.checkpoint) | {"text": text_id(config)}
    if config.towards == "dense" or has_own(config):
        found["dense"] = checkpoint_id(teacher_of(inputs))
    return Key("recover", VERSION, settings_of(config), found)


def run(
    config: RecoverConfig,
    inputs: Given,
    out_dir: Path,
    reporter: Reporter | None = None,
    *,
    resources: Resources = Resources(),
    overwrite: bool = False,
) -> Manifest:
    """Train.

    Parameters
    ----------
    config, inputs
        How, and what.
    out_dir
        The directory of the new checkpoint, which appears whole or not at all; see `work_of` for the state meanwhile.
    reporter
        Told about progress and warnings.
    resources
        Its processes are all called with the same; each computes a share of every step.
    overwrite
        Replace another checkpoint in `out_dir`.

    Raises
    ------
    LrcError
        The checkpoint is not compressed by this package, the text or the dense model cannot be used, or another result
        is in `out_dir`.
    """
    reporter, workers = reporter or Silent(), resources.workers
    if inputs.checkpoint.quantization is None:
        raise CheckpointError(
            f"{inputs.checkpoint.path} is not compressed by this program; there is nothing to recover. Compress it "
            "first with `lrc compress`."
        )
    refuse_packed(inputs.checkpoint, "recover")
    identity = key(config, inputs)
    if (found := workers.once(lambda: made_already(out_dir, identity, overwrite=overwrite))) is not None:
        return found
    plan = blueprint(inputs.checkpoint)
    plan.check_ties()
    training = Training(config, inputs, plan, work_of(out_dir), identity.id, reporter, resources)
    report = training.make()

    def write() -> Manifest:
        with replacing(out_dir, listed) as draft:
            found = rewrite(
                inputs.checkpoint,
                draft,
                training.tensor,
                dtype=str(inputs.checkpoint.dtype).removeprefix("torch."),
                shard_bytes=config.shard_bytes,
                report=lambda before: {**before, "recover": report},
                advance=lambda done, total: reporter.advance("write", done, total),
            )
            outputs = files_in(draft)
            made = commit(draft, identity, outputs, found | {"recover": report}, environment(config.device))
        training.clear()
        return made

    return workers.once(write)
