# Each target makes what it needs: `make book` and `make test` work in a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
NB ?= $(wildcard notebooks/*.ipynb)
ASSIGNMENTS := $(notdir $(patsubst %/,%,$(wildcard assignments/source/*/)))
# torch is installed first and alone, so that another build of the same version can be chosen:
#   make book TORCH="torch==VERSION --index-url ADDRESS", as PyTorch's install page has it.
TORCH ?= $(shell grep '^torch==' requirements.lock)

# Two processes of one thread each: more threads than cores cost far more than they gain.
export OMP_NUM_THREADS = 1
export MKL_NUM_THREADS = 1
export OPENBLAS_NUM_THREADS = 1

.PHONY: help book test test-offline lint check serve notebooks assignments pdf clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/\1:/p' Makefile

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -r requirements.lock
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

book: $(READY)  ## build the site into _build/html; any warning is an error
	$(BIN)/jupyter-book build . -W --keep-going -n

test: lint check  ## everything: lint, types, tests, doctests, notebooks, the strict build, its pages, assignments

lint: $(READY)  ## style, spelling, types, workflow and citation files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/python -m pip check

# loadfile: the cells of one notebook stay in one kernel. lax: cells tagged nbval-check-output are
# compared with what is stored, the others must run.
check: $(READY)  ## one pytest run over tests, doctests and notebooks; the tests build the book
	$(BIN)/python -m pytest tests coursekit notebooks README.md -n 2 --dist loadfile \
	  --doctest-modules --doctest-glob README.md --durations 10 -rs \
	  --nbval-lax --nbval-current-env --nbval-cell-timeout 300 --nbval-sanitize-with tests/sanitize.cfg

test-offline: $(READY)  ## the same again where there is no network but loopback
	unshare -rn true || { echo "test-offline needs unshare and user namespaces"; exit 1; }
	unshare -rn sh -c 'ip link set lo up && exec $(MAKE) check'

serve: book  ## read the site at http://127.0.0.1:8000
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html 8000

# The second pass joins what one cell printed in pieces, so that a new run makes a small diff.
notebooks: $(READY)  ## run the chapters and store their outputs: make notebooks NB=notebooks/autodiff.ipynb
	COURSEKIT_STATIC=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=600 \
	  --ExecutePreprocessor.record_timing=True --ExecutePreprocessor.store_widget_state=False $(NB)
	$(BIN)/jupyter nbconvert --to notebook --inplace --coalesce-streams $(NB)

assignments: $(READY)  ## student versions, without solutions and hidden tests, in assignments/release
	cd assignments && for name in $(ASSIGNMENTS); do ../$(BIN)/nbgrader generate_assignment $$name --create --force || exit 1; done

pdf: $(READY)  ## the whole book as _build/book.pdf, printed by Chromium
	$(BIN)/jupyter-book build . --builder singlehtml
	$(BIN)/python book/_ext/print_pdf.py _build/singlehtml _build/book.pdf

clean:  ## remove what is built; the virtual environment stays
	rm -rf _build dist assignments/release assignments/autograded assignments/gradebook.db .hypothesis .mypy_cache .ruff_cache
