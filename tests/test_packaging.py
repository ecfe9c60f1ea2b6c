"""The wheel has every module, and installs only `wavedraft` into site-packages."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("wavedraft", "modeling_tidar", "modeling_recurrent", "generation", "hub", "conversion", "training")


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
    names = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT)
            names.add(str(inside if folder == "wavedraft" else Path("wavedraft") / inside))
    return names


def test_every_module_is_in_the_wheel_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {name for name in names if name.endswith(".py")} == modules_of_the_tree()
    assert {name.split("/")[0] for name in names} == {"wavedraft"}


def test_every_file_in_the_wheel_is_the_trees(wheel):
    for name in modules_of_the_tree():
        inside = Path(name).relative_to("wavedraft")
        source = ROOT / inside if inside.parts[0] in FOLDERS else ROOT / name
        assert wheel.read(name) == source.read_bytes(), name


def test_the_licence_and_the_command_travel(wheel):
    names = wheel.namelist()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "wavedraft = wavedraft.cli:main" in wheel.read(entry_points).decode()


def test_the_wheel_imports_from_outside_the_repository(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import wavedraft, wavedraft.cli\n"
        "assert wavedraft.__file__.startswith(sys.argv[1]), wavedraft.__file__\n"
        "print(*sorted(set(wavedraft.__all__) - set(dir(wavedraft))))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", "a public name that does not exist"


def test_the_front_door_names_everything_it_promises():
    tree = ast.parse((ROOT / "wavedraft" / "__init__.py").read_text())
    imported = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    (promised,) = (node.value for node in tree.body if isinstance(node, ast.Assign))
    assert {element.value for element in promised.elts} <= imported | {"__version__"}


def test_what_travels_asks_for_the_transformers_that_the_package_asks_for():
    from wavedraft.hub.custom_generate import OLDEST_TRANSFORMERS

    assert f'"transformers>={OLDEST_TRANSFORMERS},' in (ROOT / "pyproject.toml").read_text()
