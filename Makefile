# `make demo` and `make test` are all a stranger needs: each makes .venv, installs, and does its work.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint clean

demo: .venv/installed
	rm -rf demo/lake demo/run demo/results
	$(BIN)/python datalake/run_lake.py demo
	$(BIN)/python evaluate_distilled_hear.py demo
	$(BIN)/python benchmark_student_vs_hear.py demo
	@echo "Look at demo/run/loss.png and demo/results/student_vs_teacher.png"

test: .venv/installed-dev lint
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -m slow

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv demo

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements-dev.txt
	touch $@
