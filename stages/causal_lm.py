"""A transformers causal LM cut in two: the body, which gives hidden states, and the head, which gives logits.

Between body and logits a model may cap, scale or bias (Gemma, Cohere, Granite). All of that lives in its own
`forward`, so the head here *is* that forward: a shallow copy of the model whose body hands through the hidden
states it is given. Nothing about any architecture is written down, and the cut is checked against the whole model.
"""

from __future__ import annotations

import copy
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

        return States(last_hidden_state=inputs_embeds)


class BodyAndHead:
    """`body(input_ids [B, L]) -> [B, L, H]` and `head(hidden [R, H]) -> logits [R, V]` of one model.

    The head shares the model's parameters (gradients reach them) unless `fp32_head`, which gives it a float32 copy of
    a half-precision output layer: bf16 logits tie so often that the order inside a top-N is lost.
    Raises UserError where the model cannot be cut this way.
    """

    def __init__(self, model: PreTrainedModel, *, fp32_head: bool = False) -> None:
        if hasattr(model, "get_base_model"):
            # PEFT keeps its adapters inside the modules of the model it wraps.
            model = model.get_base_model()  # type: ignore[operator]
        prefix = _body_name(model)
        if prefix is None or model.get_output_embeddings() is None:
            raise UserError(
                f"{type(model).__name__} has no separate body and output layer; score it with --engine vllm"
            )
        self._body: nn.Module = model.get_submodule(prefix)
        # Set by `check` where the head turns out to be its output layer and nothing else.
        self.linear_head: nn.Linear | None = None
        self._head = copy.copy(model)
        self._head.__dict__["_modules"] = {**model._modules, prefix: _HandThrough(self._body)}
        # One that was put on the instance (a trainer's, an offloader's) runs the whole model, not this copy.
        self._head.__dict__.pop("forward", None)
        output = model.get_output_embeddings()
        self._head_dtype = output.weight.dtype
        if fp32_head and self._head_dtype in (torch.float16, torch.bfloat16):
            names = [key for key, module in model._modules.items() if module is output]
            if not names:
                raise UserError(f"{type(model).__name__} keeps its output layer inside; score it with --engine vllm")
            self._head._modules[names[0]] = copy.deepcopy(output).float()
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

    def compile_body(self, **how: Any) -> None:
        """From now on the body is compiled, here and wherever else it is called. how: of `torch.compile`."""
        self._body.compile(**how)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[R, V]` of hidden states `[R, H]`."""
        return self._head(inputs_embeds=hidden[None].to(self._head_dtype), use_cache=False).logits[0]

    @torch.no_grad()
    def check(self, model: PreTrainedModel, vocabulary_size: int) -> None:
        """Raise UserError unless body and head together say what the whole model says on a few tokens."""
        device = next(model.parameters()).device
        ids = (torch.arange(8, device=device)[None] * 7919) % vocabulary_size
        try:
            whole = model(input_ids=ids, use_cache=False).logits[0].float()
            hidden = self.body(ids)[0]
            cut = self.head(hidden).float()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - models raise what they like, of inputs they miss or of dtypes
            reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
            raise UserError(
                f"{type(model).__name__} does not score a few token ids on this engine ({reason}); score it in "
                "float32, or with --engine vllm"
            ) from None
        half = next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
        tolerance = (5e-2 if half else 1e-4) * max(1.0, whole.abs().max().item())
        if cut.shape != whole.shape or (cut - whole).abs().max().item() > tolerance:
            raise UserError(
                f"{type(model).__name__} computes its logits in a way this engine does not follow; use --engine vllm"
            )
        output = model.get_output_embeddings()
        # A model that projects its states before the output layer (Electra, RemBERT) may have wider or narrower ones.
        alone = type(output) is nn.Linear and output.in_features == hidden.shape[-1]
        if alone and output.weight.dtype == self._head_dtype:
            # Large, so that a cap or a scale cannot hide in rounding.
            probe = torch.linspace(-1e3, 1e3, 4 * output.in_features, device=device, dtype=self._head_dtype)
            probe = probe.view(1, 4, -1)
            if torch.equal(self._head(inputs_embeds=probe, use_cache=False).logits, output(probe)):
                self.linear_head = output


def _body_name(model: PreTrainedModel) -> str | None:
    """Find the body: at the model's own prefix or, where nothing is there, the only inner transformers model."""
    from transformers import PreTrainedModel

    if model.base_model_prefix in model._modules:
        return model.base_model_prefix
    inner = [name for name, module in model._modules.items() if isinstance(module, PreTrainedModel)]
    return inner[0] if len(inner) == 1 else None
