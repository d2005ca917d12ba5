# Everything here works on a machine with only Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXPORT_STAMP := $(VENV)/.installed-export
comma := ,
# TensorRT for RTX (104 MB to download, 230 MB installed) builds engines without a GPU; its wheels are for these.
SYSTEM := $(shell uname -sm | tr ' ' -)
EXTRAS := export,report,batch,serve,control,test,dev$(if $(filter Linux-x86_64,$(SYSTEM)),$(comma)tensorrt)
EXTRAS := $(EXTRAS)$(if $(filter Linux-x86_64 Darwin-arm64,$(SYSTEM)),$(comma)webgpu$(comma)ray)

.PHONY: mesa chromium page-screenshots demo demo-model demo-controlnet demo-bundle demo-scores control-places test test-fast test-slow check bench bench-int8 bench-report bench-full-size bench-full-size-systems bench-openvino bench-gpu install clean

install: $(STAMP)

$(STAMP): WANTED := $(EXTRAS)
$(EXPORT_STAMP): WANTED := export
$(STAMP) $(EXPORT_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=python3.x" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(WANTED)]'
	touch $@

# The demo model's checkpoint to a bundle, and an image from it: the whole way, with what exporting needs and no more.
demo: $(EXPORT_STAMP)
	rm -rf out/demo && mkdir -p out/demo
	$(BIN)/zimage-export build tiny out/demo/bundle --precision fp16
	$(BIN)/zimage-rt run "a red circle left of a blue square" -m out/demo/bundle --seed 1 -o out/demo/picture.png

# Trains the demo model from nothing, about four hours on two cores; interrupted, it goes on where it was. The C library
# is told to keep freed memory, and idle threads to sleep: both cost a third of the time otherwise.
DEMO_WORK ?= out/demo-model
demo-model: $(EXPORT_STAMP)
	MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_MMAP_THRESHOLD_=4000000000 OMP_WAIT_POLICY=PASSIVE \
	    $(BIN)/python -m demo_model $(DEMO_WORK)

# Trains the demo model's ControlNet, about ten minutes on two quiet cores; interrupted, it goes on where it was.
CONTROLNET_WORK ?= out/demo-controlnet
demo-controlnet: $(EXPORT_STAMP)
	MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_MMAP_THRESHOLD_=4000000000 OMP_WAIT_POLICY=PASSIVE \
	    $(BIN)/python -m demo_model.controlnet $(CONTROLNET_WORK)

# Renews the bundle that ships, after a change of the exporter or of the demo model.
demo-bundle: $(EXPORT_STAMP)
	$(BIN)/zimage-export build tiny zimage_rt/demo_bundle --precision fp16 --force

# Do shapes land where a map of edges puts them?
control-places: $(STAMP)
	PYTHONPATH=. $(BIN)/python benchmarks/control_places.py

# Does it generate what it is asked for? The model card's figures, and the README's image.
demo-scores: $(STAMP)
	PYTHONPATH=. $(BIN)/python benchmarks/demo_scores.py
	PYTHONPATH=. $(BIN)/python benchmarks/contact_sheet.py docs/demo.png
	PYTHONPATH=. $(BIN)/python benchmarks/contact_sheet.py docs/four.png 4

# The page of `zimage-rt serve` at three widths, for its documentation.
page-screenshots: $(STAMP) chromium
	. $(CHROMIUM_FOLDER)/environment && $(BIN)/python benchmarks/page_screenshots.py docs/images

# Without a GPU, WebGPU computes on Mesa's software Vulkan driver, which is unpacked where the system has none.
MESA := $(VENV)/mesa
mesa: $(STAMP)
	.ci/mesa $(MESA)

# The page that `zimage-rt serve` shows is tested in a browser.
CHROMIUM_FOLDER := $(VENV)/chromium
chromium:
	.ci/chromium $(CHROMIUM_FOLDER)

# One worker per core, each with its part of the tests; whoever is done first takes over from the others.
WORKERS := -n auto --dist worksteal
test: mesa chromium
	. $(MESA)/environment && . $(CHROMIUM_FOLDER)/environment && $(BIN)/python -m pytest $(WORKERS) -m "not slow and not gpu"

test-fast: mesa chromium
	. $(MESA)/environment && . $(CHROMIUM_FOLDER)/environment && $(BIN)/python -m pytest $(WORKERS) -m "not slow and not gpu and not deep"

test-slow: mesa chromium
	. $(MESA)/environment && . $(CHROMIUM_FOLDER)/environment && $(BIN)/python -m pytest -m slow

# Types are checked as they are on each system that we support; a cache for each, or each would undo the others'.
check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	for system in linux win32 darwin; do $(BIN)/mypy --platform $$system --cache-dir .mypy_cache/$$system || exit; done

# WORK keeps the synthetic models between runs: 10 GB, and 55 GB more for the full-size one.
WORK ?= out/bench
bench: $(STAMP)
	$(BIN)/python benchmarks/memory_model.py --work $(WORK)
	$(BIN)/python benchmarks/cpu_step.py --work $(WORK)

bench-int8: $(STAMP)
	$(BIN)/python benchmarks/cpu_step.py --work $(WORK) --layers 8 --image-rounds 0 --name int8_step \
	    --variants "ours fp32" "ours int8" "ours int4" "diffusers eager fp32" "diffusers compiled fp32"

# The committed reports and the README's numbers; an hour of a quiet machine.
bench-report: $(STAMP)
	$(BIN)/python benchmarks/bench_report.py --work $(WORK)

bench-full-size: $(STAMP)
	$(BIN)/python benchmarks/full_size.py --work $(WORK)/full-size
	$(BIN)/python benchmarks/full_size.py --work $(WORK)/full-size --precision int8 --export-only
	$(BIN)/python benchmarks/full_size.py --work $(WORK)/full-size --precision int8 --image-only --size 512x512 --steps 2 --limit 8

# Beside stable-diffusion.cpp, which is built first: half an hour more, and 33 GB for its files.
bench-full-size-systems: $(STAMP)
	CMAKE_ARGS=-DGGML_NATIVE=ON $(BIN)/python -m pip install stable-diffusion-cpp-python==0.4.7
	$(BIN)/python benchmarks/bench_report.py --work $(WORK) --only full-size

# Beside OpenVINO GenAI, whose packages go into an environment of their own in the user's cache: 2 GB.
bench-openvino: $(STAMP)
	$(BIN)/python -m zimage_rt.bench.systems.openvino_environment
	$(BIN)/python benchmarks/systems.py --work $(WORK)
	$(BIN)/python benchmarks/bench_report.py --work $(WORK) --only openvino

# Every executor on this machine's GPU, and one report: onnxruntime-gpu in the place of onnxruntime (the README says how),
# TensorRT from the extra, WebGPU's adapter. GPU_FLAGS="--scale blocks --only correctness memory" takes minutes.
bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py --work $(WORK)/gpu $(GPU_FLAGS)

clean:
	rm -rf $(VENV) out build dist
