"""Samples from tar shards in WebDataset's layout, read at random without unpacking them.

| module | what |
| --- | --- |
| `headers` | one header block, and the records that precede it |
| `scan` | the members of one shard, found by reading its headers |
| `index` | where every member of every shard lies, in arrays |
| `index_file` | an index in a file |
| `names` | the shards that a pattern stands for |
| `shards` | open shards: a bounded number of descriptors in each process, and the bytes of a member |
| `fields` | which members become which fields, and how they are decoded |
| `tar_files` | the dataset |
"""
