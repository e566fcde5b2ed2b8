"""Weights of 8 or 4 bits: rounded by torchao while a model loads, or as its checkpoint holds them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from transformers import TorchAoConfig

from deepen_ext.errors import DeepenError, InputError, ModelError
from deepen_ext.ground.warning import warn
from deepen_ext.members.hf.loaded_model import inner_model
from deepen_ext.members.hf.placement import home
from deepen_ext.members.load_options import LoadOptions

GROUP = 32  # weights of a row that share a scale under int4: the smallest group that torch's kernels know
_ROWS = 16  # torch packs int4 weights of the CPU in blocks of so many rows
_AMPERE = 8

# By the method that a config names: the modules that transformers imports, and how pip calls their packages.
_PACKAGES = {
    "awq": {"gptqmodel": "gptqmodel"},
    "bitsandbytes": {"bitsandbytes": "bitsandbytes"},
    "compressed-tensors": {"compressed_tensors": "compressed-tensors"},
    "gptq": {"gptqmodel": "gptqmodel", "optimum": "optimum"},
    "torchao": {"torchao": "torchao"},
}


def method_of(config: Any) -> str | None:
    """How a checkpoint's weights are quantised, such as "gptq", by its config; None where they are not."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings["quant_method"] if isinstance(settings, dict) else settings.quant_method
    return str(getattr(method, "value", method))


def check_packages(method: str, name: str) -> None:
    """Refuse a quantised checkpoint whose package is not installed.

    Raises:
        ModelError: it names the packages and the command that installs them.
    """
    needed = {**_PACKAGES.get(method, {}), "accelerate": "accelerate"}
    if missing := [package for module, package in needed.items() if find_spec(module) is None]:
        raise ModelError(
            f"{name}: its weights are quantised by {method}, which needs {' and '.join(missing)}; install "
            f"with pip install {' '.join(missing)}"
        )


def check_installed(package: str, what: str) -> None:
    """Refuse what needs a package that is missing.

    Raises:
        InputError: it names the command that installs it.
    """
    if find_spec(package) is None:
        raise InputError(f"{what} needs {package}; install with pip install {package}")


def dtype_of(options: LoadOptions, method: str | None, name: str) -> torch.dtype | str:
    """The dtype of what is not quantised, and of the products: the one asked for, or the kernels' own.

    Raises:
        InputError: int4 with another dtype than bfloat16.
    """
    if options.quantization == "int4":
        if options.dtype is not None and options.torch_dtype != torch.bfloat16:
            raise InputError(
                f"{name}: quantization='int4' with dtype={str(options.torch_dtype).removeprefix('torch.')}: "
                "torch's int4 kernels are made for bfloat16 (on the CPU float32 takes twenty times the time "
                "of weights that are not quantised; on CUDA there is none). Leave dtype out, or give bfloat16"
            )
        return torch.bfloat16
    if method is not None and options.dtype is None:
        return "auto"
    return options.torch_dtype


def check_quantization(options: LoadOptions, method: str | None, name: str) -> None:
    """Refuse what `quantization` cannot do, before anything is loaded.

    Raises:
        InputError: the checkpoint is quantised already, torchao is missing, or the device lacks the kernels.
    """
    kind = options.quantization
    if kind is None:
        return
    if method is not None:
        raise InputError(
            f"{name}: its weights are quantised already, by {method}; leave quantization={kind!r} out"
        )
    for package in ("torchao", "accelerate"):
        check_installed(package, f"{name}: quantization={kind!r}")
    if options.device_map is None:
        check_device(kind, torch.device(options.device), name)


def check_device(kind: str, device: torch.device, name: str) -> None:
    """Refuse a device that has no kernels for such weights.

    Raises:
        InputError: see above.
    """
    where = f"{name}: quantization={kind!r} on {device}"
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"{where}: torchao has kernels for the CPU and for CUDA devices alone")
    if device.type == "cuda" and kind == "int4":
        major, minor = torch.cuda.get_device_capability(device)
        if major < _AMPERE:
            raise InputError(
                f"{where}: torch's int4 kernel needs compute capability {_AMPERE}.0 or above, and this "
                f"device has {major}.{minor}; give quantization='int8'"
            )


def check_layers(blueprint: Any, kind: str, name: str) -> None:
    """Refuse int4 for a model whose linear layers do not fit its groups; torchao would leave them out.

    Warns of weights that are not rounded because they are no linear layers, as the experts of some models.

    Args:
        blueprint: the model without memory for its weights.
        kind: "int8" or "int4".
        name: for the message.

    Raises:
        InputError: it names the first such layer.
    """
    experts = {part: one.nbytes for part, one in blueprint.named_parameters() if one.dim() > 2}
    if experts:
        size = sum(experts.values()) / 1e9
        warn(
            f"{name}: quantization={kind!r} leaves {size:.2f} GB as they are, which are no linear layers, "
            f"such as {next(iter(experts))}"
        )
    if kind != "int4":
        return
    for layer, module in blueprint.named_modules():
        if is_quantised_layer(blueprint, module) and (
            module.in_features % GROUP or module.out_features % _ROWS
        ):
            raise InputError(
                f"{name}: quantization='int4' needs linear layers with a multiple of {GROUP} inputs and of "
                f"{_ROWS} outputs, and {layer} has {module.in_features} and {module.out_features}; give "
                "quantization='int8'"
            )


def is_quantised_layer(model: Any, module: torch.nn.Module) -> bool:
    """Whether `quantization` rounds a module's weight: linear layers but for the head, as transformers does.

    The head is often the embedding too, and its rounding costs the most.
    """
    return isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()


def torchao_config(kind: str, device: torch.device) -> TorchAoConfig:
    """What makes `from_pretrained` round weights as it reads them, one after the other."""
    return TorchAoConfig(_recipe(kind, device))


def quantise(model: Any, kind: str, device: torch.device) -> None:
    """Round the weights of a model that is in memory already: the same as on load."""
    with _quiet_import():
        from torchao.quantization import quantize_

    quantize_(model, _recipe(kind, device), lambda module, _: is_quantised_layer(model, module))


def _recipe(kind: str, device: torch.device) -> Any:
    with _quiet_import():
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    if kind == "int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    if device.type == "cuda":  # the packing of torch's own kernel; the others need further packages
        return Int4WeightOnlyConfig(
            group_size=GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    try:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    except ImportError as error:
        raise InputError(
            "quantization='int4' on the CPU needs the int4 weights of torchao 0.18, which this version does "
            "not have; install with pip install 'torchao==0.18.*', or give quantization='int8'"
        ) from error
    return PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)


def try_out(model: Any, name: str) -> None:
    """Run one token through a model of quantised weights, so that missing kernels are found at once.

    Some packages unpack their weights in the first forward pass; that is done then, too.

    Raises:
        ModelError: it fails.
    """
    method = method_of(inner_model(model).config)
    if method is None:
        return
    # Of each product it says that inputs are rounded to float16, at each step.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    device = home(model)
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=device), use_cache=False)
    except DeepenError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{name}: its weights are quantised by {method}, whose kernels do not run on {device}: "
            f"{lines[0]}. Load it on a device that they are made for (such as device='cuda'), or take the "
            "checkpoint that is not quantised"
        ) from error


@contextmanager
def _quiet_import() -> Iterator[None]:
    """torchao's notes about kernels for other devices, which it cannot load, stay away from the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
