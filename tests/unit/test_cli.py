"""The command line as a whole; each command has tests of its own."""

import subprocess
import sys


def test_help_names_the_commands_and_imports_nothing_heavy():
    script = """
import sys
from loaders.cli import app
try:
    app(["--help"], prog_name="loaders")
finally:
    print({"torch", "numpy", "cv2", "albumentations", "matplotlib"} & set(sys.modules))
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert all(name in found.stdout for name in ("bench", "doctor", "prepare"))
    assert found.stdout.splitlines()[-1] == "set()"
