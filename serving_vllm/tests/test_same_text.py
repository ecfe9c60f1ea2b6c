"""Greedy text in float32 is vLLM's own, token for token, whatever is asked of the engine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from helpers_engines import MIB, Counted, core_of, engine, greedy, prompts, texts
from helpers_tiny import EOS, tiny_adapter, tiny_checkpoint

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3")


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_of_each_family(family, tmp_path):
    check_family(family, tmp_path)


def test_greedy_text_of_a_mixture_of_experts(tmp_path):
    """In a process of its own: groups of processes for experts are made with a process's first engine."""
    folder = Path(__file__).parent
    line = f"import conftest, test_same_text; test_same_text.check_family('Qwen3Moe', {str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", line], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def check_family(family, folder):
    """Alone, and eight at once; some drafts stand, and fewer steps are run than tokens are written."""
    checkpoint = tiny_checkpoint(family, Path(folder))
    (checkpoint / "adapter").mkdir()
    adapter = tiny_adapter(checkpoint, checkpoint / "adapter")
    plain, drafting = engine(checkpoint), engine(checkpoint, adapter)
    asked = prompts(8)
    want = texts(plain, asked, greedy(16))
    assert len({tuple(one[0]) for one in want}) > 5, "texts that are all the same prove little"
    assert texts(drafting, asked, greedy(16)) == want
    with Counted(drafting) as counted:
        assert [texts(drafting, [one], greedy(16))[0] for one in asked[:3]] == want[:3]
    num_tokens = sum(len(one[0]) for one in want[:3])
    assert counted.num_accepted > 0 and counted.num_steps <= num_tokens - counted.num_accepted + 3


def test_sixteen_at_once(plain, drafting):
    asked = prompts(16, seed=20)
    assert texts(drafting, asked, greedy(12)) == texts(plain, asked, greedy(12))


def test_texts_that_fill_the_context(plain, drafting):
    """Where the context ends, fewer masks ride along, and then none."""
    asked = prompts(3, 230, 248, seed=17)
    want = texts(plain, asked, greedy(60, ignore_eos=True))
    for one, (text,) in zip(asked, want, strict=True):
        assert len(one["prompt_token_ids"]) + len(text) == plain.model_config.max_model_len
    with Counted(drafting) as counted:
        assert texts(drafting, asked, greedy(60, ignore_eos=True)) == want
    assert counted.num_accepted > 0


def test_without_a_head_and_with_fewer_drafts(folders, plain, tmp_path):
    """Of a step's four tokens three may be masks, so that a draft has two places and leaves room for one mask."""
    asked = prompts(4, seed=5)
    want = texts(plain, asked, greedy(12))
    without = tiny_adapter(folders[0], tmp_path, has_head=False, scale=0.02, mask_row=0)
    with Counted(narrow := engine(folders[0], without, {"draft_length": 2, "keep": 0.0})) as counted:
        assert texts(narrow, asked, greedy(12)) == want
    assert counted.most_accepted == 2


@pytest.mark.parametrize("keeps_prefixes", [False, True])
def test_prompts_in_chunks_a_tiny_cache_and_preemption(folders, plain, keeps_prefixes):
    """More requests than the cache holds: some are put back and begin anew, perhaps from a prefix that was kept."""
    shared = prompts(1, 32, 32, seed=2)[0]["prompt_token_ids"]
    asked = [{"prompt_token_ids": shared + one["prompt_token_ids"]} for one in prompts(5, 8, 38, seed=1)]
    want = texts(plain, asked, greedy(20))
    small = engine(
        *folders,
        kv_cache_memory_bytes=MIB // 4,
        block_size=32,
        max_num_batched_tokens=48,
        max_model_len=128,
        max_num_seqs=5,
        enable_prefix_caching=keeps_prefixes,
    )
    with Counted(small) as counted:
        assert texts(small, asked, greedy(20)) == want
    assert counted.num_preempted > 0


def test_prefix_caching(folders, plain):
    shared = prompts(1, 64, 64, seed=2)[0]["prompt_token_ids"]
    asked = [{"prompt_token_ids": shared + one["prompt_token_ids"]} for one in prompts(4, seed=3)]
    want = texts(plain, asked, greedy(10))
    cached = engine(*folders, enable_prefix_caching=True, block_size=32)
    assert texts(cached, asked, greedy(10)) == want
    assert texts(cached, asked, greedy(10)) == want
    hits = sum(metric.value for metric in cached.get_metrics() if metric.name == "vllm:prefix_cache_hits")
    assert hits > 64


def asks(plain, asked):
    """Sampling parameters that end a text early, or change its scores."""
    (text,) = texts(plain, asked[:1], greedy(14))[0]
    tokenizer = plain.get_tokenizer()
    return {
        "a stop string": greedy(14, stop=[tokenizer.decode(text[6:8])]),
        "several end tokens": greedy(14, stop_token_ids=[text[5], text[9]]),
        "an end token not heeded": greedy(14, ignore_eos=True, min_tokens=4),
        "penalties": greedy(14, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4),
        "bias and bans": greedy(14, logit_bias={text[0]: -100.0, 65: 1.5}, min_tokens=3),
        "bad words": greedy(14, bad_words=[tokenizer.decode([text[1]])]),
        "allowed tokens": greedy(14, allowed_token_ids=[*range(40, 90), EOS]),
    }


@pytest.mark.parametrize(
    "name",
    ["a stop string", "several end tokens", "an end token not heeded", "penalties", "bias and bans", "bad words",
     "allowed tokens"],
)  # fmt: skip
def test_whatever_is_asked(plain, drafting, name):
    asked = prompts(4, seed=4)
    params = asks(plain, asked)[name]
    want = plain.generate(asked, params, use_tqdm=False)
    got = drafting.generate(asked, params, use_tqdm=False)
    for one, other in zip(want, got, strict=True):
        assert list(other.outputs[0].token_ids) == list(one.outputs[0].token_ids)
        assert other.outputs[0].text == one.outputs[0].text
        assert other.outputs[0].stop_reason == one.outputs[0].stop_reason


def test_requests_of_all_kinds_in_one_batch(plain, drafting):
    asked = prompts(7, seed=6)
    params = list(asks(plain, asked).values())
    assert texts(drafting, asked, params) == texts(plain, asked, params)


def test_logprobs(plain, drafting):
    asked = prompts(3, seed=7)
    params = greedy(10, logprobs=3, prompt_logprobs=1)
    for one, other in zip(*(llm.generate(asked, params, use_tqdm=False) for llm in (plain, drafting)), strict=True):
        assert list(one.outputs[0].token_ids) == list(other.outputs[0].token_ids)
        pairs = zip(one.outputs[0].logprobs, other.outputs[0].logprobs, strict=True)
        for want, got in pairs:
            assert want.keys() == got.keys()
            assert all(abs(want[token].logprob - got[token].logprob) < 1e-3 for token in want)
        assert [*map(bool, one.prompt_logprobs)] == [*map(bool, other.prompt_logprobs)]


def test_logprobs_of_chosen_tokens(plain, drafting):
    """`logprob_token_ids`, beside requests for the likeliest tokens' or for none. vLLM's own verifier forgets it."""
    asked = prompts(4, seed=16)
    params = [greedy(12, logprob_token_ids=[3, 70, 200]), greedy(12, logprobs=2), greedy(12)]
    params.append(greedy(12, logprob_token_ids=[5], logprobs=1))
    want = plain.generate(asked, params, use_tqdm=False)
    with Counted(drafting) as counted:
        got = drafting.generate(asked, params, use_tqdm=False)
    assert counted.num_accepted > 0
    assert [bool(one.outputs[0].logprobs) for one in want] == [True, True, False, True]
    for one, other in zip(want, got, strict=True):
        assert list(one.outputs[0].token_ids) == list(other.outputs[0].token_ids)
        for some, found in zip(one.outputs[0].logprobs or [], other.outputs[0].logprobs or [], strict=True):
            assert some.keys() == found.keys()
            assert all(abs(some[token].logprob - found[token].logprob) < 1e-3 for token in some)
    assert {3, 70, 200} <= want[0].outputs[0].logprobs[-1].keys()


def test_a_json_schema(plain, drafting):
    """Such requests ride without drafts; others in the same batch draft."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    asked = prompts(4, seed=8)
    params = [
        greedy(40, structured_outputs=StructuredOutputsParams(json=schema)),
        greedy(16),
        greedy(40, structured_outputs=StructuredOutputsParams(choice=["left", "right"])),
        greedy(16),
    ]
    want = texts(plain, asked, params)
    with Counted(drafting) as counted:
        assert texts(drafting, asked, params) == want
    assert counted.num_accepted > 0
    text = drafting.get_tokenizer().decode(want[2][0], skip_special_tokens=True)
    assert text in ("left", "right")
    begun = drafting.get_tokenizer().decode(want[0][0], skip_special_tokens=True)
    assert begun.startswith("{") and (want[0][0][-1] != EOS or isinstance(json.loads(begun)["n"], int))


def test_several_answers_of_one_prompt(plain, drafting):
    """Greedy ones are equal: vLLM refuses n = 2 at temperature 0, but not with the likeliest token alone."""
    asked = prompts(2, seed=9)
    params = SamplingParams(n=2, temperature=1.0, top_k=1, max_tokens=12)
    want = texts(plain, asked, params)
    assert want == [one * 2 for one in texts(plain, asked, greedy(12))]
    assert texts(drafting, asked, params) == want
    sampled = SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=12)
    answers = texts(drafting, asked, sampled)
    assert all(len(one) == 2 and one[0] != one[1] for one in answers)
    assert texts(drafting, asked, sampled) == answers, "a seed gives the same text again"


def test_a_list_of_end_tokens(plain, drafting, monkeypatch):
    """As a checkpoint's generation_config.json names them: vLLM reads that file once, into these fields."""
    asked = prompts(6, seed=14)
    another = texts(plain, asked, greedy(16))[0][0][7]
    for llm in (plain, drafting):
        monkeypatch.setitem(llm.llm_engine.input_processor.generation_config_fields, "eos_token_id", [EOS, another])
    want = texts(plain, asked, greedy(16))
    assert want[0][0][-1] == another and len(want[0][0]) <= 8
    assert texts(drafting, asked, greedy(16)) == want


def test_an_aborted_request_gives_its_blocks_back(drafting):
    core, params = core_of(drafting), greedy(100, ignore_eos=True)
    pool = core.scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    llm_engine = drafting.llm_engine
    for place, one in enumerate(prompts(3, seed=10)):
        llm_engine.add_request(f"aborted-{place}", one, params)
    for _ in range(5):
        llm_engine.step()
    assert pool.get_num_free_blocks() < free
    llm_engine.abort_request([f"aborted-{place}" for place in range(3)])
    while llm_engine.has_unfinished_requests():
        llm_engine.step()
    assert pool.get_num_free_blocks() == free and not core.scheduler.requests
