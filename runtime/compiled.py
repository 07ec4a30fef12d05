"""Models of Llama's kind, decoded by one compiled function instead of hundreds of operators.

Knows which modules such a model consists of and how `decode.cpp` wants them; knows no requests. A
model qualifies by what it computes: it is taken apart by the names that transformers uses, and must
then give the logits that the module itself gives. Everything else stays with torch.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator, Sequence as Many
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from runtime.kv import blocks_for
from runtime.linear import PieceLinear
from runtime.native_linear import LinearStruct, NativeLinear
from runtime.paged_kernel import PagedKernel, step_of
from runtime.step_layout import SHORT_TOKENS, Span, StepLayout, lay_out
from runtime.surgery import FusedNorm, FusedSlice

if TYPE_CHECKING:
    from runtime.model import Model

log = logging.getLogger(__name__)

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

# A prompt's chunk is computed as fast as by torch up to this length and context, or faster: 22 M
# parameters 0.48 of the time at 16 tokens, 0.81 at 256, 0.99 behind 512 others, 1.29 behind 2048.
CHUNK_TOKENS, CHUNK_CONTEXT = 256, 768
# A step is tried behind a prompt: where that ends, then one token, then three at once.
_TRIED = (37, 38, 41)
# Largest relative difference (Frobenius) of the logits from the module's own. In int8 a sum that
# comes out otherwise in its last digit can round to another step, so both compare without rounding.
_CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.03}


class NotOfThisKind(Exception):
    """The model is not one that `decode.cpp` computes; the message says what is different."""


class _Pieces(ctypes.Structure):
    _fields_ = (("count", _I), ("rows", _I), ("columns", _I), ("parts", _P))


class _Block(ctypes.Structure):
    _fields_ = (
        ("qkv", _Pieces),
        ("out", _Pieces),
        ("gate_up", _Pieces),
        ("down", _Pieces),
        ("norm_attention", _P),
        ("norm_mlp", _P),
        ("norm_query", _P),
        ("norm_key", _P),
        ("kv", _P),
        ("window", _I),
    )


class _Net(ctypes.Structure):
    _fields_ = (
        ("layers", _I),
        ("hidden", _I),
        ("middle", _I),
        ("heads", _I),
        ("kv_heads", _I),
        ("dim", _I),
        ("eps", _F),
        ("attention_scale", _F),
        ("rotary_scale", _F),
        ("frequencies", _P),
        ("norm", _P),
        ("blocks", _P),
        ("head", _Pieces),
    )


class Decoder(Protocol):
    """Computes whole steps in the place of a model's module, where it takes them."""

    def takes(self, layout: StepLayout) -> bool: ...
    def bind(self, kernels: Many[PagedKernel | None]) -> None: ...
    def unrounded(self) -> AbstractContextManager[None]: ...
    def __call__(
        self, ids: Many[int], positions: Many[int], layout: StepLayout, keep: Many[int]
    ) -> torch.Tensor: ...


class CompiledStep:
    """A whole step in one call, on the layers' own weights."""

    def __init__(
        self,
        library: ctypes.CDLL,
        module: PreTrainedModel,
        dtype: torch.dtype,
        windows: Many[int | None],
    ) -> None:
        """Raises NotOfThisKind."""
        self._run: Any = getattr(library, f"step_{_NAMES[dtype]}")
        self._run.argtypes = [_P, _P, _P, _P, _I, _P, _P]
        self._run.restype = None
        self._memory: list[Any] = []  # what the structs point into
        self._linear: list[LinearStruct] = []  # the modules' own, and copies
        inner, layers = inside(module)
        blocks = (self._block(*pair) for pair in zip(layers, windows, strict=True))
        self._blocks = (_Block * len(layers))(*blocks)
        self._net = self._whole(module, inner, layers)
        self._embed: Any = inner.embed_tokens

    @contextmanager
    def unrounded(self) -> Iterator[None]:
        """Activations stay as they are meanwhile, here and in the module itself: slow."""
        for struct in self._linear:
            struct.unrounded = 1
        try:
            yield
        finally:
            for struct in self._linear:
                struct.unrounded = 0

    def bind(self, kernels: Many[PagedKernel | None]) -> None:
        """The layers' pools, in order."""
        for block, kernel in zip(self._blocks, kernels, strict=True):
            assert kernel is not None
            block.kv = kernel.pointer

    def takes(self, layout: StepLayout) -> bool:
        """Whether this step is faster so than by torch: its spans are short enough, and no adapter
        is asked for."""
        if layout.adapters:
            return False
        return layout.longest <= SHORT_TOKENS or (
            layout.tails is None
            and layout.longest <= CHUNK_TOKENS
            and all(
                span.context <= CHUNK_CONTEXT or span.count <= SHORT_TOKENS for span in layout.spans
            )
        )

    def __call__(
        self, ids: Many[int], positions: Many[int], layout: StepLayout, keep: Many[int]
    ) -> torch.Tensor:
        """Logits [len(keep), V] in fp32."""
        x = self._embed(torch.tensor(ids)).float().contiguous()
        numbers = [np.array(one, dtype=np.int64) for one in (positions, keep)]
        logits = torch.empty(len(keep), self._net.head.rows)
        self._run(
            ctypes.addressof(self._net),
            step_of(layout, max(SHORT_TOKENS, layout.longest)).pointer,
            x.data_ptr(),
            numbers[0].ctypes.data,
            len(keep),
            numbers[1].ctypes.data,
            logits.data_ptr(),
        )
        return logits

    # ---- taking a model apart --------------------------------------------------------------------

    def _whole(self, module: PreTrainedModel, inner: Any, layers: list[Any]) -> _Net:
        config = module.config.get_text_config()
        want(config.hidden_act == "silu", "its activation is not silu")
        rotary = inner.rotary_emb
        first = layers[0].self_attn
        dim = int(first.head_dim)
        want(rotary.inv_freq.numel() == dim // 2, "only part of each head is turned by position")
        heads = self._blocks[0].out.columns // dim
        norm, eps = norm_of(inner.norm)
        norms = [
            one
            for layer in layers
            for one in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        want(all(norm_of(one)[1] == eps for one in norms), "norms differ in eps")
        return _Net(
            layers=len(layers),
            hidden=norm.numel(),
            middle=self._blocks[0].down.columns,
            heads=heads,
            kv_heads=(self._blocks[0].qkv.rows // dim - heads) // 2,
            dim=dim,
            eps=eps,
            attention_scale=float(first.scaling),
            rotary_scale=float(rotary.attention_scaling),
            frequencies=self._point(rotary.inv_freq.float()),
            norm=self._point(norm),
            blocks=ctypes.addressof(self._blocks),
            head=self._pieces(module.get_output_embeddings()),  # type: ignore[no-untyped-call]  # no hints
        )

    def _block(self, layer: Any, window: int | None) -> _Block:
        attention, mlp = layer.self_attn, layer.mlp
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        return _Block(
            qkv=self._pieces(fused_of(attention, "q_proj", "k_proj", "v_proj")),
            out=self._pieces(attention.o_proj),
            gate_up=self._pieces(fused_of(mlp, "gate_proj", "up_proj")),
            down=self._pieces(mlp.down_proj),
            norm_attention=self._point(norm_of(layer.input_layernorm)[0]),
            norm_mlp=self._point(norm_of(layer.post_attention_layernorm)[0]),
            norm_query=None if norms[0] is None else self._point(norm_of(norms[0])[0]),
            norm_key=None if norms[1] is None else self._point(norm_of(norms[1])[0]),
            window=window or 0,
        )

    def _pieces(self, layer: Any) -> _Pieces:
        pieces = []
        for piece in layer.pieces if isinstance(layer, PieceLinear) else [layer]:
            if not isinstance(piece, NativeLinear):
                raise NotOfThisKind(f"a layer is held as {type(piece).__name__}")
            pieces.append(piece)
        parts = (LinearStruct * len(pieces))(*(piece.struct for piece in pieces))
        self._memory += [*pieces, parts]
        self._linear += [*parts, *(piece.struct for piece in pieces)]
        rows, columns = layer.out_features, layer.in_features
        return _Pieces(len(pieces), rows, columns, ctypes.addressof(parts))

    def _point(self, tensor: torch.Tensor) -> int:
        kept = tensor.detach().contiguous()
        self._memory.append(kept)
        return kept.data_ptr()


def want(holds: bool, otherwise: str) -> None:
    if not holds:
        raise NotOfThisKind(otherwise)


def inside(module: PreTrainedModel) -> tuple[Any, list[Any]]:
    """The part below the head, and its layers."""
    inner: Any = module.base_model
    layers = list(getattr(inner, "layers", []))
    want(bool(layers), "it has no list of layers")
    for layer in layers:
        names = {name for name, _ in layer.named_children()}
        known = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
        want(names == known, f"a layer consists of {', '.join(sorted(names))}")
    return inner, layers


def fused_of(parent: Any, *names: str) -> Any:
    """The one layer that stands behind siblings."""
    slices = [getattr(parent, name) for name in names]
    fused = {one.fused for one in slices if isinstance(one, FusedSlice)}
    want(len(fused) == 1, f"{', '.join(names)} are not fused")
    linear = fused.pop().linear
    want(tuple(linear.slices) == names, f"other layers are fused with {names[0]}")
    return linear


def norm_of(norm: Any) -> tuple[torch.Tensor, float]:
    """The factors of an RMS norm [size], and its epsilon, also of one that surgery has fused."""
    weight: torch.Tensor = norm.weight.float()
    size = weight.numel()
    want(size % 8 == 0, "a norm's size is not in eights")
    if isinstance(norm, FusedNorm):
        return weight / size**0.5, norm.eps
    return weight, float(getattr(norm, "variance_epsilon", None) or norm.eps)


def compiled_step(model: Model, library: ctypes.CDLL | None) -> CompiledStep | None:
    """The step of a model that agrees with the model itself; else None, and a log line says why."""
    if library is None or model.dtype not in _NAMES:
        return None
    kernels = model.kernels
    if None in kernels:
        return None
    try:
        want_room(model)
        step = CompiledStep(library, model.module, model.dtype, model.windows)
    except NotOfThisKind as error:
        log.info("tokens are decoded by torch's operators: %s", error)
        return None
    except AttributeError as error:  # a module that is named otherwise than Llama's
        log.info(
            "tokens are decoded by torch's operators: the model is of another kind (%s)", error
        )
        return None
    differs = apart(model, step)
    limit = _CLOSE[model.dtype]
    if not differs <= limit:
        log.info(
            "tokens are decoded by torch's operators: compiled, logits differ by %.2g, limit %.2g",
            differs,
            limit,
        )
        return None
    return step


def want_room(model: Model) -> None:
    """What `apart` needs. Raises NotOfThisKind."""
    want(model.blocks >= blocks_for(_TRIED[-1]), "the KV pool is too small to try it")
    want(model.context_tokens >= _TRIED[-1], "the context is too short to try it")


def apart(model: Model, step: Decoder) -> float:
    """How far a step's logits are from the module's own: for a token, and for three at once.

    At the first positions and at the last ones: some models scale queries by how far they are.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.vocab_size, (_TRIED[-1],), generator=generator).tolist()
    table = list(range(blocks_for(len(ids))))

    def logits(first: int, end: int, at: int, decoder: Decoder | None) -> torch.Tensor:
        model.decoder = decoder
        if decoder is not None:
            decoder.bind(model.kernels)  # pools may have moved meanwhile
        layout = lay_out([Span(end, end - first, table)], model.device, model.scratch_slot)
        positions, rows = list(range(at + first, at + end)), list(range(end - first))
        return model.forward(ids[first:end], positions, layout, rows).float()

    worst = 0.0
    for at in (0, model.context_tokens - _TRIED[-1]):
        logits(0, _TRIED[0], at, None)
        with step.unrounded():
            for first, end in pairwise(_TRIED):
                expected, found = (logits(first, end, at, one) for one in (None, step))
                worst = max(worst, float((found - expected).norm() / expected.norm()))
    model.decoder = None
    model.wipe(table)
    return worst
