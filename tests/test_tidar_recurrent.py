"""TiDAR over a recurrent-depth model: drafts by masks, verified at full depth, and the text of full depth."""

import json

import pytest
import torch
from peft import get_peft_model
from test_convert_recurrent import released_folder
from test_sampling_tidar import NUM_DRAWS, SMALL_VOCABULARY, chi_square_bound, draw, exact_joint
from test_training_tidar import tokenizer as tokenizer
from transformers import AutoModelForCausalLM, DynamicCache, TrainingArguments

from recurrent_golden import random_model
from tiny_tidar import CountedForwards, plain_greedy_loop, script_drafts
from wavedraft import RecurrentDepthForCausalLM, TiDARForCausalLM, convert, to_ar
from wavedraft.generation.cache_name import CACHE
from wavedraft.generation.drafting.draft_forward import DraftForward
from wavedraft.modeling_recurrent import RecurrentDepthConfig
from wavedraft.modeling_tidar import DraftObjective
from wavedraft.modeling_tidar.objective_tidar import TrainingBatch, cached_states, doubled_states
from wavedraft.training import finetune, gated_adapter_config, measure_drafting

VOCAB_SIZE = 37
# transformers 5.22 and 5.23 have a name each for it, and the older one ends with version 6.
CHECKPOINTING = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, n))
FORMS = ["huginn", "llama", "olmo", "ouro"]


def drafting(plain, draft_length=4, mask_recurrences=None):
    """The drafting model over the weights of a plain one."""
    taught = {"draft_length": draft_length, "mask_token_id": plain.config.vocab_size, "mask_embedding_id": 3}
    config = type(plain.config)(**plain.config.to_dict())
    config.tidar_config = taught | ({"mask_recurrences": mask_recurrences} if mask_recurrences else {})
    model = TiDARForCausalLM.from_config(config).eval()
    model.load_state_dict(plain.state_dict())
    return model


def prompts(batch_size, length, seed=0):
    return torch.randint(1, VOCAB_SIZE, (batch_size, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=FORMS)
def plain(request, tmp_path_factory):
    folder = released_folder(request.param, tmp_path_factory.mktemp("form") / "source")
    return RecurrentDepthForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(("draft_length", "mask_recurrences"), [(1, None), (4, None), (4, 1), (3, 2)])
def test_greedy_text_is_that_of_full_depth(plain, draft_length, mask_recurrences):
    model = drafting(plain, draft_length, mask_recurrences)
    prompt_ids = prompts(1, 6)
    expected = plain_greedy_loop(plain, prompt_ids[0], 20).tolist()
    output = model.generate(prompt_ids, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    assert output.sequences[0].tolist() == expected and output.num_forwards <= 19
    own = plain.generate(prompt_ids, max_new_tokens=20, do_sample=False, policy="autoregressive")
    undrafted = model.generate(prompt_ids, max_new_tokens=20, do_sample=False, draft_length=0)
    assert own[0].tolist() == undrafted[0].tolist() == expected


@pytest.mark.parametrize(("mask_recurrences", "attn_implementation"), [(None, "sdpa"), (2, "sdpa"), (2, "eager")])
def test_the_rows_of_a_ragged_batch_are_the_rows_alone(mask_recurrences, attn_implementation):
    model = drafting(random_model(), 4, mask_recurrences)
    model.set_attn_implementation(attn_implementation)
    ids = prompts(4, 9)
    lengths = [9, 5, 2, 7]
    mask = torch.stack([(torch.arange(9) >= 9 - length).long() for length in lengths])
    ids = ids.masked_fill(mask == 0, 0)
    eos = int(model.generate(ids[:1], max_new_tokens=9, do_sample=False)[0, -1])  # row 0 leaves the batch early
    options = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": eos, "pad_token_id": 0}
    for branches in ({}, {"num_branches": 1}):
        together = model.generate(ids, attention_mask=mask, **options, **branches)
        for row, length in enumerate(lengths):
            alone = model.generate(ids[row : row + 1, 9 - length :], **options)[0, length:].tolist()
            own = together[row, 9:].tolist()
            assert own[: len(alone)] == alone and not any(own[len(alone) :])


@pytest.mark.parametrize(("draft_length", "mask_recurrences"), [(3, None), (2, 1)])
def test_samples_have_the_exact_distribution_of_full_depth(draft_length, mask_recurrences):
    config = RecurrentDepthConfig(
        vocab_size=SMALL_VOCABULARY, n_embd=16, n_heads=2, intermediate_size=16, n_layers_in_prelude=1, block_size=32,
        n_layers_in_recurrent_block=1, n_layers_in_coda=1, mean_recurrence=3, tie_embeddings=False, pad_token_id=0,
        init_values={"std": 0.14, "embed_scale": 1.0},
    )  # fmt: skip
    torch.manual_seed(0)
    plain = RecurrentDepthForCausalLM(config).eval()
    model = drafting(plain, draft_length, mask_recurrences)
    prompt_ids = torch.tensor([[1, 4, 2, 3]])
    sampling = {"top_k": 0, "temperature": 0.9}
    joint = exact_joint(model, prompt_ids, 3, **sampling)
    with torch.no_grad():
        first = (plain(prompt_ids).logits[0, -1] / 0.9).softmax(-1)
    assert torch.allclose(joint.sum(dim=(1, 2)), first, atol=1e-5)
    assert joint.max() < 0.5, "a nearly certain continuation would prove nothing"

    counts = draw(model, prompt_ids, 3, NUM_DRAWS, seed=draft_length, **sampling)

    expected = joint * NUM_DRAWS
    is_common = expected >= 5
    observed = torch.cat([counts[is_common], counts[~is_common].sum()[None]])
    expected = torch.cat([expected[is_common], expected[~is_common].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    assert ((observed - expected) ** 2 / expected).sum() < chi_square_bound(len(expected) - 1)


def test_right_drafts_save_forwards_and_masks_leave_the_core_early(monkeypatch):
    plain = random_model()
    model, prompt_ids = drafting(plain, 4, mask_recurrences=2), prompts(1, 5)
    text = plain_greedy_loop(plain, prompt_ids[0], 17)
    script_drafts(monkeypatch, text, is_right=True)
    widths, calls = [], CountedForwards(model)
    model.transformer["adapter"].register_forward_hook(lambda m, args, output: widths.append(args[0].shape[1]))
    output = model.generate(prompt_ids, max_new_tokens=17, do_sample=False, return_dict_in_generate=True)
    assert output.sequences[0].tolist() == text.tolist()
    assert output.num_forwards == 4 and calls.num_queries == [5 + 4, *[4 + 4 * 4] * 4]
    depth = plain.config.mean_recurrence
    assert widths[:depth] == [9, 9] + [5] * (depth - 2)
    assert widths[depth:] == ([20, 20] + [4] * (depth - 2)) * 4


@pytest.mark.parametrize("mask_recurrences", [None, 2])
def test_a_conversation_goes_on_from_the_cache_of_every_recurrence(mask_recurrences):
    model = drafting(random_model(), 4, mask_recurrences)
    first = model.generate(prompts(1, 5), max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    cache = first[CACHE]
    assert type(cache) is DynamicCache and len(cache.layers) == model.num_cache_layers == 1 + 1 + 6 * 3
    longer = torch.cat([first.sequences, prompts(1, 3, seed=5)], dim=1)
    whole = model.generate(longer, max_new_tokens=9, do_sample=False)
    with torch.no_grad():
        plain_cache = model(longer[:, :11], use_cache=True)[CACHE]
    for given in (cache, plain_cache):
        calls = CountedForwards(model)
        assert torch.equal(model.generate(longer, max_new_tokens=9, do_sample=False, **{CACHE: given}), whole)
        assert calls.num_queries[0] < longer.shape[1]


def test_what_its_generate_cannot_do_is_refused_and_the_end_of_the_position_table_is_kept():
    model = drafting(random_model(block_size=24))
    ids = prompts(1, 6)
    with pytest.raises(ValueError, match="`cache_implementation` must be left out"):
        model.generate(ids, max_new_tokens=4, cache_implementation="static")
    with pytest.raises(ValueError, match=f"`{CACHE}` must be a `DynamicCache`"):
        cache = random_model().generate(ids, max_new_tokens=4, return_dict_in_generate=True)[CACHE]
        model.generate(torch.cat([ids, ids], dim=1), max_new_tokens=4, **{CACHE: cache})
    expected = plain_greedy_loop(model, ids[0], 18).tolist()
    assert model.generate(ids, max_new_tokens=18, do_sample=False)[0].tolist() == expected
    with pytest.raises(ValueError, match="at most 24 tokens"):
        model.generate(ids, max_new_tokens=25, do_sample=False)


@pytest.mark.parametrize("mode", ["gated", "joint"])
@pytest.mark.parametrize(("depth", "mask_recurrences"), [(None, None), (4, 2), (9, 2), (2, 5)])
def test_a_block_predicts_in_training_what_it_predicts_in_decoding(mode, depth, mask_recurrences):
    model = drafting(random_model(mean_recurrence=depth or 6), 3, mask_recurrences)
    ids, objective = prompts(1, 9), DraftObjective(mode, num_recurrences=depth)
    taught = model
    if mode == "gated":
        taught = get_peft_model(model, gated_adapter_config(model, 4))
        for name, parameter in taught.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    batch = TrainingBatch(ids, torch.zeros_like(ids), ids, ids, blocks=torch.tensor([[3, 6]]), draft_length=3)
    states = cached_states if mode == "gated" else doubled_states
    with torch.no_grad():
        clean_states, mask_states = states(model, objective, batch)
        assert torch.allclose(model.lm_head_logits(clean_states), model(ids).logits, atol=1e-4)
        for place, length in enumerate((3, 6)):
            forward = DraftForward(model, 3, 3, batch_size=1)
            forward.prefill(ids[:, :length], None)
            assert torch.allclose(forward.mask_states, mask_states[:, 3 * place : 3 * place + 3], atol=1e-4)


def test_both_ways_to_a_gated_loss_agree_and_the_last_recurrences_alone_carry_its_gradient():
    model = drafting(random_model(mean_backprop_depth=2), 3)
    taught = get_peft_model(model, gated_adapter_config(model, 4)).train()
    ids = prompts(2, 9)
    losses, gradients = [], []
    for _ in range(2):
        loss = taught(input_ids=ids, objective=DraftObjective("gated", draft_loss="kl")).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in taught.parameters() if p.grad is not None])
        taught.zero_grad()
        getattr(model, f"{CHECKPOINTING}_enable")()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-5)

    model.config.tidar_config = {**model.config.tidar_config, "mask_recurrences": 2}
    with pytest.raises(ValueError, match="Activation checkpointing must be off"):
        taught(input_ids=ids, objective=DraftObjective("gated"))


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    torch.manual_seed(0)
    config = RecurrentDepthConfig(
        vocab_size=14, n_embd=32, n_heads=2, intermediate_size=48, n_layers_in_prelude=1, n_layers_in_recurrent_block=1,
        n_layers_in_coda=1, mean_recurrence=4, mean_backprop_depth=2, block_size=256, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    RecurrentDepthForCausalLM(config).save_pretrained(tmp_path / "source")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "source")
    rows = [{"text": "the " * n + "cat sat on a mat and slept all day on the mat"} for n in range(8)]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "the the cat"}) + "\n")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize(
    ("mode", "mask_recurrences", "options"),
    [
        ("gated", 2, {"draft_loss": "kl"}),
        ("gated", None, {"random_depth": True}),
        ("full", None, {"random_depth": True}),
    ],
)
def test_it_is_taught_to_draft_by_the_same_command(checkpoint, mode, mask_recurrences, options):
    folder = checkpoint / "tidar"
    finetune(checkpoint / "source", checkpoint / "data.jsonl", checkpoint / "known", mode="full", max_steps=60,
             batch_size=8, learning_rate=1e-2)  # fmt: skip
    convert(checkpoint / "known", folder, draft_length=4, mask_recurrences=mask_recurrences)

    run = checkpoint / "run"
    report = finetune(
        folder, checkpoint / "data.jsonl", run, mode=mode, rank=16, max_steps=40, batch_size=8,
        learning_rate=1e-2, eval_prompts_path=checkpoint / "prompts.jsonl", num_eval_prompts=1, **options,
    )  # fmt: skip

    assert report["after"]["identical"] == 1
    assert not (run / "custom_generate").exists() and (mode == "full") == (run / "config.json").exists()
    model = TiDARForCausalLM.from_pretrained(folder if mode == "gated" else run).eval()
    ids = torch.tensor([[4, 4, 4, 5]])
    if mode == "gated":
        untaught = measure_drafting(model, [ids[0]], max_new_tokens=13)
        expected = model.generate(ids, max_new_tokens=12, do_sample=False, draft_length=0)
        logits = model(ids).logits
        model.load_adapter(run)
        assert torch.equal(model(ids).logits, logits)
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), expected)
        assert untaught.tokens_per_forward < 1.5
    assert measure_drafting(model, [ids[0]], max_new_tokens=13).tokens_per_forward > 2


def test_conversion_there_and_back(tmp_path):
    for form in FORMS:
        source = released_folder(form, tmp_path / form)
        result = convert(source, tmp_path / f"{form}-tidar", draft_length=5, mask_recurrences=2)
        assert result.proof.max_abs_difference == 0
        values = json.loads((tmp_path / f"{form}-tidar" / "config.json").read_text())
        assert values["tidar_config"]["draft_length"] == 5 and values["tidar_config"]["mask_recurrences"] == 2
        plain = RecurrentDepthForCausalLM.from_pretrained(source).eval()
        ids = prompts(1, 5)
        with torch.no_grad():
            expected = plain(ids).logits
            assert torch.equal(
                TiDARForCausalLM.from_pretrained(tmp_path / f"{form}-tidar").eval()(ids).logits, expected
            )
            same = AutoModelForCausalLM.from_pretrained(tmp_path / f"{form}-tidar").eval()  # the plain model
            assert type(same) is type(plain) and torch.equal(same(ids).logits, expected)
        back = to_ar(tmp_path / f"{form}-tidar", tmp_path / f"{form}-back")
        assert back.proof.max_abs_difference == 0 and back.tidar_config is None
        with torch.no_grad():
            again = RecurrentDepthForCausalLM.from_pretrained(tmp_path / f"{form}-back").eval()
            assert torch.equal(again(ids).logits, expected)


def test_conversion_says_what_is_wrong(tmp_path):
    source = released_folder("huginn", tmp_path / "source")
    for options, message in [
        ({"mask_recurrences": 2}, "is for the drafts of a recurrent-depth"),
        ({"draft_length": 4, "mask_recurrences": 99}, "`mask_recurrences` must be between 1 and"),
        ({"draft_length": 0}, "`draft_length` must be an integer between 1 and"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert(source, tmp_path / "target", **options)
    convert(source, tmp_path / "target", draft_length=4)
    for options in ({}, {"draft_length": 4}):
        with pytest.raises(ValueError, match="is a TiDAR checkpoint already"):
            convert(tmp_path / "target", tmp_path / "again", **options)
