"""transformers' own `TextDiffusionStreamer` on a terminal: drafts appear in yellow and vanish, the text remains."""

import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from transformers.generation.streamers import TextDiffusionStreamer

from helpers_tidar import tiny_tidar
from wavedraft.modeling_recurrent import RecurrentDepthForCausalLM

SHIPPED = Path(__file__).parents[1] / "checkpoints" / "austen-recurrent-6m"
PARTS = re.compile(r"(\0337|\0338|\033\[J|\033\[33m|\033\[0m)")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


def shown(printed: str) -> tuple[str, list[str]]:
    """What a terminal shows in the end, and each yellow text it showed on the way."""
    screen, cursor, is_yellow, drafts = "", 0, False, []
    for part in PARTS.split(printed):
        if part == "\0337":  # save the cursor
            cursor = len(screen)
        elif part == "\0338":  # back to it; what stands after it is cleared next
            screen = screen[:cursor]
        elif part in ("\033[33m", "\033[0m"):
            is_yellow = part == "\033[33m"
        elif part != "\033[J":
            screen += part
            drafts += [part] if is_yellow else []
    return screen, drafts


@pytest.mark.parametrize("way", ["tidar", "diffusion-forcing", "exact"])
def test_drafts_are_shown_and_the_text_stays(tokenizer, way, capsys):
    if way == "tidar":
        model, options = tiny_tidar(vocab_size=len(tokenizer)), {}
    else:
        model, options = RecurrentDepthForCausalLM.from_pretrained(SHIPPED).eval(), {"policy": way}
    inputs = tokenizer("It was a", return_tensors="pt")
    options |= {"max_new_tokens": 12, "do_sample": False}
    expected = tokenizer.decode(model.generate(**inputs, **options)[0])
    capsys.readouterr()
    streamer = TextDiffusionStreamer(tokenizer)
    model.generate(**inputs, **options, streamer=streamer)
    text, drafts = shown(capsys.readouterr().out)
    assert text == expected + "\n"
    assert len(drafts) > 2
    if way != "tidar":  # its random masks draft nothing that is accepted
        assert any(draft.strip() and draft in expected for draft in drafts)
    streamer._takes_logits = True
    with pytest.raises(ValueError, match="`_takes_logits` must be False"):
        model.generate(**inputs, **options, streamer=streamer)
