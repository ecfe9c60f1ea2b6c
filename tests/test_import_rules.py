"""Import rules between packages, checked on the sources, including imports inside functions."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("modeling_tidar", "modeling_recurrent", "generation", "hub", "conversion", "training", "wavedraft")
DECODING = {"generation", "generation.drafting", "generation.recurrent", "generation.execution"}
MODELING = {"modeling_tidar", "modeling_recurrent"}
# Who may import whom, besides itself. `generation` holds the files that its three parts share.
MAY_IMPORT = {
    "generation": set(),
    "generation.execution": {"generation"},
    "generation.drafting": {"generation", "generation.execution"},
    "generation.recurrent": {"generation", "generation.execution"},
    "hub": DECODING,
    "modeling_tidar": DECODING | {"hub"},
    "modeling_recurrent": DECODING | {"hub"},
    "conversion": DECODING | MODELING | {"hub"},
    "training": DECODING | MODELING | {"hub"},
    "wavedraft": DECODING | MODELING | {"hub", "conversion", "training"},
}
TRAVELS = ("modeling_tidar", "modeling_recurrent", "generation", "hub")
TRAVELLING_DEPENDENCIES = {"torch", "transformers", "huggingface_hub", "safetensors"}


def imports(package: str) -> list[tuple[str, ast.Import | ast.ImportFrom]]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"no sources in {package}"
    return [
        (f"{path.relative_to(ROOT)}:{node.lineno}", node)
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]


def imported_file(path: Path, node: ast.Import | ast.ImportFrom) -> Path | None:
    """The file of ours that an import reaches, or None for others' code."""
    if not isinstance(node, ast.ImportFrom) or not node.level:
        return None
    folder = path.parents[node.level - 1]
    parts = (node.module or "").split(".") if node.module else []
    if parts and not folder.joinpath(parts[0]).exists() and not folder.joinpath(parts[0] + ".py").exists():
        folder = ROOT  # the packages stand side by side in the repository, and below the front door when installed
    found = folder.joinpath(*parts)
    return found / "__init__.py" if found.is_dir() else found.with_suffix(".py")


def room_of(path: Path) -> str:
    """The package that a file belongs to, with the part of `generation` it stands in."""
    parts = path.relative_to(ROOT).parts[:-1]
    return ".".join(parts[:2]) if parts[0] == "generation" else parts[0]


def files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported_files(path: Path) -> set[Path]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    found = {imported_file(path, node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)}
    assert all(one is None or one.is_file() for one in found), f"{path} imports what is not there"
    return found - {None}


def test_rooms_import_only_whom_they_may():
    broken = [
        f"{path.relative_to(ROOT)} imports {reached.relative_to(ROOT)}"
        for path in files()
        if path != ROOT / "generation" / "__init__.py"  # the names that `wavedraft.generation` shows
        for reached in imported_files(path)
        if room_of(reached) not in MAY_IMPORT[room_of(path)] | {room_of(path)}
    ]
    assert not broken


def test_no_file_imports_itself_through_others():
    reached = {path: imported_files(path) - {path} for path in files() if path.name != "__init__.py"}
    while leaves := [path for path, found in reached.items() if not found & reached.keys()]:
        for leaf in leaves:
            del reached[leaf]
    assert not reached, f"an import circle among {sorted(str(path.relative_to(ROOT)) for path in reached)}"


def test_our_code_imports_our_code_relatively():
    """An absolute import would not travel with a checkpoint, and `import generation` works only from the repository."""
    broken = [
        f"{place} imports {name}"
        for package in PACKAGES
        for place, node in imports(package)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        if name.split(".")[0] in PACKAGES and not getattr(node, "level", 0)
    ]
    assert not broken


def test_what_travels_needs_only_what_every_user_of_transformers_has():
    broken = []
    for package in TRAVELS:
        for place, node in imports(package):
            if isinstance(node, ast.ImportFrom):
                names = [] if node.level else [node.module]
            else:
                names = [alias.name for alias in node.names]
            roots = {name.split(".")[0] for name in names}
            broken += [
                f"{place} imports {root}"
                for root in roots - TRAVELLING_DEPENDENCIES
                if root not in sys.stdlib_module_names
            ]
    assert not broken


def test_no_test_file_imports_a_test_file():
    """What several files share stands in `tests/helpers_*.py`, or is a fixture of `conftest.py`."""
    broken = [
        f"{path.relative_to(ROOT)}:{node.lineno} imports {name}"
        for folder in ("tests", "experiments")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        if name.split(".")[-1].startswith(("test_", "conftest"))
    ]
    assert not broken
