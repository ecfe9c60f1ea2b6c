"""Lets Model Runner V2 run on a CPU, its Triton kernels interpreted: for tests alone.

Python imports this at its start where the folder is in PYTHONPATH, in vLLM's own processes too. vLLM asks Triton for a
"cpu" backend, which PyPI's build does not have, and never asks that backend for anything while kernels are interpreted.
"""

import os
import types

os.environ["TRITON_INTERPRET"] = "1"
try:
    from triton.backends import backends
except ImportError:
    pass
else:
    driver = type("CpuDriver", (), {"is_active": staticmethod(lambda: False)})
    backends.setdefault("cpu", types.SimpleNamespace(driver=driver, compiler=None))
