"""From the page's settings to keywords of `generate`, with errors in the page's words."""

import re
from typing import Any

from ..commands.chat_commands import read_setting
from ..commands.cli_checks import has_wavefront
from ..commands.cli_keywords import both_keywords
from ..commands.early_checks import OF_DEPTH, check_decoding
from ..commands.generate import generate

BY_DEFAULT = "by default"  # of a setting that is chosen from a list
LABELS = {
    "max_new_tokens": "New tokens",
    "temperature": "Temperature",
    "top_k": "Top k",
    "top_p": "Top p",
    "min_p": "Min p",
    "repetition_penalty": "Repetition penalty",
    "seed": "Seed",
    "draft_length": "Draft length",
    "num_branches": "Branches",
    "exact": "Exact",
    "policy": "Policy",
    "preset": "Preset",
    "num_recurrences": "Recurrences",
}
OF_BOTH = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
OF_TIDAR = ("draft_length", "num_branches", "exact")


def setting_names(is_recurrent: bool) -> tuple[str, ...]:
    """The settings of a family's page, in order."""
    return OF_BOTH + ((*OF_DEPTH, "draft_length") if is_recurrent else OF_TIDAR)


def options_of(values: dict[str, str], fixed: dict[str, Any]) -> dict[str, Any]:
    """The options of `wavedraft generate` that the settings stand for.

    Args:
        values: of the page's settings, as typed or chosen. One that is empty or missing is the option's default.
        fixed: the options that the command line set, `model` among them.

    Raises:
        ValueError: a setting is not a number where one is needed, or is outside its limits.
    """
    options = dict(fixed)
    for name in (*OF_BOTH, *OF_TIDAR, *OF_DEPTH):
        word = values.get(name, "").strip()
        word = "default" if word in ("", BY_DEFAULT) else word
        try:
            options[name] = read_setting(generate, name, word)
        except ValueError as error:
            raise ValueError(str(error).replace(name, LABELS[name], 1)) from None
    return options


def race_keywords(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keywords of `generate` for parallel and for plain decoding. It seeds plain decoding where a seed is set.

    Raises:
        ValueError: the settings contradict each other, or the checkpoint. It names them as the page does.
    """
    try:
        check_decoding(options)
        parallel, plain = both_keywords(options)
    except ValueError as error:
        raise ValueError(in_the_pages_words(str(error))) from None
    if has_wavefront(options["model"], parallel):
        parallel["record_wavefront"] = True
    return parallel, plain


def in_the_pages_words(message: str) -> str:
    """An error of the command line or of `generate`, its options named by their labels."""
    named = re.sub(r"--([a-z][a-z-]+)", lambda found: label_of(found[1].replace("-", "_"), found[0]), message)
    return re.sub(r"`([a-z_]+)`", lambda found: label_of(found[1], found[0]), named)


def label_of(name: str, instead: str) -> str:
    return LABELS.get(name, instead)
