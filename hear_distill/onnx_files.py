"""ONNX files of a student: front end and encoder, apart and together, in float32, float16 and int8; and their parity.

in:   a Student, and a folder
out:  model.onnx, model_fp16.onnx, model_int8.onnx (waveform in), encoder*.onnx (spectrogram in), frontend.onnx

Every graph takes float32 and gives float32, for any batch and any length. The front end is float32 in all of them:
float16 cannot hold the floor of PCEN, 1e-8, and int8 no spectrum. Needs the extra `export` of this package.

B clips   n samples   R spectrogram rows   D width of an embedding
"""

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import compose
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn
from torch.export import Dim

from hear_distill.files import atomic_write
from hear_distill.frontend import CLIP_SAMPLES, MelPcen
from hear_distill.onnx_graph import Encoder, PlainMelPcen
from hear_distill.student import MEL_BANDS, PATCH, Student

OPSET = 20  # has Gelu as one operator; ONNX Runtime reads it since 1.17
ENDINGS = {"fp32": "", "fp16": "_fp16", "int8": "_int8"}  # of the files' names, as other model repositories have them
WAVEFORM, SPECTROGRAM, EMBEDDING = "waveform", "spectrogram", "embedding"
FRONTEND_FILE = "frontend.onnx"
# What a file must reach on every sound that it is compared on: the largest relative error, and the mean cosine.
MAX_RELATIVE_ERROR = {"fp32": 1e-4}
MIN_COSINE = {"fp16": 0.999, "int8": 0.99}
PARITY_BATCH = 16


def export(student: Student, folder: Path) -> None:
    """Write the seven graphs. The two networks and the front end are exported once each and then put together."""
    samples = torch.zeros(2, CLIP_SAMPLES + 1)  # 2.5 s once padded: nothing shall look as if it were always 2 s
    frontend = exported(PlainMelPcen(), samples, {0: Dim("batch"), 1: Dim("samples")}, (WAVEFORM, SPECTROGRAM))
    image, sizes = torch.zeros(2, 1, 15 * PATCH, MEL_BANDS), {0: Dim("batch"), 2: PATCH * Dim("patch_rows")}
    names = (SPECTROGRAM, EMBEDDING)
    full = exported(Encoder(copy.deepcopy(student).float()), image, sizes, names)
    encoders = {
        "fp32": full,
        "fp16": exported(Encoder(copy.deepcopy(student).half()), image, sizes, names),
        "int8": quantised(full, folder),
    }
    write(frontend, folder / FRONTEND_FILE)
    for precision, encoder in encoders.items():
        write(encoder, folder / f"encoder{ENDINGS[precision]}.onnx")
        write(joined(frontend, encoder), folder / f"model{ENDINGS[precision]}.onnx")


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch and onnxruntime tell about themselves: missing torchvision, deprecations within torch."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "root")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*treespec")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def exported(
    module: nn.Module, example: Tensor, sizes: Mapping[int, object], names: tuple[str, str]
) -> onnx.ModelProto:
    """The graph of a module with one input and one output; `sizes` names the axes that may have any size."""
    with quiet():
        program = torch.onnx.export(
            module.eval(),
            (example,),
            dynamo=True,
            verbose=False,
            input_names=names[:1],
            output_names=names[1:],
            dynamic_shapes=(sizes,),
            opset_version=OPSET,
        )
    model = program.model_proto
    for item in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info, model.graph):
        del item.metadata_props[:]  # the exporter's notes: lines and paths of the source on this machine
    model.producer_name, model.producer_version = "hear-distill", ""
    return model


def quantised(encoder: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """Weights of the linear layers as bytes, one scale per output; activations are scaled as they come, per tensor.

    Bytes without a sign, with which every processor computes the same. With a sign, 24 ms of CPU time for a clip on one
    with VNNI instructions instead of 40, at the same cosine of 0.996; but without those, sums of two products saturate.
    Seven bits with a sign never do, and are as fast, at a cosine of 0.988 (a small student, 32 real clips).
    """
    path = folder / "quantised.tmp"
    with quiet():
        quantize_dynamic(encoder, path, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QUInt8)
    model = onnx.load(path)
    path.unlink()
    return model


def joined(frontend: onnx.ModelProto, encoder: onnx.ModelProto) -> onnx.ModelProto:
    """Waveform in, embedding out."""
    parts = [
        compose.add_prefix(model, prefix, rename_inputs=False, rename_outputs=False)
        for model, prefix in ((frontend, "frontend/"), (encoder, "encoder/"))
    ]
    parts[0].ir_version = parts[1].ir_version = max(part.ir_version for part in parts)
    model = compose.merge_models(*parts, io_map=[(SPECTROGRAM, SPECTROGRAM)], producer_name="hear-distill")
    del model.opset_import[1:]  # both parts state the same one
    return model


def write(model: onnx.ModelProto, path: Path) -> None:
    """One file, weights and all; checked first."""
    onnx.checker.check_model(model)
    with atomic_write(path) as f:
        f.write(model.SerializeToString())


def open_session(path: Path, num_threads: int = 1) -> onnxruntime.InferenceSession:
    """The graph in ONNX Runtime, on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@torch.inference_mode()
def parity(student: Student, folder: Path, batches: Sequence[np.ndarray]) -> dict[str, dict[str, float | bool]]:
    """How far each model in `folder` is from torch, on batches [B, n] float32 of any lengths; two clips or more in all.

    Returns:
        By file name: `max_relative_error`, the largest difference in a clip by the largest value in its embedding;
        `cosine`, the mean over clips of the cosine after the mean embedding is taken off, as a large common part hides
        errors; and `passed`, whether the limit of its precision is kept.
    """
    frontend, student = MelPcen(), student.float().cpu()
    images = [frontend(torch.from_numpy(batch)) for batch in batches]  # each [B, 1, R, M]
    expected = np.concatenate([student(image).numpy() for image in images])  # [clips, D]
    inputs = {"model": batches, "encoder": [image.numpy() for image in images]}
    found = {}
    for part, given in inputs.items():
        for precision, ending in ENDINGS.items():
            session = open_session(folder / f"{part}{ending}.onnx")
            name = session.get_inputs()[0].name
            outputs = np.concatenate([session.run(None, {name: batch})[0] for batch in given])  # [clips, D]
            error, cosine = compared(expected, outputs)
            is_close = error <= MAX_RELATIVE_ERROR.get(precision, np.inf) and cosine >= MIN_COSINE.get(precision, -1)
            found[f"{part}{ending}.onnx"] = {"max_relative_error": error, "cosine": cosine, "passed": bool(is_close)}
    return found


def compared(expected: np.ndarray, outputs: np.ndarray) -> tuple[float, float]:
    """Largest relative error and mean centred cosine of [clips, D] against [clips, D]; NaN where either has one."""
    error = float((np.abs(outputs - expected).max(axis=1) / np.abs(expected).max(axis=1)).max())
    a, b = (values.astype(np.float64) - expected.mean(axis=0, dtype=np.float64) for values in (expected, outputs))
    cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return error, float(cosine.mean())
