# Every target sets up what it needs in .venv and skips what is already there.
PYTHON ?= python3
BIN := .venv/bin
export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test chromium prometheus test-faults hosts-packages redis test-hosts soak check style types configs bench clean

# Fine-tune on two workers, merge, serve, and ask held-out questions over HTTP.
demo: .venv/installed
	$(BIN)/python -m training.demo

# Everything that must hold: check, then all other tests, three files at a time: most wait for processes to start, so that
# two leave a third of two cores idle.
test: .venv/installed
	$(MAKE) -j 3 --output-sync --no-print-directory chromium prometheus hosts-packages style types configs
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder --ignore tests/test_configs.py

# For the playground's tests: Debian's Chromium, where this may install it; they are skipped where there is none.
chromium:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& { timeout 120 apt-get update; DEBIAN_FRONTEND=noninteractive timeout 600 \
		apt-get install -y --no-install-recommends chromium fonts-noto-core fonts-noto-cjk; } >/dev/null 2>&1; } || true

# For the tests of monitoring: the programs of Debian's Prometheus, in .venv, since its package would start a service.
prometheus: .venv/installed | chromium
	@command -v promtool >/dev/null || [ -x $(BIN)/promtool ] || { cd .venv && command -v apt-get >/dev/null \
		&& { timeout 120 apt-get update; timeout 600 apt-get download prometheus && dpkg -x prometheus_*.deb debian \
		&& mv debian/usr/bin/prom* bin; rm -rf debian prometheus_*.deb; } >/dev/null 2>&1; } || true

# The long form: twenty killed workers in one run, figures kept in tests/benchmarks/results, and whatever takes minutes.
test-faults: .venv/installed
	RAYSONER_FAULTS=long $(BIN)/python -m pytest -q -m "fault or long"

# Several hosts on this machine, lost in every way: needs root, and is skipped where namespaces are not allowed.
test-hosts: .venv/installed hosts-packages redis
	RAYSONER_HOSTS=long $(BIN)/python -m pytest -q -rs tests/hosts

# For the hosts: Debian's ip, where this may install it; what needs it is skipped where it is not. One apt-get at a time.
hosts-packages: | $(filter chromium prometheus,$(MAKECMDGOALS))
	@command -v ip >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& { timeout 120 apt-get update; DEBIAN_FRONTEND=noninteractive timeout 300 \
		apt-get install -y --no-install-recommends iproute2; } >/dev/null 2>&1; } || true

# For the hosts whose head is lost; Debian's package starts a Redis of its own where the machine allows services.
redis: | hosts-packages
	@command -v redis-server >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& { timeout 120 apt-get update; DEBIAN_FRONTEND=noninteractive timeout 300 \
		apt-get install -y --no-install-recommends redis-server; } >/dev/null 2>&1; } || true

# Ten minutes of mixed load on an endpoint whose replicas are killed and replaced.
soak: .venv/installed
	$(BIN)/python -m tests.serving.soak --seconds 600 --keep

# Format, lint, types, import rules, that the README's tables are those of kept results, and that every shipped TOML loads.
check: .venv/installed
	$(MAKE) -j 2 --output-sync --no-print-directory style types configs

style: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/python -m tests.benchmarks.tables

types: .venv/installed
	$(BIN)/mypy

configs: .venv/installed
	$(BIN)/python -m pytest -q tests/test_configs.py

# Measurements with results kept in tests/benchmarks/results.
bench: .venv/installed
	$(BIN)/python -m tests.benchmarks.demo
	$(BIN)/python -m tests.benchmarks.data
	$(BIN)/python -m tests.benchmarks.train_step
	$(BIN)/python -m tests.benchmarks.distributed

clean:
	rm -rf .venv runs .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis *.egg-info

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and "Python 3.11 to 3.13 is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv || { apt-get install -y python3-venv && $(PYTHON) -m venv .venv; }
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
