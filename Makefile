PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: fit test check docs clean

fit: $(VENV)/installed ## Install, then run the quickstart: experience replay on Split-Digits
	$(RUN) -m cl_lightning fit

test: $(VENV)/installed-dev ## Install what the tests need, then run them
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadfile

check: $(VENV)/installed-dev ## Formatting, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

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
