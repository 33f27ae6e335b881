"""How fast a loader is, compared with what its dataset and machine allow: `measure(loader)` and `loaders bench`.

| module | what |
| --- | --- |
| `measurement` | `measure`: passes over a loader, and figures for each |
| `processes` | CPU time and memory of all processes in a run |
| `alone` | the ceilings: the dataset without a loader, copies, copies to a device |
| `target` | what the command line names: `module:factory`, or a folder of images |
| `setups` | the loaders to compare, each created in its own process |
| `run` | one part of a comparison, in a fresh process |
| `comparison` | all parts, interleaved in rounds; the summary sentence |
| `tables`, `show` | tables; ceilings and a plot |
| `command` | `loaders bench` |
"""

from loaders.benchmark.measurement import Measurement, Pass, measure
from loaders.benchmark.spread import Spread

__all__ = ["Measurement", "Pass", "Spread", "measure"]
