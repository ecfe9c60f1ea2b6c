"""Engines on a CPU. The environment is set before vLLM is imported, for its child processes too."""

import os
import sys
from pathlib import Path

INTERPRETER = Path(__file__).parent / "triton_interpreter"
os.environ |= {
    "PYTHONPATH": os.pathsep.join([str(INTERPRETER), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
sys.path.insert(0, str(INTERPRETER))
import sitecustomize  # noqa: E402, F401

sys.modules.pop("sitecustomize", None)
exec((INTERPRETER / "sitecustomize.py").read_text())  # another one may have been imported under this name

import pytest  # noqa: E402

from helpers_tiny import tiny_adapter, tiny_checkpoint  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def what_the_interpreter_cannot_do():
    """Triton 3.9's interpreter refuses masks that are no booleans (grammars), and vLLM's kernel for top-k and top-p.

    It also searches all of Triton's language at each call of a function: a third of its time, spent once here.
    """
    from triton import language
    from triton.runtime import interpreter
    from vllm.v1.sample.ops import topk_topp_sampler

    def store(self, ptrs, value, mask, policy, stock=interpreter.InterpreterBuilder.create_masked_store):
        mask.data = mask.data.astype(bool)
        return stock(self, ptrs, value, mask, policy)

    def patch(function, stock=interpreter._patch_lang):
        seen = [one for one in (language, language.core) if one in function.__globals__.values()]
        is_new = not seen or any(language.core.is_builtin(one.load) for one in seen)
        return stock(function) if is_new else interpreter._LangPatchScope()

    interpreter.InterpreterBuilder.create_masked_store = store
    interpreter._patch_lang = patch
    topk_topp_sampler.HAS_TRITON = False


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A tiny random Llama and an adapter for it."""
    checkpoint = tiny_checkpoint("Llama", tmp_path_factory.mktemp("llama"))
    return checkpoint, tiny_adapter(checkpoint, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="session")
def plain(folders):
    from helpers_engines import engine

    return engine(folders[0])


@pytest.fixture(scope="session")
def drafting(folders):
    from helpers_engines import engine

    return engine(*folders)
