"""Load TorchScript files whose programs can do nothing but compute.

A TorchScript file is a program, and its operators read and write files, too. So before torch
compiles it, every word of its code is looked at: the name of an operator must be one of those that
image networks are made of. An operator runs only where its name stands, whatever stands around it.
"""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from embedder.errors import EncoderError, foreign_weights

_COMPUTING = """
NumToTensor RaiseException __contains__ __getitem__ __is__ __isnot__ __not__ __and__ __or__
_convolution _native_multi_head_attention _verify_batch_size abs adaptive_avg_pool1d
adaptive_avg_pool2d adaptive_max_pool2d add add_ addmm alias all amax any append arange
avg_pool2d baddbmm batch_norm bernoulli_ bmm bool broadcast_to cat ceil chunk clamp clamp_
clamp_max clamp_min clamp_min_ clone complex constant_pad_nd contiguous conv1d conv2d cos cpu
cuda detach device dict dim div div_ dropout dropout_ dtype einsum elu embedding empty eq erf
exp expand expand_as feature_dropout flatten float floor floor_divide floordiv format full
full_like ge gelu getitem grad group_norm gt hardsigmoid hardsigmoid_ hardswish hardswish_
hardtanh hardtanh_ index_select instance_norm int interpolate is_autocast_enabled is_cuda
is_floating_point is_grad_enabled is_nested item layer_norm layout le leaky_relu leaky_relu_ len
linalg_norm linalg_vector_norm linear list log log_softmax lt masked_fill masked_fill_ matmul
max max_pool2d mean min mish mode mul mul_ name native_batch_norm native_layer_norm ne neg
negative norm normalize one_hot ones ones_like outer pad permute pixel_shuffle positive pow
prelu prod range reciprocal relu relu6 relu6_ relu_ remainder repeat repeat_interleave
requires_grad reshape roll round rsqrt rsub scalar_tensor scaled_dot_product_attention select
selu set shape sigmoid sigmoid_ sign silu silu_ sin size slice softmax softplus split
split_with_sizes sqrt square squeeze squeeze_ stack std str stride sub sub_ sum t tanh tanh_
tensor threshold to transpose type type_as unbind unchecked_cast unchecked_unwrap_optional
unflatten unfold uninitialized unsqueeze unsqueeze_ upsample_bicubic2d upsample_bilinear2d
upsample_nearest2d values var view view_as warn where zero_ zeros zeros_like annotate
"""
_SPECIAL = frozenset({"print", "fork", "classes"})
"""Forms of the language that are no operators, and reach out of the program."""


def load_torchscript(path: Path) -> nn.Module:
    """Load a module that only computes.

    Raises:
        EncoderError: it is no TorchScript file, or names what image networks do without.
    """
    with foreign_weights(f"{path}: no TorchScript file", EncoderError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript; the files are given
        if strange := _strange_words(path):
            raise EncoderError(
                f"{path}: its program names {', '.join(strange[:5])}, which image networks do "
                "without, so it is not run; export the model to ONNX, and name it onnx:FILE"
            )
        load_script: Callable[..., nn.Module] = torch.jit.load
        return load_script(path, map_location="cpu")


def _strange_words(path: Path) -> list[str]:
    """Names in a file's code that are neither its own nor those of computing operators."""
    # Torch's own reader: it and another could read different files out of one archive.
    reader = torch._C.PyTorchFileReader(str(path))
    records = [name for name in reader.get_all_records() if not name.startswith("data/")]
    texts = [reader.get_record(name).decode("latin-1") for name in records]
    code = "\n".join(text for name, text in zip(records, texts, strict=True) if name[-3:] == ".py")
    found = set(re.findall(r"[A-Za-z_]\w*", code)) & (_operators() | _SPECIAL)
    if re.search(r"\bops\b(?!\.(?:prim|aten)\.)", code):
        found.add("ops")
    if any("torch.classes" in text for text in texts):
        found.add("torch.classes")
    return sorted(found - set(_COMPUTING.split()))


def _operators() -> set[str]:
    schemas = torch._C._jit_get_all_schemas()
    return {schema.name.rpartition("::")[2] for schema in schemas}
