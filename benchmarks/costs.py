"""Runs a command and prints what it took: seconds, seconds of processors, peak memory.

python benchmarks/costs.py wavedraft convert SOURCE TARGET
"""

import resource
import subprocess
import sys
import time


def main() -> None:
    began = time.perf_counter()
    status = subprocess.run(sys.argv[1:]).returncode
    took = resource.getrusage(resource.RUSAGE_CHILDREN)
    gigabytes = took.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    seconds, of_processors = time.perf_counter() - began, took.ru_utime + took.ru_stime
    print(f"{seconds:.1f} s, {of_processors:.1f} s of processors, {gigabytes:.2f} GB at most")
    sys.exit(status)


if __name__ == "__main__":
    main()
