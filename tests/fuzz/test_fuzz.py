"""A few cases of the two long fuzzes: no raw exception, no target left, no source changed, no difference.

The long runs: `python tests/fuzz/fuzz_folders.py 0 10000` and `python tests/fuzz/fuzz_keywords.py 0 2000`.
"""

import fuzz_folders
import fuzz_keywords
import pytest
from transformers.utils import logging

ONCE_RAW = [
    54,
    81,
    134,
    170,
    249,
    286,
    2031,
    3790,
    3978,
    5507,
]  # each ended in another package's exception when it was found


@pytest.fixture(autouse=True)
def verbosity():
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


def test_damaged_folders_are_refused_or_converted_well():
    done, failures = fuzz_folders.run(0, 25)
    assert done == 25 and not failures


@pytest.mark.parametrize("number", ONCE_RAW)
def test_damage_that_was_not_refused_once(number):
    assert fuzz_folders.run(number, 1) == (1, [])


def test_random_keywords_change_no_text():
    done, failures = fuzz_keywords.run(0, 60)
    assert done == 60 and not failures
