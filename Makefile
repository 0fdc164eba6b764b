# Two commands do everything on a machine that has Python 3.11 to 3.13 and nothing else:
#   make fit     the whole job on the bundled demo, with Ray workers on this machine
#   make test    the test suite
PYTHON ?= python3
# Processes of the test suite: more than two cores, since most of its time is waiting for clusters to start and time-outs to pass.
WORKERS ?= 3
VENV ?= .venv
BIN := $(VENV)/bin
INPUTS := pyproject.toml cluster/constraints.txt

export RAY_USAGE_STATS_ENABLED := 0
# Every one of some hundred processes would compile this package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: fit demo-recalibrate test test-gpu browser lint bench bench-gpu clean

fit: $(VENV)/.installed
	$(BIN)/python jobs/fit_kron.py

# A month on the demo: a fit of the first week, then a recalibration for each of the others; status 3 says that the old one stays.
demo-recalibrate: $(VENV)/.installed
	$(BIN)/python jobs/fit_kron.py --checkpoint runs/month --window week-1 --data-args '{week: 1}' --ray-address inline
	for week in 2 3 4; do \
	  $(BIN)/python jobs/recalibrate.py --checkpoint runs/month --window week-$$week --data-args "{week: $$week}" \
	    --margin-ece 0.05 --ray-address inline || test $$? = 3 || exit 1; \
	done

test: $(VENV)/.installed-test browser
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# What needs a CUDA device, and fails without one.
test-gpu: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests/gpu --numprocesses $(WORKERS) --dist loadfile $(PYTEST_ARGS)

# The report is tested in a browser: Debian's, if there is none and this user may install it; else its test says what is missing.
browser:
	@command -v chromium || command -v chromium-browser || command -v google-chrome \
	  || ! { [ "$$(id -u)" = 0 ] && command -v apt-get; } || { apt-get update -qq \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core; }

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11 to 3.13 is needed, but $(PYTHON) is " + sys.version.split()[0] + ": set PYTHON=python3.12 or the like")'
	$(PYTHON) -m venv $(VENV)

# A stamp per extra: nothing is installed again until one of the two files that say what to install has changed.
$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint cluster/constraints.txt --editable .
	touch $@

$(VENV)/.installed-%: $(INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint cluster/constraints.txt --editable ".[$*]"
	touch $@ $(VENV)/.installed

# Every row of the table of speeds, beside the peers in an environment of their own (black boxes); ROWS=kron runs a part.
PEERS := .venv-peers
bench: $(VENV)/.installed-test $(PEERS)/.installed
	$(BIN)/python benchmarks/bench.py $(ROWS) --peer-python $(PEERS)/bin/python --write

# The rows of a CUDA device; says so where there is none.
bench-gpu: $(VENV)/.installed-test
	$(BIN)/python benchmarks/bench.py gpu --write

$(PEERS)/.installed: | $(BIN)/python
	$(BIN)/python -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet "laplace-torch==0.3" "asdfghjkl==0.1a4" \
	  "curvlinops-for-pytorch<4" backpack-for-pytorch "kronfluence==1.0.1" torch torchvision
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) runs build *.egg-info .pytest_cache .ruff_cache .hypothesis
