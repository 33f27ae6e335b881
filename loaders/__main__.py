"""`python -m loaders` is the command line."""

from loaders.cli import app

if __name__ == "__main__":
    app(prog_name="loaders")
