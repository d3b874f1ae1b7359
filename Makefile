PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: fit test check stress soak docs clean

fit: $(VENV)/installed ## Install, then run the quickstart: experience replay on Split-Digits
	$(RUN) -m cl_lightning fit

test: $(VENV)/installed-dev ## Install what the tests need, then run them
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadfile

check: $(VENV)/installed-dev ## Formatting, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

stress: $(VENV)/installed-dev ## Kill every method at many places, and fuzz for longer: about an hour
	CL_LIGHTNING_KILL_POINTS=$${CL_LIGHTNING_KILL_POINTS:-12} OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=stress \
		$(RUN) -m pytest -q -n 2 -m "stress or not stress" tests/test_kill.py tests/test_stopping.py tests/test_fuzz.py

soak: $(VENV)/installed ## 200 tasks on one process: nothing may grow; about half an hour
	OMP_NUM_THREADS=1 $(RUN) -m benchmarks.soak

docs: $(VENV)/installed ## Write the generated tables of the documentation
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
