"""A small recurrent-depth model, trained from scratch on a text with the Hugging Face Trainer.

    python benchmarks/train_recurrent.py austen.txt runs/austen
    python benchmarks/train_recurrent.py austen.txt runs/austen --resume

The text is one paragraph a line, documents (chapters) apart by an empty line; every 20th document is held out. A
byte-level BPE is learnt from the rest. The depth of each step is drawn anew (`DepthSampler`), around a mean that rises
geometrically from `--first-recurrence` to `--mean-recurrence`, which spares most of the cost of training deep.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from wavedraft.modeling_recurrent import DepthSampler, RecurrentDepthConfig, RecurrentDepthForCausalLM

END = "<|end|>"
EVAL_DEPTHS = (1, 2, 4, 8, 16, 32)


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE; token 0 ends a document, and pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, padding_side="left")


def encode(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All documents in one row, each ended by the end token, [tokens]."""
    rows = tokenizer([document + END for document in documents])["input_ids"]
    return torch.tensor([token for row in rows for token in row])


class Windows(torch.utils.data.Dataset):
    """Windows of `length` tokens, each `stride` behind the last."""

    def __init__(self, ids: torch.Tensor, length: int, stride: int):
        self.windows = ids.unfold(0, length, stride)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


class RisingDepth(TrainerCallback):
    """Draws each step's depth from its own seed, so that a resumed run goes on as if it had never stopped."""

    def __init__(self, first: float, last: float, seed: int):
        self.first, self.last, self.seed = first, last, seed

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Set the sampler of the step's forwards."""
        mean = self.first * (self.last / self.first) ** (state.global_step / state.max_steps)
        model.depth_sampler = DepthSampler(round(mean), seed=self.seed * 1_000_003 + state.global_step)


@torch.no_grad()
def held_out_loss(model: RecurrentDepthForCausalLM, ids: torch.Tensor, length: int, depth: int) -> float:
    """Mean cross-entropy in nats a token over 64 windows, each read alone from deterministic states."""
    windows = ids.unfold(0, length, length)
    batches = windows[:: max(1, len(windows) // 64)][:64].split(16)
    losses = [model(batch, labels=batch, num_recurrences=depth, init_scale=0.0).loss * len(batch) for batch in batches]
    return (sum(losses) / sum(len(batch) for batch in batches)).item()


def main() -> None:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--n-embd", type=int, default=320)
    parser.add_argument("--n-heads", type=int, default=5)
    parser.add_argument("--intermediate-size", type=int, default=864)
    parser.add_argument("--layers", type=int, nargs=3, default=(1, 2, 1), help="of prelude, core and coda")
    parser.add_argument("--first-recurrence", type=float, default=2.0)
    parser.add_argument("--mean-recurrence", type=int, default=32)
    parser.add_argument("--mean-backprop-depth", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=4096, help="positions the rotary table holds")
    parser.add_argument("--length", type=int, default=128, help="tokens of a training window")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-steps", type=int, default=2000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--save-steps", type=int, default=100)
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    set_seed(arguments.seed)

    documents = arguments.text.read_text(encoding="utf-8").split("\n\n")
    held_out, learnt = documents[::20], [document for i, document in enumerate(documents) if i % 20]
    tokenizer = train_tokenizer(learnt, arguments.vocab_size)
    ids, held_out_ids = encode(learnt, tokenizer), encode(held_out, tokenizer)
    prelude, core, coda = arguments.layers
    config = RecurrentDepthConfig(
        vocab_size=len(tokenizer),
        n_embd=arguments.n_embd,
        n_heads=arguments.n_heads,
        intermediate_size=arguments.intermediate_size,
        n_layers_in_prelude=prelude,
        n_layers_in_recurrent_block=core,
        n_layers_in_coda=coda,
        mean_recurrence=arguments.mean_recurrence,
        mean_backprop_depth=arguments.mean_backprop_depth,
        block_size=arguments.block_size,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = RecurrentDepthForCausalLM(config)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{num_parameters:,} parameters, {len(ids):,} tokens to learn from, {len(held_out_ids):,} held out", flush=True
    )

    trainer = Trainer(
        model,
        TrainingArguments(
            str(arguments.output),
            max_steps=arguments.max_steps,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.05},
            warmup_steps=max(1, arguments.max_steps // 20),
            adam_beta2=0.98,
            weight_decay=0.01,
            max_grad_norm=1.0,
            logging_steps=20,
            save_steps=arguments.save_steps,
            save_total_limit=2,
            bf16=arguments.bf16,
            use_cpu=not torch.accelerator.is_available(),
            disable_tqdm=True,
            report_to="none",
            seed=arguments.seed,
        ),
        train_dataset=Windows(ids, arguments.length, arguments.length // 2),
        callbacks=[RisingDepth(arguments.first_recurrence, arguments.mean_recurrence, arguments.seed)],
    )
    start = time.time()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(arguments.output)) if arguments.resume else None)
    model.eval().save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    report = {
        "parameters": num_parameters,
        "tokens_of_text": len(ids),
        "tokens_trained_on": arguments.max_steps * arguments.batch_size * arguments.length,
        "seconds": round(time.time() - start),
        "held_out_nats_per_token": {d: held_out_loss(model, held_out_ids, arguments.length, d) for d in EVAL_DEPTHS},
        "held_out_characters_per_token": sum(map(len, held_out)) / len(held_out_ids),
        "arguments": {
            name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()
        },
    }
    (arguments.output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2, default=str))


if __name__ == "__main__":
    main()
