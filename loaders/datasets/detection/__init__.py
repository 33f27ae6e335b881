"""Pictures with annotations: boxes, masks and keypoints of COCO, YOLO and Pascal VOC, and folders of masks.

| module | what |
| --- | --- |
| `problems` | what is wrong with a data set: refused, or left out and counted |
| `table` | the annotations of all pictures in a few arrays, and the builder that fills them |
| `segments` | outlines and run lengths of objects, packed; masks made of them |
| `run_lengths` | run lengths of masks in COCO's two notations |
| `found`, `plain_xml`, `yolo_folder` | which pictures exist, and the files that say so |
| `dataset` | what the three readers share: a picture with its rows of the table |
| `coco`, `yolo`, `voc` | the readers of the three formats |
| `mask_folder` | pictures and masks in two folders |
"""
