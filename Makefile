# make install   .venv with the plugin, fairseq and every tool, at the tested versions
# make example   examples/sentiment: Adam, SAM, δ-SAM and instance mode on real sentences, ends with a table
# make example-translation   examples/translation: the same for translation from German, ends with BLEU; SOURCE_FILE=<file>
#                TARGET_FILE=<file> uses two parallel files of your own instead of Debian's packages
# make example-finetune   examples/finetune: the four of `make example` for a pretrained model, fine-tuned on 500 sentences
# make test      the test suite
# make test-all  the test suite with its slow tests
# make test-compat   the test suite on the oldest and the newest Python, torch and fairseq that are supported, for those
#                interpreters that exist here; downloads CUDA builds of torch (5 GB) into .venv-3.10 and .venv-3.12
# make lint      ruff and mypy
# make clean     removes what the targets above made, .venv included
#
# PYTHON chooses the interpreter: make install PYTHON=python3.12
# PROCESSES is how many processes run the tests, one for each core unless given: make test PROCESSES=1

PYTHON ?= python3
PROCESSES ?= auto
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP_INSTALL := -m pip install --disable-pip-version-check --progress-bar off
# A test takes between a millisecond and minutes: a process that is done takes over tests that wait for another.
PYTEST := -m pytest -q -n $(PROCESSES) --maxprocesses 8 --dist worksteal tests

.PHONY: install example example-finetune example-translation test test-all test-compat compat-3.10 compat-3.12 lint clean
.DELETE_ON_ERROR:

install: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[fairseq,examples,test]'
	touch $@

example: $(INSTALLED)
	$(BIN)/python -m examples.sentiment.run

example-finetune: $(INSTALLED)
	$(BIN)/python -m examples.finetune.run

example-translation: $(INSTALLED)
	$(BIN)/python -m examples.translation.run $(if $(SOURCE_FILE),--source '$(SOURCE_FILE)') $(if $(TARGET_FILE),--target '$(TARGET_FILE)')

# tests compare bit for bit: results must not depend on where in memory arrays lie
test test-all compat-3.10 compat-3.12: export MKL_CBWR := COMPATIBLE

test: $(INSTALLED)
	$(BIN)/python $(PYTEST) -m "not slow"

test-all: $(INSTALLED)
	$(BIN)/python $(PYTEST)

test-compat:
	for version in 3.10 3.12; do \
		if command -v "$$(tests/helpers/interpreter.sh $$version)" > /dev/null; then $(MAKE) compat-$$version || exit; \
		else echo "No Python $$version here: not tested."; fi; \
	done

compat-3.10: .venv-3.10/.installed
compat-3.12: .venv-3.12/.installed
compat-3.10 compat-3.12: compat-%:
	.venv-$*/bin/python $(PYTEST) -m "not slow"

# fairseq 0.12.2 needs a hydra and an omegaconf whose metadata newer versions of pip refuse
.venv-3.10/.installed: CONSTRAINTS := constraints-oldest.txt
.venv-3.12/.installed: CONSTRAINTS := constraints.txt
.venv-3.10/.installed .venv-3.12/.installed: .venv-%/.installed: setup.py constraints.txt constraints-oldest.txt
	$$(tests/helpers/interpreter.sh $*) -m venv .venv-$*
	.venv-$*/bin/python $(PIP_INSTALL) 'pip<24.1'
	.venv-$*/bin/python $(PIP_INSTALL) -c $(CONSTRAINTS) -e '.[fairseq,test]'
	touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy deltasam_plugin

clean:
	rm -rf $(VENV) .venv-3.* build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache examples/*/work
	find deltasam_plugin tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
