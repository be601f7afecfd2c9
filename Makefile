# Each target does all set-up by itself: .venv, packages, kernels. What is up to date is skipped.
PYTHON := .venv/bin/python
RECIPE ?= debug
ARGS ?=
# Not for the programs: launch/ has variables of these names, and dozens of processes that compile all of torch anew
# take three times as long as those that find it compiled (pip --no-compile leaves that to the first).
unexport RECIPE ARGS PYTHONDONTWRITEBYTECODE

.PHONY: help train test lint docs clean
help:  ## this list
	@sed -n 's/^\([a-z]*\):  *## /  make \1	/p' Makefile
	@echo '  RECIPE=name picks the recipe of make train; ARGS="..." goes to the program behind train and test'

train:  ## train a small model on real text (RECIPE=debug)
	@sh scripts/bootstrap
	$(PYTHON) -m megamoe_train.pretrain --recipe $(RECIPE) $(ARGS)

test:  ## build the kernels where nvcc is, run all tests
	@sh scripts/bootstrap test
	$(PYTHON) -m pytest $(ARGS)

lint:  ## ruff and clang-format, without changing a file
	@sh scripts/bootstrap dev
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	.venv/bin/shellcheck launch/*.sh launch/train.slurm launch/cluster.env.example scripts/bootstrap scripts/sanitize
	git ls-files 'csrc/*' 'tests/*.cu' 'tests/*.cpp' 'tests/*.hpp' | xargs -r .venv/bin/clang-format --dry-run -Werror

docs:  ## write the tables of docs/configuration.md and docs/recipes.md from the code
	@sh scripts/bootstrap
	$(PYTHON) scripts/configuration_tables.py

clean:  ## remove build products and caches; .venv and runs/ stay
	rm -rf build dist megamoe_train/_C.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
