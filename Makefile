# What a person or CI runs on a checkout. `make` alone lists the targets.
# Needs Python >= 3.10; everything else is installed into .venv, and with apt-get RabbitMQ,
# PostgreSQL and MariaDB.

BIN := .venv/bin
# Four workers, also on two cores: tests wait for brokers more than they compute. PYTEST_ARGS= runs
# them in one process.
PYTEST_ARGS ?= -n 4
# Of `check`, whose tests wait for timeouts.
CHECK_ARGS ?= -n 4
# More of them: python -m benchmarks --help
BENCH_ARGS ?=
# For `faults`: how long, which schedule, which RabbitMQ, where to write a report, and whatever
# else `python tests/faults --help` knows.
SECONDS ?= 60
SEED ?= 1
RELEASE ?= host
REPORT ?=
FAULTS_ARGS ?=
# For `kills`, besides SEED, RELEASE and REPORT: how many transactions, in which database,
# through which adapter (`python tests/outbox_faults.py --help`).
TRANSACTIONS ?= 300
DATABASE ?= postgresql
ADAPTER ?= sqlalchemy
KILLS_ARGS ?=

.DEFAULT_GOAL := help
# The targets of `test` print one after the other, with pytest's result at the end.
.NOTPARALLEL:
.PHONY: help demo check test matrix bench faults kills lint types docs build broker databases clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1 \2/p' Makefile | while read -r make target text; do \
		printf 'make %-8s %s\n' "$$target" "$$text"; done

demo: .venv/.ready ## start a private RabbitMQ and show a day in the life of an event
	$(BIN)/python tools/rabbitmq_node.py run -- $(BIN)/python -m domain_events demo --broker

test: broker databases lint types docs build ## everything that must pass: lint, types, docs, build, tests
	$(BIN)/python -m pytest --cov --cov-report=term $(PYTEST_ARGS)

check: lint types ## while you work, in two minutes, without RabbitMQ: lint, types, the tests that need none
	DOMAIN_EVENTS_TEST_RELEASE=none $(BIN)/python -m pytest -q $(CHECK_ARGS) \
		-m 'not rabbitmq and not slow'

matrix: databases ## the tests on RabbitMQ 3.10, 4.0, 4.3 and on each Python and pika
	$(BIN)/python tools/matrix.py $(PYTEST_ARGS)

bench: .venv/.ready ## speed beside the peers, half an hour: BENCH_ARGS='--quick --release 4.3', or --outbox
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

faults: .venv/.ready ## lose nothing while all fails: SECONDS=300 SEED=7 RELEASE=4.3 REPORT=FILE
	$(BIN)/python tools/rabbitmq_node.py install $(RELEASE)
	$(BIN)/python tests/faults --seconds $(SECONDS) --seed $(SEED) --release $(RELEASE) \
		$(if $(REPORT),--report $(REPORT)) $(FAULTS_ARGS)

kills: databases ## kill all around the outbox: TRANSACTIONS=2000 SEED=7 DATABASE=mariadb ADAPTER=django
	$(BIN)/python tools/rabbitmq_node.py install $(RELEASE)
	$(BIN)/python tests/outbox_faults.py --transactions $(TRANSACTIONS) --seed $(SEED) \
		--database $(DATABASE) --adapter $(ADAPTER) --release $(RELEASE) \
		$(if $(REPORT),--report $(REPORT)) $(KILLS_ARGS)

lint: .venv/.ready ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/.ready ## mypy --strict, and pyright as strict on what users import
	$(BIN)/mypy
	$(BIN)/pyright

docs: .venv/.ready ## the documentation, to docs/_build/html: links, spelling, every public name
	$(BIN)/codespell README.rst CHANGELOG.rst CONTRIBUTING.rst docs domain_events
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html
	$(BIN)/python tools/check_docs.py docs/_build/html

build: .venv/.ready ## source distribution and wheel, to dist/
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean: ## delete what these targets made
	rm -rf .venv .tox build dist docs/_build htmlcov *.egg-info .coverage .coverage.* \
		.hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A broker for the tests: installed unless one is there, or given.
broker: .venv/.ready
	@test -n "$$DOMAIN_EVENTS_TEST_URL" || \
		$(BIN)/python tools/rabbitmq_node.py install $${DOMAIN_EVENTS_TEST_RELEASE:-host}

# PostgreSQL and MariaDB, likewise, unless DOMAIN_EVENTS_TEST_DATABASES=none.
databases: .venv/.ready
	@$(BIN)/python tools/databases.py install

.venv/.ready: pyproject.toml setup.py tools/venv.sh
	sh tools/venv.sh .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
