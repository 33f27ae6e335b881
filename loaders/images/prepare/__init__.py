"""Writing a folder of photos anew, with restart markers in its JPEGs: `loaders prepare SRC DST`.

| module | what |
| --- | --- |
| `photo` | one JPEG, with markers |
| `outcome` | one file of a folder, written whole or not at all, and what became of it |
| `claim` | the folder to write to: of one kind, for one run at a time |
| `folders` | all of a folder, by many processes, going on where it was stopped |
| `run` | what the command prints |
"""
