# Every target sets up what it needs: the virtual environment .venv, the packages, the compiled extension.
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') CMakeLists.txt

.PHONY: setup demo test slow-test lint format peers link sanitize cuda-check gpu-check gpu-packages bench clean

setup: .venv/installed

.venv/packages: pyproject.toml constraints.txt
	@echo "== packages into .venv (torch is the large one; once)"
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PIP) torch cmake ninja scikit-build-core pybind11
	@touch $@

.venv/installed: .venv/packages $(NATIVE)
	@echo "== compiling the extension (a minute the first time, seconds later)"
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

demo: setup
	$(PY) examples/demo/run.py

test: setup
	$(PY) -m pytest

slow-test: setup
	$(PY) -m pytest -m slow

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/clang-format --dry-run --Werror $(filter csrc/%,$(NATIVE))

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	.venv/bin/clang-format -i $(filter csrc/%,$(NATIVE))

# The peers that benchmarks run beside us, in an environment of their own.
peers: .venv-peers/installed .venv-mergekit/installed
.venv-peers/installed: bench/peers.txt
	@echo "== peers into .venv-peers (transformers, peft, trl)"
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt -r bench/peers.txt
	@touch $@

.venv-mergekit/installed: bench/peers-merge.txt  # mergekit pins its own versions
	@echo "== mergekit into .venv-mergekit"
	@test -x .venv-mergekit/bin/python || $(PYTHON) -m venv .venv-mergekit
	@.venv-mergekit/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt -r bench/peers-merge.txt
	@touch $@

# JAX and transformers, which the examples of examples/link plug the kernels into, on top of the packages of .venv.
link: .venv-link/installed
.venv-link/installed: .venv/packages
	@echo "== jax and transformers into .venv-link"
	@test -x .venv-link/bin/python || $(PYTHON) -m venv .venv-link
	@$(PY) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > "$$(.venv-link/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	@.venv-link/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt jax transformers
	@touch $@

# The kernel tests and the fuzzer under AddressSanitizer and UndefinedBehaviorSanitizer, with AVX-512 emulated; tests/sanitize.sh --all
# runs all CUDA kernels in the emulator as well.
sanitize: setup
	tests/sanitize.sh

# The CUDA kernels compiled for every architecture: spills and registers (without nvcc it says so and passes).
cuda-check: setup
	$(PY) tests/cuda_check.py

# Build, tests, training, memory, benchmarks and compute-sanitizer on this machine's GPU, with the Python at hand: bench/gpu/check.py.
# GPU_CHECK=emulated is the dry run without one; GPU_CHECK=kernels,memory some of the sections.
gpu-check:
	$$( [ -x $(PY) ] && echo $(PY) || echo $(PYTHON) ) -m bench.gpu.check $(GPU_CHECK)

# What the trainer imports and a plain PyTorch image may lack, for its Python, which may be another: GPU_PYTHON=3.12.
GPU_TARGET := --target build/gpu/packages --upgrade --only-binary=:all:
gpu-packages: .venv/packages
	$(PIP) $(GPU_TARGET) $(if $(GPU_PYTHON),--python-version $(GPU_PYTHON)) pydantic pyyaml jinja2
	$(PIP) $(GPU_TARGET) $(if $(GPU_PYTHON),--python-version $(GPU_PYTHON)) --no-deps safetensors tokenizers

bench: setup
	$(PY) -m bench all

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache
