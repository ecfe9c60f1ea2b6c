"""SmolLM2 with the shipped adapter, served by the real OpenAI server: eight chats at once, or NUM_CHATS of them.

All texts are plain vLLM's and `generate`'s, and as many tokens are written in a forward as by `generate` with one
branch and causal blocks, or some fewer: that also reads drafts after its branch, for which consecutive positions have
no place.
"""

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers_plain import plain_answers
from helpers_server import MIB, ask, metric, served

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct-TiDAR"
ADAPTER = ROOT / "adapters" / "smollm2-135m-instruct-gated"
NUM_CHATS, NUM_TOKENS = int(os.environ.get("NUM_CHATS", 8)), 48
LONGEST_DRAFT = {4: 6, 8: 7}  # by K
MOST_LOST = {4: 0.06, 8: 0.13}  # of `generate`'s tokens per forward

pytestmark = [
    pytest.mark.dear,
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="no real model: `make demo` makes it"),
]


@pytest.fixture(scope="module")
def questions():
    rows = (ROOT / "benchmarks" / "prompts_heldout.jsonl").read_text().splitlines()[:NUM_CHATS]
    return [json.loads(row)["prompt"] for row in rows]


@pytest.fixture(scope="module")
def plain(questions):
    """vLLM's texts without drafts."""
    chats = [[{"role": "user", "content": text}] for text in questions]
    about = {"max_model_len": 1024, "max_num_seqs": 8, "kv_cache_memory_bytes": 300 * MIB}
    return [text for ((text, _),) in plain_answers(MODEL, chats, about, temperature=0, max_tokens=NUM_TOKENS)]


@pytest.fixture(scope="module", params=[4, 8])
def server(tmp_path_factory, request):
    """K, and the address of a server that drafts with it."""
    words = ["--max-model-len", "1024", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(300 * MIB)]
    log = tmp_path_factory.mktemp("server") / "log"
    with served(MODEL, ADAPTER, log, {"draft_length": request.param}, *words) as address:
        yield request.param, address


def chat(address, text):
    about = {"messages": [{"role": "user", "content": text}], "max_tokens": NUM_TOKENS}
    answer = json.load(ask(address, "/v1/chat/completions", **about))
    return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]


def with_causal_blocks(folder):
    """Model and adapter whose masks see only those before them, and no copies, as in vLLM; other files are links."""
    model, adapter = folder / "model", folder / "adapter"
    causal = {"block_attention": "causal"}
    changed = {
        model: {"config.json": {"tidar_config": causal}, "generation_config.json": {"draft_copies": False}},
        adapter: {"generation_config.json": causal},
    }
    for made, stock in ((model, MODEL), (adapter, ADAPTER)):
        made.mkdir()
        for file in stock.iterdir():
            if file.name not in changed[made]:
                (made / file.name).symlink_to(file)
        for name, changes in changed[made].items():
            values = json.loads((stock / name).read_text())
            for key, change in changes.items():
                values[key] = values[key] | change if isinstance(change, dict) else change
            (made / name).write_text(json.dumps(values))
    return model, adapter


def generated(model, adapter, draft_length, questions, tmp_path):
    """Texts and tokens per forward of `wavedraft generate` with one branch, in wavedraft's own environment."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in questions))
    words = ["generate", model, "--adapter", adapter, "--prompts", prompts, "--dtype", "float32", "--output", "json"]
    words += ["--max-new-tokens", NUM_TOKENS, "--draft-length", draft_length, "--num-branches", 1]
    words += ["--no-packed-weights"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [ROOT / ".venv" / "bin" / "wavedraft", *map(str, words)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return [row["text"] for row in rows], sum(row["tokens"] - 1 for row in rows) / sum(row["forwards"] for row in rows)


def test_eight_chats_at_once(server, questions, plain, tmp_path):
    draft_length, address = server
    with ThreadPoolExecutor(NUM_CHATS) as pool:
        answers = list(pool.map(lambda text: chat(address, text), questions))
    got = [text for text, _ in answers]
    assert got == plain
    steps, accepted = metric(address, "wavedraft:steps_total"), metric(address, "wavedraft:accepted_tokens_total")
    written = sum(num for _, num in answers) - NUM_CHATS  # the forward of a prompt writes one too
    tokens_per_forward = written / steps
    assert steps + accepted >= written  # drafts that stand after the last token asked for are counted, and cut off
    assert metric(address, "wavedraft:draft_places_total") == steps * LONGEST_DRAFT[draft_length]
    texts, by_generate = generated(*with_causal_blocks(tmp_path), draft_length, questions, tmp_path)
    found = f"{tokens_per_forward:.3f} served, {by_generate:.3f} by generate"
    print(f"{NUM_CHATS} chats, K = {draft_length}: tokens per forward: {found}")
    assert [text.strip() for text in texts] == [text.strip() for text in got]
    assert abs(tokens_per_forward / by_generate - 1) < MOST_LOST[draft_length]
