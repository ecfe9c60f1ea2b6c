"""Ways to decode the same prompts, timed: what `wavedraft bench` measures (measure) and what is said of it (report)."""

from .contenders import AR, Contender, compiled_keywords, contenders_of, without_adapter
from .instruments import counted, peak_bytes, time_forwards, timed
from .measure import Bench, Run, batch_of, bench, num_runs
from .settings import OWN_LENGTH, Settings

__all__ = [
    "AR",
    "OWN_LENGTH",
    "Bench",
    "Contender",
    "Run",
    "Settings",
    "batch_of",
    "bench",
    "compiled_keywords",
    "contenders_of",
    "counted",
    "num_runs",
    "peak_bytes",
    "time_forwards",
    "timed",
    "without_adapter",
]
