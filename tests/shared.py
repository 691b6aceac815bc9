"""Where the shared test data lies; tests that need it skip where it is not."""

import pathlib

import pytest

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"
needs_shared = pytest.mark.skipif(
  not SHARED.exists(), reason=f"test data {SHARED} is not on this machine"
)
