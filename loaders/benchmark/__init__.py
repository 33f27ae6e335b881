"""How fast a loader is, beside what its dataset and its machine allow: `measure(loader)` and `loaders bench`.

| module | what |
| --- | --- |
| `measurement` | `measure`: passes over a loader, and the figures of each |
| `processes` | CPU time and memory of all processes of a run |
| `alone` | the ceilings: the dataset without a loader, copies, copies to a device |
| `target` | what the command line names: `module:factory`, or a folder of images |
| `setups` | the loaders that are compared, each made in a process of its own |
| `run` | one part of a comparison, in a fresh process |
| `comparison` | all parts, interleaved, in rounds; the sentence that sums them up |
| `tables`, `show` | tables; ceilings and a plot |
| `command` | `loaders bench` |
"""

from loaders.benchmark.measurement import Measurement, Pass, measure
from loaders.benchmark.spread import Spread

__all__ = ["Measurement", "Pass", "Spread", "measure"]
