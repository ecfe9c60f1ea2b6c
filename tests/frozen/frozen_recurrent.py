"""What recurrent-depth decoding does: every policy on tiny random models, and the golden runs."""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from frozen_runs import rounded
from frozen_tidar import DraftWatcher, RowWatcher, Watcher
from transformers import CompileConfig

from helpers_recurrent import golden_model, keywords, kv_cache_of, prompt_ids, random_model, records
from wavedraft import RecurrentDepthConfig, RecurrentDepthForCausalLM
from wavedraft.modeling_recurrent import OuroConfig, OuroForCausalLM

CACHE = "past_key_values"
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]
STATIC = {"cache_implementation": "static"}
POLICIES: dict[str, dict[str, Any]] = {
    "autoregressive": {"policy": "autoregressive"},
    "autoregressive, shared cache": {"kv_cache": "latest-only"},
    "adaptive": {"policy": "adaptive"},
    "self-speculative": {"policy": "self-speculative", "draft_recurrences": 2},
    "diffusion-forcing": {"preset": "diffusion-forcing-r4"},
    "diffusion-forcing, noise and headway": {"preset": "diffusion-forcing-r2", "headway": 3, "embedding_ema": 0.5},
    "exact": {"policy": "exact"},
    "exact, narrow": {"policy": "exact", "draft_recurrences": (1, 3), "max_wavefront": 3},
}
CRITERIA = ("latent-difference", "latent-acceleration-1", "latent-acceleration-2", "token-stability", "fixed")
SCHEDULES = ("constant", "dampened", "linear", "sqrt")
RETROFIT: dict[str, Any] = {
    "n_embd": 24, "n_heads": 4, "head_dim": 6, "intermediate_size": 40, "vocab_size": 37, "block_size": 160,
    "n_layers_in_prelude": 1, "n_layers_in_recurrent_block": 2, "n_layers_in_coda": 1, "mean_recurrence": 5,
    "tie_embeddings": False, "num_key_value_heads": 2,
}  # fmt: skip
OURO: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
    "num_hidden_layers": 3, "total_ut_steps": 4, "vocab_size": 37, "max_position_embeddings": 256,
    "layer_types": ["full_attention"] * 3, "tie_word_embeddings": False,
}  # fmt: skip


def with_large_weights(model: Any) -> Any:
    """The model with random weights that let its texts vary."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "ln_f" not in name:
                scale = 1 if "wte" in name or "embed" in name else parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn_like(parameter) * scale)
    return model.eval()


def family_model(kind: str) -> Any:
    if kind == "ouro":
        return with_large_weights(OuroForCausalLM(OuroConfig(**OURO))).double()
    own = {"num_key_value_heads": 4} if kind == "sandwich" else {"qk_bias": False}
    config = RecurrentDepthConfig(**RETROFIT | own, block_form=kind)
    return with_large_weights(RecurrentDepthForCausalLM(config)).double()


def settling_model(seed: int = 21) -> Any:
    """One whose states come to rest, so that float32 is enough."""
    model = random_model(seed, mean_recurrence=4)
    with torch.no_grad():
        model.transformer["adapter"].weight[:, : model.config.n_embd] *= 0.25
    return model


def double_model(seed: int = 2) -> Any:
    """In float64, so that rounding decides nothing."""
    return random_model(seed, block_size=400).double()


def inputs(rows: str) -> dict[str, Any]:
    """One prompt, or three left-padded ones, whose rows end at end-of-sequence ids."""
    if rows == "one":
        return {"input_ids": torch.tensor([PROMPTS[0]])}
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in PROMPTS])
    return {"input_ids": ids, "attention_mask": mask, "eos_token_id": [3, 20], "pad_token_id": 0}


def told_of(output: Any) -> dict[str, Any]:
    """All that one output says, as JSON."""
    names = ("num_core_passes", "num_prefill_core_passes", "num_prefill_positions", "num_steps", "num_positions")
    told: dict[str, Any] = {"kind": type(output).__name__, "sequences": output.sequences.tolist()}
    told |= {name: getattr(output, name, None) for name in names}
    if getattr(output, "recurrences_per_position", None) is not None:
        told["recurrences_per_position"] = output.recurrences_per_position.tolist()
        told["tokens_per_forward"] = [rounded(x) if x == x else None for x in output.tokens_per_forward.tolist()]
    if getattr(output, "wavefront", None) is not None:
        told["wavefront"] = [[s.start, s.fed_ids, s.predicted_ids, s.num_frozen] for s in output.wavefront]
    if output.get(CACHE) is not None:
        told["cache"] = {"kind": type(output[CACHE]).__name__, "length": int(output[CACHE].get_seq_length())}
        told["cache"]["lengths"] = list(getattr(output[CACHE], "lengths", []))
    return told


def ran(model: Any, **asked: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    return told_of(model.generate(**{"max_new_tokens": 16, "return_dict_in_generate": True} | asked))


def policy_cases() -> Iterator[tuple[str, Any]]:
    """Every policy, alone and in a batch, greedy and sampled, over both caches."""
    for policy, rows, how, cache in itertools.product(
        POLICIES, ("one", "ragged"), ("greedy", "sampled"), ("dynamic", "static", "compiled")
    ):
        if cache != "dynamic" and policy.startswith("exact"):
            continue
        if cache == "compiled" and (rows, how) != ("ragged", "greedy"):
            continue
        asked = POLICIES[policy] | {"do_sample": how == "sampled", "seed": 1} | ({} if cache == "dynamic" else STATIC)
        if policy.startswith("autoregressive") and how == "sampled":
            asked.pop("seed")  # it samples with transformers' own loop, which knows no seeds
        if cache == "compiled":
            asked["compile_config"] = CompileConfig(backend="eager", dynamic=False)
        name = f"{policy}, {rows}, {how}, {cache}"
        yield name, lambda rows=rows, asked=asked: ran(double_model(), **inputs(rows), **asked)
        if cache == "dynamic":
            yield name + ", float32", lambda rows=rows, asked=asked: ran(settling_model(), **inputs(rows), **asked)


def forcing_cases() -> Iterator[tuple[str, Any]]:
    """Diffusion forcing's criteria and schedules, and the published code's own ways."""
    for criterion, schedule in itertools.product(CRITERIA, SCHEDULES):
        asked = {"policy": "diffusion-forcing", "freeze_criterion": criterion, "noise_schedule": schedule, "seed": 4}
        asked |= {"state_noise": 0.3, "headway": 2, "max_wavefront": 5, "record_wavefront": True}
        yield (
            f"{criterion}, {schedule}",
            lambda asked=asked: ran(double_model(11), **inputs("ragged"), **asked | {"max_new_tokens": 10}),
        )
    compat: dict[str, dict[str, Any]] = {
        "adaptive": {"policy": "adaptive"},
        "diffusion-forcing": {"policy": "diffusion-forcing", "init_scale": 0.0, "max_steps": 200},
        "diffusion-forcing-r2": {"preset": "diffusion-forcing-r2", "record_wavefront": True, "max_steps": 200},
    }
    for name, asked in compat.items():
        yield (
            f"reference_compat, {name}",
            lambda asked=asked: ran(settling_model(), **inputs("one"), **asked, seed=1, reference_compat=True),
        )


def streamed(streamer_class: type, rows: str, **asked: Any) -> dict[str, Any]:
    streamer = streamer_class()
    return ran(double_model(), **inputs(rows), **asked, streamer=streamer) | {"streamed": streamer.seen}


def in_two_turns(rows: str, **asked: Any) -> list:
    """A text, and a second one that goes on from its cache with two tokens more."""
    model, given = double_model(), inputs(rows) | {"eos_token_id": None, "max_new_tokens": 6} | asked
    torch.manual_seed(0)
    first = model.generate(**given, return_dict_in_generate=True)
    more = torch.tensor([[4, 9]] * len(first.sequences))
    given["input_ids"] = torch.cat([first.sequences, more], dim=1)
    if "attention_mask" in given:
        mask, num_new = given["attention_mask"], given["input_ids"].shape[1] - given["attention_mask"].shape[1]
        given["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), num_new)], dim=1)
    return [told_of(first), ran(model, **given, **{CACHE: first[CACHE]})]


def other_cases() -> Iterator[tuple[str, Any]]:
    """Other models of the family, streams, second turns, processors, depths."""
    for kind, policy in itertools.product(("pre-norm", "post-norm", "sandwich", "ouro"), POLICIES):
        asked = POLICIES[policy] | {"do_sample": False, "seed": 1}
        if kind == "ouro" and policy.startswith("diffusion"):
            continue  # refused: it does not see its tokens again
        yield (
            f"{kind}, {policy}",
            lambda kind=kind, asked=asked: ran(family_model(kind), **inputs("ragged"), **asked),
        )
    for policy in POLICIES:
        asked = POLICIES[policy] | {"do_sample": False, "seed": 1}
        kinds = [(Watcher, "one"), (DraftWatcher, "one")]
        if not policy.startswith("autoregressive"):
            kinds.append((RowWatcher, "ragged"))
        for kind, rows in kinds:
            yield f"{kind.__name__}, {policy}", partial(streamed, kind, rows, **asked)
        for rows in ("one", "ragged"):
            yield f"two turns, {policy}, {rows}", partial(in_two_turns, rows, **asked)
        more = asked | {"repetition_penalty": 1.3, "output_scores": policy.startswith("auto")}
        if "noise" not in policy:  # its states never come to rest there, so that rounding counts
            yield f"penalty, {policy}", lambda more=more: ran(double_model(), **inputs("ragged"), **more)
        eager = asked | {"num_recurrences": 3} | ({"draft_recurrences": 1} if "draft_recurrences" in asked else {})
        yield f"depth of 3, {policy}", lambda more=eager: ran(double_model(5), **inputs("ragged"), **more)


def golden(variant: str, prompt: str, num_new: int, **asked: Any) -> dict[str, Any]:
    return ran(golden_model(variant), input_ids=prompt_ids(prompt), max_new_tokens=num_new, **asked)


def golden_cases() -> Iterator[tuple[str, Any]]:
    """The golden runs of tests/test_golden_recurrent.py: what our code gives."""
    for place, r in enumerate(records()["ar"]):
        asked = {"num_recurrences": r["num_steps"], "init_scale": 0.0, "kv_cache": kv_cache_of(r["cache"])}
        yield f"ar {place}", partial(golden, r["variant"], r["prompt"], len(r["tokens"]), **asked)
    for place, r in enumerate(records()["adaptive"]):
        asked = {"policy": "adaptive", "num_recurrences": r["num_steps"], "exit_threshold": r["exit_threshold"]}
        asked |= {"init_scale": 0.0, "reference_compat": True}
        yield f"adaptive {place}", partial(golden, r["variant"], r["prompt"], len(r["tokens"]), **asked)
    for place, r in enumerate(records()["speculative"]):
        asked = {"policy": "self-speculative", "num_recurrences": r["num_steps"], "draft_length": r["lookahead"]}
        asked |= {"draft_recurrences": r["draft_steps"], "init_scale": 0.0, "kv_cache": "latest-only"}
        yield f"speculative {place}", partial(golden, r["variant"], r["prompt"], len(r["tokens"]), **asked)
    for place, r in enumerate(records()["df"]):
        asked = keywords(r["params"])
        yield f"forcing {place}", partial(golden, r["variant"], r["prompt"], r["N"], **asked)
        if not r["stalled"] or r["params"]["max_wavefront"] < 128:
            compat = asked | {"reference_compat": True, "max_steps": 400}
            yield f"forcing {place}, compat", partial(golden, r["variant"], r["prompt"], r["N"], **compat)


def cases() -> Iterator[tuple[str, Any]]:
    """Name and call of every case on a random model; each makes its model anew."""
    yield from policy_cases()
    yield from forcing_cases()
    yield from other_cases()
