"""Samples from Arrow tables, Arrow and Parquet files, and datasets of Hugging Face. Needs pyarrow.

| module | what |
| --- | --- |
| `dataset` | `ArrowDataset` |
| `fields` | what the fields of a sample are, found from a schema |
| `sources` | where the rows come from |
| `pieces` | a table that is in memory or mapped, and its rows as samples |
| `columns`, `blocks` | the values of a column, read through NumPy views of Arrow's memory |
| `values` | values that have no fixed size |
| `files`, `parquet`, `ipc` | tables in files: their units of reading, and a worker's own reader |
| `huggingface` | what a `datasets.Dataset` consists of |
| `faults` | why a value cannot be read |
"""
