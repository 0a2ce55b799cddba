"""The benchmarks are scripts, not a package: their folder goes on the path for their own tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
