"""The small pictures of the stages' tests serve here too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "curation" / "stages"))
