"""A load of 32 requests that arrive at random moments, of which some are aborted: each text is plain vLLM's."""

import json
import random
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers_engines import MIB, Counted, core_of, engine, engine_that_plans_ahead, greedy, prompts, texts
from helpers_server import ask, metric, served

NUM_REQUESTS, NUM_ABORTED = 32, 8


def load_of(plain, seed, most=32):
    """Prompts, parameters and plain vLLM's own texts, and how much of each is read before it is aborted, if it is."""
    draw = random.Random(seed)
    shared = prompts(1, 32, 32, seed=seed)[0]["prompt_token_ids"]
    asked = prompts(NUM_REQUESTS, 3, 30, seed=seed + 1)
    for one in asked[::4]:
        one["prompt_token_ids"] = shared + one["prompt_token_ids"]
    kinds = [{}, {"ignore_eos": True}, {"repetition_penalty": 1.3}, {"presence_penalty": 0.7}, {"stop_token_ids": [65]}]
    given = [{"num_tokens": draw.randint(6, most)} | draw.choice(kinds) for _ in asked]
    want = [one[0] for one in texts(plain, asked, [greedy(**one) for one in given])]
    long = [place for place, text in enumerate(want) if len(text) > 8]
    aborted = {place: draw.randint(1, len(want[place]) - 3) for place in draw.sample(long, NUM_ABORTED)}
    return asked, given, want, aborted


@pytest.mark.parametrize("made_by", [engine, engine_that_plans_ahead])
def test_requests_that_come_and_go(folders, plain, made_by):
    """In an engine of few blocks that keeps prefixes, reads prompts in chunks, and drafts in small steps only."""
    asked, given, want, aborted = load_of(plain, seed=31)
    small = {"kv_cache_memory_bytes": MIB // 4, "block_size": 32, "max_num_batched_tokens": 64, "max_num_seqs": 8}
    busy = made_by(*folders, {"max_batch": 3}, **small, max_model_len=128, enable_prefix_caching=True)
    with Counted(busy) as counted:
        written, largest = come_and_go(busy.llm_engine, asked, [greedy(**one) for one in given], aborted)
    for number, text in enumerate(want):
        got = written[number]
        assert got == (text[: len(got)] if number in aborted else text), number
    assert sum(len(written[number]) < len(want[number]) for number in aborted) == NUM_ABORTED
    assert counted.num_accepted > 0 and counted.num_preempted > 0 and largest > 3
    pool = core_of(busy).scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "of all blocks, vLLM keeps one for itself"


def come_and_go(llm_engine, asked, params, aborted):
    """What is written of each request, and how many were unfinished at most; some one arrives each step."""
    draw, written, largest, num_steps, arrival = random.Random(32), {}, 0, 0, 0.0
    coming = deque((arrival := arrival + draw.expovariate(1.0), place) for place in range(len(asked)))
    while coming or llm_engine.has_unfinished_requests():
        while coming and coming[0][0] <= num_steps:
            _, place = coming.popleft()
            llm_engine.add_request(str(place), asked[place], params[place])
        outputs = llm_engine.step() if llm_engine.has_unfinished_requests() else []
        for output in outputs:
            place = int(output.request_id)
            written[place] = list(output.outputs[0].token_ids)
            if not output.finished and len(written[place]) >= aborted.get(place, len(written[place]) + 1):
                llm_engine.abort_request([output.request_id])
        num_steps += 1
        largest = max(largest, llm_engine.get_num_unfinished_requests())
    return written, largest


@pytest.mark.dear
def test_users_of_the_real_server_that_come_and_go(folders, plain, tmp_path):
    """Over HTTP, streamed. A user who goes away closes the connection; blocks for some four requests are there."""
    asked, given, _, aborted = load_of(plain, seed=41)
    for one in given:
        one.pop("stop_token_ids", None)
    want = plain.generate(asked, [greedy(**one) for one in given], use_tqdm=False)
    want = [output.outputs[0].text for output in want]
    draw, arrival = random.Random(42), 0.0
    arrivals = [arrival := arrival + draw.expovariate(1.0) for _ in asked]
    words = ["--max-model-len", "128", "--max-num-seqs", "8", "--block-size", "32", "--max-num-batched-tokens", "64"]
    words += ["--kv-cache-memory-bytes", str(MIB // 4)]
    with served(*folders, tmp_path / "log", {"max_batch": 3}, *words) as address:
        begun = time.monotonic()

        def use(place):
            """The text that this user read."""
            time.sleep(max(0.0, begun + arrivals[place] - time.monotonic()))
            options = {name: value for name, value in given[place].items() if name != "num_tokens"}
            about = {"prompt": asked[place]["prompt_token_ids"], "max_tokens": given[place]["num_tokens"]}
            text, num_read = "", 0
            with ask(address, "/v1/completions", **about, **options, stream=True) as answer:
                for line in answer:
                    if not line.startswith(b"data: ") or b"[DONE]" in line:
                        continue
                    text += json.loads(line[6:])["choices"][0]["text"]
                    num_read += 1
                    if place in aborted and num_read > min(2, aborted[place]):
                        break
            return text

        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            got = list(pool.map(use, range(NUM_REQUESTS)))
        for place, text in enumerate(want):
            assert text.startswith(got[place]) if place in aborted else got[place] == text, place
        assert any(got[place] != want[place] for place in aborted)
        after = json.load(ask(address, "/v1/completions", prompt=[65], max_tokens=4))
        assert after["usage"]["completion_tokens"] == 4
        for _ in range(60):
            if not metric(address, "vllm:num_requests_running"):
                break
            time.sleep(1)
        assert metric(address, "vllm:num_requests_running") == metric(address, "vllm:num_requests_waiting{") == 0
        assert metric(address, "wavedraft:accepted_tokens_total") > 0
