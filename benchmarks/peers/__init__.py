"""One module per peer. Each defines these names, except for what the peer does not support:

| name | meaning |
| --- | --- |
| `NAME` | the peer's name in tables |
| `REQUIREMENTS` | pinned packages that `python -m benchmarks.peers.install PEER` installs into its environment |
| `SYSTEM` | Debian packages that compiling these needs, to be installed by hand |
| `WHY_NOT` | instead of `REQUIREMENTS`: why the peer is not measured |
| `samples(dataset, batch_size, workers)` | batches of a NumPy dataset, read by index |
| `photos(photos, batch_size, workers, normalised)` | batches of JPEG files, randomly cropped and mirrored |
| `prepare(photos)` | writes what `photos` needs to `photos.prepared`, untimed |

`samples` and `photos` return an iterable of batches, with the images under "image" or first in a tuple; each iteration
is an epoch.
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
