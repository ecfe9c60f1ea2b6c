"""`trust`: what the model's own logits count for beside those of each block's first mask (arXiv 2511.08923, beta)."""

import json
import logging
import sys

import pytest
import torch
from transformers import CompileConfig, LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from helpers_hybrids import tiny_hybrid
from helpers_step_graph import Recording
from helpers_stock import save_tiny_stock
from helpers_tidar import CountedForwards, gated, plain_greedy_loop, ragged, random_prompts, tiny_tidar
from helpers_without_wavedraft import run_alone
from wavedraft import TiDARForCausalLM, convert
from wavedraft.generation import tidar as tidar_decode
from wavedraft.generation.execution.gated_linear import mask_gate_of
from wavedraft.generation.step_graph import StepGraphs

MASK_ROW = 3  # of the embedding table, in all tiny models
DECODER = sys.modules["wavedraft.generation.drafting.decode_tidar"]  # the package names its function so
COMPILED = {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager", dynamic=False)}
RICH = {"do_sample": False, "return_dict_in_generate": True}


@torch.no_grad()
def whole_forward(model, clean, branches, length, is_causal=False, gate=None):
    """Logits after each clean token [N, V], and of blocks of masks [M, K, V]: one forward without a cache, under a mask
    written by loops. Block m sees the first `branches[m]` tokens and itself."""
    num_clean, num_masks = len(clean), length * len(branches)
    ids = clean + [MASK_ROW] * num_masks
    positions = [*range(num_clean), *(branch + slot for branch in branches for slot in range(length))]
    seen = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    for query in range(len(ids)):
        for key in range(len(ids)):
            if query < num_clean:
                seen[query, key] = key <= query
            elif key < num_clean:
                seen[query, key] = key < branches[(query - num_clean) // length]
            else:
                is_own = (query - num_clean) // length == (key - num_clean) // length
                seen[query, key] = is_own and (key <= query or not is_causal)
    given = {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]).clamp(max=model.config.max_position_embeddings - 1),
        "attention_mask": torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None],
    }
    if gate is None:
        logits = model(**given).logits[0]
    else:
        with gate.open(num_masks):
            logits = model(**given).logits[0]
    return logits[:num_clean], logits[num_clean:].view(len(branches), length, -1)


def plain_loop_of_steps(model, prompt, num_new, trust, length, **how):
    """The decode of one row [P] step by step, from the formula: its text, and how many tokens each step accepted."""
    text, counts = prompt.tolist(), [0] * length
    own, of_masks = whole_forward(model, text, [len(text)], length, **how)
    draft = [int(own[-1].argmax()), *of_masks[0, 1:].argmax(dim=-1).tolist()]
    written = [*text, draft[0]]
    while len(written) < len(prompt) + num_new:
        branches = [len(text) + i for i in range(1, length + 1)]
        own, of_masks = whole_forward(model, text + draft, branches, length, **how)
        values = [trust * own[len(text) + i] + (1 - trust) * of_masks[i, 0] for i in range(length)]
        chosen = [int(value.argmax()) for value in values]
        accepted = 1
        while accepted < length and chosen[accepted - 1] == draft[accepted]:
            accepted += 1
        counts[accepted - 1] += 1
        text += draft[:accepted]
        draft = [chosen[accepted - 1], *of_masks[accepted - 1, 1:].argmax(dim=-1).tolist()]
        written = [*text, draft[0]]
    return written[: len(prompt) + num_new], counts


def plain_loop_of_tokens(model, prompt, num_new, trust, length, process=lambda ids, scores: scores, **how):
    """The text alone, token by token: no draft can change it. The first token is decided without masks, and so is one
    whose mask would stand after the last position of a learned table."""
    text = prompt.tolist()
    for place in range(num_new):
        own, of_masks = whole_forward(model, text, [len(text)], length, **how)
        has_mask = place > 0 and len(text) < model.config.max_position_embeddings
        value = trust * own[-1] + (1 - trust) * of_masks[0, 0] if has_mask else own[-1]
        text.append(int(process(torch.tensor([text]), value[None])[0].argmax()))
    return text


@pytest.mark.parametrize("trust", [0, 0.5, 1])
@pytest.mark.parametrize(("family", "length"), [("llama", 4), ("gemma2", 3), ("llama", 1)])
def test_text_and_steps_are_those_of_the_formula(family, length, trust):
    if family == "gemma2" and trust == 1:
        pytest.skip("the other families show it")
    # The window of gemma2 is wider than the text: the twin's mask has none.
    model = tiny_tidar(family, length, **({"sliding_window": 64} if family == "gemma2" else {}))
    prompt = random_prompts(1, 7)
    output = model.generate(prompt, max_new_tokens=16, trust=trust, **RICH)
    text, counts = plain_loop_of_steps(model, prompt[0], 16, trust, length)
    assert output.sequences[0].tolist() == text == plain_loop_of_tokens(model, prompt[0], 16, trust, length)
    assert output.accepted_lengths[0].tolist() == counts and output.trust == trust
    differs = text != plain_greedy_loop(model, prompt[0], 16).tolist()
    assert differs == (trust < 1), "below 1 this model's masks change the text"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("trust", [0, 0.5, 1])
def test_rows_of_a_ragged_batch_write_what_the_formula_gives_each_alone(trust, implementation):
    model = tiny_tidar()
    model.set_attn_implementation(implementation)
    batch = ragged()
    output = model.generate(**batch, max_new_tokens=12, trust=trust, **RICH)
    for row, (ids, mask) in enumerate(zip(*batch.values(), strict=True)):
        text, counts = plain_loop_of_steps(model, ids[mask.bool()], 12, trust, 4)
        assert output.sequences[row, -12:].tolist() == text[-12:]
        assert output.accepted_lengths[row].tolist() == counts


def test_rows_that_end_at_different_lengths_leave_the_others_as_they_are():
    model, batch = tiny_tidar(), ragged()
    whole = model.generate(**batch, max_new_tokens=14, trust=0.5, **RICH).sequences
    end = int(whole[1, 7 + 4])
    output = model.generate(**batch, max_new_tokens=14, trust=0.5, eos_token_id=end, **RICH)
    for row in range(3):
        expected = whole[row, 7:].tolist()
        expected = expected[: expected.index(end) + 1] if end in expected else expected
        assert output.sequences[row, 7:][: len(expected)].tolist() == expected


@pytest.mark.parametrize("family", ["llama", "causal", "gated"])
def test_causal_blocks_and_gated_adapters_count_their_own_masks(family):
    model, prompt = tiny_tidar(), random_prompts(1, 7)
    how = {}
    if family == "causal":
        model.config.tidar_config = model.config.tidar_config | {"block_attention": "causal"}
        how = {"is_causal": True}
    if family == "gated":
        model = gated(model).base_model.model
        how = {"gate": mask_gate_of(model)}
    text = model.generate(prompt, max_new_tokens=12, trust=0.25, do_sample=False)[0].tolist()
    assert text == plain_loop_of_tokens(model, prompt[0], 12, 0.25, 4, **how)


def test_layers_with_a_state_mix_in_the_masks_too():
    _, model = tiny_hybrid("lfm2")
    model.config.tidar_config = model.config.tidar_config | {"block_attention": "causal"}
    prompt = random_prompts(1, 7)
    text = prompt[0].tolist()
    for place in range(10):  # causal blocks are a plain forward of the text and masks after it
        with torch.no_grad():
            logits = model(torch.tensor([text + [MASK_ROW] * 4])).logits[0]
        own, of_mask = logits[len(text) - 1], logits[len(text)]
        text.append(int((0.5 * own + 0.5 * of_mask if place else own).argmax()))
    assert model.generate(prompt, max_new_tokens=10, trust=0.5, do_sample=False)[0].tolist() == text


def test_where_a_position_table_ends_the_models_own_logits_decide_alone(tmp_path):
    config = save_tiny_stock(tmp_path / "stock", "gpt2")
    convert(tmp_path / "stock", tmp_path / "tidar", draft_length=4, mask_token_id=MASK_ROW)
    model = TiDARForCausalLM.from_pretrained(tmp_path / "tidar")
    prompt = random_prompts(1, config.n_positions - 9)
    prompt[prompt == MASK_ROW] = MASK_ROW + 1
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "trust": 0.0}
    text = plain_loop_of_tokens(model, prompt[0], 10, 0.0, 4, lambda ids, scores: without_mask_token(scores))
    assert len(text) == config.n_positions + 1, "the last token has no mask before it"
    assert model.generate(prompt, **options)[0].tolist() == text


def without_mask_token(scores):
    scores[:, MASK_ROW] = -torch.inf
    return scores


class OwnPenalty(LogitsProcessor):
    """A user's own: it may keep state, and is asked once a token."""

    def __call__(self, input_ids, scores):
        return RepetitionPenaltyLogitsProcessor(1.7)(input_ids, scores)


@pytest.mark.parametrize("kind", [RepetitionPenaltyLogitsProcessor, OwnPenalty])
def test_processors_act_on_the_blend(kind):
    model, prompt = tiny_tidar(), random_prompts(1, 7)
    processor = kind(1.7) if kind is RepetitionPenaltyLogitsProcessor else kind()
    options = {"logits_processor": LogitsProcessorList([processor]), "output_scores": True, "output_logits": True}
    output = model.generate(prompt, max_new_tokens=12, trust=0.5, **options, **RICH)
    text = plain_loop_of_tokens(model, prompt[0], 12, 0.5, 4, RepetitionPenaltyLogitsProcessor(1.7))
    assert output.sequences[0].tolist() == text
    own, of_masks = whole_forward(model, text[:10], [10], 4)
    torch.testing.assert_close(output.logits[3][0], 0.5 * own[-1] + 0.5 * of_masks[0, 0], rtol=1e-4, atol=1e-4)
    assert output.scores[3][0].argmax() == text[10]


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(DECODER, "is_captured", lambda model, config: config is not None)
    monkeypatch.setattr(StepGraphs, "record", Recording)
    Recording.num_recorded = Recording.num_replays = 0
    return Recording


@pytest.mark.parametrize("padded", [False, True])
def test_a_static_cache_and_captured_steps_write_the_same(padded, recorded):
    model = tiny_tidar()
    batch = ragged() if padded else {"input_ids": random_prompts(2, 7)}
    for trust in (0.5, 0.0, 1.0, 0.5):  # a captured step is of one value
        expected = model.generate(**batch, max_new_tokens=12, trust=trust, **RICH)
        for more in ({"cache_implementation": "static"}, COMPILED):
            found = model.generate(**batch, max_new_tokens=12, **more, trust=trust, **RICH)
            assert found.sequences.tolist() == expected.sequences.tolist(), (trust, more)
            assert found.accepted_lengths.tolist() == expected.accepted_lengths.tolist()
    assert recorded.num_replays > 10


def test_trust_1_is_the_mode_without_it_and_costs_nothing():
    model, prompt = tiny_tidar(), random_prompts(1, 9)
    rows_read = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows_read.append(output.shape[:-1].numel()))
    hook = CountedForwards(model)
    reads = {}
    for trust in (None, 1, 1.0, 0.5):
        rows_read.clear(), hook.num_queries.clear()
        output = model.generate(prompt, max_new_tokens=12, trust=trust, output_scores=True, **RICH)
        reads[trust] = output.sequences.tolist(), torch.stack(output.scores), [*rows_read], [*hook.num_queries]
    for trust in (1, 1.0):
        assert reads[trust][0] == reads[None][0] and torch.equal(reads[trust][1], reads[None][1])
        assert reads[trust][2:] == reads[None][2:]
    assert reads[0.5][2][1:4] == [4, 4, 3], "draft tokens, the first mask of each block, and the rest of one block"


def test_without_num_branches_every_branch_is_drafted_and_the_log_says_what_the_text_is(caplog):
    model, prompt = tiny_tidar(), random_prompts(1, 9)
    model.generation_config.num_branches = None
    with caplog.at_level(logging.INFO, logger="wavedraft"):
        output = model.generate(prompt, max_new_tokens=12, trust=0.5, **RICH)
    assert output.plans.keys() == {(4, 4)}
    assert "trust=0.5: the text is not plain decoding's" in caplog.text
    shorter = model.generate(prompt, max_new_tokens=12, trust=0.5, draft_length=2, num_branches=2, **RICH)
    assert shorter.plans.keys() == {(2, 2)}, "a number that is all of them is allowed"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trust": 1.5}, "from 0 to 1, but is 1.5"),
        ({"trust": -0.1}, "from 0 to 1, but is -0.1"),
        ({"trust": float("nan")}, "from 0 to 1"),
        ({"trust": True}, "from 0 to 1, but is True"),
        ({"trust": "half"}, "from 0 to 1, but is 'half'"),
        ({"trust": 0.5, "num_branches": 2}, "`num_branches` must be 'all', but is 2"),
        ({"trust": 0.5, "num_branches": "auto"}, "`num_branches` must be 'all', but is 'auto'"),
        ({"trust": 0.5, "do_sample": True}, "`trust=0.5` needs greedy decoding"),
        ({"trust": 0.5, "exact": "tie-safe"}, "`exact='tie-safe'` promises"),
        ({"trust": 0.5, "draft_length": 0}, "`trust` must be 1 where nothing is drafted"),
        ({"trust": 0.5, "num_beams": 2}, "`trust` must be 1 where nothing is drafted .beams"),
        ({"trust": 0.5, "use_cache": False}, "`trust` must be 1 where nothing is drafted .there is no cache"),
        ({"trust": 0.5, "prompt_lookup_num_tokens": 2}, "`trust` must be 1 where nothing is drafted .transformers"),
    ],
)
def test_what_has_no_blend_is_refused_by_name(options, words):
    model, hook = tiny_tidar(), None
    model.generation_config.num_branches = None
    hook = CountedForwards(model)
    with pytest.raises(ValueError, match=words):
        model.generate(random_prompts(1, 9), max_new_tokens=12, **{"do_sample": False, **options})
    assert not hook.num_queries, "refused before any work"


def test_a_custom_decode_takes_it_and_refuses_it_alike():
    model, prompt = tiny_tidar(), random_prompts(1, 9)
    options = {"custom_generate": tidar_decode, "max_new_tokens": 12, "do_sample": False}
    found = model.generate(prompt, trust=0.5, **options)
    assert found.tolist() == model.generate(prompt, max_new_tokens=12, trust=0.5, do_sample=False).tolist()
    with pytest.raises(ValueError, match="`num_branches` must be 'all', but is 1"):
        model.generate(prompt, trust=0.5, num_branches=1, **options)


def test_continuous_batching_refuses_it():
    model = tiny_tidar()
    model.generation_config.trust = 0.5
    with pytest.raises(ValueError, match="continuous batching has a loop of its own"):
        model.init_continuous_batching()


def test_nothing_of_it_stays_with_the_model():
    model, prompt = tiny_tidar(), random_prompts(1, 9)
    plain = plain_greedy_loop(model, prompt[0], 12).tolist()
    mixed = model.generate(prompt, max_new_tokens=12, trust=0.0, do_sample=False)[0].tolist()
    assert getattr(model.generation_config, "trust", None) is None
    assert model.generate(prompt, max_new_tokens=12, do_sample=False)[0].tolist() == plain != mixed


def test_in_the_generation_config_it_counts_until_plain_decoding_is_asked_for(tmp_path):
    model, prompt = tiny_tidar(), random_prompts(1, 9)
    expected = model.generate(prompt, max_new_tokens=12, trust=0.5, do_sample=False).tolist()
    model.generation_config.trust = 0.5
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["trust"] == 0.5
    loaded = TiDARForCausalLM.from_pretrained(tmp_path)
    assert loaded.generate(prompt, max_new_tokens=12, do_sample=False).tolist() == expected
    plain = loaded.generate(prompt, max_new_tokens=12, do_sample=False, draft_length=0)
    assert plain[0].tolist() == plain_greedy_loop(model, prompt[0], 12).tolist()
    assert "`trust` of 0.5" in (tmp_path / "README.md").read_text()


TRAVELLED = """
    from transformers import LlamaForCausalLM

    ids = torch.tensor(arguments["ids"])
    options = {"max_new_tokens": 12, "do_sample": False, "trust": 0.5}
    trusted = AutoModelForCausalLM.from_pretrained("tidar", trust_remote_code=True)
    stock = AutoModelForCausalLM.from_pretrained("tidar")
    assert type(stock) is LlamaForCausalLM
    rich = trusted.generate(ids, return_dict_in_generate=True, **options)
    assert rich.trust == 0.5
    custom = stock.generate(ids, custom_generate="tidar", trust_remote_code=True, **options)
    answer = [rich.sequences.tolist(), custom.tolist()]
"""


def test_it_travels_with_a_checkpoint(tmp_path):
    save_tiny_stock(tmp_path / "stock", "llama")
    convert(tmp_path / "stock", tmp_path / "tidar", draft_length=3)
    ids = random_prompts(2, 9)
    model = TiDARForCausalLM.from_pretrained(tmp_path / "tidar")
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, trust=0.5).tolist()
    assert run_alone(TRAVELLED, {"ids": ids.tolist()}, tmp_path) == [expected, expected]


def test_the_command_line_says_that_a_text_need_not_be_plain_decodings(tmp_path, capsys):
    from wavedraft.audit import Audit, Comparison, Mismatch, audit
    from wavedraft.bench.contenders import contenders_of
    from wavedraft.bench.settings import Settings
    from wavedraft.commands.audit import print_audit
    from wavedraft.commands.timed_runs import why_different

    model, prompts = tiny_tidar(), list(random_prompts(2, 7))
    found = audit(model, prompts, plain={"draft_length": 0}, parallel={"trust": 0.0}, max_new_tokens=8, batch_size=2)
    assert found.trust == 0 and found.parallel.mismatches and found.to_dict()["trust"] == 0
    model.generation_config.trust = 0.5
    assert audit(model, prompts, plain={"draft_length": 0}, parallel={}, max_new_tokens=8, batch_size=2).trust == 0.5
    assert why_different(model, 0.5) == "With trust=0.5 a text need not be plain decoding's."

    class Tokenizer:
        decode = staticmethod(str)

    other = Comparison(2, [Mismatch(0, 1, 5, 6, 0.5)])
    about = {"dtype": "float32", "device": "cpu"}
    for trust, is_said in ((0.5, True), (1.0, False)):
        print_audit(Audit(16, other, other, 2, trust=trust), Tokenizer, None, about)
        assert ("A text that differs is no fault: trust=0.5" in capsys.readouterr().out) == is_said

    settings = Settings(draft_lengths=(4,), num_branches=(1, "all", "auto"))
    keywords = {one.name: one.keywords for one in contenders_of(model, model, settings, trust=0.25)}
    assert keywords["K=4 trust=0.25"] == {"draft_length": 4, "num_branches": 4, "trust": 0.25}
    assert keywords["K=4 B=1"]["trust"] == 1, "what the checkpoint's own generation config says is for its default"
    model.generation_config.trust = None
    assert "trust" not in {one.name: one.keywords for one in contenders_of(model, model, settings)}["K=4 B=1"]


def test_tuning_refuses_a_checkpoint_with_a_text_of_its_own():
    from wavedraft.bench.tuning import settings_of, tune

    model = tiny_tidar()
    model.generation_config.trust = 0.5
    with pytest.raises(ValueError, match="`trust` must be 1 to tune, but"):
        tune(model, model, {}, None, settings_of(4, False, 8))
