.PHONY: setup check test bench

setup: ## install for development
	pip install -e '.[dev]' && pre-commit install

check: ## formatting, lint, import floors
	ruff check . && lint-imports

test: ## everything
	pytest

bench: ## the short form of the benchmarks
	python benchmarks/quantizer.py --short
