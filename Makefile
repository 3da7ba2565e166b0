# make demo | test | faults | lab | docs: each makes .venv first when it is not there. PYTHON may be any Python >= 3.10.
PYTHON ?= python3
BIN := .venv/bin
# Idle OpenMP threads sleep instead of spinning: two searches side by side then cost what two searches cost.
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test faults lab docs clean sync

.venv/.installed: settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e '.[dev,lab]'
	touch $@

demo: .venv/.installed
	rm -rf runs/demo && mkdir -p runs
	$(BIN)/papermill --log-level WARNING -k python3 nbs/start/quickstart.ipynb runs/quickstart-demo.ipynb -p out runs/demo
	@echo "report:   $(CURDIR)/runs/demo/report.html"
	@echo "notebook: $(CURDIR)/runs/quickstart-demo.ipynb"

# What exports networks and pictures is optional; the tests need it.
.venv/.export: .venv/.installed
	$(BIN)/pip install -q -e '.[export]'
	touch $@

# Two processes, one thread each: most of the time is spent in nets that a second thread would not help. Each begins
# with half of the tests, file by file, and takes from the other when it has none left: a fixture is made once or twice.
test: .venv/.export
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=15

# Fifty kills, failing system calls, rotten files, wrong inputs: under 20 minutes on two cores.
faults: .venv/.installed
	mkdir -p runs
	$(BIN)/papermill --log-level WARNING --no-progress-bar --stdout-file - -k python3 nbs/runs/fault_suite.ipynb runs/faults.ipynb -p out runs/faults
	@echo "record:   $(CURDIR)/runs/faults/record.json"
	@echo "notebook: $(CURDIR)/runs/faults.ipynb"

lab: .venv/.installed
	[ -e runs/demo/result.json ] || $(MAKE) demo
	$(BIN)/mgdarts lab

docs: .venv/.installed
	$(BIN)/pip install -q -e '.[docs]'
	$(BIN)/python tools/project.py docs

# After editing notebooks: export the package, clean the notebooks, regenerate README.md and environment.yml.
sync: .venv/.installed
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python tools/project.py index readme environment

clean:
	rm -rf .venv _docs _proc build dist *.egg-info
