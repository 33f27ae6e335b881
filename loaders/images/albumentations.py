"""Albumentations pipelines on whole samples, seeded from `sample_rng()`."""

from __future__ import annotations

from typing import Any

import numpy as np

from loaders.errors import FieldDtypeError, FieldNameError, FieldShapeError, add_note
from loaders.nested import children, is_namedtuple, rebuild
from loaders.randomness.streams import Domain, KeyedGenerator, sample_rng
from loaders.system.opencv_threads import quiet_opencv
from loaders.timing.stages import AUGMENT

# The argument that declares the format of a target to a pipeline, and an example.
_PARAMS = {
    "bboxes": ("bbox_params", 'A.BboxParams("pascal_voc")'),
    "keypoints": ("keypoint_params", 'A.KeypointParams("xy")'),
}


class Albumentations:
    """Applies an Albumentations pipeline to whole samples.

        transform = Albumentations(A.Compose([A.RandomCrop(224, 224), A.HorizontalFlip()]))
        dataset = ImageFolder("train", transform)

    The fields named below go through the pipeline if the sample has them; all others stay unchanged. The fields of a
    plain tuple or list are named "0", "1", …, and the first is the image unless `image` names another.

    Each call seeds the pipeline from `sample_rng()`, so workers and epochs do not repeat each other's random numbers,
    and a seed passed to the pipeline itself has no effect.

    Only the pipeline's public interface is used: `set_random_state`, or else `set_random_seed`, the call, and, if
    present, attributes such as `available_keys` and `processors`, which list the targets that it accepts.

    Args:
        transform: an `albumentations.Compose`, or a single transform. It holds random state, so threads must not share
            it: give each thread a `copy.deepcopy` of this object.
        image: the field with the image, (H, W) or (H, W, C); likewise `mask`; `masks` is (N, H, W) or a list of masks.
        boxes: the field with bounding boxes, (N, 4 or more) in the format the pipeline declares (`bbox_params`).
        labels: the field, or fields, with one row per box, of any dtype and shape. The pipeline must declare them by
            the same name: `BboxParams(..., label_fields=["labels"])`.
        box_rows: fields with one row per box, such as "masks" or "iscrowd", of which the rows of dropped boxes are
            dropped, too. They need not be declared, but the sample must have one of the `labels`, which is.
        keypoints: the field with keypoints, (N, 2 or more); `keypoint_labels` as `labels`, in `keypoint_params`.
        targets: the fields of other targets of the pipeline, such as its `additional_targets`: `image2="right_image"`.

    Returns:
        (when called) a new sample of the same type. Boxes and keypoints are float32 (N, columns as given), even when no
        rows are left; their labels keep type and dtype, and lose the same rows.

    Raises:
        FieldNameError: (when called) the sample has none of the fields, or has boxes, keypoints, labels or targets that
            the pipeline does not declare: `bbox_params`, `keypoint_params`, `label_fields`, `additional_targets`.
        FieldDtypeError: a field was an ndarray, and the pipeline returned something else for it.
        FieldShapeError: labels do not match the rows of their boxes or keypoints, before or after the pipeline.
    """

    keys_itself = True  # it seeds its pipeline from `sample_rng()`: see `randomness.transforms`

    def __init__(
        self,
        transform: Any,
        *,
        image: str = "image",
        mask: str = "mask",
        masks: str = "masks",
        boxes: str = "boxes",
        labels: str | tuple[str, ...] = "labels",
        box_rows: str | tuple[str, ...] = (),
        keypoints: str = "keypoints",
        keypoint_labels: str | tuple[str, ...] = "keypoint_labels",
        **targets: str,
    ) -> None:
        if not callable(transform) or not (
            hasattr(transform, "set_random_state") or hasattr(transform, "set_random_seed")
        ):
            raise TypeError(
                f"transform is a {type(transform).__name__}, not an Albumentations pipeline: it has no "
                "set_random_state. Pass A.Compose([...]); pass other functions to the dataset directly."
            )
        self.transform = transform
        self.image = image
        self.mask = mask
        self.masks = masks
        self.boxes = boxes
        self.labels = labels
        self.box_rows = box_rows
        self.keypoints = keypoints
        self.keypoint_labels = keypoint_labels
        self.targets = targets
        self._keyed = KeyedGenerator()

    def __call__(self, sample: Any) -> Any:
        """A new sample of the same type, augmented."""
        with AUGMENT:
            return self._augmented(sample)

    def _augmented(self, sample: Any) -> Any:
        quiet_opencv()
        fields = dict(children(sample) or ())
        names = self._names(sample, fields)
        passed = {target: fields[name] for target, name in names.items()}
        tables = [
            (target, _as_tuple(labels), columns)
            for target, labels, columns in (("bboxes", self.labels, 4), ("keypoints", self.keypoint_labels, 2))
            if target in names
        ]
        for target, labels, columns in tables:
            passed[target] = _as_table(fields[names[target]], columns)
            for label in labels:
                if label in fields:
                    passed[label] = _row_numbers(label, fields[label], names[target], len(passed[target]))
        self._refuse_unknown(names)
        self._seed()
        results = self._run(passed)
        for target, name in names.items():
            fields[name] = _checked(name, fields[name], results[target])
        for target, labels, _ in tables:
            name = names[target]
            fields[name] = np.asarray(results[target], np.float32).reshape(-1, passed[target].shape[1])
            for label in labels:
                if label in fields:
                    kept = _kept_rows(label, fields[label], results[label], name, len(fields[name]))
                    fields[label] = self._known(label, target, kept)
        if "bboxes" in names:
            self._drop_rows(fields, names["bboxes"], results, len(passed["bboxes"]))
        return rebuild(sample, list(fields.values()))

    def __repr__(self) -> str:
        return f"Albumentations({type(self.transform).__name__})"

    def _names(self, sample: Any, fields: dict[str, Any]) -> dict[str, str]:
        """The pipeline's name → the sample's field, for each target that the sample has."""
        unnamed = isinstance(sample, (tuple, list)) and not is_namedtuple(sample)
        image = "0" if unnamed and self.image not in fields else self.image
        names = {
            "image": image,
            "mask": self.mask,
            "masks": self.masks,
            "bboxes": self.boxes,
            "keypoints": self.keypoints,
            **self.targets,
        }
        present = {target: name for target, name in names.items() if fields.get(name) is not None}
        if not present:
            found = ", ".join(map(repr, fields)) or f"none, it is a {type(sample).__name__}"
            raise FieldNameError(
                f"The sample has nothing to augment. Its fields: {found}; expected {image!r} or another of {names}.\n"
                f'  Name the field with the image: Albumentations(transform, image="...").'
            )
        return present

    def _refuse_unknown(self, names: dict[str, str]) -> None:
        """Refuse targets that the pipeline does not declare: it would take boxes for fractions of the picture."""
        known = getattr(self.transform, "available_keys", None)
        if known is None or not getattr(self.transform, "transforms", True):
            return  # it does not list its targets, or is empty and changes nothing
        processors, additional = _processors(self.transform), getattr(self.transform, "additional_targets", {})
        for target, name in names.items():
            kind = additional.get(target, target)
            argument = _PARAMS.get(kind)
            if argument is not None and kind in known and kind not in processors:
                raise FieldNameError(
                    f'field "{name}": the pipeline does not know the format of its {kind} and would transform them '
                    f"wrongly: {argument[0]} is missing.\n"
                    f"  Pass it where the pipeline is made: A.Compose([...], {argument[0]}={argument[1]}).",
                    field=name,
                )
            if target in self.targets and target not in known:
                raise FieldNameError(
                    f'field "{name}": the pipeline has no target "{target}" and would leave it unchanged.\n'
                    f'  Declare it where the pipeline is made, as additional_targets={{"{target}": "image"}}.',
                    field=name,
                )

    def _known(self, label: str, target: str, kept: Any) -> Any:
        processor = _processors(self.transform).get(target)
        if processor is not None and label not in (processor.params.label_fields or ()):
            argument, declaration = _PARAMS[target]
            raise FieldNameError(
                f'field "{label}": the pipeline does not know these labels of its {target}, and does not drop their '
                f"rows with them.\n  Declare them where the pipeline is made: {argument}="
                f'{declaration.removesuffix(")")}, label_fields=["{label}"]).',
                field=label,
            )
        return kept

    def _drop_rows(self, fields: dict[str, Any], boxes: str, results: dict[str, Any], count: int) -> None:
        """Drop the rows of dropped boxes from the fields of `box_rows`; `count` boxes were given to the pipeline."""
        present = [name for name in _as_tuple(self.box_rows) if name in fields]
        labels = [label for label in _as_tuple(self.labels) if label in fields]
        if present and not labels:
            raise FieldNameError(
                f'field "{present[0]}": its rows follow those of "{boxes}", but the sample has no labels, by which '
                "dropped boxes are found.\n  Give each box a label, and name the field in labels= and label_fields=.",
                field=present[0],
            )
        for name in present:
            _row_numbers(name, fields[name], boxes, count)  # raises: not one row per box
            fields[name] = _kept_rows(name, fields[name], results[labels[0]], boxes, len(fields[boxes]))

    def _seed(self) -> None:
        word = int(sample_rng().bit_generator.random_raw())
        if not hasattr(self.transform, "set_random_state"):
            self.transform.set_random_seed(word)
            return
        # The same two generators are re-keyed each time: making new ones costs more.
        self._keyed.rekey(Domain.TRANSFORM, word, 0, 0)
        self._keyed.python.seed(word)
        self.transform.set_random_state(self._keyed.numpy, self._keyed.python)

    def _run(self, passed: dict[str, Any]) -> dict[str, Any]:
        masks = passed.get("masks")
        # Albumentations 2.0.8 cannot stack zero masks; an image without objects is valid.
        no_masks = isinstance(masks, np.ndarray) and len(masks) == 0
        try:
            results: dict[str, Any] = self.transform(
                **{k: v for k, v in passed.items() if not (no_masks and k == "masks")}
            )
        except Exception as error:
            given = ", ".join(f"{name}: {_summary(value)}" for name, value in passed.items())
            add_note(error, f"Raised by the Albumentations pipeline, which was given {given}.")
            raise
        if no_masks and masks is not None:
            size = results["image"].shape[:2] if "image" in results else masks.shape[1:3]
            results["masks"] = np.zeros((0, *size, *masks.shape[3:]), masks.dtype)
        return results


def _processors(transform: Any) -> dict[str, Any]:
    """Processors of boxes and keypoints, by target; a transform taken from a Compose may have some but uses none."""
    processors: dict[str, Any] = getattr(transform, "processors", {}) if hasattr(transform, "preprocess") else {}
    return processors


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _as_table(rows: Any, columns: int) -> np.ndarray:
    table = np.array(rows, np.float32)  # a copy: the pipeline may write into its input
    return table if table.ndim > 1 else table.reshape(-1, columns)


def _row_numbers(label: str, labels: Any, name: str, count: int) -> np.ndarray:
    """Row numbers that go through the pipeline in place of labels, which it would cast to float32 and flatten.

    They are negative, to distinguish them from rows that the pipeline adds from elsewhere, which have no labels here.
    """
    if len(labels) != count:
        raise FieldShapeError(
            f'field "{label}": {len(labels)} rows, but "{name}" has {count}; expected one per row.', field=label
        )
    return np.arange(-count, 0)


def _kept_rows(label: str, labels: Any, rows: Any, name: str, count: int) -> Any:
    rows = np.asarray(rows, np.int64).reshape(-1)
    if len(rows) != count or (rows >= 0).any():
        raise FieldShapeError(
            f'field "{label}": the pipeline returned {len(rows)} labels for {count} rows of "{name}", or labels of '
            "rows that are not in the sample.\n  Declare the field where the pipeline is made: "
            f'BboxParams or KeypointParams(..., label_fields=["{label}"]).',
            field=label,
        )
    return labels[rows] if isinstance(labels, np.ndarray) else [labels[row] for row in rows]


def _checked(name: str, given: Any, result: Any) -> Any:
    if isinstance(given, np.ndarray) and not isinstance(result, np.ndarray):
        raise FieldDtypeError(
            f'field "{name}": the pipeline returned a {type(result).__name__}, expected an ndarray.\n'
            "  Remove ToTensorV2: samples stay NumPy arrays, and become tensors once per batch, when collated.",
            field=name,
        )
    return result


def _summary(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
