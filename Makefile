PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint survival docs
# One thread: on a network this small, several mostly wait for each other.
demo: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/onward compare --algorithms bp fdfa --data digits --model mlp --epochs 5 --lr 1e-3 --seeds 3 --out runs/demo --overwrite

test: .venv/installed lint
	$(BIN)/python -m pytest -q -n 2

# What a run survives, in the long form; an hour of it is the soak, which ONWARD_SOAK_MINUTES shortens.
survival: .venv/installed
	$(BIN)/python -m pytest -q -m "slow or not slow" tests/lab/test_resume.py tests/lab/test_faults.py tests/lab/test_fuzz.py tests/lab/test_soak.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into build/site. A warning fails it.
docs: .venv/docs
	$(BIN)/python docs/pictures/draw.py
	$(BIN)/python docs/fill.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,compat,docs]'
	touch $@

# The constraints hold every version that is tested, so that two installations are the same.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,compat]'
	touch $@
