PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: fit test check stress soak docs clean

fit: $(VENV)/installed ## Install, then run the quickstart: experience replay on Split-Digits
	$(RUN) -m cl_lightning fit

# The parts under everything else, with an answer in two minutes; what is in no such folder is tested after them.
CORE := $(addprefix tests/,data losses measures memory models porch stream)
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadgroup

test: $(VENV)/installed-dev ## Install what the tests need, then run them: the core first, then the rest
	$(PYTEST) $(CORE)
	$(PYTEST) tests $(addprefix --ignore=,$(CORE))

check: $(VENV)/installed-dev ## Formatting, lint, types, imports between rooms, generated documentation
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(RUN) docs/rooms.py
	$(RUN) docs/generate.py --check

stress: $(VENV)/installed-dev ## Every test, with every method killed at many places, and longer fuzzing: an hour or two
	CL_LIGHTNING_ROTATION=all CL_LIGHTNING_KILL_POINTS=$${CL_LIGHTNING_KILL_POINTS:-12} HYPOTHESIS_PROFILE=stress \
		$(PYTEST) -m "stress or not stress"

soak: $(VENV)/installed ## 200 tasks on one process: nothing may grow; about half an hour
	OMP_NUM_THREADS=1 $(RUN) -m benchmarks.soak

docs: $(VENV)/installed ## Write the generated parts of the documentation
	$(RUN) docs/generate.py

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python requirements.txt setup.cfg
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
