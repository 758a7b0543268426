# SPDX-License-Identifier: Apache-2.0
"""Palmette's benchmarks: workloads, peers, ceilings, and reports of how they compare (see README.md)."""
