# `make help` lists the targets.
CONCEPT ?= crimson daisy
OUT     ?= runs/$(subst $(space),-,$(CONCEPT))
# The interpreter that makes .venv, 3.10 or newer.
PYTHON  ?= python3
# Installed first. A plain `torch` brings the CUDA build, several GB, also where there is no GPU;
# on Linux without one:  make setup TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH   ?= torch==2.13.0
# Notebooks whose outputs `make docs` renews: all, or for example NB="40_mesh 42_losses".
NB      ?=

space   := $(subst ,, )
bin     := .venv/bin
docs    := $(bin)/python .ci/docs.py
# nbdev_test has no time limit of its own; macOS has no `timeout` command.
limit   := $(if $(shell command -v timeout),timeout 40m)

.PHONY: help setup erase test lint check-sync check-pages test-notebooks test-package nightly \
	docs export site
.NOTPARALLEL:

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' $(MAKEFILE_LIST)

setup: .venv/.installed ## everything installed in .venv

.venv/.installed: settings.ini pyproject.toml
	@echo "== setup: $(TORCH), then fade and its tools in .venv"
	$(PYTHON) -m venv .venv
	$(bin)/pip install --quiet $(TORCH)
	$(bin)/pip install --quiet --editable ".[dev]"
	@touch $@

erase: setup ## erase CONCEPT ("crimson daisy") from the model, results in OUT
	@echo "== erase: $(CONCEPT) -> $(OUT)"
	$(bin)/fade erase "$(CONCEPT)" --out "$(OUT)"

test: lint check-sync check-pages test-notebooks test-package ## everything CI checks
	@echo "== test: all steps passed"

# Tests use the models in the repository, never a hub.
check-sync check-pages test-notebooks test-package nightly: export HF_HUB_OFFLINE = 1
# Two notebooks or test files run side by side, one thread each: more would compete for the cores.
test-notebooks test-package nightly: export OMP_NUM_THREADS = 1

lint: setup ## style and imports of notebooks, modules and tests
	@echo "== test 1/5: ruff check and ruff format"
	@$(bin)/ruff check
	@$(bin)/ruff format --check

check-sync: setup
	@echo "== test 2/5: notebooks are clean and fade/ is what they export"
	@$(docs) sync --check

check-pages: setup
	@echo "== test 3/5: badges, install cells and README.md are up to date"
	@$(docs) badges --check
	@$(docs) readme --check

test-notebooks: setup
	@echo "== test 4/5: every cell of the pages runs"
	@$(limit) $(bin)/nbdev_test --n_workers 2 --timing --file_re '^([0-9]|index)'

test-package: setup
	@echo "== test 5/5: tests/"
	@$(bin)/pytest --numprocesses 2 --dist worksteal --durations 25

nightly: setup ## the test of killed runs, with random moments
	@echo "== nightly: runs killed at random moments"
	FADE_KILL=random $(bin)/pytest -m nightly

export: setup ## fade/ from nbs/, notebooks cleaned and formatted
	@$(docs) sync

docs: setup ## everything generated: badges, fade/, notebook outputs, README.md
	@$(docs) badges
	@$(docs) sync
	@$(docs) outputs $(NB)
	@$(docs) readme

site: setup ## the documentation site in build/site
	@echo "== site: mkdocs build --strict"
	@$(bin)/python .ci/site.py
