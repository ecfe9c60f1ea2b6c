"""Draws are functions of seed, purpose and position, so a row is the same in every batch."""

import pytest
import torch

from helpers_recurrent import random_model, settling_model
from wavedraft.generation.recurrent.draws_recurrent import (
    CHOICE,
    STATE,
    STATE_NOISE,
    Draws,
    gumbel_at,
    hash_of,
    normal_at,
    scramble,
    scramble_each,
    state_hashes,
    uniform_at,
)
from wavedraft.generation.recurrent.initial_states import AHEAD, InitialStates

POLICIES = ["adaptive", "self-speculative", "diffusion-forcing", "exact"]


def test_host_and_device_hash_alike():
    numbers = [0, 1, -1, 2**62, -(2**63), 12345678901234]
    on_device = scramble_each(torch.tensor(numbers)).tolist()
    assert [number % 2**64 for number in on_device] == [scramble(number % 2**64) for number in numbers]
    assert scramble(1) == 0xE220A8397B1DCDAF, "SplitMix64's first output"
    expected = [[hash_of(seed, STATE, position, 0) for position in (0, 7)] for seed in (3, 4)]
    assert state_hashes(torch.tensor([3, 4]), torch.tensor([[0, 7]])).tolist() == expected


def test_draws_have_the_distributions_they_name():
    hashes = state_hashes(torch.tensor([5]), torch.arange(1000)[None])[0]
    uniform, normal, gumbel = (draw(hashes, 100) for draw in (uniform_at, normal_at, gumbel_at))
    assert uniform.min() > 0 and uniform.max() < 1
    assert normal.abs().max() <= 3
    # Five standard errors of 100,000 draws about what the distributions' formulas give.
    for draws, mean, deviation in ((uniform, 0.5, 12**-0.5), (normal, 0.0, 0.98658), (gumbel, 0.57722, 1.28255)):
        assert abs(draws.double().mean() - mean) < 5 * deviation / 100_000**0.5
        assert abs(draws.double().std() / deviation - 1) < 0.015
    for neighbours in (normal[1:] * normal[:-1], normal[:, 1:] * normal[:, :-1]):
        assert abs(neighbours.mean()) < 5 / 99_000**0.5, "neighbouring positions or channels are correlated"
    assert uniform.unique().numel() == uniform.numel()


def test_every_key_tells_a_draw_apart():
    draws = Draws([1, 2], torch.device("cpu"))
    keys = [(CHOICE, [0], [3], [0]), (CHOICE, [1], [3], [0]), (CHOICE, [0], [4], [0]), (CHOICE, [0], [3], [1])]
    numbers = [draws.uniform(*key).item() for key in [*keys, (STATE, [0], [3], [0])]]
    assert len(set(numbers)) == 5
    draws.keep_rows([1])
    assert draws.uniform(CHOICE, [0], [3]).item() == numbers[1]


def prompts_of(batch_size: int) -> list[list[int]]:
    """Prompts of mixed lengths, one of a single token."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1, *torch.randint(2, 12, (15,), generator=generator).tolist()]
    return [torch.randint(1, 37, (length,), generator=generator).tolist() for length in lengths][:batch_size]


def left_padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_row_of_a_batch_is_the_row_alone_in_fp32(policy, do_sample):
    model, rows = settling_model(21), prompts_of(16)
    seeds = [100 + 7 * row for row in range(16)]
    options = {
        "max_new_tokens": 7,
        "policy": policy,
        "do_sample": do_sample,
        "eos_token_id": list(range(20, 27)),
        "pad_token_id": 0,
    }
    alone = [
        model.generate(torch.tensor([r]), seed=[s], **options)[0, len(r) :] for r, s in zip(rows, seeds, strict=True)
    ]
    assert len({len(text) for text in alone}) > 1, "all rows end together"
    for num in (2, 5, 16):
        batch = left_padded(rows[:num])
        together = model.generate(**batch, seed=seeds[:num], **options)[:, batch["input_ids"].shape[1] :]
        for text, found in zip(alone[:num], together, strict=True):
            assert found[: len(text)].tolist() == text.tolist()
            assert not found[len(text) :].any()


def rounds_alike() -> bool:
    """Whether, on this machine, products and attention filled up as a wavefront's are have one rounding."""
    generator = torch.Generator().manual_seed(0)
    weight, tokens = torch.randn(72, 24, generator=generator), torch.randn(64, 24, generator=generator)
    query, key, value = torch.randn(3, 1, 3, 192, 8, generator=generator)
    attend = torch.nn.functional.scaled_dot_product_attention
    hidden = torch.zeros(1, 1, 32, 192).masked_fill_(torch.arange(192) > torch.arange(32)[:, None], -torch.inf)
    wide = attend(query[:, :, :32], key, value, attn_mask=hidden)[:, :, :4]
    narrow = attend(query[:, :, :4], key[:, :, :16], value[:, :, :16], attn_mask=hidden[:, :, :4, :16])
    return torch.equal(tokens[:4] @ weight.T, (tokens @ weight.T)[:4]) and torch.equal(wide, narrow)


@pytest.mark.skipif(not rounds_alike(), reason="this machine's products round by their number here too")
@pytest.mark.parametrize("changes", [{}, {"n_embd": 64, "n_heads": 4}, {"n_embd": 40, "n_heads": 2}])
def test_a_wavefronts_row_has_the_bits_it_has_alone_in_fp32_though_no_state_rests(changes):
    model, rows, seeds = random_model(3, **changes), prompts_of(6), list(range(6))
    options = {
        "max_new_tokens": 6,
        "policy": "diffusion-forcing",
        "max_recurrences": 8,
        "return_dict_in_generate": True,
    }
    options |= {"output_logits": True, "headway": 2, "inner_recurrence": 2}
    together = model.generate(**left_padded(rows), seed=seeds, **options)
    for place, row in enumerate(rows):
        alone = model.generate(torch.tensor([row]), seed=seeds[place], **options)
        assert together.sequences[place, -6:].tolist() == alone.sequences[0, -6:].tolist()
        for mine, theirs in zip(together.logits, alone.logits, strict=True):
            assert torch.equal(mine[place], theirs[0])


def test_state_noise_too_is_the_rows_own():
    model, rows = settling_model(22), prompts_of(3)
    options = {"max_new_tokens": 8, "policy": "diffusion-forcing", "state_noise": 0.4, "headway": 2}
    together = model.generate(**left_padded(rows), seed=[5, 6, 7], **options)[:, max(map(len, rows)) :]
    alone = [
        model.generate(torch.tensor([r]), seed=s, **options)[0, len(r) :].tolist()
        for r, s in zip(rows, (5, 6, 7), strict=True)
    ]
    assert together.tolist() == alone
    assert (
        together.tolist() != model.generate(**left_padded(rows), seed=8, **options)[:, max(map(len, rows)) :].tolist()
    )


@pytest.mark.parametrize("policy", ["self-speculative", "exact"])
def test_random_initial_states_keep_the_text_of_plain_decoding(policy):
    model, batch = random_model(23), left_padded(prompts_of(3))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    plain = model.generate(**batch, max_new_tokens=16)
    assert model.generate(**batch, max_new_tokens=16, policy=policy).tolist() == plain.tolist()
    seeded = model.generate(**batch, max_new_tokens=16, seed=9)
    assert model.generate(**batch, max_new_tokens=16, policy=policy, seed=9).tolist() == seeded.tolist()
    assert seeded.tolist() != plain.tolist(), "the initial states matter to this model"
    assert torch.equal(torch.get_rng_state(), before), "greedy decoding draws nothing"


def test_states_drawn_ahead_are_those_drawn_one_by_one():
    model = random_model(25)
    states = InitialStates(model, 1.0, Draws([3, 4], torch.device("cpu")), model.dtype)
    like = torch.empty(1, 1, model.config.n_embd)
    for row, position in ((0, 5), (1, 5), (0, 5 + AHEAD - 1), (0, 5 + AHEAD), (0, 4), (1, 100), (1, 6)):
        alone = states.packed(like, [row], [position])[0]
        assert torch.equal(states.at([row], [position]), alone), (row, position)
        assert torch.equal(states.of(like.expand(2, 1, -1), [position] * 2)[row], alone)
    assert not torch.equal(states.at([0], [5]), states.at([1], [5]))


def test_noise_drawn_ahead_is_that_of_its_row_position_and_time():
    model, draws = random_model(25), Draws([3, 4], torch.device("cpu"))
    states = InitialStates(model, 1.0, draws, model.dtype)
    like, seen = torch.empty(1, 1, model.config.n_embd), []
    for row, position, time in ((0, 5, 0), (0, 5, 2), (1, 5, 2), (0, 5 + AHEAD, 2), (0, 4, 2), (0, 6, 0)):
        hashes = draws.hashes(STATE_NOISE, [row], [position], [time])[:, None]
        noise = states.noise([row], [position], [time])
        assert torch.equal(noise, model.initial_states(like, 1.0, hashes=hashes)[:, 0]), (row, position, time)
        assert not any(torch.equal(noise, other) for other in seen)
        seen.append(noise)


def test_a_seed_for_each_sequence_returned():
    model, ids = random_model(24, mean_recurrence=4), torch.tensor([[5, 6, 7], [8, 9, 10]])
    options = {"max_new_tokens": 8, "do_sample": True, "policy": "exact"}
    sampled = model.generate(ids, num_return_sequences=3, seed=[1, 2, 1, 1, 2, 1], **options)
    assert sampled.shape == (6, 11)
    assert sampled[0].tolist() == sampled[2].tolist() != sampled[1].tolist()
    assert model.generate(ids[:1], seed=2, **options).tolist() == sampled[1:2].tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": -1}, "`seed` must be an integer"),
        ({"seed": [1, 2, 3]}, "or 2 of them"),
        ({"seed": 1, "generator": torch.Generator()}, "absent where `generator` is given"),
        ({"seed": 1, "policy": "autoregressive", "do_sample": True}, "`seed` must be left out"),
    ],
)
def test_seeds_that_cannot_be_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        random_model().generate(torch.ones(2, 3).long(), max_new_tokens=2, **{"policy": "exact", **options})
