"""When masks ride along, and what is counted of them."""

from prometheus_client import REGISTRY, Gauge

from helpers_engines import Counted, core_of, engine, greedy, prompts, texts
from helpers_tiny import DRAFT_LENGTH
from wavedraft_vllm.metrics import DraftMetrics, _metric


def metrics_of(llm):
    """What `/metrics` says of an engine: {name: value}. A server asks for these metrics by itself, a test does here."""
    manager = llm.llm_engine.logger_manager
    if not any(isinstance(one, Recorded) for one in manager.stat_loggers):
        manager.stat_loggers.append(Recorded(llm.llm_engine.vllm_config))
    names = ("steps_total", "accepted_tokens_total", "draft_places_total", "is_drafting")
    return {name: REGISTRY.get_sample_value(f"wavedraft:{name}", {"engine": "0"}) for name in names}


class Recorded(DraftMetrics):
    """As vLLM's own adapter calls it for each engine."""

    def log(self): ...


def growth(before, after):
    return {name: after[name] - before[name] for name in before if name.endswith("_total")}


def test_above_the_largest_batch_nothing_rides_along(folders, plain):
    """And a request costs the query tokens that it costs without the plugin. Below, drafts are counted as they are."""
    asked = prompts(5, seed=11)
    limited = engine(*folders, {"max_batch": 2})
    want = texts(plain, asked, greedy(10, ignore_eos=True))
    begun = metrics_of(limited)
    with Counted(limited) as counted:
        assert texts(limited, asked, greedy(10, ignore_eos=True)) == want
    assert counted.num_steps == 10 and counted.num_verified == 0
    assert counted.num_scheduled == sum(len(one["prompt_token_ids"]) for one in asked) + 5 * 9
    many = metrics_of(limited)
    assert not any(growth(begun, many).values()) and many["is_drafting"] == 0
    with Counted(limited) as counted:
        assert texts(limited, asked[:2], greedy(10, ignore_eos=True)) == want[:2]
    few = metrics_of(limited)
    assert counted.num_verified > 0 and few["is_drafting"] == 1
    assert growth(many, few) == {
        "steps_total": counted.num_verified,
        "accepted_tokens_total": counted.num_accepted,
        "draft_places_total": counted.num_verified * (DRAFT_LENGTH - 1),
    }
    assert 0 < counted.num_accepted < counted.num_verified * (DRAFT_LENGTH - 1)


def test_a_step_and_its_accepted_tokens_are_the_text(drafting):
    """Tokens written are one a step, what stood, and one of each prompt's forward."""
    before = metrics_of(drafting)
    answers = texts(drafting, prompts(4, seed=15), greedy(13, ignore_eos=True))
    grown = growth(before, metrics_of(drafting))
    num_tokens = sum(len(one[0]) for one in answers)
    # a draft that stands after the last token asked for is counted, and cut off
    assert 0 <= grown["steps_total"] + grown["accepted_tokens_total"] - (num_tokens - 4) <= 4 * (DRAFT_LENGTH - 1)


def test_masks_are_not_counted_as_rejected_drafts(drafting):
    scheduler = core_of(drafting).scheduler
    stats = scheduler.make_spec_decoding_stats(None, 2 * DRAFT_LENGTH - 1, 2, None, "one")
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (1, DRAFT_LENGTH - 1, 2)


def test_an_engine_that_does_not_draft_counts_nothing(plain):
    assert DraftMetrics(plain.llm_engine.vllm_config).counters is None


def test_of_several_processes_of_a_server_the_last_one_says_whether_masks_ride_along():
    """With --api-server-count 2 each process writes a file, and by default each would be a series of its own."""
    assert _metric(Gauge, "wavedraft:of_a_test", "...")._multiprocess_mode == "mostrecent"
