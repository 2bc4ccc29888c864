# Everything a contributor runs. A clean clone needs Python >= 3.11 and a C compiler; the first
# target that needs .venv makes it. Another interpreter: make PYTHON=python3.12 ...

LOCK := requirements/cpu-engine.lock
STAMP := .venv/.installed
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
DIST_DIR ?= dist
WHEEL_DIR ?= $(DIST_DIR)

# Where the CPU build of torch is looked for when pip's own configuration does not offer it.
PYTORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

# The lock is the one place that names versions, those of pip and torch included.
PIP_PIN := $(shell sed -n '/^pip==/p' $(LOCK))
TORCH_PIN := $(shell sed -n 's/^\#: //p' $(LOCK))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo bench docs test vision versions stacks lint lock wheel dist clean

help: ## list the targets
	@sed -n -e 's/^##@ \(.*\)/@\t\1/p' -e 's/^\([a-z]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | \
	  while IFS="$$(printf '\t')" read -r target text; do \
	    if [ "$$target" = @ ]; then printf '\n%s\n' "$$text"; \
	    else printf '  make %-9s %s\n' "$$target" "$$text"; fi; \
	  done

##@ Try it

demo: $(STAMP) ## push into SmolLM2, then a short RL run with its plot (DEMO_ARGS="...")
	$(PY) -m examples.demo $(DEMO_ARGS)
	@rm -rf .demo-cache/rl
	$(PY) -m examples.rl --quick --out .demo-cache/rl

bench: $(STAMP) ## measure how long a weight sync takes (BENCH_ARGS="...")
	$(PY) -m benchmarks.sync_latency $(BENCH_ARGS)

# Every warning is an error: a link that leads nowhere fails. Not --quiet: that hides them from --strict.
docs: .venv-docs/.installed ## build the documentation into site/; a broken link fails
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict $(DOCS_ARGS)

##@ Check it

lint: $(STAMP) ## ruff, mypy, and which room may import which
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# Engines use one thread: two processes are as fast as two machines.
test: $(STAMP) ## run the tests (PYTEST_ARGS="-m 'not engine'")
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# What `test` leaves out of it: engines in other processes, a minute a model.
vision: $(STAMP) ## vision-language models are shown images before and after pushes
	FLASHQUANT_TEST_VISION=1 $(PY) -m pytest tests/engine/test_vision.py $(PYTEST_ARGS)

versions: $(STAMP) ## run the engine tests on every vLLM we claim, and write the table (VERSIONS_ARGS="...")
	nice -n 5 $(PY) -m tools.versions $(VERSIONS_ARGS)

# Not a part of `test`: the stacks are downloaded, 400 MB into .stacks/.
stacks: $(STAMP) ## RL stacks' own code against a patched engine
	$(PY) -m tests.stacks.overlays
	$(PY) -m pytest tests/stacks $(PYTEST_ARGS)

##@ Release it

wheel: $(STAMP) ## build the wheel into dist/
	$(PY) -m build --wheel --no-isolation --outdir $(WHEEL_DIR) .

dist: $(STAMP) .venv-dist/.installed ## build wheel and sdist into dist/, and check both
	rm -f $(DIST_DIR)/flashquant-*
	$(PY) -m build --no-isolation --outdir $(DIST_DIR) .
	.venv-dist/bin/twine check --strict $(DIST_DIR)/flashquant-*

# Not a child of the stamp: after an edit of pyproject.toml that would put the old versions back.
lock: | .venv/bin/python ## write what is installed in .venv to the lock
	@$(PIP) freeze --all --exclude flashquant > $(LOCK).freeze
	@{ sed -n '/^#/p' $(LOCK) | sed "s/^#: torch==.*/#: $$(sed -n '/^torch==/p' $(LOCK).freeze)/"; \
	   sed -e '/^torch==/d' -e '/^torchvision==/d' -e '/^torchaudio==/d' -e '/^torchcodec==/d' \
	       -e '/^intel-/s/$$/ ; platform_machine == "x86_64"/' \
	       -e '/^triton==/s/$$/ ; platform_machine == "x86_64"/' $(LOCK).freeze | LC_ALL=C sort -f; \
	 } > $(LOCK).new
	@rm $(LOCK).freeze && mv $(LOCK).new $(LOCK)
	@git --no-pager diff --stat -- $(LOCK) 2>/dev/null || true

clean: ## remove caches and build results (.venv, .stacks and .versions stay)
	rm -rf build dist site .venv-docs .venv-dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . \( -path ./.venv -o -path ./.stacks -o -path ./.versions \) -prune -o \
	  -type d -name __pycache__ -exec rm -rf {} +

.venv/bin/python:
	@for python in $(PYTHON) python3.11 python3; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "making .venv with $$("$$python" -V)"; exec "$$python" -m venv .venv; \
	  fi; \
	done; \
	echo "flashquant needs Python 3.11 or newer; neither python3.11 nor python3 is one." >&2; \
	echo "Install it, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; \
	exit 1

# Tools that the engine's lock knows nothing of, each in an environment of its own.
.venv-%/.installed: requirements/%.txt | .venv/bin/python
	$(PY) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip --disable-pip-version-check --no-input install --quiet --no-deps -r $<
	@touch $@

# .venv/vision is on nobody's path but the tests' (tests/support/vision.py).
$(STAMP): pyproject.toml $(LOCK) requirements/vision.txt | .venv/bin/python
	$(PIP) install --quiet $(PIP_PIN)
	@$(PIP) install --quiet --no-deps '$(TORCH_PIN)' 2>/dev/null || { \
	  echo "$(TORCH_PIN): trying $(PYTORCH_CPU_INDEX)"; \
	  $(PIP) install --no-deps --extra-index-url '$(PYTORCH_CPU_INDEX)' '$(TORCH_PIN)'; }
	$(PIP) install --quiet --no-deps -r $(LOCK)
	rm -rf .venv/vision
	$(PIP) install --quiet --no-deps --target .venv/vision -r requirements/vision.txt
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@
