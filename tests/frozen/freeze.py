"""Writes down what the package does on tiny models, or compares what it does now with what was written down.

    python tests/frozen/freeze.py OUT.json [SECTION ...]
    python tests/frozen/freeze.py --check [SECTION ...]

A section is one of tidar, recurrent, golden, errors, help, travelling. Numbers are compared to a thousandth, since
machines round differently; everything else must be equal.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import frozen_recurrent  # noqa: E402
import frozen_tidar  # noqa: E402
import frozen_words  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

BEHAVIOUR = HERE / "behaviour.json"
TOLERANCE = 1e-3
SECTIONS: dict[str, Callable[[], Iterator[tuple[str, Any]]]] = {
    "tidar": frozen_tidar.cases,
    "recurrent": frozen_recurrent.cases,
    "golden": frozen_recurrent.golden_cases,
    "errors": frozen_words.error_cases,
    "help": frozen_words.help_cases,
    "travelling": frozen_words.travelling_cases,
}
# Of the cases of a section, and of those that compile or record, one in so many runs with the tests.
FAST = {"tidar": 4, "recurrent": 8, "golden": 16, "compiled": 40, "recorded": 40}


def is_fast(section: str, name: str) -> bool:
    """Whether a case runs with the tests: by its name alone, so that other cases do not change the choice."""
    kind = next((kind for kind in ("compiled", "recorded") if f", {kind}" in name), section)
    return zlib.crc32(name.encode()) % FAST.get(kind, 1) == 0


def run_section(section: str, is_chosen: Callable[[str, str], bool] = lambda section, name: True) -> dict[str, Any]:
    """What each chosen case of a section gives now, as it comes back from JSON."""
    found: dict[str, Any] = {}
    for name, call in SECTIONS[section]():
        if is_chosen(section, name):
            assert name not in found, f"two cases are called {name!r}"
            torch.manual_seed(0)
            try:
                found[name] = json.loads(json.dumps(call()))
            except Exception as error:
                found[name] = f"raised {type(error).__name__}: {error}"
    return found


def differences(old: Any, new: Any, place: str = "") -> Iterator[str]:
    """One line for each place where two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if key not in old or key not in new:
                side = "new" if key in new else "frozen"
                yield f"{place}.{key}: only in the {side} one: {short(new.get(key, old.get(key)))}"
            else:
                yield from differences(old[key], new[key], f"{place}.{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences(one, other, f"{place}[{index}]")
    elif isinstance(old, float) or isinstance(new, float):
        if not are_close(old, new):
            yield f"{place}: {old} was frozen, now {new}"
    elif old != new:
        yield f"{place}: {short(old)} was frozen, now {short(new)}"


def are_close(old: Any, new: Any) -> bool:
    are_numbers = isinstance(old, int | float) and isinstance(new, int | float)
    return are_numbers and abs(old - new) <= TOLERANCE * max(1.0, abs(old))


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 300 else text[:300] + " ..."


def compare(section: str, frozen: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Readable differences of one section, case by case."""
    lines = []
    for name in sorted(frozen.keys() | found.keys()):
        if name not in found or name not in frozen:
            lines.append(f"[{section}] {name}: the case is {'new' if name in found else 'gone'}")
            continue
        lines += [f"[{section}] {name} {line}" for line in differences(frozen[name], found[name])]
    return lines


def read_frozen() -> dict[str, Any]:
    return json.loads(BEHAVIOUR.read_text())


def write(path: Path, content: dict[str, Any]) -> None:
    """One case a line, so that a change shows in a diff."""
    parts = []
    for section in sorted(content):
        cases = content[section]
        dumped = {name: json.dumps(told, separators=(",", ":"), sort_keys=True) for name, told in cases.items()}
        lines = [f"{json.dumps(name)}:{dumped[name]}" for name in sorted(cases)]
        parts.append(f"{json.dumps(section)}:{{\n" + ",\n".join(lines) + "\n}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def be_quiet() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with behaviour.json")
    parser.add_argument("--fast", action="store_true", help="only the cases that run with the tests")
    parser.add_argument("names", nargs="*", help="OUT.json unless --check, and sections")
    given = parser.parse_args()
    names = list(given.names)
    out = None if given.check else Path(names.pop(0))
    be_quiet()
    is_chosen = is_fast if given.fast else lambda section, name: True
    frozen, written, lines = read_frozen() if given.check else {}, {}, []
    for section in names or SECTIONS:
        began = time.perf_counter()
        written[section] = run_section(section, is_chosen)
        print(f"{section}: {len(written[section])} cases, {time.perf_counter() - began:.0f} s", flush=True)
        if given.check:
            wanted = {name: told for name, told in frozen[section].items() if is_chosen(section, name)}
            lines += compare(section, wanted, written[section])
    if out is not None:
        write(out, written)
    print("\n".join(lines) or "no differences")
    return 1 if lines else 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        sys.exit(main())
