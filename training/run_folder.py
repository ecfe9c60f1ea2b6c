"""The folder of a training run: its manifest, its complete checkpoints, and the safe stop of a run."""

import hashlib
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

MANIFEST = "run.json"  # everything that determines the loss curve
MARKER = "complete"  # the last file written to a checkpoint

logger = logging.get_logger(__name__)


class TrainingStopped(Exception):
    """A signal stopped the run after a step, with a complete checkpoint.

    Attributes:
        signal_number: the signal, SIGINT or SIGTERM.
    """

    def __init__(self, step: int, output_dir: Path, signal_number: int):
        super().__init__(f"Stopped after step {step}, saved in {output_dir}. Continue with `--resume`.")
        self.signal_number = signal_number


class SafeStop(TrainerCallback):
    """Stops the run after the current step, with a checkpoint, on SIGTERM or Ctrl-C. Marks complete checkpoints.

    A signal to one of several processes stops all of them after the same step.

    Attributes:
        stopped_by: the signal that stopped the run, or None.
    """

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self.received: int | None = None
        self.stopped_by: int | None = None
        self.handlers: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def remember(signal_number: int, frame: Any) -> None:
            self.received = signal_number
            logger.warning("Stopping at the end of this step, with a checkpoint ...")

        self.handlers = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        received = self.received or 0
        if self.accelerator.num_processes > 1:
            every = self.accelerator.gather(torch.tensor([received], device=self.accelerator.device))
            received = int(every.max())
        if received:
            self.stopped_by = received
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / MARKER).touch()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def last_whole_checkpoint(output_dir: Path) -> Path | None:
    """The latest checkpoint with a marker. Warns of each later one, which a killed run left incomplete."""
    folders = output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if output_dir.is_dir() else ()
    steps = sorted((int(folder.name.rsplit("-", 1)[1]), folder) for folder in folders)
    for _, folder in reversed(steps):
        if (folder / MARKER).exists():
            return folder
        logger.warning(f"{folder} is incomplete: the run was killed while writing it. It is skipped.")
    return None


def fingerprint(model: nn.Module) -> str:
    """A hash of a model: of every tensor's name, shape and first values."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.flatten()[:16].float().tolist()}".encode())
    return digest.hexdigest()[:16]


def data_fingerprint(rows: Sequence[dict[str, list[int]]]) -> str:
    """A hash of the encoded rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row["input_ids"], row["labels"]]).encode())
    return digest.hexdigest()[:16]


def write_manifest(output_dir: Path, manifest: dict[str, Any]) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def check_manifest(output_dir: Path, manifest: dict[str, Any]) -> None:
    """Checks that the folder has the same run as the one to resume.

    Raises:
        ValueError: the folder's manifest is missing or differs; the message names every difference.
    """
    path = output_dir / MANIFEST
    if not path.exists():
        raise ValueError(f"{output_dir} has no {MANIFEST}, so the options of its run are unknown. Start a new run.")
    saved = json.loads(path.read_text(encoding="utf-8"))
    differences = [
        f"{name} was {saved.get(name)!r} and is now {manifest.get(name)!r}"
        for name in sorted({*saved, *manifest})
        if saved.get(name) != manifest.get(name)
    ]
    if differences:
        raise ValueError(
            f"The run in {output_dir} cannot be resumed with other options: {'; '.join(differences)}. Give its "
            "original options, or start a new run in another folder."
        )
