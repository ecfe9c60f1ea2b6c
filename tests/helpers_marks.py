"""Which cases of a test run at every change, and which with the slow ones."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(quick: Collection[Any], cases: Iterable[Any], *, is_of_several: bool = False) -> list[Any]:
    """All `cases`: those of `quick` as they are, the others marked as slow. Are their values of several arguments?"""
    values = [(case, case if is_of_several else (case,)) for case in cases]
    return [case if case in quick else pytest.param(*value, marks=pytest.mark.slow) for case, value in values]
