"""Tiny prepared TFDS data sets, written without TensorFlow."""

import io
import json

import numpy as np
import pytest


@pytest.fixture
def write_tfds():
    return _write_tfds


def _write_tfds(directory, name, splits, file_format="array_record"):
    """Writes {split: (images, labels)} as TFDS does; returns the prepared folder."""
    import tensorflow_datasets as tfds

    version = str(tfds.builder_cls(name).VERSION)
    folder = directory / name / version
    folder.mkdir(parents=True)
    for split, (images, labels) in splits.items():
        path = folder / f"{name}-{split}.{file_format}-00000-of-00001"
        _write_records(path, images, labels)
    info = {
        "fileFormat": file_format,
        "name": name,
        "version": version,
        "splits": [
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": "1",
                "shardLengths": [str(len(labels))],
            }
            for split, (_, labels) in splits.items()
        ],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(json.dumps(_features(images.shape[1:])))
    return folder


def _write_records(path, images, labels):
    from array_record.python.array_record_module import ArrayRecordWriter
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_pb2

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for image, label in zip(images, labels, strict=True):
        png = io.BytesIO()
        pixels = image[..., 0] if image.shape[-1] == 1 else image
        Image.fromarray(np.ascontiguousarray(pixels)).save(png, "PNG")
        example = tf_example_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(png.getvalue())
        example.features.feature["label"].int64_list.value.append(int(label))
        writer.write(example.SerializeToString())
    writer.close()


def _features(image_shape):
    package = "tensorflow_datasets.core.features"
    dimensions = [str(size) for size in image_shape]
    return {
        "pythonClassName": f"{package}.features_dict.FeaturesDict",
        "featuresDict": {
            "features": {
                "image": {
                    "pythonClassName": f"{package}.image_feature.Image",
                    "image": {"dtype": "uint8", "shape": {"dimensions": dimensions}},
                },
                "label": {
                    "pythonClassName": f"{package}.class_label_feature.ClassLabel",
                    "classLabel": {"numClasses": "10"},
                },
            }
        },
    }
