"""Commands that look: show, list, verify."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich import filesize

from lowrank_compress.cli.printing import cached, refined, removed
from lowrank_compress.cli.terminal import became, console, number, print_json, sparkline, table
from lowrank_compress.errors import ArtifactError, InputError
from lowrank_compress.options import Option
from lowrank_compress.registry import unknown
from lowrank_compress.stages.naming import loss_unit
from lowrank_compress.stages.routers import routers_of

KINDS = {"dense": "N-LRC", "width": "narrow", "latent": "cache"}
LISTS = ("methods", "allocators", "architectures", "stages")


def list_entries(what: str, as_json: bool) -> None:
    """Print one of the tables."""
    rows: list[list[str]]
    if what == "methods":
        from lowrank_compress.methods.table import METHODS

        columns = ["method", "what counts", "ranks", "storage", "what it does", "paper", "options"]
        rows = [
            [name, m.metrics, m.allocate, m.storage, m.help, m.paper, _described(getattr(m, "options", ()))]
            for name, m in METHODS.items()
        ]
    elif what == "allocators":
        from lowrank_compress.allocation.table import ALLOCATORS

        columns = ["allocator", "how ranks are chosen", "options"]
        rows = [[name, each.help, _described(each.options)] for name, each in ALLOCATORS.items()]
    elif what == "architectures":
        from lowrank_compress.arch.table import ARCHITECTURES

        columns = ["architecture", "model types", "head norms", "compressed matrices of a block"]
        rows = [
            [
                name,
                ", ".join(a.model_types),
                "yes" if a.head_norms else "–",
                ", ".join(f"{p.path} ({'+'.join(p.parts)})" for p in a.projections),
            ]
            for name, a in ARCHITECTURES.items()
        ]
    elif what == "stages":
        from lowrank_compress.stages.table import in_order

        columns = ["stage", "command", "directory in a run", "starts from", "version", "what it leaves"]
        rows = [[s.name, f"lrc {s.command}", s.directory, s.reads, str(s.version), s.help] for s in in_order()]
    else:
        raise InputError(unknown("list", what, LISTS))
    if as_json:
        print_json({what: [dict(zip(columns, row, strict=True)) for row in rows]})
    else:
        console().print(table(what.capitalize(), columns, rows, left=len(columns)))


def _described(options: Iterable[Option]) -> str:
    return "; ".join(option.described for option in options) or "–"


def show(target: str, as_json: bool) -> None:
    """Print every matrix of a run or compressed checkpoint."""
    from lowrank_compress.cli.commands import read_report
    from lowrank_compress.cli.quantization import print_layers
    from lowrank_compress.model.locate import files_of
    from lowrank_compress.stages.presenting import spectra_of
    from lowrank_compress.stages.report import REPORT
    from lowrank_compress.stages.run import Run

    run = Run(Path(target))
    is_run = run.exists()
    place = run.finished(names=(REPORT,)).path if is_run else files_of(target, ("config.json", REPORT))
    report = read_report(place)
    of_matrices = report.get("matrices", {})
    spectra = {name: values for name, values in (spectra_of(run) if is_run else {}).items() if name in of_matrices}
    texts = _texts(run) if is_run else []
    if as_json:
        routers = {"routers": found} if (found := routers_of(report.get("experts", {}))) else {}
        print_json(report | {"spectra": spectra, "texts": texts} | routers)
        return
    if "quantize" in report:
        print_layers(target, report["quantize"], loss_unit(report))
    if not of_matrices:
        return
    nats = report["unit"] == "nats"
    unit = loss_unit(report)
    rows = []
    for name, matrix in report["matrices"].items():
        rows.append(
            [
                name,
                sparkline(spectra.get(name, [])),
                KINDS.get(matrix["format"], "LRC"),
                matrix["format"],
                "×".join(map(str, matrix["shape"])),
                "–" if matrix["rank"] is None else str(matrix["rank"]),
                f"{matrix['stored'] / matrix['dense']:.1%}" if matrix["dense"] else f"+{matrix['stored']:,}",
                filesize.decimal(matrix["stored_bytes"]) if "stored_bytes" in matrix else "–",
                number(matrix["predicted_loss"]),
            ]
        )
    loss = f"loss, {unit}" if nats else "loss, share"
    columns = ["matrix", "spectrum (6 decades)", "kind", "format", "shape", "rank or width", "kept", "bytes", loss]
    out = console()
    out.print(table(f"{target}: {report['method']}", columns, rows, left=4))
    if experts := report.get("experts"):
        out.print(_experts_table(experts, report["matrices"]))
        if routers := routers_of(experts):
            out.print(_routers_table(routers))
    kinds = [row[2] for row in rows]
    total = sum(matrix["predicted_loss"] for matrix in report["matrices"].values())
    sizes = [removed(report)] if report["asked_ratio"] else []
    sizes += [became(report["claimed_bytes"], report["stored_bytes"])] if "stored_bytes" in report else []
    out.print(
        f"{kinds.count('LRC')} matrices are low-rank (LRC), {kinds.count('narrow')} modules are narrower, "
        f"{kinds.count('N-LRC')} stay dense (N-LRC). {', '.join(sizes)}{'.' if sizes else ''}"
    )
    if "cache" in report:
        out.print(cached(report["cache"]))
    for tried in report.get("plans") or []:
        at_random = "" if tried["at_random"] is None else f", {tried['at_random']:.4g} on tokens drawn at random"
        taken = " (taken)" if tried["plan"] == report["plan"] else ""
        far = f"{tried['divergence']:.4g} {unit}"
        out.print(f"Plan {tried['plan']}{taken}: {far} from dense on held-out text{at_random}.")
    for text in texts:
        dense = "" if text["perplexity"] is None else f", dense perplexity {text['perplexity']:.4g}"
        weight = f", weight {text['weight']:g}" if len(texts) > 1 else ""
        out.print(
            f"Calibrated on {text['text']}{weight}: {text['windows']} windows or examples, {text['tokens']} tokens"
            f"{dense}."
        )
    if "refine" in report:
        out.print(refined(report["refine"], unit))
    if nats:
        out.print(f"Predicted loss increase: {total:.4g} {unit} (second order: too low at large ratios).")
    else:
        out.print(
            "Losses are shares of each matrix's own total in the method's metric; they do not compare between matrices."
        )


def _texts(run: Any) -> list[dict[str, Any]]:
    """What each text of a run's calibration came to."""
    from lowrank_compress.artifacts.manifest import read_manifest

    try:
        manifest = read_manifest(run.statistics)
    except ArtifactError:
        return []
    return [] if manifest is None else manifest.report.get("texts", [])


def _experts_table(experts: dict[str, Any], matrices: dict[str, Any]) -> Any:
    """List what each routed expert saw, and what is left of it."""
    rows = []
    for path, expert in experts.items():
        ranks = [expert["width"]] if "width" in expert else [matrices[name]["rank"] for name in expert["entries"]]
        tokens = "–" if expert["tokens"] is None else f"{expert['tokens']:,}" if expert["tokens"] else "none"
        said = ", ".join("dense" if rank is None else str(rank) for rank in ranks) or "dense"
        said = f"in {expert['leads_to'].rpartition('.')[2]}" if "leads_to" in expert else said
        rows.append([path, tokens, said, f"{expert['stored'] / expert['dense']:.1%}"])
    return table("Routed experts", ["expert", "tokens seen", "width, or ranks of gate, up, down", "kept"], rows, left=1)


def _routers_table(routers: Mapping[str, Mapping[str, float]]) -> Any:
    """List how routers shared out the calibration set."""
    columns = ["choices of the router", "experts", "in effect", "busiest", "idlest"]
    rows = [
        [path, str(each["experts"]), f"{each['in_effect']:.1f}", f"{each['busiest']:.1%}", f"{each['idlest']:.1%}"]
        for path, each in routers.items()
    ]
    return table("Routers", columns, rows, left=1)


# What may be said of a checkpoint's model code, which is no damage.
_CODE = {
    "older code": "The checkpoint's own model code is of another version of this program. Where lowrank_compress is "
    "installed it is not used; for machines without, `lrc refresh {run}` renews it.",
    "newer code": "The checkpoint's own model code is of a later version of this program: update lowrank_compress.",
}


def verify(target: str, as_json: bool) -> Path:
    """Check the files of a run, or of a checkpoint that is in none; return where they are.

    Raises
    ------
    ArtifactError
        One is damaged.
    """
    from lowrank_compress.artifacts.manifest import MANIFEST, read_manifest
    from lowrank_compress.model.locate import files_of
    from lowrank_compress.stages import verification
    from lowrank_compress.stages.run import Run

    path = files_of(target, (MANIFEST,))
    if Run(path).exists() or not (path / MANIFEST).exists():
        findings = verification.verify(path)
    else:
        manifest = read_manifest(path)
        path = files_of(target, () if manifest is None else manifest.outputs)
        findings = verification.verify_checkpoint(path)
    bad = [
        finding
        for finding in findings
        if finding["state"] not in ("intact", "edited by hand", "not there yet", "dropped", *_CODE)
    ]
    notes = [_CODE[finding["state"]].format(run=path) for finding in findings if finding["state"] in _CODE]
    if as_json:
        print_json({"run": str(path), "ok": not bad, "files": findings, "notes": notes})
    else:
        rows = [[finding["stage"], finding["file"], finding["state"]] for finding in findings]
        console().print(table(str(path), ["stage", "file", "state"], rows, left=3))
        for note in notes:
            console().print(note)
    if bad:
        first = bad[0]
        raise ArtifactError(
            f"{len(bad)} of {len(findings)} files are not what was written, the first {first['file']} "
            f"({first['state']}). {_mend(first['stage'])}"
        )
    return path


def _mend(stage: str) -> str:
    """Say what makes a stage's files anew."""
    if stage == "eval":
        return "Repeat `lrc eval` with the same options: what was changed is measured anew."
    return f"Repeat the {stage} stage with --overwrite."
