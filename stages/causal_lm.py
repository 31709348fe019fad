"""A transformers causal LM cut in two: the body, which gives hidden states, and the head, which gives logits.

Between body and logits a model may cap, scale or bias (Gemma, Cohere, Granite). All of that lives in its own
`forward`, so the head here *is* that forward: a shallow copy of the model whose body hands through the hidden
states it is given. Nothing about any architecture is written down, and the cut is checked against the whole model. A
model that cannot be cut gives its full logits, and a reason is there to be said.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from storage.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _HandThrough(nn.Module):
    """Stands where the body was and returns the hidden states it is given as embeddings."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.router_logits: Any = None
        # Not as a module of this one, or the head would seem to have the body's parameters.
        self.__dict__["_body"] = body

    def __getattr__(self, name: str) -> Any:
        """Give the parts of the body, which some models call (OPT its decoder): each hands through, too."""
        part = getattr(self.__dict__["_body"], name)
        return self if isinstance(part, nn.Module) else part

    def forward(self, *args: Any, inputs_embeds: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        class States(BaseModelOutputWithPast):
            """What else a head looks for in its body's output (cross-attentions, router logits) is not there."""

            def __getattr__(self, name: str) -> None:
                if name[:1] == "_":
                    raise AttributeError(name)

        states = States(last_hidden_state=inputs_embeds)
        if self.router_logits is not None:
            states.router_logits = self.router_logits
        return states


class BodyAndHead:
    """`body(input_ids [B, L]) -> [B, L, H]` and `head(hidden [R, H]) -> logits [R, V]` of one model.

    Made by `take_apart`. The head shares the model's parameters (gradients reach them) unless `fp32_head`, which gives
    it a float32 copy of a half-precision one: bf16 logits tie so often that the order inside a top-N is lost.
    Raises CutError where the model cannot be cut this way.
    """

    note: str | None = None

    def __init__(self, model: PreTrainedModel, *, fp32_head: bool = False) -> None:
        if hasattr(model, "get_base_model"):
            # PEFT keeps its adapters inside the modules of the model it wraps.
            model = model.get_base_model()  # type: ignore[operator]
        prefix = _body_name(model)
        if prefix is None or model.get_output_embeddings() is None:
            raise CutError("it has no separate body and output layer")
        self._body: nn.Module = model.get_submodule(prefix)
        # Set by `check` where the head turns out to be its output layer and nothing else.
        self.linear_head: nn.Linear | None = None
        self._head = copy.copy(model)
        self._in_place = _HandThrough(self._body)
        self._head.__dict__["_modules"] = {**model._modules, prefix: self._in_place}
        # One that was put on the instance (a trainer's, an offloader's) runs the whole model, not this copy.
        self._head.__dict__.pop("forward", None)
        self._head_dtype = model.get_output_embeddings().weight.dtype
        if fp32_head and self._head_dtype in (torch.float16, torch.bfloat16):
            # All that lies behind the body, projections before the output layer too.
            self._head.__dict__["_parameters"] = {
                name: weight if weight is None else nn.Parameter(weight.float(), requires_grad=False)
                for name, weight in self._head._parameters.items()
            }
            for name, part in model._modules.items():
                if part is not None and name != prefix:
                    self._head._modules[name] = copy.deepcopy(part).float()
            self._head_dtype = torch.float32

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        """What the head computes with, a weight tied to the embedding included."""
        modules = [module for module in self._head._modules.values() if module is not None]
        found = [*self._head._parameters.values(), *(p for module in modules for p in module.parameters())]
        return [parameter for parameter in found if parameter is not None]

    def body(self, input_ids: torch.Tensor, **packing: torch.Tensor) -> torch.Tensor:
        """Hidden states `[B, L, H]`. Right padding needs no mask: attention is causal.

        packing: `position_ids` where the row holds several sequences (packing.py).
        """
        return self._body(input_ids=input_ids, use_cache=False, **packing).last_hidden_state

    def body_and_router(
        self, input_ids: torch.Tensor, real: torch.Tensor | None, **packing: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the body's states and the router's loss, a scalar, of the model's own code; None where it has none.

        real: int64 `[B, L]`, 0 for padding, which the loss leaves out; None where there is none.
        """
        found = self._body(input_ids=input_ids, use_cache=False, output_router_logits=True, **packing)
        hidden = found.last_hidden_state
        self._in_place.router_logits = found.router_logits
        try:
            # The logits of one position come along unused.
            one = hidden[:1, :1].detach().to(self._head_dtype)
            output = self._head(inputs_embeds=one, attention_mask=real, output_router_logits=True, use_cache=False)
        finally:
            self._in_place.router_logits = None
        return hidden, output.aux_loss

    def compile_body(self, **how: Any) -> None:
        """From now on the body is compiled, here and wherever else it is called. how: of `torch.compile`."""
        self._body.compile(**how)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[R, V]` of hidden states `[R, H]`."""
        return self._head(inputs_embeds=hidden[None].to(self._head_dtype), use_cache=False).logits[0]

    @torch.no_grad()
    def check(self, ids: torch.Tensor, whole: torch.Tensor, output: nn.Module | None) -> None:
        """Raise CutError unless body and head together give the logits of the whole model.

        ids: int64 `[B, L]`. whole: `[B, L, V]`, what the whole model gives for them. output: its output layer.
        """
        hidden = self.body(ids)
        cut = torch.stack([self.head(row) for row in hidden]).float()
        if cut.shape != whole.shape or not _close(cut, whole, hidden.dtype):
            raise CutError("its logits are computed in a way that is not followed")
        # A model that projects its states before the output layer (Electra, RemBERT) may have wider or narrower ones.
        if not (type(output) is nn.Linear and output.in_features == hidden.shape[-1]):
            return
        if output.weight.dtype == self._head_dtype:
            # Large, so that a cap or a scale cannot hide in rounding.
            probe = torch.linspace(-1e3, 1e3, 4 * output.in_features, device=ids.device, dtype=self._head_dtype)
            probe = probe.view(1, 4, -1)
            if torch.equal(self._head(inputs_embeds=probe, use_cache=False).logits, output(probe)):
                self.linear_head = output


class FullLogits:
    """A model that is not cut: its logits `[B, L, V]` stand in for hidden states, and the head does nothing.

    note: one sentence with the reason.
    """

    linear_head: nn.Linear | None = None

    def __init__(self, model: PreTrainedModel, reason: str) -> None:
        self._forward: Callable[..., Any] = model.forward
        self.head_parameters: list[nn.Parameter] = []
        self.note = (
            f"{_name(model)} is not cut into body and head ({reason}): it computes full logits, which takes more memory"
        )

    def body(self, input_ids: torch.Tensor, **packing: torch.Tensor) -> torch.Tensor:
        return self._forward(input_ids=input_ids, use_cache=False, **packing).logits

    def body_and_router(
        self, input_ids: torch.Tensor, real: torch.Tensor | None, **packing: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits and the router's loss, as `BodyAndHead.body_and_router` does."""
        found = self._forward(
            input_ids=input_ids, attention_mask=real, use_cache=False, output_router_logits=True, **packing
        )
        return found.logits, found.aux_loss

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def compile_body(self, **how: Any) -> None:
        self._forward = torch.compile(self._forward, **how)


class CutError(Exception):
    """A model cannot be cut into body and head; the text is the reason."""


def take_apart(model: PreTrainedModel, *, fp32_head: bool = False) -> BodyAndHead | FullLogits:
    """Cut a model, or take its full logits where it cannot be cut; compared on a few token ids.

    Raises UserError for a model that gives no logits for token ids alone.
    """
    with evaluating(model):
        ids = probe_ids(model)
        try:
            whole = model(input_ids=ids, use_cache=False).logits
            shape = (*ids.shape, vocabulary_size(model))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - models raise what they like, of inputs they miss or of dtypes
            raise UserError(f"{_name(model)} does not score a few token ids ({_reason(error)})") from None
        if not isinstance(whole, torch.Tensor) or tuple(whole.shape) != shape:
            raise UserError(f"{_name(model)} does not give one logit for each of its {shape[-1]} token ids")
        try:
            parts = BodyAndHead(model, fp32_head=fp32_head)
            parts.check(ids, whole.float(), model.get_output_embeddings())
            return parts
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a head may miss anything of its body
            reason = _reason(error)
            if fp32_head and whole.dtype in (torch.float16, torch.bfloat16):
                reason += f"; its {str(whole.dtype).removeprefix('torch.')} logits tie where float32 ones would not"
            return FullLogits(model, reason)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return V, the ids that a model has logits for: as wide as its output layer, padding included."""
    output = model.get_output_embeddings()
    weight = getattr(output, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dim() == 2:
        return int(weight.shape[0])
    return int(model.config.get_text_config().vocab_size)


@torch.no_grad()
def probe_ids(model: PreTrainedModel) -> torch.Tensor:
    """Return ids for a look at a model, int64 `[2, 8]`, spread over the vocabulary, no two alike where there are 16."""
    size = vocabulary_size(model)
    return ((torch.arange(16, device=next(model.parameters()).device) * 7919 + 1) % size).view(2, 8)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, so that dropout does not look like a difference, and each part back after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _close(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return True where two tensors differ by rounding; NaN is as good as NaN."""
    half = dtype in (torch.float16, torch.bfloat16)
    tolerance = (5e-2 if half else 1e-4) * max(1.0, other.nan_to_num(0.0, 0.0, 0.0).abs().max().item())
    return torch.allclose(one, other, rtol=0.0, atol=tolerance, equal_nan=True)


def _name(model: Any) -> str:
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:150]


def _body_name(model: PreTrainedModel) -> str | None:
    """Find the body: at the model's own prefix or, where nothing is there, the only inner transformers model."""
    from transformers import PreTrainedModel

    if model.base_model_prefix in model._modules:
        return model.base_model_prefix
    inner = [name for name, module in model._modules.items() if isinstance(module, PreTrainedModel)]
    return inner[0] if len(inner) == 1 else None
