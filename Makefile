# Two commands do everything on a fresh machine: `make demo` and `make test`.
# TORCH is what pip is told to install first. On a machine without a GPU, add PyTorch's CPU index:
#   make test TORCH="torch==2.13.0 --index-url <the CPU index named on pytorch.org/get-started>"
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
VENV4 := .venv-transformers4
STAMP := $(VENV)/.installed

.PHONY: demo demo-chat test test-slow test-transformers4 test-newest test-pages test-examples test-tasks test-across architectures docs packages lint format types install clean

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q $(TORCH)
	$(PY) -m pip install -q -c constraints.txt -e ".[tests,quality,plots]"
	touch $(STAMP)

demo: $(STAMP)
	$(PY) -m benchmarks.demo

# a real chat model: asks before it downloads (BUDGET for search, text and tuning)
BUDGET ?= 20min
demo-chat: $(STAMP)
	$(PY) -m pip install -q gguf
	$(PY) -m benchmarks.demo_chat --budget $(BUDGET)

# two processes of one thread each: small models gain nothing from more threads. Files stay whole, so that what a file's
# tests share is made once (xdist 3.8's loadgroup says the same and does nothing with pytest 9.2)
PYTEST := -m pytest -n 2 --dist loadfile
test: export OMP_NUM_THREADS = 1
test: $(STAMP)
	$(PY) $(PYTEST)

test-slow: $(STAMP)
	$(PY) -m pytest -m slow

# the same tests with the last transformers 4, in an environment of its own
$(VENV4)/.installed: setup.cfg pyproject.toml constraints-transformers4.txt
	test -x $(VENV4)/bin/python || $(PYTHON) -m venv $(VENV4)
	$(VENV4)/bin/python -m pip install -q $(TORCH)
	$(VENV4)/bin/python -m pip install -q -c constraints-transformers4.txt -e ".[tests]"
	touch $@

test-transformers4: export OMP_NUM_THREADS = 1
test-transformers4: $(VENV4)/.installed
	$(VENV4)/bin/python $(PYTEST)

# the newest transformers, which `pip install` without constraints brings: what calls a model, on one model of each kind
NEWEST := 5.24.0
VENV_NEWEST := .venv-newest
$(VENV_NEWEST)/.installed: setup.cfg pyproject.toml constraints.txt Makefile
	test -x $(VENV_NEWEST)/bin/python || $(PYTHON) -m venv $(VENV_NEWEST)
	$(VENV_NEWEST)/bin/python -m pip install -q $(TORCH)
	sed 's/^transformers==.*/transformers==$(NEWEST)/' constraints.txt > $(VENV_NEWEST)/constraints.txt
	$(VENV_NEWEST)/bin/python -m pip install -q -c $(VENV_NEWEST)/constraints.txt -e ".[tests]"
	touch $@

test-newest: export OMP_NUM_THREADS = 1
test-newest: $(VENV_NEWEST)/.installed
	$(VENV_NEWEST)/bin/python $(PYTEST) tests/forward tests/calibration tests/surgery tests/tuning tests/evaluation tests/runtime tests/test_pruner.py tests/test_trial.py

# every command of ours and every Python block in README, docs and a model card, on small models
test-pages: export OMP_NUM_THREADS = 1
test-pages: $(STAMP)
	$(PY) -m pytest -n 2 --dist load -m slow tests/test_pages_run.py

# the notebooks, from a clean kernel, on the model that comes with the repository, with seconds instead of a minute to heal
test-examples: export OMP_NUM_THREADS = 1
test-examples: export CLP_BUDGET = 4s
test-examples: export HF_HUB_OFFLINE = 1
test-examples: $(STAMP)
	$(PY) -m pip install -q -c constraints.txt -e ".[examples]"
	CLP_OUTPUT=$$(mktemp -d) $(PY) -m pytest --nbmake --nbmake-timeout=600 examples

# tasks of lm-eval, asked through it on data that the tests write: no network. It brings 350 MB, so `make test` goes without
test-tasks: export OMP_NUM_THREADS = 1
test-tasks: export HF_HUB_OFFLINE = 1
test-tasks: $(STAMP)
	$(PY) -m pip install -q -c constraints.txt -e ".[tasks]"
	$(PY) -m pytest -m "slow or not slow" tests/evaluation/test_named_tasks.py tests/evaluation/test_tasks.py tests/commands/test_named_task_commands.py 'tests/test_pages_run.py::test_a_page_runs[docs/cli.md]'

# what transformers 5 has saved, read by transformers 4
test-across: export OMP_NUM_THREADS = 1
test-across: $(STAMP) $(VENV4)/.installed
	CLP_OTHER_PYTHON=$(CURDIR)/$(VENV4)/bin/python $(PY) -m pytest tests/checkpoint/test_across_versions.py tests/checkpoint/test_loading.py -k transformers

# the contract suite with its slow tier, in both environments, and the table made from what it finds (about an hour)
ARCHITECTURES := tests/test_contract.py tests/test_quantization_architectures.py tests/exporters/test_onnx_architectures.py
architectures: export OMP_NUM_THREADS = 1
architectures: $(STAMP) $(VENV4)/.installed
	$(PY) $(PYTEST) --dist load -m "slow or not slow" --record-architectures $(ARCHITECTURES)
	$(VENV4)/bin/python $(PYTEST) --dist load -m "slow or not slow" --record-architectures $(ARCHITECTURES)
	PYTHONPATH=. $(PY) tests/architecture_record.py

# the site, in site/: strict (a link or an anchor that leads nowhere is an error), without a network
$(VENV)/.docs: $(STAMP)
	$(PY) -m pip install -q -c constraints.txt -e ".[docs]"
	touch $@

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.docs
	$(PY) -m mkdocs build --strict --quiet
	$(PY) -m pytest -q tests/test_site.py
	@echo "site/index.html"

# sdist and wheel, in dist/. Some tests pass from the sdist alone; the wheel's program starts from an environment of its own
packages: export OMP_NUM_THREADS = 1
packages: $(STAMP)
	rm -rf dist && $(PY) -m pip install -q build
	$(PY) -m build -q
	bash .ci/packages $(PY) dist

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: $(STAMP)
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(VENV4) $(VENV_NEWEST) build dist site *.egg-info demo-output examples/first-cut examples/my-*
