# The two commands: `make demo` runs the main job end to end, `make test` checks everything. Each sets itself up.
PYTHON ?= python3
# torch goes in first and alone: a plain dependency would bring gigabytes of GPU libraries to a machine without one.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
# Another TORCH, another stamp: it is installed anew.
READY := $(VENV)/.ready-$(subst =,_,$(TORCH))
DEMO_DIR ?= demo-output
SEED ?= 0
# How many tests run at once; a file's tests stay together, since they share what is slow to build.
JOBS ?= auto

.PHONY: demo test test-slow deepspeed lint format clean

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	# Apart, for one test: every process that finds torchao imports it, which prints and takes seconds.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/torchao torchao
	# Apart too: whole, it brings torchvision, timm and thirty packages more. These are what images and text need.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/lmms-eval \
		lmms-eval loguru tenacity
	rm -f $(VENV)/.ready-*
	touch $(READY)

demo: $(READY)
	$(BIN)/vlmoe demo --output-dir $(DEMO_DIR) --seed $(SEED) --force

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy modeling_vlmoe
	$(BIN)/mypy conversion finetune model_cards benchmarks

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# Apart too: transformers and accelerate change what they do where they find it. Only slow tests need it.
$(VENV)/deepspeed: | $(READY)
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--no-build-isolation --target $@ deepspeed einops hjson msgpack ninja py-cpuinfo

deepspeed: $(VENV)/deepspeed

test-slow: $(READY) $(VENV)/deepspeed
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV) $(DEMO_DIR) build dist *.egg-info
