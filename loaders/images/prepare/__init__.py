"""Writing a folder of photos anew, with restart markers in its JPEGs: `loaders prepare SRC DST`.

| module | what |
| --- | --- |
| `photo` | one JPEG, with markers |
| `tree` | a folder of them, by many processes, going on where it was stopped |
| `run` | what the command prints |
"""
