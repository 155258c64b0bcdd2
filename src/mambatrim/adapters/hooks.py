"""attach: hooks at the borders of blocks, which remove tokens between them and give all of them back at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import methods
from ..kernels.library import wide
from ..reduction import AS_IT_STANDS, Assignment, Method, Reducer, Schedule, Tokens
from .records import Adapter, Parts


class Handle:
    """What `attach` returns: `remove()` takes the reduction away; so does leaving a `with` block."""

    def __init__(self, hooks: Sequence[RemovableHandle]) -> None:
        self._hooks = list(hooks)

    def remove(self) -> None:
        """The model is what it was; a second call changes nothing."""
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def attach(model: nn.Module, *, method: str | Method = "mtr", schedule: Schedule, adapter: Adapter) -> Handle:
    """Remove tokens inside another model from now on, until `remove` is called or the `with` block ends.

    Attach first and compile then: `torch.compile` traces the hooks like the rest, and notices `remove`. What it
    compiled before stays without them, which cannot always be seen here: then call `torch.compiler.reset()`. One
    forward at a time: neither `nn.DataParallel` nor activation checkpointing.

    Args:
        model: built of Mamba-1 blocks, alone or inside something else.
        method: a name of `methods.METHODS`, or a Method.
        schedule: how many patches go after which block.
        adapter: how to read the model, such as `adapters.OFFICIAL_VIM`.

    Raises:
        ValueError: the model is compiled, has a reduction already, or has no Mamba blocks that the adapter knows; the
            schedule is not for as many blocks; the method needs signals of a block that has none. In the forward: the
            blocks of a run do not see one sequence, or do not run in their order.
    """
    chosen = methods.get(method) if isinstance(method, str) else method
    if not isinstance(chosen, Method):
        raise ValueError(f"method must be a name or a Method, got {chosen!r}; a factory has to be called first")
    if chosen.sequence is not AS_IT_STANDS:
        raise ValueError(
            f"blocks of another library take a reduced sequence only as it stands, and method {chosen.name!r} wants "
            f"{chosen.sequence.name!r}; choose another method, or sequence=AS_IT_STANDS"
        )
    _refuse_model(model)
    scopes = [list(blocks) for blocks in adapter.scopes(model) if len(blocks)]
    blocks = [block for scope in scopes for block in scope]
    _refuse_blocks(model, blocks, schedule, adapter)
    trim, reducer = _Trim(model, chosen, schedule, adapter), Reducer(chosen, schedule)
    starts, ends = {id(scope[0]) for scope in scopes}, {id(scope[-1]) for scope in scopes}
    borders = []
    for index, block in enumerate(blocks):
        wanted = tuple(name for name in reducer.needs(index) if name != "hidden")
        if wanted and not adapter.scans(block):
            raise ValueError(f"method {chosen.name!r} needs {', '.join(wanted)}, and block {index} has no scan to tell")
        borders.append(_AfterBlock(trim, index, id(block) in starts, id(block) in ends, wanted))
    # on every mixer or on none: torch.compile takes blocks of one class for the same, whatever hooks they have
    watched = blocks if any(border.wanted for border in borders) else []
    after_mixer = _AfterMixer(trim)
    mixers = [adapter.mixer(block) for block in watched if adapter.scans(block)]
    hooks = [mixer.register_forward_hook(after_mixer, with_kwargs=True) for mixer in mixers]
    return Handle([*hooks, *(block.register_forward_hook(b) for block, b in zip(blocks, borders, strict=True))])


def _refuse_model(model: nn.Module) -> None:
    name = type(model).__name__
    if isinstance(getattr(model, "reducer", None), Reducer):
        raise ValueError(f"{name} is a model of this library: use mambatrim.reduce")
    for module in model.modules():
        compiled = isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod")
        if compiled or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"{name} is compiled, and would not see the reduction: attach first and compile then")
        if any(isinstance(hook, _AfterBlock | _AfterMixer) for hook in module._forward_hooks.values()):
            raise ValueError(f"{name} has a reduction already: call remove() of its handle first")


def _refuse_blocks(model: nn.Module, blocks: Sequence[nn.Module], schedule: Schedule, adapter: Adapter) -> None:
    name = type(model).__name__
    if not any(adapter.scans(block) for block in blocks):
        raise ValueError(
            f"{name} has no Mamba blocks that {adapter.name} knows: blocks in a ModuleList, each with a mixer that has "
            f"{', '.join(adapter.parts)}"
        )
    if len({id(block) for block in blocks}) != len(blocks):
        raise ValueError(f"{name} uses a block twice, so that blocks do not say where in the model they are")
    if not isinstance(schedule, Schedule) or schedule.depth != len(blocks):
        raise ValueError(f"schedule must be a Schedule for the {len(blocks)} blocks of {name}, got {schedule!r}")
    if schedule.stem:
        raise ValueError(f"patches cannot go before block 0 of {name}, only after a block")


# ----------------------------------------------------------------------------------------------------- during a forward


@dataclass
class _Trim:
    """What the hooks of one attachment share, and where they are in the forward that runs.

    tokens: what left the last block; None outside a run of blocks.
    parts: the tensors that the stream is the sum of, as they left the last block.
    canvas: the parts of every token of the stem, (B, L0, D) each, as they were when it was last there.
    mixed: input and output of the mixer that just ran.
    """

    model: nn.Module
    method: Method
    schedule: Schedule
    adapter: Adapter
    reducer: Reducer = field(default_factory=Reducer.dense)
    expected: int = 0
    tokens: Tokens | None = None
    canvas: Parts | None = None
    mixed: tuple[Tensor, Tensor] | None = None

    def start(self, parts: Parts) -> Tokens:
        """A sequence that no block has reduced yet."""
        x = _sum(parts)
        special = self.adapter.special(self.model, x.shape[1])
        self.reducer = Reducer(self.method, self.schedule, special)
        self.canvas = None
        return Tokens.start(x, self.adapter.grid(x.shape[1] - len(special)))

    def follow(self, block: int, parts: Parts) -> Tokens:
        """The tokens of the block before, with what this one made of them."""
        tokens, x = self.tokens, _sum(parts)
        if tokens is None or block != self.expected:
            raise ValueError(f"block {block} ran out of turn: attach follows blocks that run one after the other")
        if x.shape[:2] != tokens.x.shape[:2]:
            raise ValueError(
                f"block {block} returned {x.shape[1]} tokens of {x.shape[0]} images, but the block before it left "
                f"{tokens.x.shape[1]} of {tokens.x.shape[0]}: the sequence must not change between blocks"
            )
        return tokens.with_x(x)

    def capture(self, block: nn.Module, tokens: Tokens, wanted: Sequence[str]) -> Mapping[str, Tensor]:
        """The signals of a block, from what its mixer was given and made."""
        found = {"hidden": tokens.x}
        if wanted:
            if self.mixed is None:
                raise ValueError(f"the mixer of a {type(block).__name__} was not called, so that it gave no signals")
            x, update = self.mixed
            with torch.no_grad():
                found |= self.adapter.signals(self.adapter.mixer(block), x, wanted)
            found["update"] = update
        return found

    def restore(self, tokens: Tokens, parts: Parts) -> Parts:
        """All L0 tokens: rows of those that are there, and of those that are gone the last ones that they had."""
        alive = (tokens.origin.dest < tokens.origin.survivors).unsqueeze(2)  # (B, L0, 1)
        dense = tuple(tokens.origin.unmerge(part) for part in parts)
        if self.canvas is None:
            return dense
        return tuple(torch.where(alive, now, then) for now, then in zip(dense, self.canvas, strict=True))


@dataclass(frozen=True, eq=False)
class _AfterMixer:
    """Notes what a mixer was given and what it made, for the border of its block."""

    trim: _Trim

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        self.trim.mixed = given.detach(), (output[0] if isinstance(output, tuple) else output).detach()


@dataclass(frozen=True, eq=False)
class _AfterBlock:
    """The border after a block: removes what the schedule says, and at the end of a run gives all tokens back."""

    trim: _Trim
    block: int
    first: bool
    last: bool
    wanted: tuple[str, ...]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        trim, adapter = self.trim, self.trim.adapter
        parts = adapter.read(output)
        before = trim.start(parts) if self.first else trim.follow(self.block, parts)
        trim.tokens, trim.expected = before, self.block + 1
        if trim.schedule.at(self.block):
            trim.canvas = trim.restore(before, parts)
            captured = trim.capture(module, before, self.wanted)
            trim.tokens = trim.reducer(self.block, before, captured)
            parts = _merge(parts, before, trim.tokens)
            output = adapter.write(output, parts)
        if self.last:
            if trim.canvas is not None:
                output = adapter.write(output, trim.restore(trim.tokens, parts))
            trim.tokens = trim.canvas = None
        trim.mixed = None
        return output


def _sum(parts: Parts) -> Tensor:
    """(B, L, D): the residual stream, in fp32."""
    total = parts[0].to(wide(parts[0]))
    for part in parts[1:]:
        total = total + part
    return total


def _merge(parts: Parts, before: Tokens, after: Tokens) -> Parts:
    """The parts of the stream at its new tokens: the last of them is what the others leave of it.

    The step L -> K that was taken is read off the origins before and after it.
    """
    old, new = before.origin, after.origin
    step = Assignment(old.dest.gather(1, new.keep), new.dest.gather(1, old.keep))
    others = [step.merge(part, before.size) for part in parts[:-1]]
    rest = after.x
    for part in others:
        rest = rest - part
    return (*others, rest.to(parts[-1].dtype))
