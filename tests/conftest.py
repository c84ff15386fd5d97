"""Makes the helper modules beside the tests, and the tiny model's prompts, importable."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples" / "tiny_deepseek")]
