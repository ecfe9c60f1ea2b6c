"""The wheel holds every module, and puts nothing but `wavedraft` and its command into site-packages."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import wavedraft

ROOT = Path(__file__).parents[1]
FOLDERS = ("wavedraft", "modeling_tidar", "modeling_recurrent", "generation", "hub", "conversion", "training")
COMMAND = "wavedraft_command.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel built through the sdist: what is missing in the sdist is missing in the wheel, and no stale build/
    folder can put deleted files into it."""
    pytest.importorskip("build")
    tree = tmp_path_factory.mktemp("tree") / "wavedraft-source"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "models")
    shutil.copytree(ROOT, tree, ignore=ignored)
    output = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = output.glob("*.whl")
    return zipfile.ZipFile(path)


def modules_of_the_tree() -> set[str]:
    names = {COMMAND}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT)
            names.add(str(inside if folder == "wavedraft" else Path("wavedraft") / inside))
    return names


def test_every_module_is_in_the_wheel_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {name for name in names if name.endswith(".py")} == modules_of_the_tree()
    assert {name.split("/")[0] for name in names} == {"wavedraft", COMMAND}
    assert "wavedraft/py.typed" in names, "else type checkers take every name for Any"


def test_every_file_in_the_wheel_is_the_trees(wheel):
    for name in modules_of_the_tree() - {COMMAND}:
        inside = Path(name).relative_to("wavedraft")
        source = ROOT / inside if inside.parts[0] in FOLDERS else ROOT / name
        assert wheel.read(name) == source.read_bytes(), name


def test_the_licence_and_the_command_travel(wheel):
    names = wheel.namelist()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "wavedraft = wavedraft_command:main" in wheel.read(entry_points).decode()


def test_the_wheel_imports_from_outside_the_repository(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import wavedraft, wavedraft.cli\n"
        "assert wavedraft.__file__.startswith(sys.argv[1]), wavedraft.__file__\n"
        "assert not [name for name in wavedraft.__all__ if not hasattr(wavedraft, name)]\n"
        "print(*sorted(set(wavedraft.__all__) - set(dir(wavedraft))))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", "a public name that does not exist"


def test_the_front_door_names_the_same_to_type_checkers_as_to_python():
    """What `if TYPE_CHECKING` imports, `__all__` and the table of lazy names are one list of names."""
    tree = ast.parse((ROOT / "wavedraft" / "__init__.py").read_text())
    (for_checkers,) = (node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node))
    assigned = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    packages = {key: names for key, names in ast.literal_eval(assigned["_PUBLIC_NAMES"]).items() if names}
    assert packages == {node.module: tuple(alias.name for alias in node.names) for node in for_checkers.body}
    assert {name for names in packages.values() for name in names} | {"__version__"} == set(
        ast.literal_eval(assigned["__all__"])
    )


def test_the_metadata_says_the_version_and_the_extras(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = wheel.read(name).decode().splitlines()
    assert f"Version: {wavedraft.__version__}" in metadata
    extras = {line.removeprefix("Provides-Extra: ") for line in metadata if line.startswith("Provides-Extra: ")}
    assert extras == {"train", "gguf", "grammar", "plot", "web", "docs", "dev"}


def test_the_pages_about_versions_name_this_one():
    version = wavedraft.__version__
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changes and f"## [{version}]" in changes
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_what_travels_asks_for_the_transformers_that_the_package_asks_for():
    from wavedraft.hub.custom_generate import OLDEST_TRANSFORMERS

    assert f'"transformers>={OLDEST_TRANSFORMERS},' in (ROOT / "pyproject.toml").read_text()
