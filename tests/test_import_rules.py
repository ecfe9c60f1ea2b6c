"""Who may import whom, read from the sources: an import inside a function counts as well."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("modeling_tidar", "modeling_recurrent", "generation", "conversion", "training", "wavedraft")
MAY_IMPORT = {
    "generation": {"generation"},
    "modeling_tidar": {"modeling_tidar", "generation"},
    "modeling_recurrent": {"modeling_recurrent", "generation"},
    "conversion": {"conversion", "modeling_tidar", "modeling_recurrent", "generation"},
    "training": {"training", "modeling_tidar", "modeling_recurrent", "generation"},
    "wavedraft": set(PACKAGES),
}
TRAVELS = ("modeling_tidar", "modeling_recurrent", "generation")
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


def imported_package(package: str, node: ast.Import | ast.ImportFrom) -> str | None:
    """The package of ours that an import reaches, or None for others' code."""
    if isinstance(node, ast.ImportFrom) and node.level:
        parts = (node.module or "").split(".")
        if node.level == 1:  # the front door's siblings are the packages
            return parts[0] if package == "wavedraft" and parts[0] in PACKAGES else package
        return parts[0]
    return None


def test_packages_import_only_whom_they_may():
    broken = [
        f"{place} imports {reached}"
        for package in PACKAGES
        for place, node in imports(package)
        if (reached := imported_package(package, node)) and reached not in MAY_IMPORT[package]
    ]
    assert not broken


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
