# make install   .venv with the plugin, fairseq and every tool, at the tested versions
# make example   examples/sentiment: Adam, SAM and δ-SAM on real sentences, ends with a table
# make example-translation   examples/translation: the same for translation from German, ends with BLEU; SOURCE_FILE=<file>
#                TARGET_FILE=<file> uses two parallel files of your own instead of Debian's packages
# make test      the test suite
# make test-all  the test suite with its slow tests
# make lint      ruff and mypy
# make clean     removes what the targets above made, .venv included
#
# PYTHON chooses the interpreter: make install PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install example example-translation test test-all lint clean
.DELETE_ON_ERROR:

install: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
		-c constraints.txt -e '.[fairseq,examples,test]'
	touch $@

example: $(INSTALLED)
	$(BIN)/python -m examples.sentiment.run

example-translation: $(INSTALLED)
	$(BIN)/python -m examples.translation.run $(if $(SOURCE_FILE),--source '$(SOURCE_FILE)') $(if $(TARGET_FILE),--target '$(TARGET_FILE)')

# tests compare bit for bit: results must not depend on where in memory arrays lie
test test-all: export MKL_CBWR := COMPATIBLE

test: $(INSTALLED)
	$(BIN)/python -m pytest -q tests -m "not slow"

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -q tests

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy deltasam_plugin

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache examples/*/work
	find deltasam_plugin tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
