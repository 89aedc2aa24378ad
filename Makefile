# Two commands do everything on a fresh machine: `make demo` and `make test`. Both create .venv themselves.
PYTHON ?= python3
BIN := .venv/bin
PROTO_BIN := .venv-proto/bin

.PHONY: demo examples test callers workers crash-test attack-test programs interrupts sweep check bench bench-durability bench-services bench-workers bench-peers gpu gpu-tests gpu-figures image image-test lock proto aio lint types clean simulate

demo: .venv/stamp-demo
	$(BIN)/stepwire demo

# In full: a few minutes, most of them the language model's. CI runs them in their short form, as tests.
examples: .venv-examples/stamp
	for name in digits_numpy digits_torch digits_jax digits_workers federated_digits two_tower language_model; do \
	    .venv-examples/bin/python examples/$$name.py --plot demo-output/$$name.png || exit 1; done

.venv-examples/stamp: pyproject.toml
	$(PYTHON) -m venv .venv-examples
	.venv-examples/bin/pip install --quiet --disable-pip-version-check -e '.[demo,jax]' torch==2.13.0
	touch $@

# One worker more than there are processors, since many tests wait for a socket now and then. A worker takes neighbours and
# gives what is left to whoever has nothing more, so that few kernels are compiled twice. Server processes start faster
# where Python may keep its bytecode. Long tests are left out, and of many cases of one kind every fourth is run. CI has the
# long ones and every second case, at the next commit the others; `make test SAMPLE=` has all of them. What takes seconds is
# left out by `make test ARGUMENTS='-m "not slow"'`.
WORKERS ?= $(shell echo $$(($$(nproc) + 1)))
SAMPLE ?= $(if $(CI),--every 2 --offset $(shell git rev-list --count HEAD 2> /dev/null || echo 0),--sample)
test: .venv/stamp-dev
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(SAMPLE) $(ARGUMENTS)

# The model of several callers of one session, in long form: so many examples for each of one server, shards, and shards
# that commit in two phases. The tests have some of them, and CI 300 of each.
EXAMPLES ?= 1000
callers: .venv/stamp-dev
	env STEPWIRE_CALLERS_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal tests/integration/callers

# The models of several workers of one session, in long form: so many examples for each way of aggregation, and so many
# rounds over connections that are cut. The tests have some of them.
workers: .venv/stamp-dev
	env STEPWIRE_WORKERS_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -q -n 2 tests/server/sessions/several \
	    tests/integration/workers/test_cut_rounds.py

# Servers that are killed at every named point while clients train, so many times at each, with object stores too, and
# every image of a disk that the tests have some of.
SEEDS ?= 20
crash-test: .venv/stamp-dev
	env STEPWIRE_CRASH_SEEDS=$(SEEDS) $(BIN)/python -m pytest -q -n 2 tests/crash \
		tests/integration/durability/test_recovery.py

# Whole clusters on virtual time: so many histories of shards, workers, networks and disks with faults, each from a seed.
# A history that fails is printed with its seed and with those of its faults that matter.
HISTORIES = $(if $(filter command line environment,$(origin SEEDS)),$(SEEDS),1000)
simulate: .venv/stamp-dev
	$(BIN)/python -m tests.simulation.main --seeds $(HISTORIES)
	$(BIN)/python -m tests.simulation.main --histories pairs --seeds $(HISTORIES)
	$(BIN)/python -m tests.simulation.main --histories moves --seeds $(HISTORIES)

# Hostile requests of strangers and of another tenant, so many for each way of keeping state, beside a session that trains.
# The tests have some hundreds of them. Each hostile datagram ends a packet lane, and an attach makes the next one.
REQUESTS ?= 1000000
DATAGRAMS ?= 100000
attack-test: .venv/stamp-dev
	env STEPWIRE_ATTACK_REQUESTS=$(REQUESTS) $(BIN)/python -m pytest -q tests/attack tests/server/rpc/test_call_floods.py
	env STEPWIRE_HOSTILE_PACKETS=$(DATAGRAMS) $(BIN)/python -m pytest -q -n 2 -k hostile tests/server/sharing

# An interrupt at every point of the thread that steps, and at every line of the thread that steps for it; the tests have a
# few of them.
interrupts: .venv/stamp-dev
	env STEPWIRE_INTERRUPTS=every $(BIN)/python -m pytest -q -n 2 tests/integration/interrupts

# Every rule, formula, option and precision in regimes that no vector has, against those frameworks that are installed
# beside: torch, optax, Keras. `make sweep ARGUMENTS="--short"` runs the cases that the tests run. The tables of
# docs/numerics.md are written with `ARGUMENTS="--page docs/numerics.md"`.
sweep: .venv/stamp-dev
	$(BIN)/python conformance/sweep/main.py $(ARGUMENTS)

# Random programs on torch's optimizers and on `stepwire.torch` side by side, in long form; the tests have a few of them.
# It needs PyTorch in .venv. `make programs PROGRAMS=10000 FROM=10000` goes on behind the first 10,000.
PROGRAMS ?= 1000
FROM ?= 0
programs: .venv/stamp-dev
	env STEPWIRE_PROGRAMS=$(PROGRAMS) STEPWIRE_PROGRAMS_FROM=$(FROM) $(BIN)/python -m pytest -q -n 2 tests/client/torch/programs

# Everything that is not a test: style, types, the contract, and whether generated code is fresh.
check: lint types proto aio
	cd proto && ../$(BIN)/buf lint
	git diff --exit-code -- client/stepwire/v1 client/stepwire/aio/surface.py

lint: .venv/stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/stamp-dev
	$(BIN)/mypy

# With arguments, such as `make bench ARGUMENTS="--quick"`.
bench: .venv/stamp-dev
	$(BIN)/python benchmarks/main.py $(ARGUMENTS)

# Durable sessions alone, into the pages; `ARGUMENTS="--data-dir DIR"` names a place on the disk to measure.
bench-durability: .venv/stamp-dev
	$(BIN)/python benchmarks/main.py --only durability --json benchmarks/results/durability-2-core.json $(ARGUMENTS)
	$(BIN)/python benchmarks/page.py

# Sections of services, into the pages: small steps on one host, rows, metrics, many sessions and clients, floods, TLS.
bench-services: .venv/stamp-dev
	$(BIN)/python benchmarks/main.py --only lane rows metrics fairness floods many security shards standby moves \
	    --json benchmarks/results/services-2-core.json $(ARGUMENTS)
	$(BIN)/python benchmarks/page.py

# Rounds of several workers, into the pages, in the environment of the peers below.
bench-workers: .venv-peers/stamp
	.venv-peers/bin/python benchmarks/main.py --only workers straggler --json benchmarks/results/workers-2-core.json \
	    $(ARGUMENTS)
	.venv-peers/bin/python benchmarks/page.py

# Beside what other people use for the same job, in environments of their own: torch's CPU build is pinned, since a plain
# requirement would pull gigabytes of CUDA packages, and Flower's requirements exclude ours. What cannot be installed is
# left out of the table, with the reason.
bench-peers: .venv-peers/stamp .venv-flower/stamp
	.venv-peers/bin/python benchmarks/peers.py $(ARGUMENTS)

.venv-peers/stamp: pyproject.toml
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check -e '.[dev]' torch==2.13.0
	for peer in pyarrow ray; do .venv-peers/bin/pip install --quiet --disable-pip-version-check $$peer || true; done
	touch $@

# A package that it needs is built from source by a tool that newer setuptools no longer have.
.venv-flower/stamp:
	$(PYTHON) -m venv .venv-flower
	echo 'setuptools<81' > .venv-flower/build.txt
	PIP_CONSTRAINT=.venv-flower/build.txt .venv-flower/bin/pip install --quiet --disable-pip-version-check flwr || true
	touch $@

# On a machine with a CUDA device and cupy, cuda-toolkit[nvrtc,cudart], numpy, grpcio, protobuf, ml_dtypes, numba and
# pytest; nothing is installed, and the checkout need not be. torch is compared with where it is there. The conformance
# vectors, which need a whole server, are skipped unless there are also wheels of msgspec, structlog,
# google-crc32c and grpcio-health-checking. The two parts fit into a quarter of an hour together, and each into ten minutes: the tests by
# weight, and then the figures, which are worth having where a test fails too. Whatever time was too short for is named.
# A run in which every test is skipped fails; a test that waits for ever is told from one that is slow.
gpu gpu-tests gpu-figures: export PYTHONPATH := client:server$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu:
	status=0; \
	$(MAKE) gpu-tests || status=1; \
	$(MAKE) gpu-figures || status=1; \
	exit $$status

gpu-tests: export STEPWIRE_GPU_SECONDS := 330
gpu-tests:
	timeout --signal=INT --kill-after=5 400 $(PYTHON) -m pytest -q -m gpu -W default -o faulthandler_timeout=100 \
	    --confcutdir=tests/server/engines tests/server/engines/test_gpu.py

gpu-figures:
	status=0; \
	timeout --signal=INT --kill-after=5 235 $(PYTHON) benchmarks/gpu.py || status=1; \
	timeout --signal=INT --kill-after=5 150 $(PYTHON) benchmarks/gpu_experiments.py --seconds 120 || status=1; \
	exit $$status

# With what builder there is. `make image TARGETS="cpu gpu demo"`.
TARGETS ?= cpu
image:
	docker/build $(TARGETS)

# Builds every target and runs it, as root, where no registry and no Docker need be; the first run fetches what it takes.
image-test: .venv/stamp-dev
	$(BIN)/python docker/image_test/main.py

# What the images hold, resolved anew and pinned with the hashes of every wheel, for each Python that is supported.
LOCK := .venv-lock/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
    --custom-compile-command 'make lock'
IMAGE_EXTRAS := --extra server --extra objects --extra tls --extra jwt --extra metrics --extra otel --extra reflection
lock: .venv-lock/stamp
	echo hatchling | $(LOCK) - --output-file docker/requirements/build.txt
	echo cyclonedx-bom | $(LOCK) - --output-file docker/requirements/sbom.txt
	$(LOCK) pyproject.toml $(IMAGE_EXTRAS) --output-file docker/requirements/cpu.txt
	$(LOCK) pyproject.toml --extra cuda13 $(IMAGE_EXTRAS) --constraint docker/requirements/cpu.txt --output-file docker/requirements/gpu.txt
	$(LOCK) pyproject.toml --extra demo $(IMAGE_EXTRAS) --constraint docker/requirements/cpu.txt --output-file docker/requirements/demo.txt

.venv-lock/stamp:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet --disable-pip-version-check 'uv>=0.9,<1'
	touch $@

# Code generated by a newer toolchain refuses older runtimes, so the toolchain is pinned.
proto: .venv-proto/stamp
	$(PROTO_BIN)/python -m grpc_tools.protoc -Iproto --python_out=client --pyi_out=client \
	    proto/stepwire/v1/*.proto
	$(PROTO_BIN)/python -m grpc_tools.protoc -Iproto --grpc_python_out=client \
	    proto/stepwire/v1/optimizer_service.proto

# The asynchronous client, from the synchronous one.
aio: .venv/stamp-dev
	$(BIN)/python generators/aio.py

# An environment that another Python made stays broken unless it is cleared; one of the same Python is used again, with
# what was installed by hand.
CHECKED_VERSION := import sys; sys.exit(sys.version_info < (3, 11) and "stepwire needs Python 3.11 or newer, and this is " \
    + sys.version.split()[0] + "; name another: make PYTHON=python3.12 …")
SAME_PYTHON := import pathlib, re, sys; found = pathlib.Path(".venv/pyvenv.cfg"); \
    sys.exit(not (found.exists() and re.search(r"^version *= *%d[.]%d[.]" % sys.version_info[:2], found.read_text(), re.M)))
.venv/stamp-%: pyproject.toml
	@$(PYTHON) -c '$(CHECKED_VERSION)'
	$(PYTHON) -c '$(SAME_PYTHON)' && $(PYTHON) -m venv .venv || $(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

.venv-proto/stamp: Makefile
	$(PYTHON) -m venv .venv-proto
	$(PROTO_BIN)/pip install --quiet --disable-pip-version-check grpcio-tools==1.76.0 protobuf==6.31.1
	touch $@

clean:
	rm -rf .venv .venv-examples .venv-proto .venv-peers .venv-flower .venv-lock build
	rm -rf examples/javascript/node_modules examples/go/stepwirev1 examples/go/digits
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
