"""How a checkout is built: modules, rooms, and who imports whom.

    python .ci/house.py CHECKOUT [--arrows]

A room is a package with modules of its own, or a module that lies at the top level, as in a house whose rooms are stages:
`optimum_clp.search`, `optimum_clp.pruner`. An arrow is a pair of rooms of which one imports the other, at the top of a
module or within a function; `module:object` strings of registries are no imports. What is read is the source alone.
"""

import argparse
import ast
from pathlib import Path

PACKAGE = "optimum_clp"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--arrows", action="store_true", help="list them")
    args = parser.parse_args()
    files = modules_of(args.checkout)
    imports = {(name, other) for name, path in files.items() for other in imported(name, path, files)}
    packages = {name for name, path in files.items() if path.name == "__init__.py"}
    written = [name for name in files if name not in packages or lines_of_code(files[name])]
    rooms = sorted({room(name, packages) for name in written})
    arrows = sorted({(a, b) for a, b in ((room(x, packages), room(y, packages)) for x, y in imports) if a != b})
    flat = [name for name in written if name not in packages and name.count(".") == 1]
    print(f"modules {len(written)} (at the top level {len(flat)}), packages {len(packages)}, rooms {len(rooms)}, "
          f"arrows between rooms {len(arrows)}, imports between modules {len(imports)}, "
          f"circles of rooms {len(circles(rooms, arrows))}")  # fmt: skip
    for circle in circles(rooms, arrows):
        print("circle:", ", ".join(circle))
    for a in rooms if args.arrows else ():
        print(f"{a}: {', '.join(b for first, b in arrows if first == a) or '-'}")


def modules_of(checkout: Path) -> dict[str, Path]:
    """Files of the package by their dotted names."""
    found = {}
    for path in sorted((checkout / PACKAGE).rglob("*.py")):
        parts = path.relative_to(checkout).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, files: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            base = node.module or "" if node.level == 0 else ".".join(filter(None, [above, node.module]))
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in files else base)
    return {other for other in found if other in files and other != name}


def lines_of_code(path: Path) -> int:
    """Statements at the top of a file besides its docstring."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return len(body) - bool(body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant))


def room(name: str, packages: set[str]) -> str:
    """The package that a module lies in, or itself at the top level."""
    inner = name if name in packages or name.count(".") == 1 else name.rpartition(".")[0]
    return inner.removeprefix(f"{PACKAGE}.")


def circles(rooms: list[str], arrows: list[tuple[str, str]]) -> list[list[str]]:
    """Rooms that reach one another."""
    below = {a: {b for first, b in arrows if first == a} for a in rooms}
    changed = True
    while changed:
        changed = False
        for a in below:
            further = set().union(*(below[b] for b in below[a] if b in below)) - below[a]
            below[a] |= further
            changed = changed or bool(further)
    found = {frozenset(b for b in below if b in below[a] and a in below[b]) for a in below}
    return sorted(sorted(circle) for circle in found if len(circle) > 1)


if __name__ == "__main__":
    main()
