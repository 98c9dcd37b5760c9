.PHONY: setup check test bench

setup: ## install for development
	pip install -e '.[dev]' && pre-commit install

check: ## formatting, lint, import floors
	ruff check . && lint-imports

test: ## everything
	pytest

bench: ## the short form of the benchmarks
	for claim in quantizer step memory evaluation startup; do python benchmarks/$$claim.py --short || exit 1; done
