"""One GGUF file as llama.cpp has it: mapped weights, and what the library knows of them."""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path

import torch

from deepen_ext.errors import ModelError
from deepen_ext.members.llama_cpp import api
from deepen_ext.members.llama_cpp.library import Library


class LlamaModel:
    """A loaded model. It is freed when nothing uses it any more; every context holds on to it.

    Attributes:
        library: where it is loaded.
        name: the member's, for errors.
        handle: llama_model, for the C API.
        vocab: its llama_vocab.
        vocab_size: V, the number of logits.
        on_gpu: its layers were offloaded.
    """

    def __init__(self, library: Library, path: Path, name: str, device: torch.device) -> None:
        """Map the file; nothing of it is copied on the CPU, but for weights that llama.cpp repacks.

        Args:
            library: see `library.load_library`.
            path: the GGUF file, its header checked already.
            name: for errors.
            device: "cpu", or a CUDA device that takes all layers.

        Raises:
            ModelError: the library has no kernels for the device, or it cannot load the file: damaged, of an
                architecture that it does not know, or no language model.
        """
        call = library.call
        self.library = library
        self.name = name
        self.on_gpu = device.type == "cuda"
        if self.on_gpu and not call.llama_supports_gpu_offload():
            raise ModelError(
                f"{name}: device={device} needs a llama.cpp that was built for CUDA, and {library.name} was "
                "not; install such a build (CMAKE_ARGS=-DGGML_CUDA=on pip install --no-binary :all: "
                "llama-cpp-python), use device='cpu', or backend='transformers'"
            )
        params = call.llama_model_default_params()
        params.n_gpu_layers = -1 if self.on_gpu else 0
        if self.on_gpu:
            params.split_mode, params.main_gpu = api.SPLIT_NONE, device.index or 0
        library.complaint()
        handle = call.llama_model_load_from_file(str(path).encode(), params)
        if not handle:
            raise ModelError(
                f"{name}: llama.cpp cannot load {path}: {library.complaint() or 'no reason given'}. Fetch "
                "the file again if it may be damaged. An architecture that this llama.cpp does not know may "
                "be known to a newer one, or to backend='transformers'"
            )
        self.handle: int = handle
        weakref.finalize(self, call.llama_model_free, handle)
        if (
            not call.llama_model_has_decoder(handle)
            or call.llama_model_has_encoder(handle)
            or call.llama_model_is_diffusion(handle)
        ):
            raise ModelError(f"{name}: {path} holds no causal language model; name another file")
        self.vocab: int = call.llama_model_get_vocab(handle)
        self.vocab_size: int = call.llama_vocab_n_tokens(self.vocab)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return int(self.library.call.llama_model_n_params(self.handle))

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights, as they lie in the file."""
        return int(self.library.call.llama_model_size(self.handle))

    @property
    def window(self) -> int | None:
        """How many positions back a layer with a sliding window sees; None where no layer has one."""
        return int(self.library.call.llama_model_n_swa(self.handle)) or None

    @property
    def keeps_positions(self) -> bool:
        """Whether each position has states of its own, so that a text can be cut and its beginning shared."""
        call = self.library.call
        return not (call.llama_model_is_recurrent(self.handle) or call.llama_model_is_hybrid(self.handle))

    def cell_values(self) -> int:
        """Numbers that one position of one text takes in the KV cache, over all layers (an estimate)."""
        call = self.library.call
        layers, heads = call.llama_model_n_layer(self.handle), call.llama_model_n_head(self.handle)
        width = call.llama_model_n_embd(self.handle) // max(heads, 1)
        key, value = (self._number(f"attention.{part}_length") or width for part in ("key", "value"))
        return int(layers * call.llama_model_n_head_kv(self.handle) * (key + value))

    def _number(self, setting: str) -> int | None:
        """A whole number of the file's settings, below its architecture's name."""
        architecture = self.setting("general.architecture")
        found = self.setting(f"{architecture}.{setting}")
        return int(found) if found.isdigit() else None

    def setting(self, key: str) -> str:
        """A setting of the file as text; "" where it has none of this name."""
        buffer = ctypes.create_string_buffer(256)
        self.library.call.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace")
