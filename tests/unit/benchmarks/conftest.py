"""`benchmarks` is no installed package: it is found beside `tests`, from wherever pytest is started."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3]))
