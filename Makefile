# SPDX-License-Identifier: Apache-2.0
# Each target works as the first command on a fresh machine: it checks what the system must have, makes .venv, installs what
# it needs there, and builds. What it did is not done again until pyproject.toml, TORCH or PIP_ARGS change.
#
#   make demo                                       decode trees with a real language model
#   make test                                       build and run every test
#   make bench                                      measure against other implementations
#   make lint                                       ruff, mypy, clang-format, clang-tidy
#   make wheel                                      build a wheel and try it in a venv of its own
#
#   make test TORCH='torch==2.14.1'                 another torch (2.13 or later)
#   make demo PIP_ARGS='--extra-index-url URL'      more options for pip, here a place that has CPU-only builds of torch
#   make demo ARGS='--help'                         options for the program itself (demo, test, bench)

TORCH ?= torch==2.13.0
PIP_ARGS ?=
PYTHON ?= python3
ARGS ?=
export TORCH PIP_ARGS PYTHON

.PHONY: help demo test bench lint wheel clean

help:
	@sed -n 's/^#   //p' Makefile

demo test bench lint wheel:
	@ci/$@.sh $(ARGS)

clean:
	rm -rf .venv build dist python/palmette/lib
