"""What the page of `wavedraft web` does without a browser: races, settings, HTML, and the Space."""

import re
import runpy
import socket
from pathlib import Path

import pytest
import torch
import yaml

from helpers_tidar import tiny_tidar
from helpers_tokenizers import WORDS, word_tokenizer
from wavedraft.commands import web as web_command
from wavedraft.commands.timed_runs import Run
from wavedraft.web.drawing import lane, outcome, trace_frame
from wavedraft.web.lane import Lane, Moment, StoppedRace
from wavedraft.web.race import ALONE, BESIDE, WARMING, Race
from wavedraft.web.racer import Racer
from wavedraft.web.settings import in_the_pages_words, options_of, race_keywords, setting_names

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "checkpoints" / "austen-recurrent-6m"
FIXED = {"adapter": None, "packed_weights": None, "compile": False, "dtype": "auto", "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    tiny_tidar(vocab_size=len(WORDS)).save_pretrained(folder)
    word_tokenizer(unk_token="the").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def racer(folder):
    return Racer.load(model=str(folder), **FIXED)


def raced(racer, prompt="the cat", **values):
    values = {"max_new_tokens": "20", **values}
    return list(racer.race("me", prompt, False, values))


def text_of(lane_html):
    return re.sub(r"<[^>]+>", "", lane_html.split('class="text"')[1].split(">", 1)[1])


def test_both_lanes_write_what_generate_writes(racer):
    *_, (end, ours, plain, trace) = raced(racer, num_branches="all")
    ids = racer.tokenizer.apply_chat_template(
        [{"role": "user", "content": "the cat"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    new_ids = racer.model.generate(ids, max_new_tokens=20, draft_length=0)[0, ids.shape[1] :]
    text = racer.tokenizer.decode(new_ids, skip_special_tokens=True)
    assert len(text) > 20 and "The texts are identical." in end
    assert text_of(ours).replace(" ", "") == text_of(plain).replace(" ", "") == text.replace(" ", "")
    assert "19 forwards" in plain and trace.count("data-token") == 20
    assert racer.races == {} and len(racer.warm) == 1


def test_the_stages_of_a_race_come_in_order_and_warm_up_once(racer):
    def stages(shown):
        told = (re.sub(r"<[^>]+>", "", one[0]) for one in shown[:-1])
        return list(dict.fromkeys(told))

    assert stages(raced(racer, draft_length="2")) == [WARMING, ALONE, BESIDE, "The race is over."]
    assert stages(raced(racer, draft_length="2")) == [ALONE, BESIDE, "The race is over."]


def test_a_stop_ends_either_decode_and_leaves_the_model_as_it_was(racer):
    hooks, rest = len(racer.model._forward_pre_hooks), dict(racer.model.generation_config.to_dict())
    for stage in (ALONE, BESIDE):
        shown = racer.race("me", "the cat", False, {"max_new_tokens": "100000" if stage == ALONE else "150"})
        for told, *_ in shown:
            if stage in told:
                racer.stop("me")
                break
        *_, (end, _, _, _) = list(shown)
        assert "Stopped." in end
        assert len(racer.model._forward_pre_hooks) == hooks
    assert racer.model.generation_config.to_dict() == rest
    assert "identical" in raced(racer)[-1][0]


def test_a_page_that_goes_away_ends_its_decode(racer):
    shown = racer.race("me", "the cat", False, {"max_new_tokens": "100000"})
    next(shown)
    race = racer.races["me"]
    shown.close()
    assert race.is_stopped and racer.races == {}
    assert "identical" in raced(racer)[-1][0], "the model is free again"


@pytest.mark.parametrize(
    ("prompt", "values", "error"),
    [
        (" ", {}, "There is no prompt. Type one above."),
        ("the", {"temperature": "hot"}, "Temperature must be a number from 0.0 up, but is &#x27;hot&#x27;."),
        ("the", {"max_new_tokens": "2.5"}, "New tokens must be a whole number from 1 up"),
        ("the", {"top_k": "3"}, "Top k is for sampling: give a Temperature above 0"),
        ("the", {"repetition_penalty": "0"}, "Repetition penalty must be above 0"),
        ("the", {"exact": "tie-safe", "temperature": "1"}, "Exact is for greedy decoding"),
        ("the", {"draft_length": "1", "num_branches": "2"}, "Branches must be auto, all or between 1 and 1"),
    ],
)
def test_what_is_wrong_is_told_in_the_pages_words(racer, prompt, values, error):
    *_, (told, *_) = raced(racer, prompt, **values)
    assert 'class="failed"' in told and error in told
    assert "--" not in told


def test_a_decode_that_fails_is_told_too(racer, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(racer.model, "generate", fails)
    *_, (told, *_) = raced(racer, top_k="5", temperature="1")
    assert "Decoding failed with RuntimeError: out of memory" in told
    assert "Traceback" in capsys.readouterr().err


def test_settings_become_the_options_of_the_command_line(folder):
    fixed = {"model": str(folder), **FIXED}
    options = options_of({"temperature": "", "draft_length": "by default", "seed": "3"}, fixed)
    assert options["temperature"] == 0.0 and options["draft_length"] is None and options["seed"] == 3
    assert options["policy"] is None and options["model"] == str(folder)
    assert "exact" in setting_names(is_recurrent=False) and "policy" in setting_names(is_recurrent=True)
    options = options_of({"seed": "3", "temperature": "1", "max_new_tokens": "8"}, fixed)
    drawn = []
    for _ in range(2):
        parallel, plain = race_keywords(options)
        drawn.append(torch.rand(1))
        assert parallel["seed"] == 3 and "seed" not in plain
    assert torch.equal(*drawn), "plain decoding draws from the global generator"
    assert in_the_pages_words("`top_p` and --num-branches, but not --else") == "Top p and Branches, but not --else"


def test_a_recurrent_depth_model_shows_its_wavefront():
    racer = Racer.load(model=str(SHIPPED), **FIXED)
    *_, (end, ours, plain, trace) = raced(racer, "Emma Woodhouse", policy="exact", max_new_tokens="12")
    assert "identical" in end and text_of(ours) == text_of(plain)
    assert "core passes" in end and "The wavefront" in trace


def test_a_lane_shows_what_was_there_at_a_time():
    lane_of = Lane(word_tokenizer())
    lane_of.begin()
    lane_of.put(torch.tensor([[4, 5]]))
    lane_of.moments = [Moment(0.0, 0, "", 0), Moment(1.0, 1, "", 2), Moment(2.0, 1, " mat", 2), Moment(3.0, 2, "", 5)]
    assert [lane_of.at(seconds).num_tokens for seconds in (0.5, 1.0, 2.5, 9.0)] == [0, 2, 2, 5]
    assert lane_of.at(2.5).draft == " mat"
    lane_of.is_stopped = True
    for put in (lambda: lane_of.put(torch.tensor([4])), lambda: lane_of.put_draft(torch.tensor([[4]]))):
        with pytest.raises(StoppedRace):
            put()


def test_hostile_text_is_shown_and_not_obeyed():
    hostile = "<script>alert(1)</script>\x1b[2J"
    lane_of = Lane(word_tokenizer())
    lane_of.pieces = [hostile]
    shown = lane("Plain", lane_of, Moment(1.0, 1, hostile, 3), 1.0, True)
    assert "<script" not in shown and "\x1b" not in shown and shown.count("&lt;script") == 2


def test_an_outcome_says_why_texts_may_differ(racer):
    race = Race(racer.model, racer.tokenizer, None, None)
    race.runs = [Run([1, 2, 3], 1, 2.0), Run([1, 2, 4], 2, 1.0)]
    told = outcome(race, False, "In float32 they must be the same.")
    assert "0.50 times its speed" in told and "The texts differ. In float32" in told and "did not pay" in told
    assert "differ" not in outcome(race, True, "In float32 they must be the same.").replace("Sampled texts", "")
    assert "Stopped" in outcome(Race(racer.model, racer.tokenizer, None, None), False, "")


def test_the_trace_is_the_page_of_the_command_line_in_a_frame_without_scripts(racer):
    race = Race(racer.model, racer.tokenizer, None, None)
    frame = trace_frame(race.trace("<b>"), racer.tokenizer)
    assert frame.startswith('<iframe class="trace" sandbox ') and "&lt;!doctype html&gt;" in frame
    assert 'download="trace.html"' in frame


def test_a_port_that_is_taken_and_a_package_that_is_not_there_are_told(folder, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"--port {port} cannot be served"):
            web_command.web(str(folder), port=port)
    assert web_command.free_port("127.0.0.1", 0) > 0
    monkeypatch.setattr(web_command, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs Gradio, which is not installed"):
        web_command.web(str(folder))


def test_the_space_shows_the_page_of_its_model(folder, monkeypatch):
    pytest.importorskip("gradio")
    header = yaml.safe_load((ROOT / "spaces" / "README.md").read_text().split("---")[1])
    assert header["sdk"] == "gradio" and (ROOT / "spaces" / header["app_file"]).is_file()
    assert len(header["short_description"]) <= 60, "the Hub takes no more"
    monkeypatch.setenv("WAVEDRAFT_MODEL", str(folder))
    names = runpy.run_path(str(ROOT / "spaces" / header["app_file"]), run_name="space")
    config = names["page"].get_config_file()
    assert str(folder) in str(config) and names["racer"].fixed["model"] == str(folder)
    assert "wavedraft[web]" in (ROOT / "spaces" / "requirements.txt").read_text()
