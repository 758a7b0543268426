# SPDX-License-Identifier: Apache-2.0
"""Integrations with other libraries; each module needs its library, this package none."""
