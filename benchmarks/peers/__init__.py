"""One module per peer. Each has the same names, and leaves out what the peer does not do:

| name | what |
| --- | --- |
| `NAME` | for tables |
| `REQUIREMENTS` | what `python -m benchmarks.peers.install PEER` installs into an environment of its own, pinned |
| `WHY_NOT` | instead of them: why it is not measured |
| `samples(dataset, batch_size, workers)` | batches of a NumPy dataset that is read by index |
| `photos(photos, batch_size, workers, normalised)` | batches of JPEG files, randomly cropped and mirrored |
| `prepare(photos)` | what must be written to `photos.prepared` before, untimed |

Both give an iterable with a batch's images under "image", or first in a tuple; each iteration is an epoch.
"""

PEERS = (
    "ours",
    "torch_loader",
    "torchvision_pil",
    "timm_recipe",
    "spdl_pipeline",
    "dali_cpu",
    "ffcv_loader",
    "tf_data",
    "grain_loader",
    "webdataset_loader",
    "litdata_loader",
    "streaming_loader",
    "hf_datasets",
)
