"""Copies a folder of photos, adding restart markers to its JPEGs: `loaders prepare SRC DST`.

| module | what |
| --- | --- |
| `photo` | adds markers to one JPEG |
| `outcome` | one file of a folder, written atomically, and its outcome |
| `claim` | claims the target folder: for one method, for one run at a time |
| `folders` | a whole folder, with several processes, resumable after a stop |
| `run` | what the command prints |
"""
