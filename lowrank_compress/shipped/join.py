"""One file of the shipped files, as checkpoints carry it; this file itself stays in the package."""

from __future__ import annotations

import ast
import functools
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
# What a checkpoint's auto_map leads to; all else that is shipped, it imports.
ENTRY = "remote.py"
HEADER = '''"""The compressed layers of this checkpoint, and what makes ``from_pretrained`` load them.

This file imports nothing but torch and transformers. It is joined from those in lowrank_compress/shipped; running it
registers the quantizer, unless that of the package is in place.
"""
'''
WIDTH = 120


@dataclass(frozen=True)
class _Source:
    """One of the files: its name, the first line of its docstring, its imports and what follows them.

    `needs` are the files that it imports, `names` what it defines.
    """

    name: str
    summary: str
    imports: tuple[ast.Import | ast.ImportFrom, ...]
    needs: tuple[str, ...]
    body: str
    names: tuple[str, ...]


@functools.cache
def joined(folder: Path = HERE) -> str:
    """Join the shipped files into one that works alone, each after those that it imports.

    The entry file and what it imports, directly or not, is shipped: a new file needs no mention here.

    Raises
    ------
    ValueError
        A file has something that cannot be joined: an import that is not at its top or renames something of another
        file, or a name that another file has too.
    """
    sources = list(_in_order(folder, ENTRY, {}))
    owners: dict[str, str] = {}
    for source in sources:
        for name in source.names:
            if owners.setdefault(name, source.name) != source.name:
                raise ValueError(f"{source.name} and {owners[name]} both define {name}; expected names of their own")
    parts = [f"{_comment(f'{source.name}: {source.summary}')}\n\n\n{source.body}" for source in sources]
    return f"{HEADER}\n{_import_lines(sources)}\n" + "\n\n".join(parts)


def _comment(text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _in_order(folder: Path, name: str, seen: dict[str, bool]) -> Iterator[_Source]:
    """Yield the files that a file imports, each once, and then itself."""
    if name in seen:
        if not seen[name]:
            raise ValueError(f"{name} imports itself by way of another file")
        return
    seen[name] = False
    source = _parsed(folder, name)
    for needed in source.needs:
        yield from _in_order(folder, needed, seen)
    seen[name] = True
    yield source


def _parsed(folder: Path, name: str) -> _Source:
    text = (folder / name).read_text(encoding="utf-8")
    tree = ast.parse(text)
    summary = (ast.get_docstring(tree) or "").partition("\n")[0]
    rest = [node for node in tree.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    head = [node for node in rest if isinstance(node, ast.Import | ast.ImportFrom)]
    if any(isinstance(node, ast.Import | ast.ImportFrom) for node in rest[len(head) :]):
        raise ValueError(f"{name} has an import below something else; expected all at its top")
    own = [node for node in head if isinstance(node, ast.ImportFrom) and node.level]
    if renamed := [alias for node in own for alias in node.names if alias.asname or node.module is None]:
        raise ValueError(f"{name} imports {renamed[0].name} under another name, or a file as a whole")
    needs = tuple(_target(name, node) for node in own)
    imports = tuple(node for node in head if node not in own and getattr(node, "module", "") != "__future__")
    lines = text.splitlines(keepends=True)[head[-1].end_lineno if head else 0 :]
    body = "".join(lines).strip("\n") + "\n"
    return _Source(name, summary, imports, needs, body, tuple(_defined(rest[len(head) :])))


def _target(name: str, node: ast.ImportFrom) -> str:
    """Find the file, relative to the folder, that a relative import in file `name` means."""
    above = Path(name).parents[node.level - 1]
    return (above / f"{(node.module or '').replace('.', '/')}.py").as_posix()


def _defined(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def _import_lines(sources: list[_Source]) -> str:
    """Write what all files import of others, once, in the usual order."""
    whole: set[str] = set()
    single: dict[str, set[str]] = {}
    for node in (node for source in sources for node in source.imports):
        if isinstance(node, ast.Import):
            whole |= {ast.unparse(ast.Import([alias])) for alias in node.names}
        else:
            single.setdefault(str(node.module), set()).update(ast.unparse(alias) for alias in node.names)
    groups = ["from __future__ import annotations\n"]
    for standard in (True, False):
        lines = [line for line in sorted(whole) if _is_standard(line.split()[1]) == standard]
        lines += [_from(module, single[module]) for module in sorted(single) if _is_standard(module) == standard]
        groups.append("".join(f"{line}\n" for line in lines))
    return "\n".join(groups)


def _is_standard(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def _from(module: str, names: set[str]) -> str:
    """Write a ``from`` import: constants, classes and then others, wrapped as formatters do."""
    kinds = sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    line = f"from {module} import {', '.join(kinds)}"
    return line if len(line) <= WIDTH else f"from {module} import (\n" + "".join(f"    {n},\n" for n in kinds) + ")"
