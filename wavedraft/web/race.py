"""A race of two ways to decode one prompt. Each runs alone on the machine, so that its time is its own."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ..commands.timed_runs import Run, timed_generate, timed_recurrent, told_of
from ..modeling_recurrent.checkpoint_recurrent import is_recurrent_config
from ..trace import Trace, TraceStreamer
from .lane import Lane, Moment, StoppedRace

NUM_WARM_UP = 16  # tokens, in which each kind of step occurs
TICK = 0.1  # seconds between two frames
WARMING = "Warming up: this is the first race with these settings. No time is counted."
ALONE = "Parallel decoding runs, alone on this machine."
BESIDE = "Plain decoding runs, alone. Parallel decoding is shown once more beside it, on the same clock."


class Frame(NamedTuple):
    """What the page shows at one time.

    Attributes:
        told: what is going on, as one line.
        lanes: ours and plain decoding's.
        moments, seconds: of each lane, what to show of it and the time on its clock.
    """

    told: str
    lanes: tuple[Lane, Lane]
    moments: tuple[Moment, Moment]
    seconds: tuple[float, float]


class Race:
    """Two decodes of one prompt.

    First ours runs, alone. Then plain decoding runs, alone, and ours is shown again beside it, by its own clock.

    Args:
        model: a TiDAR or recurrent-depth model.
        inputs: ids and mask of one prompt, [1, P], on the model's device.
        keywords: makes the keywords of `generate` for both, ours first. It is called anew before each race, since it
            may seed plain decoding.
        is_warm: whether these keywords were raced before, so that nothing is left to warm up.

    Attributes:
        runs: what ours and plain decoding took; None until each has ended.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        inputs: Any,
        keywords: Callable[[], tuple[dict[str, Any], dict[str, Any]]],
        is_warm: bool = False,
    ):
        self.model, self.inputs, self.keywords, self.is_warm = model, inputs, keywords, is_warm
        self.lanes = Lane(tokenizer), Lane(tokenizer)
        self.recorder = TraceStreamer(self.lanes[0])
        self.runs: list[Run | None] = [None, None]
        self.is_stopped = False

    def stop(self) -> None:
        """Ends the race at the next token of the decode that runs."""
        self.is_stopped = True
        for lane in self.lanes:
            lane.is_stopped = True

    def frames(self) -> Iterator[Frame]:
        """Runs the race. The last frame shows how it ended.

        Raises:
            whatever `generate` raises.
        """
        ours, _ = self.lanes
        try:
            if not self.is_warm:
                for frame in self._watch(self._warm_up):
                    yield frame._replace(told=WARMING)
            for frame in self._watch(lambda: self._decode(0)):
                yield frame._replace(told=ALONE)
            for frame in self._watch(lambda: self._decode(1)):
                yield self._beside(frame)
            while not self.is_stopped and self._since_plain() < ours.elapsed():  # plain decoding was faster
                yield self._beside(self._frame(""))
                time.sleep(TICK)
            yield self._frame("The race was stopped." if self.is_stopped else "The race is over.")
        finally:
            self.stop()

    def trace(self, prompt: str) -> Trace:
        """The trace of ours, as far as it came."""
        run, num_tokens = self.runs[0], self.lanes[0].moments[-1].num_tokens
        if run is None:
            return Trace(prompt, f"{num_tokens} tokens, then stopped", self.recorder.forwards)
        return Trace(prompt, told_of(run), self.recorder.forwards, run.wavefront)

    def _watch(self, work: Callable[[], None]) -> Iterator[Frame]:
        """Does the work in a thread, and draws meanwhile. After a stop it does nothing."""
        if self.is_stopped:
            return
        raised: list[BaseException] = []

        def worker() -> None:
            try:
                work()
            except StoppedRace:
                pass
            except BaseException as error:  # it is raised where the page can show it
                raised.append(error)

        thread = threading.Thread(target=worker, daemon=True)
        thread.start()
        while thread.is_alive():
            yield self._frame("")
            thread.join(TICK)
        if raised:
            raise raised[0]

    def _warm_up(self) -> None:
        """Decodes a few tokens each way, so that no timed text waits for what a first one does."""
        few = FirstTokens(self.inputs["input_ids"].shape[1] + NUM_WARM_UP, self)
        for keywords in self.keywords():
            self.model.generate(**self.inputs, **keywords, stopping_criteria=StoppingCriteriaList([few]))

    def _decode(self, place: int) -> None:
        """Runs ours (0) or plain decoding (1), and keeps what it took."""
        lane, keywords = self.lanes[place], self.keywords()[place]
        timed = timed_recurrent if is_recurrent_config(self.model.config) else timed_generate
        lane.begin()
        try:
            run = timed(self.model, self.inputs, streamer=lane if place else self.recorder, **keywords)
        finally:
            lane.finish()
        self.runs[place] = run

    def _frame(self, told: str) -> Frame:
        """Both lanes as they are now."""
        moments, seconds = [lane.moments[-1] for lane in self.lanes], [lane.elapsed() for lane in self.lanes]
        return Frame(told, self.lanes, (moments[0], moments[1]), (seconds[0], seconds[1]))

    def _since_plain(self) -> float:
        """Seconds since plain decoding began."""
        start = self.lanes[1].start
        return 0.0 if start is None else time.perf_counter() - start

    def _beside(self, frame: Frame) -> Frame:
        """Plain decoding as it is now, and ours as it was at the same time of its own clock."""
        now, ours = self._since_plain(), self.lanes[0]
        moments, seconds = (ours.at(now), frame.moments[1]), (min(now, ours.elapsed()), frame.seconds[1])
        return frame._replace(told=BESIDE, moments=moments, seconds=seconds)


class FirstTokens(StoppingCriteria):
    """Ends a text when it is `length` tokens long, or when the race was stopped."""

    def __init__(self, length: int, race: Race):
        self.length, self.race = length, race

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        is_over = self.race.is_stopped or input_ids.shape[1] >= self.length
        return torch.full((len(input_ids),), is_over, device=input_ids.device)
