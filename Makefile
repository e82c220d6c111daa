# Everything sets itself up first: `make reproduce` and `make test` work on a fresh machine.
#
#   make reproduce [TASK=id] [SEEDS=10,11] [LIMIT=n] [NPROC=n] [FRESH=1] [RUNS_DIR=folder] [EXTRA="..."]
#   make test [EXTRA="-k name"]
#   make check                     style, layers and the tests that need neither torch nor an engine
#   make bench [EXTRA="rl --sizes 1m"]
#
# make itself exits with 2 whenever a command fails; the suite's own code (10 INCONCLUSIVE, 12 NOT_RUN, ...) stands in
# the VERDICT line, always the last line on standard output, and is what `suite reproduce` exits with.

TASK ?= desk-offline-mismatch
SEEDS ?=
LIMIT ?=
NPROC ?=
FRESH ?=
RUNS_DIR ?=
EXTRA ?=
PYTHON ?=
TORCH_INDEX ?=
LOCK ?=
TEST_WORKERS ?= 2

export PYTHON TORCH_INDEX LOCK
SUITE := .venv/bin/python -m suite
RUN_FLAGS = $(if $(SEEDS),--seeds $(SEEDS)) $(if $(LIMIT),--limit $(LIMIT)) $(if $(NPROC),--nproc $(NPROC)) \
            $(if $(filter-out 0,$(FRESH)),--fresh) $(if $(RUNS_DIR),--out '$(RUNS_DIR)') $(EXTRA)

.PHONY: reproduce test check list doctor validate results bench setup clean
.NOTPARALLEL:

reproduce: setup
	@$(SUITE) reproduce '$(TASK)' $(RUN_FLAGS)

test: setup
	@.venv/bin/python -m pytest -n $(TEST_WORKERS) $(EXTRA)

check: setup
	@.venv/bin/ruff check suite tests requirements
	@.venv/bin/lint-imports --no-cache
	@.venv/bin/python -m pytest -n $(TEST_WORKERS) --without-engines $(EXTRA)

list doctor validate bench: setup
	@$(SUITE) $@ $(EXTRA)

results: setup
	@$(SUITE) report $(EXTRA)

setup:
	@requirements/setup.sh

clean:
	rm -rf .venv build dist *.egg-info
