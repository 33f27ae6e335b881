"""What is wrong with a machine or a dataset, and what to do about it: `loaders doctor`.

| module | what |
| --- | --- |
| `finding` | a `Finding`: what was checked, how bad it is, the remedy |
| `machine` | memory, descriptors, cores, decoders, accelerators |
| `samples` | samples read on trial, and what they show |
| `behaviour` | the dataset itself: randomness, copies, workers |
| `open_files` | files and databases that a fork would share |
| `imports` | what a worker imports, with times |
| `examine` | all checks in order |
| `command` | `loaders doctor` |
"""

from loaders.doctor.examine import examine_dataset, examine_machine
from loaders.doctor.finding import Finding

__all__ = ["Finding", "examine_dataset", "examine_machine"]
