"""The fork server imports once what each worker would import anew."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
    import sys
    import needed
    from loaders import DataLoader

    class Here:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return index

    def epoch(dataset):
        loader = DataLoader(dataset, 2, num_workers=1, multiprocessing_context="forkserver", collate_fn=needed.told)
        return list(loader)[0]

    if __name__ == "__main__":
        import json
        print(json.dumps([epoch(needed.Dataset()), epoch(needed.Dataset())]))
"""
NEEDED = """
    import os, sys
    LOADED_BY = os.getpid()

    class Dataset:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return index

    def told(samples):
        return {"pid": os.getpid(), "loaded by": LOADED_BY, "torch": "torch" in sys.modules, "samples": samples}
"""


def run(tmp_path: Path, program: str = PROGRAM, needed: str = NEEDED) -> Any:
    (tmp_path / "needed.py").write_text(textwrap.dedent(needed))
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(program))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_workers_find_the_modules_of_their_dataset_loaded_already(tmp_path: Path) -> None:
    first, second = run(tmp_path)
    assert first["loaded by"] == second["loaded by"]
    assert len({first["pid"], second["pid"], first["loaded by"]}) == 3
    assert first["samples"] == [0, 1]


def test_a_server_that_runs_already_is_left_as_it_is(tmp_path: Path) -> None:
    begin = "from multiprocessing import forkserver\n        forkserver.ensure_running()"
    first, second = run(tmp_path, PROGRAM.replace("import json\n", f"import json\n        {begin}\n", 1))
    assert (first["loaded by"], second["loaded by"]) == (first["pid"], second["pid"])


@pytest.mark.parametrize("fails", ["raise RuntimeError('not in the server')", "raise SystemExit(3)"])
def test_a_module_that_cannot_be_imported_by_the_server_is_imported_by_its_workers(tmp_path: Path, fails: str) -> None:
    guard = f"import sys\nif 'needed_by' not in vars(sys):\n    {fails}\n"
    program = PROGRAM.replace("import needed\n", "sys.needed_by = 'the program'\n    import needed\n", 1)
    first, second = run(tmp_path, program, guard + textwrap.dedent(NEEDED))
    assert first["samples"] == second["samples"] == [0, 1]


def test_the_server_imports_torch_only_where_the_users_own_modules_do(tmp_path: Path) -> None:
    script = """
        import json, multiprocessing, sys
        from loaders.workers.messages import Job
        from loaders.workers.preload import modules_of
        import needed
        job = Job(needed.Dataset(), "each", None, True, {}, False, 1, False, 1, 0, None)
        print(json.dumps(sorted(modules_of(job))))
    """
    assert not {name for name in run(tmp_path, script) if name.split(".")[0] == "torch"}
