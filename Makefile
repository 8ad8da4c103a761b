# Needs python3 (3.11 or later), make and a package index. All targets share .venv and install only once.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Compiling all that is installed takes pip half of its time. Python compiles what is imported, and keeps it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo almanac reproduce readme docs notebooks clients test quick check pytest fuzz tokenizers clean
.DELETE_ON_ERROR:

demo: .venv/.demo-installed  ## a published model answers in parallel, and sequentially; options: make demo ARGS="..."
	$(BIN)/python -m pasta_jax.demo $(ARGS)

almanac: .venv/.installed  ## train, decode and score tiny models on the built-in data set
	$(BIN)/python -m pasta_jax.almanac

reproduce: .venv/.reproduce-installed  ## the paper's comparison, with figures; options: make reproduce ARGS="..."
	$(BIN)/python -m pasta_jax.reproduce $(ARGS)

test: check pytest  ## everything that must hold

quick: .venv/.test-installed  ## the inner loop: laws on small counts; compiled programs are kept in .cache
	JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/jax $(BIN)/python -m pytest -n 2 -q -m "not slow and not tpu"

check: .venv/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2

pytest: .venv/.test-installed
	$(BIN)/python -m pytest -n 2

fuzz: .venv/.test-installed  ## random and hostile inputs for 30 minutes; options: make fuzz ARGS="--minutes=5"
	$(BIN)/python -m tests.fuzz $(ARGS)

clients: .venv/.clients-installed  ## openai and LangChain on our server, and the notebooks from top to bottom
	PASTA_NOTEBOOKS=1 $(BIN)/python -m pytest tests/test_serve_clients.py tests/test_notebooks.py

tokenizers:  ## published tokenizers for the tests, into .cache: 300 MB come once, and no code of theirs is run
	$(PYTHON) -m tests.fetch

.venv/.demo-installed: requirements-demo.txt requirements.txt
	$(call install,requirements-demo.txt,$@)

.venv/.installed: requirements.txt
	$(call install,requirements.txt,$@)

.venv/.reproduce-installed: requirements-reproduce.txt requirements.txt
	$(call install,requirements-reproduce.txt,$@)

.venv/.notebooks-installed: requirements-notebooks.txt requirements-reproduce.txt requirements.txt
	$(call install,requirements-notebooks.txt,$@)

.venv/.clients-installed: requirements-clients.txt requirements-test.txt requirements-reproduce.txt requirements.txt
	$(call install,requirements-clients.txt,$@)

.venv/.docs-installed: requirements-docs.txt
	$(call install,requirements-docs.txt,$@)

.venv/.test-installed: requirements-test.txt requirements-reproduce.txt requirements.txt
	$(call install,requirements-test.txt,$@)

# A virtual environment that another python left behind is of no use: it is checked, not only the one that makes it.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pasta_jax needs Python 3.11 or later; $(PYTHON) is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and ".venv was made with Python " + sys.version.split()[0] + "; remove it (make clean) and try again.")'
	@echo "Installing $(1) into .venv"
	$(BIN)/pip install --quiet --no-compile -r $(1)
	@touch $(2)
endef

readme: .venv/.test-installed  ## puts what `make demo` left in runs/demo into README.md and docs
	$(BIN)/python -m tests.readme runs/demo

docs: .venv/.docs-installed  ## the pages of docs/ as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

notebooks: .venv/.notebooks-installed  ## executes the notebooks, and keeps what they show
	$(BIN)/python -m tests.notebooks $(ARGS)

clean:  ## remove the environment and the caches; runs are kept
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache
