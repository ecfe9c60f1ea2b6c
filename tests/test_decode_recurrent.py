"""The policies of recurrent-depth decoding on tiny random models, each compared with its slow, obvious twin."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedTokenizerFast, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from helpers_marks import slow_but
from helpers_recurrent import PROMPTS, left_padded, random_model
from wavedraft.generation.recurrent.decode_diffusion_forcing import freeze
from wavedraft.generation.recurrent.options_recurrent import (
    POLICIES,
    PublishedOptions,
    RecurrentOptions,
    keywords_of,
)
from wavedraft.generation.recurrent.wavefront import Wavefront

WAVEFRONT_POLICIES = ["adaptive", "self-speculative", "diffusion-forcing", "exact"]
EXACT_POLICIES = ["self-speculative", "exact"]


def plain_loop(model, prompt: list[int], num_new: int, process=None, **forward) -> list[int]:
    """Greedy text: the whole prefix through the whole model for each token; no cache, no wavefront."""
    ids = torch.tensor([prompt])
    for _ in range(num_new):
        with torch.no_grad():
            scores = model(ids, init_scale=0.0, **forward).logits[:, -1]
        scores = scores if process is None else process(ids, scores)
        ids = torch.cat([ids, scores.argmax(dim=-1, keepdim=True)], dim=1)
    return ids[0, len(prompt) :].tolist()


def continuation(model, prompt: list[int], num_new: int, **options) -> list[int]:
    ids = torch.tensor([prompt])
    return model.generate(ids, max_new_tokens=num_new, init_scale=0.0, **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_plain_decoding_with_the_cache_is_decoding_without(seed):
    model = random_model(seed)
    assert continuation(model, PROMPTS[0], 16) == plain_loop(model, PROMPTS[0], 16)


@pytest.mark.parametrize("draft_recurrences", [(1,), (5,), (2, 4), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("seed", slow_but(range(2), range(4)))
def test_the_exact_wavefront_writes_the_text_of_plain_decoding(seed, draft_recurrences):
    model = random_model(seed, n_layers_in_recurrent_block=1 + seed)
    expected = plain_loop(model, PROMPTS[seed % 3], 24)
    assert continuation(model, PROMPTS[seed % 3], 24, policy="exact", draft_recurrences=draft_recurrences) == expected


@pytest.mark.parametrize("max_wavefront", [1, 2, 3])
def test_the_exact_wavefront_is_bounded_and_still_exact(max_wavefront):
    model, ids = random_model(1), torch.tensor([PROMPTS[0]])
    output = model.generate(
        ids,
        max_new_tokens=16,
        init_scale=0.0,
        policy="exact",
        draft_recurrences=1,
        max_wavefront=max_wavefront,
        record_wavefront=True,
        return_dict_in_generate=True,
    )
    assert output.sequences[0, ids.shape[1] :].tolist() == plain_loop(model, PROMPTS[0], 16)
    assert max(len(step.fed_ids) for step in output.wavefront) <= max_wavefront


@pytest.mark.parametrize("draft_length", [1, 3, 8])
def test_self_speculation_writes_the_text_of_plain_decoding(draft_length):
    model = random_model(2)
    expected = plain_loop(model, PROMPTS[0], 20)
    options = {"policy": "self-speculative", "draft_length": draft_length, "draft_recurrences": 2}
    assert continuation(model, PROMPTS[0], 20, **options) == expected


@pytest.mark.parametrize("policy", EXACT_POLICIES)
def test_a_depth_of_one_leaves_nothing_to_draft_and_works(policy):
    model = random_model(3)
    expected = plain_loop(model, PROMPTS[1], 8, num_recurrences=1)
    assert continuation(model, PROMPTS[1], 8, policy=policy, num_recurrences=1) == expected


def test_diffusion_forcing_at_full_depth_between_decodes_is_plain_decoding():
    model = random_model(4)
    options = {"inner_recurrence": 24, "num_recurrences": 24, "embedding_ema": 0.0, "exit_threshold": 1e9}
    options["freeze_criterion"] = "fixed"
    del options["exit_threshold"]
    text = continuation(model, PROMPTS[0], 12, policy="diffusion-forcing", kv_cache="every-recurrence", **options)
    assert text == plain_loop(model, PROMPTS[0], 12, num_recurrences=24)


@pytest.mark.parametrize("policy", ["autoregressive", *WAVEFRONT_POLICIES])
def test_a_row_of_a_ragged_batch_is_the_row_alone(policy):
    model = random_model(5).double()  # so that rounding, which other shapes do otherwise, decides nothing
    alone = [continuation(model, row, 16, policy=policy) for row in PROMPTS]
    batch = left_padded(PROMPTS)

    together = model.generate(**batch, max_new_tokens=16, init_scale=0.0, policy=policy)

    assert together[:, batch["input_ids"].shape[1] :].tolist() == alone


@pytest.mark.parametrize("policy", WAVEFRONT_POLICIES)
def test_rows_end_at_their_own_end_and_then_cost_nothing(policy):
    model = random_model(5)
    texts = [continuation(model, row, 24, policy=policy) for row in PROMPTS]
    end = texts[1][2]  # the second row ends early, the others where they happen to
    options = {"policy": policy, "eos_token_id": [end, 36], "pad_token_id": 0, "return_dict_in_generate": True}

    output = model.generate(**left_padded(PROMPTS), max_new_tokens=24, init_scale=0.0, **options)

    positions = 0
    for row, text in zip(output.sequences[:, len(PROMPTS[0]) :].tolist(), texts, strict=True):
        stop = next((i + 1 for i, token in enumerate(text) if token in (end, 36)), 24)
        assert row == text[:stop] + [0] * (len(row) - stop)
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        positions += model.generate(ids, max_new_tokens=24, init_scale=0.0, **options).num_positions
    if policy in ("adaptive", "exact", "self-speculative"):
        assert output.num_positions == positions


@pytest.mark.parametrize("policy", WAVEFRONT_POLICIES)
@pytest.mark.parametrize("num_new", [1, 2, 7])
def test_max_new_tokens_is_met_and_not_exceeded(policy, num_new):
    assert len(continuation(random_model(6), PROMPTS[0], num_new, policy=policy)) == num_new


@pytest.mark.parametrize("policy", EXACT_POLICIES)
def test_processors_see_the_prefix_each_token_really_has(policy):
    model = random_model(7)
    options = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "min_new_tokens": 4, "eos_token_id": 9}
    for row in PROMPTS:
        plain = continuation(model, row, 20, pad_token_id=0, **options)
        assert continuation(model, row, 20, policy=policy, pad_token_id=0, **options) == plain


class StopAfter(StoppingCriteria):
    """Ends a row at a token, having looked at every new column once."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("policy", WAVEFRONT_POLICIES)
def test_a_stopping_criterion_ends_the_text(policy):
    model = random_model(8)
    text = continuation(model, PROMPTS[0], 20, policy=policy)
    stopped = continuation(model, PROMPTS[0], 20, policy=policy, stopping_criteria=[StopAfter(text[5])])
    assert stopped == text[: text.index(text[5]) + 1]


@pytest.mark.parametrize("policy", WAVEFRONT_POLICIES)
def test_stop_strings_end_the_text(policy):
    model = random_model(8)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789_"
    characters = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, merges=[]))
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters)
    text = continuation(model, PROMPTS[0], 20, policy=policy)
    stop = letters[text[4]] + letters[text[5]]

    stopped = continuation(model, PROMPTS[0], 20, policy=policy, tokenizer=tokenizer, stop_strings=[stop])

    whole = "".join(letters[token] for token in text)
    assert "".join(letters[token] for token in stopped) == whole[: whole.index(stop) + 2]


class Recorder(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
        self.chunks, self.has_ended = [], False

    def put(self, value):
        self.chunks.append(value.flatten().tolist())

    def end(self):
        self.has_ended = True


@pytest.mark.parametrize("policy", WAVEFRONT_POLICIES)
def test_tokens_stream_as_they_freeze(policy):
    model, recorder = random_model(9), Recorder()
    text = continuation(model, PROMPTS[0], 16, policy=policy, streamer=recorder)
    prompt, *chunks = recorder.chunks
    assert prompt == PROMPTS[0]
    assert list(itertools.chain(*chunks)) == text
    assert len(chunks) > 1 and recorder.has_ended


@pytest.mark.parametrize("policy", WAVEFRONT_POLICIES)
@pytest.mark.parametrize("dtype", slow_but({torch.bfloat16}, (torch.float32, torch.bfloat16, torch.float64)))
def test_any_dtype_samples_with_its_own_generator_and_touches_nothing_global(policy, dtype):
    model = random_model(10).to(dtype)
    ids = torch.tensor([PROMPTS[0]] * 2)
    draw = lambda seed: model.generate(  # noqa: E731
        ids,
        max_new_tokens=10,
        do_sample=True,
        temperature=0.8,
        policy=policy,
        generator=torch.Generator().manual_seed(seed),
    ).tolist()

    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("criterion", ["latent-acceleration-1", "latent-acceleration-2", "token-stability", "fixed"])
@pytest.mark.parametrize("schedule", ["constant", "dampened", "linear", "sqrt"])
def test_every_criterion_and_noise_schedule_finishes_in_a_ragged_batch(criterion, schedule):
    output = random_model(11).generate(
        **left_padded(PROMPTS),
        max_new_tokens=12,
        policy="diffusion-forcing",
        freeze_criterion=criterion,
        noise_schedule=schedule,
        state_noise=0.3,
        headway=2,
        max_wavefront=5,
        generator=torch.Generator().manual_seed(0),
        return_dict_in_generate=True,
        record_wavefront=True,
    )
    assert output.sequences.shape == (3, len(PROMPTS[0]) + 12)
    assert max(len(step.fed_ids) for step in output.wavefront) <= 5
    frozen = output.wavefront[0].start
    for step in output.wavefront:  # what is frozen stays, in order
        assert step.start == frozen
        frozen += step.num_frozen


def test_a_wavefront_of_one_is_adaptive_decoding():
    model = random_model(12)
    adaptive = continuation(model, PROMPTS[0], 16, policy="adaptive", exit_threshold=0.2, num_recurrences=32)
    options = {"inner_recurrence": 1, "embedding_ema": 0.0, "exit_threshold": 0.2, "num_recurrences": 32}
    assert continuation(model, PROMPTS[0], 16, policy="diffusion-forcing", max_wavefront=1, **options) == adaptive


def test_the_statistics_add_up():
    model, ids = random_model(13), torch.tensor([PROMPTS[0]])
    for policy in ["autoregressive", *WAVEFRONT_POLICIES]:
        output = model.generate(ids, max_new_tokens=12, init_scale=0.0, policy=policy, return_dict_in_generate=True)
        assert output.sequences.shape[1] == ids.shape[1] + 12
        assert output.num_prefill_core_passes == 6
        assert output.recurrences_per_position.shape == (1, 12)
        assert output.recurrences_per_position[0, :-1].min() >= 1
        assert output.tokens_per_forward[0] == pytest.approx(11 * 6 / output.num_core_passes)
        if policy in ("autoregressive", "adaptive"):
            assert output.num_core_passes == output.num_positions == output.recurrences_per_position.sum()


def test_options_may_stand_in_the_generation_config():
    model, ids = random_model(14), torch.tensor([PROMPTS[0]])
    config = GenerationConfig(max_new_tokens=8, policy="exact", draft_recurrences=[1, 3], init_scale=0.0)
    output = model.generate(ids, generation_config=config, return_dict_in_generate=True)
    by_keyword = model.generate(
        ids, max_new_tokens=8, policy="exact", draft_recurrences=[1, 3], init_scale=0.0, return_dict_in_generate=True
    )
    assert output.sequences.tolist() == by_keyword.sequences.tolist()
    assert output.num_core_passes == by_keyword.num_core_passes
    assert config.to_dict() == GenerationConfig(**config.to_dict()).to_dict()


@pytest.mark.parametrize("preset", ["static-r4", "adaptive", "self-speculative", "diffusion-forcing-r2"])
def test_a_preset_is_the_options_it_names(preset):
    model = random_model(15)
    assert len(continuation(model, PROMPTS[0], 6, preset=preset)) == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": "fastest"}, "`policy` must be one of"),
        ({"preset": "best"}, "`preset` must be one of"),
        ({"policy": "exact", "headway": 2}, "`headway` has no effect with"),
        ({"policy": "exact", "draft_recurrences": 6}, "`draft_recurrences` must be"),
        ({"policy": "exact", "draft_recurrences": (3, 2)}, "`draft_recurrences` must be"),
        ({"policy": "self-speculative", "draft_recurrences": (1, 2)}, "a single depth"),
        ({"policy": "diffusion-forcing", "inner_recurrence": 0}, "`inner_recurrence` must be"),
        ({"policy": "diffusion-forcing", "embedding_ema": 2.0}, "`embedding_ema` must be"),
        ({"policy": "diffusion-forcing", "freeze_criterion": "luck"}, "`freeze_criterion` must be"),
        ({"policy": "diffusion-forcing", "kv_cache": "none"}, "`kv_cache` must be"),
        ({"policy": "diffusion-forcing", "inner_recurrence": 8, "max_recurrences": 4}, "`max_recurrences` must be"),
        ({"policy": "exact", "num_beams": 3}, "`num_beams` must be left"),
        ({"policy": "exact", "output_hidden_states": True}, "`output_hidden_states` must be left"),
        ({"policy": "exact", "use_cache": False}, "`use_cache` must be left"),
        ({"policy": "exact", "guidance_scale": 1.5}, "`guidance_scale` must be left"),
        ({"policy": "exact", "prefill_chunk_size": 2}, "`prefill_chunk_size` must be left"),
        ({"policy": "exact", "position_ids": torch.arange(7)[None]}, "`position_ids` must be left"),
        ({"policy": "exact", "assistant_model": random_model()}, "assisted"),
        ({"policy": "exact", "synced_gpus": True}, "`synced_gpus=False`"),
        ({"policy": "exact", "output_attentions": True}, "`output_attentions` must be left"),
        ({"assistant_early_exit": 2}, "`draft_recurrences`"),
        ({"policy": "exact", "max_new_tokens": 1000}, "`config.block_size`"),
        ({"num_recurrences": 0}, "`num_recurrences` must be"),
        ({"wavefronts": 3}, "wavefronts"),
        ({"cache_implementation": "quantized"}, "`cache_implementation` must be"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(options, words):
    with pytest.raises(ValueError, match=words):
        random_model().generate(torch.tensor([PROMPTS[0]]), **{"max_new_tokens": 4, **options})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy", 3),
        ("num_recurrences", "3"),
        ("num_recurrences", True),
        ("init_scale", "a"),
        ("init_scale", float("inf")),
        ("generator", 3),
        ("exit_threshold", "x"),
        ("exit_threshold", float("nan")),
        ("embedding_ema", "x"),
        ("max_recurrences", "x"),
        ("headway", 2.5),
        ("kv_cache", True),
        ("reference_compat", "yes"),
        ("draft_recurrences", 2.5),
        ("draft_recurrences", "12"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(name, value):
    policy = {"policy": "exact" if name == "draft_recurrences" else "diffusion-forcing"}
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        RecurrentOptions.from_layers([policy | {name: value}], 6)


def test_none_is_the_default():
    names = dict.fromkeys(RecurrentOptions.names())
    assert RecurrentOptions.from_layers([names], 6) == RecurrentOptions.from_layers([], 6)
    stored = {"policy": "exact", "seed": 3}
    assert RecurrentOptions.from_layers([{"policy": None, "seed": None}, stored], 6).seed is None


PUBLISHED = [{"policy": "published"}, {"policy": "diffusion-forcing", "reference_compat": True}]


@pytest.mark.parametrize("asked", PUBLISHED)
def test_the_published_sampler_takes_one_row(asked):
    batch = left_padded(PROMPTS)
    with pytest.raises(ValueError, match="one row without padding"):
        random_model().generate(**batch, max_new_tokens=4, **asked)


@pytest.mark.parametrize("more", [{}, {"max_steps": 9}, {"preset": "diffusion-forcing-r2", "headway": 2, "seed": 3}])
def test_reference_compat_is_an_older_name_of_the_published_policy(more):
    expected, *others = (RecurrentOptions.from_keywords(asked | more, 6) for asked in PUBLISHED)
    assert type(expected) is PublishedOptions and others == [expected]
    assert expected == RecurrentOptions.from_keywords({"policy": "published", "reference_compat": True} | more, 6)
    model, ids = random_model(3), torch.tensor([PROMPTS[0]])
    texts = []
    for asked in PUBLISHED:
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        options = asked | {name: value for name, value in more.items() if name != "seed"} | {"generator": generator}
        texts.append(model.generate(ids, max_new_tokens=12, do_sample=True, **options).tolist())
    assert texts[0] == texts[1]


def test_reference_compat_may_come_from_another_layer_than_the_policy():
    layers = [{"reference_compat": True}, {"policy": "diffusion-forcing", "headway": 2}]
    assert RecurrentOptions.from_layers(layers, 6) == PublishedOptions(num_recurrences=6, headway=2)
    assert RecurrentOptions.from_layers([{"policy": "diffusion-forcing"}, layers[0]], 6).policy == "published"
    assert RecurrentOptions.from_layers([{"policy": "exact"}, layers[0]], 6).policy == "exact"
    assert RecurrentOptions.from_layers([{"policy": "adaptive"}, layers[0]], 6).reference_compat


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"policy": "published", "reference_compat": False}, "`reference_compat` must be True or left out"),
        ({"policy": "exact", "reference_compat": True}, "`reference_compat` has no effect with `policy='exact'`"),
        ({"policy": "diffusion-forcing", "max_steps": 4}, "only `reference_compat` reads it"),
        (
            {"policy": "diffusion-forcing", "max_steps": 4, "reference_compat": False},
            "only `reference_compat` reads it",
        ),
        ({"policy": "published", "draft_length": 4}, "`draft_length` has no effect with `policy='published'`"),
    ],
)
def test_keywords_that_contradict_the_policy_are_refused(keywords, words):
    with pytest.raises(ValueError, match=words):
        RecurrentOptions.from_keywords(keywords, 6)


@pytest.mark.parametrize("policy", list(POLICIES))
def test_a_policy_has_the_keywords_it_reads_and_no_others(policy):
    options = RecurrentOptions.from_keywords({"policy": policy}, 6)
    assert options.policy == policy and options.num_recurrences == 6
    for name in sorted(RecurrentOptions.names() - keywords_of(policy) - {"policy", "preset"}):
        with pytest.raises(ValueError, match=f"`{name}` has no effect with `policy='{policy}'`"):
            RecurrentOptions.from_keywords({"policy": policy, name: 1}, 6)


def test_padding_on_the_right_is_refused():
    ids, mask = torch.tensor([[5, 6, 0], [5, 6, 7]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    with pytest.raises(ValueError, match="padding on the left"):
        random_model().generate(ids, attention_mask=mask, max_new_tokens=4, policy="exact")


@pytest.mark.parametrize("policy", WAVEFRONT_POLICIES)
def test_every_attention_implementation_decodes_the_same_text(policy):
    model = random_model(17)  # one none of whose states comes so near its threshold that rounding decides
    expected = [continuation(model, row, 10, policy=policy) for row in PROMPTS]
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    batch = left_padded(PROMPTS)
    together = model.generate(**batch, max_new_tokens=10, init_scale=0.0, policy=policy)
    assert together[:, batch["input_ids"].shape[1] :].tolist() == expected


def test_a_model_that_does_not_see_its_tokens_again_takes_no_diffusion_forcing():
    model = random_model()
    model.reinjects_input = False
    with pytest.raises(ValueError, match="reinjects_input"):
        continuation(model, PROMPTS[0], 4, policy="diffusion-forcing")


def test_the_picture_colours_what_became_of_each_token():
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from picture_recurrent import CHANGED, FROZEN, GUESSED, KEPT, NOT_BEGUN, what_became

    from wavedraft.generation.recurrent.outputs_recurrent import WavefrontStep

    steps = [WavefrontStep(7, [1], [2], 0), WavefrontStep(7, [1, 2], [2, 3], 1), WavefrontStep(8, [2, 3], [4, 5], 0)]
    assert what_became(steps, 4).tolist() == [
        [FROZEN, GUESSED, NOT_BEGUN, NOT_BEGUN],
        [FROZEN, FROZEN, GUESSED, NOT_BEGUN],
        [FROZEN, FROZEN, CHANGED, GUESSED],
    ]
    steps[2].predicted_ids[0] = 3
    assert what_became(steps, 4)[2, 2] == KEPT


def step_of(wavefront, num_frozen, predicted_ids, headway=1):
    """One decode step: states that begin are 0 and count recurrences of two at a time, embeddings average by half."""
    width = wavefront.add_headway(headway, [8] * len(wavefront.starts))
    wavefront.fit(width, lambda rows, positions: torch.zeros(len(rows), 1), None)
    wavefront.embeds = torch.lerp(wavefront.ids(width)[..., None].float(), *wavefront.earlier_embeds(0.5))
    embeds = wavefront.embeds[..., 0].tolist()
    wavefront.states = wavefront.states + 2
    wavefront.add_recurrences(2)
    states = wavefront.states[..., 0].tolist()
    wavefront.advance(num_frozen, predicted_ids)
    return states, embeds


def test_a_position_whose_token_changes_begins_anew():
    wavefront = Wavefront([4], [5], torch.device("cpu"))
    assert step_of(wavefront, [0], [[6]]) == ([[2]], [[5]])
    assert step_of(wavefront, [0], [[6, 7]]) == ([[4, 2]], [[5, 6]])
    assert step_of(wavefront, [0], [[8, 7, 9]]) == ([[6, 4, 2]], [[5, 6, 7]])  # 8 is news to the second, no other
    assert step_of(wavefront, [1], [[8, 7, 9, 9]]) == ([[8, 2, 4, 2]], [[5, 8, 7, 9]])
    assert (wavefront.starts, wavefront.ages, wavefront.counts) == ([5], [[2, 4, 2]], [[6, 4, 2]])
    wavefront.begin_anew([True], 2)
    wavefront.begin_anew([False], 4)
    assert wavefront.is_retried == [False]
    wavefront.begin_anew([False], 2)
    assert wavefront.is_retried == [True]
    assert step_of(wavefront, [0], [[7, 9, 9, 1]])[0] == [[2, 6, 4, 2]]
    wavefront.begin_anew([False], 2)  # it has begun anew already
    assert step_of(wavefront, [1], [[7, 9, 9, 1, 2]])[0] == [[4, 8, 6, 4, 2]]
    assert wavefront.is_retried == [False]


@pytest.mark.parametrize(
    ("ages", "is_retried", "num_frozen"),
    [([8, 8], False, 1), ([8, 4], False, 0), ([4, 8], False, 0), ([8, 8], True, 0), ([32, 8], True, 1)],
)
def test_only_states_with_a_former_one_settle_and_a_retried_one_not_before_full_depth(ages, is_retried, num_frozen):
    asked = {"policy": "diffusion-forcing", "exit_threshold": 1e9, "num_recurrences": 32}
    session = SimpleNamespace(options=RecurrentOptions.from_keywords(asked, 32))
    wavefront = Wavefront([4], [5], torch.device("cpu"))
    wavefront.fed_ids, wavefront.ages, wavefront.is_retried = [[5, 6]], [ages], [is_retried]
    assert freeze(wavefront, session, [[6, 7]], [[0.0, 0.0]])[0] == [num_frozen]


def test_a_wavefront_narrows_when_its_widest_row_leaves():
    wavefront = Wavefront([4, 4], [5, 6], torch.device("cpu"))
    wavefront.num_seen = [1, 1]
    wavefront.add_headway(2, [3, 1])
    assert wavefront.widths == [3, 1]
    wavefront.fit(3, lambda rows, positions: torch.ones(len(rows), 8), None)
    wavefront.embeds = torch.lerp(torch.ones(2, 3, 8), *wavefront.earlier_embeds(0.1))
    wavefront.advance([0, 0], [[7, 8, 9], [1]])
    wavefront.keep_rows([1])
    width = wavefront.add_headway(1, [2])
    wavefront.fit(width, lambda rows, positions: torch.zeros(len(rows), 8), None)
    wavefront.embeds = torch.lerp(torch.zeros(1, width, 8), *wavefront.earlier_embeds(0.1))
    assert wavefront.embeds.shape == wavefront.states.shape == (1, 2, 8)
