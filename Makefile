# clip-shim: what a newcomer runs. `make` alone lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

HERE := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
VENV := $(HERE)/.venv
PYTHON ?=
IMAGE ?=
ARGS ?=

.PHONY: help
help: ## list the targets
	@echo "clip-shim: containers that start at once, whatever their image's size"
	@echo
	@grep -hE '^[a-z-]+:.*## ' '$(HERE)/Makefile' | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

.PHONY: demo
demo: venv ## run an image from its index: IMAGE=docker.io/library/python:3.12, or one built here (root)
	@cd '$(HERE)' && exec '$(VENV)/bin/python' -m tests.support.demo $(IMAGE)

.PHONY: test
test: venv ## run all tests: unit, mounts, engines, faults (root; ARGS='-k word' goes to pytest)
	@cd '$(HERE)' && exec '$(VENV)/bin/python' -m tests.support.tiers $(ARGS)

.PHONY: packages
packages: venv ## build the deb and the rpm into build/
	@cd '$(HERE)' && exec '$(VENV)/bin/python' packaging/build.py build $(ARGS)

.PHONY: package-test
package-test: venv ## install, upgrade, remove and purge the packages in clean Debian roots; lintian (root, ~3 minutes)
	@missing=(); for tool in lintian rpm promtool; do command -v $$tool >/dev/null || missing+=("$${tool/promtool/prometheus}"); done; \
		((!$${#missing[@]})) || DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$${missing[@]}"
	@cd '$(HERE)' && exec '$(VENV)/bin/python' -m pytest -q tests/packages $(ARGS)

.PHONY: boot-test
boot-test: venv ## boot a Debian 13 with systemd and the package; kill, hang, restart and upgrade the service (root, ~3 minutes)
	@cd '$(HERE)' && exec '$(VENV)/bin/python' -m pytest -q tests/boot $(ARGS)

.PHONY: docs
docs: venv ## write the configuration reference anew from the settings table
	@cd '$(HERE)' && '$(VENV)/bin/python' packaging/generate.py reference >packaging/CONFIGURATION.md

.PHONY: browser-test
browser-test: venv ## look at `clip-shim report` in Chromium (root; installs Debian's chromium, 100 MB)
	@command -v chromium >/dev/null || DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends chromium
	@cd '$(HERE)' && exec '$(VENV)/bin/python' -m pytest -q tests/browser $(ARGS)

.PHONY: bench
bench: venv ## measure, print the tables and renew tests/bench/README.md (root, ~15 minutes)
	@cd '$(HERE)' && exec nice -n 0 '$(VENV)/bin/python' -m tests.bench $(ARGS)

.PHONY: soak
soak: venv ## kill the server 100 times under load, run 1,000 containers: nothing may fail or grow (root, ~15 minutes)
	@cd '$(HERE)' && exec '$(VENV)/bin/python' -m tests.soak $(ARGS)

.PHONY: lint
lint: venv ## ruff, mypy and the structure rules
	@cd '$(HERE)' && exec '$(VENV)/bin/python' -m pytest -q tests/unit/test_style.py $(ARGS)

.PHONY: venv
venv: $(VENV)/.installed ## install Debian packages (as root, if missing) and make .venv

$(VENV)/.installed: $(HERE)/pyproject.toml $(HERE)/packaging/install-deps.sh
	@'$(HERE)/packaging/install-deps.sh'
	@[[ -x '$(VENV)/bin/python' ]] || for python in $(PYTHON) /usr/bin/python3 /usr/bin/python3.1{1..9} none; do \
		[[ $$python != none ]] || { echo "clip-shim needs Python 3.11 or newer in /usr/bin" >&2; exit 1; }; \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			"$$python" -m venv '$(VENV)'; break; fi; done
	@'$(VENV)/bin/python' -m pip install --quiet --disable-pip-version-check -e '$(HERE)[dev]' --config-settings editable_mode=compat
	@'$(VENV)/bin/python' -m compileall -q '$(HERE)/shim'
	@touch '$@'

.PHONY: clean
clean: ## remove .venv, caches and the test images kept in /var/cache/clip-shim-tests
	@cd '$(HERE)' && rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .cache build dist *.egg-info \
		"$${CLIP_SHIM_TEST_CACHE:-/var/cache/clip-shim-tests}"
	@find '$(HERE)' -name __pycache__ -type d -prune -exec rm -rf {} +
