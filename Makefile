# `make help` lists what can be made.
CONCEPT ?= crimson daisy
OUT     ?= runs/$(subst $(space),-,$(CONCEPT))
# The interpreter that makes .venv, 3.10 or newer.
PYTHON  ?= python3
# Installed before everything else. A plain `torch` brings the CUDA build, several GB, where there is no use for it:
# on Linux without a GPU say  make setup TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH   ?= torch==2.13.0
# Notebooks whose outputs `make docs` renews: all, or for example NB="40_mesh 41_losses".
NB      ?=

space   := $(subst ,, )
bin     := .venv/bin
docs    := $(bin)/python .ci/docs.py
# nbdev_test has no time limit of its own; macOS has no `timeout` command.
limit   := $(if $(shell command -v timeout),timeout 40m)

.PHONY: help setup erase test docs export check-sync check-pages test-notebooks test-package
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

test: check-sync check-pages test-notebooks test-package ## everything CI checks
	@echo "== test: all steps passed"

# Tests use the models in the repository, never a hub.
check-sync check-pages test-notebooks test-package: export HF_HUB_OFFLINE = 1
# Two notebooks or test files run side by side: with more than one thread each they would wait for one another.
test-notebooks test-package: export OMP_NUM_THREADS = 1

check-sync: setup
	@echo "== test 1/4: notebooks are clean and fade/ is what they export"
	@$(docs) sync --check

check-pages: setup
	@echo "== test 2/4: badges, install cells and README.md are in step"
	@$(docs) badges --check
	@$(docs) readme --check

test-notebooks: setup
	@echo "== test 3/4: every cell of the component notebooks runs"
	@$(limit) $(bin)/nbdev_test --n_workers 2 --timing --file_re '^[0-9]'

test-package: setup
	@echo "== test 4/4: tests/"
	@$(bin)/pytest --numprocesses 2 --dist worksteal --durations 25

export: setup ## fade/ from nbs/, notebooks cleaned
	@$(docs) sync

docs: setup ## everything generated: badges, fade/, notebook outputs, README.md
	@$(docs) badges
	@$(docs) sync
	@$(docs) outputs $(NB)
	@$(docs) readme
