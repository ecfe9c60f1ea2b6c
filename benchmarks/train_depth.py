"""A small recurrent-depth model that needs its depth, trained from scratch on the problems of depth_tasks.py.

    python benchmarks/train_depth.py runs/depth --minutes 60
    python benchmarks/train_depth.py runs/depth --minutes 60 --resume     (goes on where it was stopped)

One lookup a recurrence. At depth r the target of an answer is where its way is after r lookups, or at its end; the
depth of half the steps is the greatest so far, R, of the others evenly below. R rises by one when answers are right;
after the longest way, to full depth at once.

So that keys can be shared across recurrences, which the samplers with one cache plane need, most steps read the
prompt first, to a depth of its own, and let answers read its last keys at every recurrence. In half of these the
answers begin one after the other, as in a wavefront. `--rest` penalises what a state still moves after its way's end.
"""

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from depth_tasks import (
    LEVELS,
    MOST_HOPS,
    NUM_ANSWERS,
    NUM_SYMBOLS,
    PAD,
    PAIRS,
    STEPS,
    TASKS,
    WORDS,
    Problems,
    drawn,
    task_tokenizer,
    test_problems,
)
from torch import nn

from wavedraft.generation.recurrent.freezing import latent_difference
from wavedraft.modeling_recurrent import RecurrentDepthConfig, RecurrentDepthForCausalLM
from wavedraft.modeling_recurrent.cache_recurrent import Window

STAGGERS = (0, 1, 2, 4)


def new_model(arguments: argparse.Namespace) -> RecurrentDepthForCausalLM:
    """Random weights."""
    prelude, core, coda = arguments.layers
    config = RecurrentDepthConfig(
        vocab_size=len(WORDS),
        n_embd=arguments.n_embd,
        n_heads=arguments.n_heads,
        intermediate_size=2 * arguments.n_embd,
        n_layers_in_prelude=prelude,
        n_layers_in_recurrent_block=core,
        n_layers_in_coda=coda,
        mean_recurrence=arguments.full_depth,
        mean_backprop_depth=4,
        block_size=256,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    model = RecurrentDepthForCausalLM(config)
    compose_pairs(model.get_input_embeddings().weight)
    return model


@torch.no_grad()
def compose_pairs(embeddings: torch.Tensor) -> None:
    """Begins with pairs that are alike where they share a symbol: each is two turned embeddings of its symbols."""
    symbols = embeddings[:NUM_SYMBOLS]
    turns = [nn.init.orthogonal_(torch.empty(symbols.shape[1], symbols.shape[1])) for _ in range(2)]
    first, second = (symbols @ turn / math.sqrt(2) for turn in turns)
    embeddings[PAIRS:STEPS] = (first[:, None] + second[None]).flatten(0, 1)


class PromptKeys:
    """A cache in training: the keys and values of a prompt's last recurrence, before those that a call adds.

    Unlike `RecurrentCache` it writes nothing in place, so that gradients reach the prompt's last recurrence.
    """

    def __init__(self) -> None:
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.is_read = False

    def write_and_read(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, recurrence: int, window: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, H, T, D] keys and values: kept while the prompt is read, put after the prompt's from then on."""
        if not self.is_read:
            self.kept[layer] = keys, values
            return keys, values
        before = self.kept[layer]
        return torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)


def windows(
    model: RecurrentDepthForCausalLM, embeds: torch.Tensor, num_read: int, cache: PromptKeys
) -> tuple[Window, Window]:
    """Of the first `num_read` positions, and of the others, which see the first by the cache."""
    length = embeds.shape[1]
    prompt = model.padded_window(embeds[:, :num_read], None, torch.arange(num_read)[None], None)
    position_ids = torch.arange(num_read, length)[None]
    is_hidden = torch.arange(length) > position_ids[..., None]
    mask = torch.zeros(1, 1, length - num_read, length).masked_fill_(is_hidden[:, None], -torch.inf)
    rotary = model.rotary_at(position_ids, embeds.dtype)
    rest = Window(rotary, mask, prompt.attention_function, cache, kv_length=length)  # type: ignore[arg-type]
    return replace(prompt, cache=cache), rest  # type: ignore[arg-type]


def read_first(
    model: RecurrentDepthForCausalLM, ids: torch.Tensor, num_read: int, plan: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Window]:
    """Reads a prompt to its depth. Returns what its states [B, P] moved, then e, s_0 and the window of the rest."""
    cache = PromptKeys()
    prompt, rest = windows(model, model.get_input_embeddings()(ids), num_read, cache)
    embeds = model.prelude(ids[:, :num_read], prompt)
    with torch.no_grad():
        before = model.core_steps(
            model.initial_states(embeds, plan["init_scale"]), embeds, prompt, plan["prompt_depth"] - 1
        )
    states = model.core_step(before, embeds, prompt)
    model.coda_states(states, prompt)
    cache.is_read = True
    embeds = model.prelude(ids[:, num_read:], rest)
    return latent_difference(states, before), embeds, model.initial_states(embeds, plan["init_scale"]), rest


def recurred(
    model: RecurrentDepthForCausalLM, ids: torch.Tensor, num_prompt: int, plan: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the answers [B, M, V], what each position moved in its last recurrence [B, T], and each answer's depth
    [M].

    The plan has `depth`, of the first answer; `prompt_depth`, 0 if the prompt recurs beside the answers; `stagger`, the
    recurrences that an answer begins after the one before it; `num_backprop`, the last recurrences with a gradient.
    """
    depth, num_read = plan["depth"], num_prompt - 1  # the prompt's last token predicts the first answer
    delays = (torch.arange(NUM_ANSWERS) * plan["stagger"]).clamp(max=depth - 1)
    moved = torch.empty(len(ids), 0)
    if plan["prompt_depth"]:
        moved, embeds, states, window = read_first(model, ids, num_read, plan)
        begins = delays
    else:
        embeds = model.get_input_embeddings()(ids)
        window = model.padded_window(embeds, None, torch.arange(ids.shape[1])[None], None)
        embeds = model.prelude(None, window, inputs_embeds=embeds)
        states = model.initial_states(embeds, plan["init_scale"])
        begins = torch.cat([torch.zeros(num_read, dtype=torch.long), delays])
    has_delays, before = bool(plan["stagger"]), states
    for recurrence in range(1, depth + 1):
        with torch.set_grad_enabled(torch.is_grad_enabled() and recurrence > depth - plan["num_backprop"]):
            before, after = states, model.core_step(states, embeds, window)
            states = torch.where((recurrence > begins)[None, :, None], after, before) if has_delays else after
    moved = torch.cat([moved, latent_difference(states, before)], dim=1)
    logits = model.coda(states, window, logits_to_keep=NUM_ANSWERS)
    return logits, moved, depth - delays


def inputs_of(problems: Problems) -> torch.Tensor:
    """[B, P + M - 1] the prompt and all answers but the last."""
    return torch.cat([problems.prompt_ids, problems.answers[:, :-1]], dim=1)


class Training:
    """A run: weights, optimizer, generator and the greatest depth so far, all saved and loaded together."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.model = new_model(arguments)
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.01},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.98), fused=True)
        self.generator = torch.Generator().manual_seed(arguments.seed + 1)
        self.counts = {"step": 0, "seconds": 0.0, "depth": 1, "raised": 0}
        self.right = dict.fromkeys(TASKS, 0.0)
        self.curve: list[dict[str, Any]] = []
        self.path = arguments.output / "state.pt"

    def save(self) -> None:
        """All of it, in one file that is replaced at once."""
        parts = {name: getattr(self, name) for name in ("counts", "right", "curve")}
        states = {name: getattr(self, name).state_dict() for name in ("model", "optimizer")}
        unfinished = self.path.with_suffix(".new")
        torch.save({**parts, **states, "generator": self.generator.get_state()}, unfinished)
        unfinished.replace(self.path)

    def load(self) -> None:
        """What `save` wrote."""
        saved = torch.load(self.path, weights_only=True)
        self.generator.set_state(saved["generator"])
        self.counts, self.right, self.curve = saved["counts"], saved["right"], saved["curve"]
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])

    def draw(self, *bounds: int) -> int:
        """A whole number between two bounds, both possible."""
        return int(torch.randint(bounds[0], bounds[1] + 1, (1,), generator=self.generator))

    def plan(self) -> dict[str, Any]:
        """How deep this step is, and in which order its positions are read."""
        greatest = self.counts["depth"]
        depth = greatest if self.draw(0, 1) else self.draw(1, greatest)
        reads_first = bool(self.draw(0, 3)) and bool(self.arguments.sharing)
        return {
            "depth": depth,
            "prompt_depth": self.draw(1, max(greatest, 2)) if reads_first else 0,
            "stagger": STAGGERS[self.draw(0, len(STAGGERS) - 1)] if reads_first and self.draw(0, 1) else 0,
            "num_backprop": self.draw(2, 4),
            "init_scale": self.arguments.init_scale,
        }

    def shares(self) -> dict[str, float]:
        """Each task's share of a step's problems: more of the one with more wrong answers."""
        wrong = {task: 1.02 - right for task, right in self.right.items()}
        return {task: min(0.85, max(0.15, count / sum(wrong.values()))) for task, count in wrong.items()}

    def step(self, rate: float) -> float:
        """One step of both tasks. Returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        plan, total = self.plan(), 0.0
        for task, share in self.shares().items():
            num = round(len(TASKS) * self.arguments.batch_size * share)
            problems = drawn(task, num, self.generator, held_out=False)
            logits, moved, depths = recurred(self.model, inputs_of(problems), problems.prompt_ids.shape[1], plan)
            targets = problems.after(depths)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) * share
            total += loss.item()
            is_done = torch.ones_like(moved, dtype=torch.bool)
            is_done[:, -NUM_ANSWERS:] = problems.hops < depths
            loss = loss + self.arguments.rest * share * (moved**2)[is_done].mean() if plan["depth"] > 1 else loss
            loss.backward()
            if plan["depth"] == self.counts["depth"] and not plan["stagger"]:
                right = (logits.argmax(-1) == targets).float().mean().item()
                self.right[task] = 0.9 * self.right[task] + 0.1 * right
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.counts["step"] += 1
        return total

    def rate(self) -> float:
        """Warmed up over 100 steps, constant, falling over the last share of the time."""
        done = self.counts["seconds"] / 60 / self.arguments.minutes
        fall = max(0.02, (1 - done) / self.arguments.decay) if done > 1 - self.arguments.decay else 1.0
        return self.arguments.learning_rate * min(1.0, (self.counts["step"] + 1) / 100) * fall

    def run(self) -> None:
        """Until the minutes are over."""
        self.model.train()
        smooth = math.nan
        while self.counts["seconds"] < 60 * self.arguments.minutes:
            start = time.process_time()
            loss = self.step(self.rate())
            self.counts["seconds"] += time.process_time() - start
            smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
            has_learnt = min(self.right.values()) > self.arguments.right
            if has_learnt and self.counts["depth"] < self.arguments.full_depth:
                is_long_enough = self.counts["depth"] > MOST_HOPS  # what is left to learn is to stay at the end
                self.counts["depth"] = self.arguments.full_depth if is_long_enough else self.counts["depth"] + 1
                self.right = dict.fromkeys(TASKS, 0.0)
                self.save()
            if self.counts["step"] % 50 == 0:
                right = " ".join(f"{task} {share:.3f}" for task, share in self.right.items())
                print(f"{self.counts['seconds'] / 60:.1f} min step {self.counts['step']} depth {self.counts['depth']} "
                      f"loss {smooth:.3f} right {right}", flush=True)  # fmt: skip
                self.curve.append({**self.counts, "loss": round(smooth, 4), "right": dict(self.right)})
            if self.counts["step"] % 100 == 0:
                self.save()
        self.save()


@torch.no_grad()
def right_at(model: RecurrentDepthForCausalLM, problems: Problems, depth: int, **plan: int) -> float:
    """The share of problems whose answers are all right, each read after right ones (not decoded)."""
    plan = {"prompt_depth": 0, "stagger": 0, "init_scale": 0.0, "num_backprop": 0, "depth": depth, **plan}
    logits, _, _ = recurred(model, inputs_of(problems), problems.prompt_ids.shape[1], plan)
    return (logits.argmax(-1) == problems.answers).all(1).float().mean().item()


def report(model: RecurrentDepthForCausalLM, depths: range, num: int = 300) -> dict[str, Any]:
    """Accuracy by level and depth: keys of each recurrence, and the prompt's last keys."""
    model.eval()
    table: dict[str, Any] = {}
    for level in LEVELS:
        problems = test_problems(level, num, seed=0)
        each = [right_at(model, problems, depth) for depth in depths]
        last = [right_at(model, problems, depth, prompt_depth=depths[-1]) for depth in depths]
        table[level] = {"every recurrence's keys": each, "the prompt's last keys": last}
        for name, shares in table[level].items():
            print(f"{level:16}{name:26}" + " ".join(f"{share:.2f}" for share in shares), flush=True)
    return table


def draw_curve(curve: list[dict[str, Any]], output: Path) -> None:
    """Right answers and the greatest depth over the steps of a run. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), dpi=110)
    steps = [point["step"] for point in curve]
    for task in TASKS:
        axes.plot(steps, [point["right"][task] for point in curve], label=f"{task}, right at the greatest depth")
    depths = axes.twinx()
    depths.step(steps, [point["depth"] for point in curve], color="gray", where="post", label="greatest depth")
    axes.set_xlabel("step")
    axes.set_ylabel("share of answers")
    depths.set_ylabel("recurrences")
    figure.legend(loc="lower center", ncols=3, fontsize=8)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(output)


def main() -> None:
    """Train, save, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, default=60, help="of CPU time in all")
    parser.add_argument("--n-embd", type=int, default=128)
    parser.add_argument("--n-heads", type=int, default=4)
    parser.add_argument("--layers", type=int, nargs=3, default=(1, 1, 1), help="of prelude, core and coda")
    parser.add_argument("--full-depth", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=32, help="problems a step and task, on average")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.3, help="share of the time in which the rate falls")
    parser.add_argument("--right", type=float, default=0.9, help="share of answers at which the depth rises")
    parser.add_argument("--rest", type=float, default=0.1, help="weight of what states move after their way's end")
    parser.add_argument("--init-scale", type=float, default=0.0)
    parser.add_argument("--sharing", type=int, default=1, help="0: never read the prompt first")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    training = Training(arguments)
    if arguments.resume and training.path.exists():
        training.load()
    print(f"{sum(p.numel() for p in training.model.parameters()):,} parameters", flush=True)
    training.run()
    model = training.model.eval()
    model.generation_config.init_scale = 0.0
    model.generation_config.max_new_tokens = NUM_ANSWERS
    model.save_pretrained(arguments.output)
    task_tokenizer().save_pretrained(arguments.output)
    results = {
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "right": report(model, range(1, arguments.full_depth + 1)),
        "curve": training.curve,
    }
    (arguments.output / "training.json").write_text(json.dumps(results, indent=1) + "\n")
    draw_curve(training.curve, arguments.output / "curve.png")
    prompts = [task_tokenizer().decode(ids) for level in LEVELS for ids in test_problems(level, 8).prompt_ids]
    (arguments.output / "prompts.txt").write_text("\n".join(prompts) + "\n")


if __name__ == "__main__":
    main()
