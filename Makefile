# Two commands for a fresh machine with Python 3.11 or later: `make demo` and `make test`.

VENV ?= .venv
PYTHON ?= python3
DEMO ?= run --model demo --drop 0.4

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/layerprune $(DEMO)

# One thread for each worker: the tests' models are too small to share.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist loadfile

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

$(VENV)/.installed: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) runs build
