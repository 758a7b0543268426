# SPDX-License-Identifier: Apache-2.0
"""Readable PyTorch in float64 for every operator: the oracle of the tests, and the maths written down."""
