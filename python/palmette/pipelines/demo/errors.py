# SPDX-License-Identifier: Apache-2.0
"""What the demo may find wrong."""


class DisagreementError(AssertionError):
    """Two methods came to different results."""
