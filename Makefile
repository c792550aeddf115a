# make install   .venv with the plugin, fairseq and every tool, at the tested versions
# make example   examples/sentiment: Adam, SAM and δ-SAM on real sentences, ends with a table
# make test      the test suite
# make lint      ruff and mypy
# make clean     removes what the targets above made, .venv included
#
# PYTHON chooses the interpreter: make install PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install example test lint clean
.DELETE_ON_ERROR:

install: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
		-c constraints.txt -e '.[fairseq,examples,test]'
	touch $@

example: $(INSTALLED)
	$(BIN)/python examples/sentiment/run.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -q tests

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy deltasam_plugin

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache examples/sentiment/work
	find deltasam_plugin tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
