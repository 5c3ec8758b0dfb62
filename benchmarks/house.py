"""The house in figures: lines, modules, arrows and import cycles of the package, room by room.

    python benchmarks/house.py             # of this checkout
    python benchmarks/house.py CHECKOUT    # of another one, such as a worktree of a former commit

Needs import-linter, whose graph (grimp) it reads: type-only imports count, nothing is imported. An
arrow is one module that imports another; a cycle is a set of modules, or of packages, that all
reach each other. Printed as JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import grimp

ROOT = "rankadaptor_plugin"


def measured(checkout: Path) -> dict[str, object]:
    """Returns the figures of a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / ROOT
        shutil.copytree(checkout / ROOT, package)
        for name in ("hooks", "tasks"):
            shutil.copytree(checkout / name, package / name)
        sys.path.insert(0, folder)
        graph = grimp.build_graph(ROOT, cache_dir=None)
        modules = {path: path.relative_to(package).parts for path in package.rglob("*.py")}
        lines = {path: len(path.read_text("utf-8").splitlines()) for path in modules}
    rooms: dict[str, Counter[str]] = {}
    for path, parts in modules.items():
        room = rooms.setdefault(parts[0] if len(parts) > 1 else "(root)", Counter())
        room.update(modules=1, lines=lines[path])
    arrows = [
        (importer, imported)
        for importer in graph.modules
        for imported in graph.find_modules_directly_imported_by(importer)
    ]
    between = {(room_of(a), room_of(b)) for a, b in arrows} - {
        (r, r) for r in {room_of(m) for m in graph.modules}
    }
    tests = [path for path in (checkout / "tests").rglob("*.py") if ".tox" not in path.parts]
    return {
        "modules": len(modules),
        "lines": sum(lines.values()),
        "test_lines": sum(len(path.read_text("utf-8").splitlines()) for path in tests),
        "arrows": len(arrows),
        "arrows_between_rooms": len(between),
        "cycles_of_modules": cycles(set(arrows)),
        "cycles_of_rooms": cycles(between),
        "rooms": {name: dict(count) for name, count in sorted(rooms.items())},
    }


def room_of(module: str) -> str:
    """Returns the package that a module lies in, or its own name at the root."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def cycles(arrows: set[tuple[str, str]]) -> list[list[str]]:
    """Returns the sets of more than one node that reach each other."""
    following: dict[str, set[str]] = {}
    for start, end in arrows:
        following.setdefault(start, set()).add(end)
    reached = {node: _reached(node, following) for node in following}
    groups = {frozenset(b for b in reached[a] if a in reached.get(b, ())) for a in following}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _reached(node: str, following: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [node]
    while waiting:
        for other in following.get(waiting.pop(), set()) - seen:
            seen.add(other)
            waiting.append(other)
    return seen


if __name__ == "__main__":
    checkout = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    print(json.dumps(measured(checkout), indent=2))
